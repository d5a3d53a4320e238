"""The command line: parse, call one function, print. Nothing heavy is imported before a command needs it."""

import io
import json
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .cache.errors import SidebenchError

if TYPE_CHECKING:
    from .bench.progress import Display


class Guarded(TyperGroup):
    """Turns refused input into a sentence and exit code 2, Ctrl-C into how to go on and 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Any other exception is a bug and shows its traceback."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the run in its own process would go on alone
        try:
            return super().invoke(ctx)
        except SidebenchError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            again = shlex.join(["bench", *(word for word in sys.argv[1:] if word != "--fresh")])
            print(f"\ninterrupted; everything finished is kept. To go on: {again}", file=sys.stderr)
            raise SystemExit(130) from None


# rich's own help costs 0.2 s per call; rich serves tables and progress.
_PLAIN: dict[str, Any] = {"rich_markup_mode": None, "no_args_is_help": True, "add_completion": False}
app = typer.Typer(
    cls=Guarded,
    pretty_exceptions_enable=False,
    help="Run a frozen backbone once, train methods from its stored activations, compare accuracy, memory and time.",
    **_PLAIN,
)
cache_app = typer.Typer(help="Build, list, check and remove activation caches.", **_PLAIN)
app.add_typer(cache_app, name="cache")

Backbone = Annotated[str, typer.Option(help="sample:NAME, hf:ID_OR_FOLDER or module:PKG.MOD:FACTORY.")]
Task = Annotated[str, typer.Option(help="sample:NAME, csv:PATH, jsonl:PATH, folder:PATH or glue:NAME: `bench tasks`.")]
Layers = Annotated[
    str | None, typer.Option(help="Globs with commas, e.g. 'blocks.*'. Default: embeddings, blocks, norm.")
]
Dtype = Annotated[str, typer.Option(help="Storage dtype: float16, bfloat16, float32, int8 or fp8 (e4m3).")]
Tokens = Annotated[str, typer.Option(help="all, cls, mean, cls+mean, grid:K, first:N or proj:M (random directions).")]
PerChannel = Annotated[bool, typer.Option("--per-channel", help="int8, fp8: normalise channels before tokens.")]
Compression = Annotated[str | None, typer.Option(help="zstd or lz4; random reading then decompresses whole chunks.")]
Views = Annotated[int, typer.Option(min=0, help="Augmented views of each example, to be trained on in its place.")]
CaptureSeed = Annotated[
    int, typer.Option("--seed", min=0, help="Seed of the views and of proj:M; training has --seeds.")
]
ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Side of the images in pixels. Default: the backbone's own.")
]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Longest text in tokens. Default: 128.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Keep this many examples, stratified by label.")]
SplitSeed = Annotated[int, typer.Option(min=0, help="Seed of the train/val/test split, apart from training seeds.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:I.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where caches live. Default: SIDEBENCH_HOME/caches.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document on stdout.")]
Store = Annotated[str, typer.Argument(help="Digest of the cache, or its beginning, or its path.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No messages and no progress.")]


@cache_app.command("build")
def cache_build(
    backbone: Backbone,
    task: Task,
    layers: Layers = None,
    dtype: Dtype = "float16",
    tokens: Tokens = "all",
    per_channel: PerChannel = False,
    compression: Compression = None,
    views: Views = 0,
    seed: CaptureSeed = 0,
    image_size: ImageSize = None,
    max_length: MaxLength = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per frozen forward; part of the digest.")] = 64,
    limit: Limit = None,
    split_seed: SplitSeed = 0,
    device: Device = "auto",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that build; the store is the same for any number.")
    ] = 1,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run the frozen backbone once over a task and keep its activations; finds or resumes an earlier build."""
    from .bench.build_workers import LocalWorkers
    from .bench.prepare import Inputs, build_store, plan_store, prepare
    from .bench.tasks.split import split
    from .cache.build import CaptureOptions
    from .cache.catalog import read_notes
    from .cache.home import home

    inputs = Inputs(backbone, task, image_size, max_length, limit, device)
    with _display(quiet) as display:
        prepared = prepare(inputs, home=home(), cache_dir=_cache_dir(cache_dir), say=display.say)
        sizes = split(prepared.task, split_seed).sizes()
        capture = CaptureOptions(_names(layers), dtype, batch_size, tokens, per_channel, compression, views, seed)
        planned = plan_store(prepared, capture)
        local = LocalWorkers(workers, prepared, planned, home())
        result = build_store(prepared, planned, progress=display.examples, say=display.say, workers=local)
    document = {
        "status": result.status,
        "digest": result.manifest.digest,
        "path": str(result.folder),
        "examples": sizes,
        "layers": list(result.manifest.layers),
        "bytes": result.bytes,
        "forward_seconds": result.forward_seconds,
        "write_seconds": result.write_seconds,
        "build_seconds": result.build_seconds,
        "resumed_chunks": result.resumed_chunks,
        "relative_errors": read_notes(result.folder).get("relative_errors") or {},
    }
    took = "" if result.build_seconds is None else f" in {result.build_seconds:.1f} s"
    _print(document, as_json, f"{result.status}{took}: {result.folder} ({result.bytes:,} bytes)")


@cache_app.command("ls")
def cache_ls(cache_dir: CacheDir = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the caches, complete or not."""
    from .cache.catalog import entries

    found: list[dict[str, Any]] = [
        {
            "digest": e.folder.name.removesuffix(".zarr") if e.manifest is None else e.manifest.digest,
            "path": str(e.folder),
            "backbone": e.notes.get("backbone"),
            "task": e.notes.get("task"),
            "examples": None if e.manifest is None else e.manifest.examples,
            "bytes": e.bytes,
            "complete": e.manifest is not None,
            "created": e.notes.get("created"),
        }
        for e in entries(_cache_dir(cache_dir))
    ]
    lines = [
        f"{row['digest'][:16]}  {row['bytes'] / 2**20:10,.1f} MiB  "
        f"{row['examples'] if row['complete'] else 'incomplete'}  {row['backbone']}  {row['task']}  {row['created']}"
        for row in found
    ]
    _print(found, as_json, "\n".join(lines) or f"no caches in {_cache_dir(cache_dir)}")


@cache_app.command("info")
def cache_info(store: Store, cache_dir: CacheDir = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Print the whole manifest of a cache, by digest (or its beginning) or path."""
    from .cache.catalog import locate, read_notes
    from .cache.manifest import read_manifest

    folder = locate(store, _cache_dir(cache_dir))
    manifest, objects = read_manifest(folder)
    document = {
        "digest": manifest.digest,
        "path": str(folder),
        "facts": manifest.facts(),
        "objects": {key: [o.bytes, o.crc32c] for key, o in objects.items()},
        "notes": read_notes(folder),
    }
    shown = {key: value for key, value in document.items() if key != "objects"}
    _print(document, as_json, json.dumps({**shown, "objects": len(objects)}, indent=1))


@cache_app.command("verify")
def cache_verify(
    store: Store,
    repair: Annotated[
        bool, typer.Option("--repair", help="Recompute what is bad from the same backbone and task.")
    ] = False,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Read every object of a cache and compare it with the manifest; exit code 1 when something is (still) bad."""
    from dataclasses import asdict

    from .cache.catalog import locate
    from .cache.manifest import read_manifest
    from .cache.zarr_store import verify

    folder = locate(store, _cache_dir(cache_dir))
    repaired: dict[str, int] = {}
    if repair:
        from .bench.repair import repair_store
        from .cache.home import home

        with _display(quiet) as display:
            mended = repair_store(
                folder, home=home(), cache_dir=_cache_dir(cache_dir), progress=display.examples, say=display.say
            )
        bad, repaired = mended.bad, {"repaired": mended.repaired}
    else:
        bad = verify(folder)
    chunks = sum(layout.chunks for layout in read_manifest(folder)[0].arrays().values())
    lines = [f"repaired: {mended.repaired}"] if repair else []
    lines += [f"{b.layer} {b.chunk}: {b.reason}" for b in bad] or [f"all {chunks} chunks are as written"]
    document = {"ok": not bad, "chunks": chunks, "bad": [asdict(b) for b in bad], **repaired}
    _print(document, as_json, "\n".join(lines))
    if bad:
        raise typer.Exit(1)


@cache_app.command("export")
def cache_export(
    store: Store,
    to: Annotated[Path, typer.Option(help="The HDF5 file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a cache as one HDF5 file: every array, and the manifest as an attribute."""
    from .cache.catalog import locate
    from .cache.export import export_store

    folder = locate(store, _cache_dir(cache_dir))
    with _display(quiet) as display:
        size = export_store(folder, to, force=force, progress=display.examples)
    _print({"path": str(folder), "file": str(to), "bytes": size}, as_json, f"exported: {to} ({size:,} bytes)")


@cache_app.command("import")
def cache_import(
    file: Annotated[Path, typer.Argument(help="An exported cache, or features: one HDF5 dataset per layer.")],
    task: Annotated[str | None, typer.Option(help="The task the features are of; its order unless `ids` says.")] = None,
    backbone_name: Annotated[str | None, typer.Option(help="For `bench compare --backbone imported:NAME`.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Datasets in forward order. Default: all, layer.2 before layer.10.")
    ] = None,
    prefix_tokens: Annotated[int, typer.Option(min=0, help="Leading tokens that no mean includes (class token).")] = 0,
    limit: Limit = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a cache of an HDF5 file: an exported cache, or features (N, T, D) or (N, D) per layer."""
    from .bench.importing import import_hdf5
    from .cache.features import ImportOptions
    from .cache.home import home

    with _display(quiet) as display:
        result = import_hdf5(
            file,
            task,
            ImportOptions(backbone_name, _names(layers), prefix_tokens, limit),
            home=home(),
            cache_dir=_cache_dir(cache_dir),
            progress=display.examples,
            say=display.say,
        )
    document = {
        "status": result.status,
        "digest": result.manifest.digest,
        "path": str(result.folder),
        "examples": result.manifest.examples,
        "layers": list(result.manifest.layers),
        "keys": result.manifest.backbone.get("keys"),
        "bytes": result.manifest.stored_bytes,
    }
    _print(document, as_json, f"{result.status}: {result.folder} ({result.manifest.stored_bytes:,} bytes)")


@cache_app.command("rm")
def cache_rm(
    store: Store,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Remove a cache, by digest (or its beginning) or path."""
    from .cache.catalog import locate, remove

    folder = locate(store, _cache_dir(cache_dir))
    if not yes and not _agreed(f"Remove {folder}?"):
        raise SidebenchError("nothing was removed; --yes removes without asking.")
    remove(folder)
    _print({"removed": str(folder)}, as_json, f"removed {folder}")


@app.command()
def compare(
    backbone: Backbone,
    task: Task,
    methods: Annotated[str, typer.Option(help="Names with commas, a path to a method file, or all.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="METHOD.KEY=VALUE, repeatable.")] = None,
    seeds: Annotated[str, typer.Option(help="Training seeds with commas.")] = "0,1,2",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training part.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per training step.")] = 32,
    lr: Annotated[
        str | None, typer.Option(help="auto, a number, or several with commas to choose on validation.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16 (mixed).")] = "fp32",
    limit: Limit = None,
    split_seed: SplitSeed = 0,
    layers: Layers = None,
    dtype: Dtype = "float16",
    tokens: Tokens = "all",
    per_channel: PerChannel = False,
    compression: Compression = None,
    views: Views = 0,
    seed: CaptureSeed = 0,
    cache_in_ram: Annotated[bool, typer.Option("--cache-in-ram", help="Hold the cache in RAM while training.")] = False,
    cache_on_device: Annotated[bool, typer.Option("--cache-on-device", help="Hold it in the device's memory.")] = False,
    image_size: ImageSize = None,
    max_length: MaxLength = None,
    device: Device = "auto",
    no_build: Annotated[bool, typer.Option("--no-build", help="Refuse instead of building a missing cache.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Run everything again / reuse finished runs.")
    ] = False,
    cache_dir: CacheDir = None,
    runs_dir: Annotated[Path, typer.Option(help="Where records, predictions and reports go.")] = Path("runs"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train and test methods on one backbone and task, and report accuracy, memory and time side by side."""
    from .bench.compare import Request, compare
    from .bench.prepare import Inputs
    from .bench.record import write_text
    from .bench.report import failures, markdown, print_table, skipped, verdicts
    from .bench.table import comparisons, document, rows
    from .cache.build import CaptureOptions
    from .cache.home import home

    if cache_in_ram and cache_on_device:
        raise SidebenchError("--cache-in-ram and --cache-on-device exclude each other; choose one.")
    if precision not in ("fp32", "bf16"):
        raise SidebenchError(f"--precision is fp32 or bf16; found {precision!r}.")
    request = Request(
        inputs=Inputs(backbone, task, image_size, max_length, limit, device),
        methods=tuple(name for name in methods.split(",") if name),
        settings=_settings(set_ or []),
        seeds=_seeds(seeds),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        split_seed=split_seed,
        precision=precision,
        capture=CaptureOptions(_names(layers), dtype, 64, tokens, per_channel, compression, views, seed),
        tier="ram" if cache_in_ram else "device" if cache_on_device else "auto",
        may_build=not no_build,
        fresh=fresh,
    )
    with _display(quiet) as display:
        outcome = compare(
            request, home=home(), cache_dir=_cache_dir(cache_dir), runs_dir=runs_dir, listener=display.listener()
        )
    table, compared, report = rows(outcome), comparisons(outcome), outcome.folder / "report.md"
    write_text(report, markdown(outcome, table, compared))
    if as_json:
        print(json.dumps(document(outcome, table, compared, report), indent=1))
    else:
        print_table(table, outcome.score_name)
        sentences = [*failures(table), *skipped(outcome), *verdicts(outcome, compared)]
        print("\n".join([*sentences, f"report: {report}"]))
    if any(row["error"] for row in table):
        raise typer.Exit(1)


@app.command()
def plan(
    backbone: Annotated[str, typer.Option(help="hf-config:PRESET, a folder or JSON file, or any backbone.")],
    methods: Annotated[str, typer.Option(help="Names with commas, a path to a method file, or all.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="METHOD.KEY=VALUE, repeatable.")] = None,
    task: Annotated[str | None, typer.Option(help="Says how many classes and examples there are.")] = None,
    limit: Limit = None,
    num_examples: Annotated[int | None, typer.Option(min=1, help="Examples, where no task says how many.")] = None,
    num_outputs: Annotated[int | None, typer.Option(min=1, help="Classes. Default: the task's, else 100.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per training step.")] = 32,
    image_size: ImageSize = None,
    max_length: MaxLength = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16 (mixed).")] = "fp32",
    semantics: Annotated[str, typer.Option(help="cuda or cpu: whose kernels and optimiser defaults.")] = "cuda",
    attention: Annotated[str, typer.Option(help="auto, efficient, flash or math.")] = "auto",
    device_memory: Annotated[str | None, typer.Option(help="24GiB, 24GB or bytes: say what fits.")] = None,
    layers: Layers = None,
    dtype: Dtype = "float16",
    tokens: Tokens = "all",
    per_channel: PerChannel = False,
    compression: Compression = None,
    views: Views = 0,
    seed: CaptureSeed = 0,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Predict every method's peak memory, what fits, and the cache's size and gain; needs no GPU, weights or data."""
    from .bench.plan import PlanRequest, plan
    from .bench.plan_report import print_plan
    from .cache.build import CaptureOptions
    from .cache.home import home

    request = PlanRequest(
        backbone=backbone,
        methods=tuple(name for name in methods.split(",") if name),
        settings=_settings(set_ or []),
        task=task,
        limit=limit,
        batch_size=batch_size,
        image_size=image_size,
        max_length=max_length,
        num_outputs=num_outputs,
        num_examples=num_examples,
        precision=precision,
        semantics=semantics,
        attention=attention,
        capture=CaptureOptions(_names(layers), dtype, 64, tokens, per_channel, compression, views, seed),
        device_memory=device_memory,
    )
    with _display(quiet) as display:
        document = plan(request, home=home(), cache_dir=_cache_dir(cache_dir), say=display.say)
    if as_json:
        print(json.dumps(document, indent=1))
    else:
        print_plan(document)


@app.command()
def methods(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the methods: kind, paper, trained parameters, and every option with its default."""
    from .adapters._registry import describe, known_methods

    found = [describe(name) for name in known_methods()]
    lines = []
    for m in found:
        lines += [f"{m['name']} ({m['kind']}): {m['summary']}", f"  {m['paper']}"]
        lines += [f"  {line}" for line in m["parameters"].splitlines()]
        lines += [f"  {m['name']}.{key}={str(o['default']).lower()}  {o['help']}" for key, o in m["config"].items()]
    _print(found, as_json, "\n".join(lines))


@app.command()
def backbones(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the forms a backbone's name takes, and the samples."""
    from .cache.load import SCHEMES
    from .cache.samples import SAMPLES

    found = [{"scheme": scheme, "summary": text} for scheme, text in SCHEMES.items()]
    found += [
        {"scheme": f"sample:{name}", "summary": sample.summary}
        for name, sample in SAMPLES.items()
        if sample.kind == "backbone"
    ]
    _print(found, as_json, "\n".join(f"{row['scheme']}  {row['summary']}" for row in found))


@app.command()
def tasks(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the forms a task's name takes, and the samples."""
    from dataclasses import asdict

    from .bench.tasks.load import known_tasks

    found = known_tasks()
    _print([asdict(t) for t in found], as_json, "\n".join(f"{t.form}  {t.summary}" for t in found))


@app.command()
def doctor(cache_dir: CacheDir = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Say what works on this machine and why the rest does not."""
    from .bench.doctor import examine
    from .cache.home import home

    found = examine(home(), _cache_dir(cache_dir))
    _print(found, as_json, "\n".join(f"{key}: {value}" for key, value in found.items()))


@contextmanager
def _display(quiet: bool) -> "Iterator[Display]":
    from .bench.progress import Display

    with Display(quiet=quiet) as display:
        yield display


def _agreed(question: str) -> bool:
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")  # nobody there to answer: an empty line


def _print(document: Any, as_json: bool, text: str) -> None:
    print(json.dumps(document, indent=1) if as_json else text)


def _cache_dir(given: Path | None) -> Path:
    from .cache.home import home

    return given if given is not None else home() / "caches"


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name for name in text.split(",") if name)


def _settings(given: list[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        method, dot, key = name.rpartition(".")
        if not (equals and dot and method and key):
            raise SidebenchError(f"--set wants METHOD.KEY=VALUE, e.g. lora.rank=4; found {text!r}.")
        found.setdefault(method, {})[key] = value
    return found


def _seeds(text: str) -> tuple[int, ...]:
    try:
        found = tuple(dict.fromkeys(int(seed) for seed in text.split(",")))
    except ValueError:
        raise SidebenchError(f"--seeds wants whole numbers with commas, e.g. 0,1,2; found {text!r}.") from None
    if min(found) < 0 or max(found) >= 2**63:
        raise SidebenchError(f"--seeds wants numbers from 0 to 2^63 - 1; found {text!r}.")
    return found
