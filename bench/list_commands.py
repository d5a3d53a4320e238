"""`bench methods | backbones | tasks | doctor`: what there is, and what works here."""

import typer

from .options import PLAIN, AsJson, CacheDir, Quiet, caches, show

list_app = typer.Typer(**PLAIN)


@list_app.command()
def methods(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the methods: kind, paper, trained parameters, and every option with its default."""
    from ..adapters._registry import describe, known_methods

    found = [describe(name) for name in known_methods()]
    lines = []
    for m in found:
        lines += [f"{m['name']} ({m['kind']}): {m['summary']}", f"  {m['paper']}"]
        lines += [f"  {line}" for line in m["parameters"].splitlines()]
        lines += [f"  {m['name']}.{key}={str(o['default']).lower()}  {o['help']}" for key, o in m["config"].items()]
        for family, found_for in m["families"].items():
            changed = ", ".join(f"{key}={str(value).lower()}" for key, value in found_for["options"].items())
            lines.append(f"  on {family} tasks: {changed}  {found_for['source']}")
    show(found, as_json, "\n".join(lines))


@list_app.command()
def backbones(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the forms a backbone's name takes, and the samples."""
    from ..cache.load import SCHEMES
    from ..cache.samples import SAMPLES

    found = [{"scheme": scheme, "summary": text} for scheme, text in SCHEMES.items()]
    found += [
        {"scheme": f"sample:{name}", "summary": sample.summary}
        for name, sample in SAMPLES.items()
        if sample.kind == "backbone"
    ]
    show(found, as_json, "\n".join(f"{row['scheme']}  {row['summary']}" for row in found))


@list_app.command()
def tasks(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the forms a task's name takes, and the samples."""
    from dataclasses import asdict

    from .tasks.load import known_tasks

    found = known_tasks()
    show([asdict(t) for t in found], as_json, "\n".join(f"{t.form}  {t.summary}" for t in found))


@list_app.command()
def doctor(cache_dir: CacheDir = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Say what works on this machine and why the rest does not."""
    from ..cache.home import home
    from .doctor import examine

    found = examine(home(), caches(cache_dir))
    show(found, as_json, "\n".join(f"{key}: {value}" for key, value in found.items()))
