"""The Markdown report and the terminal's table: a pure function of the records, every unit named."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .compare import Outcome
from .table import Compared
from .tasks.score import ACCURACY

Row = Mapping[str, Any]
# What Markdown (with GitHub's tables and formulas) reads as markup; an underscore inside a word is none.
_SPECIAL = re.compile(r"[\\`*|~$\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_MIB = 2**20
_LITERATURE_GB = 2**20 * 1000
_MEMORY_LEGEND = (
    'Tracked bytes, except the last column. Literature "GB": bytes / 1024² / 1000, the unit that LST, UniPT and SHERL '
    "print as GB. Predicted: the same step on fake tensors, requested bytes under the semantics of the run's device."
)
_NO_AUGMENTATION = (
    "The backbone's dropout is off and there is no augmentation, for all methods alike; published recipes of live "
    "methods often use both."
)

_SHARED_COLUMNS = (
    "95 % over seeds",
    "95 % over test examples",
    "trained params",
    "tracked peak MiB",
    "device peak MiB",
    "host growth MiB",
    "train s",
    "examples/s",
)


def columns(score_name: str) -> tuple[str, ...]:
    """The heads of the table."""
    return ("method", "kind", f"{score_name} %", *_SHARED_COLUMNS)


def cells(row: Row) -> list[str]:
    """One row of the table as text."""
    score = row["score"]
    return [
        row["method"],
        row["kind"],
        "failed" if score is None else f"{100 * score['mean']:.2f}",
        "" if score is None else _interval(score["ci95"]),
        "" if score is None else _interval(score["test_ci95"]),
        "" if row["trainable_params"] is None else f"{row['trainable_params']:,}",
        _mib(row["peak_tracked_bytes"]),
        _mib(row["peak_device_bytes"]),
        _mib(row["peak_host_bytes"]),
        "" if row["train_seconds"] is None else f"{row['train_seconds']:.1f}",
        "" if row["examples_per_second"] is None else f"{row['examples_per_second']:,.0f}",
    ]


def failures(rows: Sequence[Row]) -> list[str]:
    """A sentence per method of which a run failed."""
    return [f"{row['method']} failed: {row['error']}" for row in rows if row["error"]]


def skipped(outcome: Outcome) -> list[str]:
    """A sentence per method that was left out of "all"."""
    return [f"{method} is left out: {reason}" for method, reason in outcome.skipped.items()]


def verdicts(outcome: Outcome, compared: Sequence[Compared]) -> list[str]:
    """A sentence per method against the reference."""
    test = "sign-flip" if outcome.score_name == ACCURACY else "swap"
    return [
        f"{c.method} {'shows no difference from' if c.verdict == 'no difference shown' else c.verdict} {c.against}: "
        f"{100 * c.difference:+.2f} points, 95 % paired bootstrap interval [{100 * c.ci95[0]:+.2f}, "
        f"{100 * c.ci95[1]:+.2f}], {test} permutation p = {c.p_value:.4f}, {c.p_adjusted:.4f} after Holm over "
        f"{len(compared)}; {outcome.sizes['test']} test examples, {len(outcome.request.seeds)} seeds."
        for c in compared
    ]


def markdown(outcome: Outcome, rows: Sequence[Row], compared: Sequence[Compared]) -> str:
    """The whole report."""
    parts = [
        f"# {_text(outcome.request.inputs.backbone)} on {_text(outcome.request.inputs.task)}",
        _protocol(outcome),
        "## Results",
        _table(columns(outcome.score_name), [cells(row) for row in rows]),
        *_score_parts(outcome, rows),
        _legend(),
    ]
    for title, lines in (("## Failed", failures(rows)), ("## Skipped", skipped(outcome))):
        if lines:
            parts += [title, _list(lines)]
    if compared:
        parts += ["## Paired comparisons", _list(verdicts(outcome, compared))]
    parts += ["## Memory by category at the tracked peak", _memory(rows)]
    if outcome.store:
        parts += ["## Activation cache", _cache(outcome.store)]
    parts += ["## Learning rates", _rates(outcome, rows), "## World", _world(outcome)]
    return "\n\n".join(parts) + "\n"


def _score_parts(outcome: Outcome, rows: Sequence[Row]) -> list[str]:
    """What a score that is a mean of figures is made of."""
    scored = {row["method"]: row["score"]["parts"] for row in rows if row["score"]}
    if not any(len(parts) > 1 for parts in scored.values()):
        return []
    listed = [
        f"{method}: " + ", ".join(f"{name} {100 * value:.2f}" for name, value in parts.items())
        for method, parts in scored.items()
    ]
    return [f"{_text(outcome.score_name)} is the mean of the two, which are, as means over seeds:", _list(listed)]


def _protocol(outcome: Outcome) -> str:
    request, sizes = outcome.request, outcome.sizes
    return (
        f"{sizes['train']} training, {sizes['val']} validation and {sizes['test']} test examples "
        f"(split seed {request.split_seed}"
        + (f", limited to {request.inputs.limit} examples" if request.inputs.limit else "")
        + f"); seeds {', '.join(map(str, request.seeds))}; {request.epochs} epochs, batch size {request.batch_size}, "
        f"{request.precision}. AdamW with 10 % linear warm-up and cosine decay; the epoch is selected on validation, "
        "the test part is read once at the end. linear_probe is solved instead, its L2 weight chosen on validation"
        f"{_unconverged(outcome)}. Every method sees the same examples in the same order. "
        + (_views(outcome) if request.capture.views else _NO_AUGMENTATION)
    )


def _unconverged(outcome: Outcome) -> str:
    """A chosen L2 weight whose solution was not reached is said, not hidden."""
    measured = [record.measured for records in outcome.records.values() for record in records if record.measured]
    short = sum(m.get("l2") is not None and m["l2"] in m.get("unconverged_l2", ()) for m in measured)
    return f" (in {short} runs the solver did not converge at the L2 weight chosen)" if short else ""


def _legend() -> str:
    return (
        "Tracked peak: exact bytes of live tensors in one training step on the longest batch, steady state; includes "
        "weights, gradients, optimizer and batch (of a method solved at once: its solver with a full history, an upper "
        "bound). Device peak: CUDA's max_memory_allocated. Host growth: sampled "
        "anonymous resident memory above its level before the step, so weights are not in it; corroboration, not a "
        "result. These are different kinds of figure; compare within a column. Train s and examples/s leave evaluation "
        "out and, for cached methods, the one-off build of the cache (below). 95 % over seeds: Student t; of width "
        "zero it says only that all seeds scored alike, and linear_probe does not depend on the seed. 95 % over test "
        "examples: percentile bootstrap of the seed-averaged score. Examples/s of linear_probe: its training examples "
        "over the whole solution, which passes over them many times."
    )


def _memory(rows: Sequence[Row]) -> str:
    names = ("parameters", "gradients", "optimizer", "activations", "inputs", "temporaries")
    body = [
        [
            row["method"],
            *(_mib(row["memory_by_category"].get(name)) for name in names),
            _mib(row["peak_tracked_bytes"]),
            f"{row['peak_tracked_bytes'] / _LITERATURE_GB:.3f}",
            _mib(row["predicted_peak_bytes"]),
        ]
        for row in rows
        if row["memory_by_category"]
    ]
    head = (*(f"{name} MiB" for name in names), "sum MiB", 'sum, literature "GB"', "predicted sum MiB")
    return "\n\n".join([_table(("method", *head), body), _MEMORY_LEGEND])


def _cache(store: Mapping[str, Any]) -> str:
    seconds = store["build_seconds"]
    built = (
        f"built in {seconds:.1f} s" if isinstance(seconds, int | float) else "built over several sessions, time unknown"
    )
    if keys := store.get("imported_keys"):
        built = f"imported from features called {', '.join(_text(str(key)) for key in keys)}, made elsewhere"
    return (
        f"`{store['digest'][:16]}`: {store['bytes'] / _MIB:,.1f} MiB, {_form(store['form'])}, "
        f"{len(store['layers'])} layers ({', '.join(_text(layer) for layer in store['layers'])}), {built}."
        f"{_lost(store['relative_errors'])}"
    )


def _form(form: Mapping[str, Any]) -> str:
    parts = [form["dtype"] + (" after normalising each channel" if form["per_channel"] else "")]
    parts += [] if form["tokens"] == "all" else [f"tokens {_text(form['tokens'])}"]
    return ", ".join([*parts, *([f"compressed by {form['compression']}"] if form["compression"] else [])])


def _lost(errors: Any) -> str:
    """Notes of a store are untrusted: what is no number is not shown."""
    listed = errors.items() if isinstance(errors, Mapping) else ()
    found = {layer: error for layer, error in listed if isinstance(error, float)}
    if not found:
        return ""
    shown = ", ".join(f"{_text(layer)} {error:.2g}" for layer, error in found.items())
    return f" Relative error against the full activations, on a sample of the task: {shown}."


def _views(outcome: Outcome) -> str:
    """What training on stored views is not."""
    capture = outcome.request.capture
    return (
        f"Trained on {capture.views} fixed augmented views of each example (seed {capture.seed}; a view: "
        f"{outcome.view}), one drawn per example and epoch, the same for every method; a solver takes all of them. "
        "A live augmented recipe draws a new view every time, so from the epoch on in which views repeat, this is less "
        "augmentation than such a recipe has. Validation and test are on the plain examples. The backbone's dropout is "
        "off for all methods alike; published recipes of live methods often use it."
    )


def _rates(outcome: Outcome, rows: Sequence[Row]) -> str:
    how = {
        None: "each method's default, whose source `bench methods` names",
        "auto": "chosen on validation, mean over seeds, from 0.3, 1 and 3 times each method's default",
    }.get(outcome.request.lr, f"chosen on validation, mean over seeds, from {outcome.request.lr}")
    used = ", ".join(f"{_text(row['method'])} {row['lr']:g}" for row in rows if row["lr"])
    return f"{how[0].upper()}{how[1:]}: {used or 'none used'}."


def _world(outcome: Outcome) -> str:
    """What the records say, not what is true now: a reused run may come from another version or machine."""
    worlds = [record.world for records in outcome.records.values() for record in records]
    lines = []
    for name in sorted({name for world in worlds for name in world}):
        found = list(dict.fromkeys(str(world.get(name)) for world in worlds))
        lines.append(f"{name}: {found[0]}" if len(found) == 1 else f"{name} differs between runs: {' / '.join(found)}")
    return _list(lines)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_text(line)}" for line in lines)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [
        _line(head),
        _line(["---", *("---:" for _ in head[1:])]),
        *(_line([_text(c) for c in row]) for row in body),
    ]
    return "\n".join(lines)


def _line(row: Sequence[str]) -> str:
    return "| " + " | ".join(row) + " |"


def _text(value: Any) -> str:
    """Names and messages are untrusted: nothing in them may become markup or break a table."""
    escaped = _SPECIAL.sub(r"\\\g<0>", " ".join(str(value).split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / _MIB:,.1f}"


def _interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}"


def print_table(rows: Sequence[Row], score_name: str) -> None:
    """The table on stdout, as wide as it needs to be where stdout is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns(score_name), box=box.SIMPLE)
    for row in rows:
        table.add_row(*map(Text, cells(row)))  # a name is text, never rich's markup
    console = Console()
    console = console if console.is_terminal else Console(width=220)
    console.print(table)
