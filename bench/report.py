"""The Markdown report and the terminal's table: a pure function of the records, every unit named."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..adapters._base import TrainingConfig
from . import few_shot_report
from .markdown import MIB, bullets, interval, mib, table, text
from .outcome import Outcome
from .pretrained import sentences as pretrained_modules
from .table import Compared
from .tasks.score import ACCURACY, NATURAL, score_named, shown, unit

Row = Mapping[str, Any]
_LITERATURE_GB = 2**20 * 1000
_MEMORY_LEGEND = (
    'Tracked bytes, except the last column. Literature "GB": bytes / 1024² / 1000, the unit that LST, UniPT and SHERL '
    "print as GB. Predicted: the same step on fake tensors, requested bytes under the semantics of the run's device."
)
_NO_AUGMENTATION = (
    "The backbone's dropout is off and there is no augmentation, for all methods alike; published recipes of live "
    "methods often use both."
)

_SEEDLESS = ", and linear_probe does not depend on the seed"
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


def columns(score_name: str, rows: Sequence[Row]) -> tuple[str, ...]:
    """The heads of the table."""
    shots = ("shots",) if any(row["shots"] for row in rows) else ()
    return ("method", "kind", *shots, unit(score_name), *_SHARED_COLUMNS)


def cells(row: Row) -> list[str]:
    """One row of the table as text."""
    score = row["score"]
    return [
        row["method"],
        row["kind"],
        *([str(row["shots"])] if row["shots"] else []),
        "failed" if score is None else f"{shown(score['name'], score['mean']):.2f}",
        "" if score is None else interval(score["ci95"], score["name"]),
        "" if score is None else interval(score["test_ci95"], score["name"]),
        "" if row["trainable_params"] is None else f"{row['trainable_params']:,}",
        mib(row["peak_tracked_bytes"]),
        mib(row["peak_device_bytes"]),
        mib(row["peak_host_bytes"]),
        "" if row["train_seconds"] is None else f"{row['train_seconds']:.1f}",
        "" if row["examples_per_second"] is None else f"{row['examples_per_second']:,.0f}",
    ]


def failures(rows: Sequence[Row]) -> list[str]:
    """A sentence per method of which a run failed."""
    return [f"{_at(row['method'], row['shots'])} failed: {row['error']}" for row in rows if row["error"]]


def skipped(outcome: Outcome) -> list[str]:
    """A sentence per method that was left out of "all"."""
    return [f"{method} is left out: {reason}" for method, reason in outcome.skipped.items()]


def verdicts(outcome: Outcome, compared: Sequence[Compared]) -> list[str]:
    """A sentence per comparison."""
    score = score_named(outcome.score_name)
    test = "sign-flip" if score.of_examples or score.name == ACCURACY else "swap"
    return [
        f"{_at(c.method, c.shots)} "
        f"{'shows no difference from' if c.verdict == 'no difference shown' else c.verdict} {c.against}: "
        f"{shown(score.name, c.difference):+.2f} points, 95 % paired bootstrap interval "
        f"[{_signed(c.ci95, score.name)}], {test} permutation p = {c.p_value:.4f}, {c.p_adjusted:.4f} after Holm over "
        f"{len(compared)}; {_tested(outcome)}, {len(outcome.request.seeds)} seeds"
        + (f", 95 % over seeds [{_signed(c.seeds_ci95, score.name)}]." if c.seeds_ci95 else ".")
        for c in compared
    ]


def _tested(outcome: Outcome) -> str:
    """How many things the tests and intervals are over."""
    items = outcome.sizes.get("test_items")
    return f"{outcome.sizes['test']} test examples" if items is None else f"{items} test items with their captions"


def _signed(ends: Sequence[float], score_name: str) -> str:
    return ", ".join(f"{shown(score_name, end):+.2f}" for end in ends)


def _at(method: str, shots: int | None) -> str:
    return method if shots is None else f"{method} at {shots} shot{'s' * (shots > 1)}"


def markdown(outcome: Outcome, rows: Sequence[Row], compared: Sequence[Compared]) -> str:
    """The whole report."""
    parts = [
        f"# {text(outcome.request.inputs.backbone)} on {text(outcome.request.inputs.task)}",
        _protocol(outcome),
        "## Results",
        table(columns(outcome.score_name, rows), [cells(row) for row in rows]),
        *_score_parts(outcome, rows),
        _legend(bool(outcome.few_shot_sizes)),
        *(few_shot_report.sections(outcome, rows, compared) if outcome.few_shot_sizes else []),
    ]
    for title, lines in (("## Failed", failures(rows)), ("## Skipped", skipped(outcome))):
        if lines:
            parts += [title, bullets(lines)]
    if compared:
        parts += ["## Paired comparisons", bullets(verdicts(outcome, compared))]
    parts += ["## Memory by category at the tracked peak", _memory(rows)]
    if lines := _initialisations(rows):
        parts += ["## Initialisation", bullets(lines)]
    if lines := pretrained_modules([record for runs in outcome.runs for record in runs.records]):
        parts += ["## Pre-trained modules", bullets(lines)]
    if outcome.store:
        streams = outcome.store.get("streams", {"": outcome.store})
        lines = [f"{name}: {_cache(one)}" if name else _cache(one) for name, one in streams.items()]
        parts += ["## Activation cache", "\n\n".join(lines)]
    parts += ["## Learning rates", _rates(outcome, rows), "## World", _world(outcome)]
    return "\n\n".join(parts) + "\n"


def _score_parts(outcome: Outcome, rows: Sequence[Row]) -> list[str]:
    """What a score that is a mean of figures is made of."""
    scored = {_at(row["method"], row["shots"]): row["score"]["parts"] for row in rows if row["score"]}
    if not any(len(parts) > 1 for parts in scored.values()):
        return []
    if score_named(outcome.score_name).of_examples:
        return ["All figures, as means over seeds; fractions in percent:", bullets(_figures(scored))]
    listed = [
        f"{method}: " + ", ".join(f"{name} {100 * value:.2f}" for name, value in parts.items())
        for method, parts in scored.items()
    ]
    return [f"{text(outcome.score_name)} is the mean of the two, which are, as means over seeds:", bullets(listed)]


def _figures(scored: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Shares in percent; sums and ranks, whose names say so, as they are."""
    return [
        f"{method}: "
        + ", ".join(f"{name} {value if name.endswith(NATURAL) else 100 * value:.2f}" for name, value in parts.items())
        for method, parts in scored.items()
    ]


def _protocol(outcome: Outcome) -> str:
    request, sizes = outcome.request, outcome.sizes
    pairs = "test_items" in sizes
    counted = f"captions (of {sizes['test_items']} test items)" if pairs else "examples"
    return (
        f"{sizes['train']} training, {sizes['val']} validation and {sizes['test']} test {counted} "
        f"(split seed {request.split_seed}"
        + (f", limited to {request.inputs.limit} {'items' if pairs else 'examples'}" if request.inputs.limit else "")
        + f"); seeds {', '.join(map(str, request.seeds))}; {_length(outcome)}, batch size {request.batch_size}, "
        f"{request.precision}. AdamW with 10 % linear warm-up and cosine decay{_other_schedules(outcome)}; the epoch "
        "is selected on validation, the test part is read once at the end. linear_probe is solved instead, its L2 "
        "weight chosen on validation"
        f"{_unconverged(outcome)}. Every method sees the same examples in the same order. "
        + (_views(outcome) if request.capture.views else _NO_AUGMENTATION)
        + (f" {few_shot_report.protocol(outcome)}" if outcome.few_shot_sizes else "")
    )


def _length(outcome: Outcome) -> str:
    request = outcome.request
    return f"{request.epochs} epochs" if request.steps is None else f"as many epochs as {request.steps} steps allow"


def _other_schedules(outcome: Outcome) -> str:
    """Methods of which the learning rate takes another course than the common one."""
    found = []
    for method, records in outcome.records.items():
        configs = (record.asked["config"] for record in records if "config" in record.asked)
        config: Row = next(configs, {})  # none: all failed
        schedule = config.get("schedule", TrainingConfig.schedule)
        warm_up = config.get("warm_up", TrainingConfig.warm_up)
        if (schedule, warm_up) != (TrainingConfig.schedule, TrainingConfig.warm_up):
            decay = "no" if schedule == "constant" else schedule
            found.append(f"{text(method)}: {100 * warm_up:g} % and {text(decay)} decay")
    return f" ({'; '.join(found)})" if found else ""


def _unconverged(outcome: Outcome) -> str:
    """A chosen L2 weight whose solution was not reached is said, not hidden."""
    measured = [record.measured for records in outcome.records.values() for record in records if record.measured]
    short = sum(m.get("l2") is not None and m["l2"] in m.get("unconverged_l2", ()) for m in measured)
    return f" (in {short} runs the solver did not converge at the L2 weight chosen)" if short else ""


def _legend(few_shot: bool) -> str:
    return (
        "Tracked peak: exact bytes of live tensors in one training step on the longest batch, steady state; includes "
        "weights, gradients, optimizer and batch (of a method solved at once: its solver with a full history, an upper "
        "bound). Device peak: CUDA's max_memory_allocated. Host growth: sampled "
        "anonymous resident memory above its level before the step, so weights are not in it; corroboration, not a "
        "result. These are different kinds of figure; compare within a column. Train s and examples/s leave evaluation "
        "out and, for cached methods, the one-off build of the cache (below). 95 % over seeds: Student t; of width "
        f"zero it says only that all seeds scored alike{_SEEDLESS if not few_shot else ''}. 95 % over test "
        "examples: percentile bootstrap of the seed-averaged score. Examples/s of linear_probe: its training examples "
        "over the whole solution, which passes over them many times."
    )


def _memory(rows: Sequence[Row]) -> str:
    names = ("parameters", "gradients", "optimizer", "activations", "inputs", "temporaries")
    body = [
        [
            _at(row["method"], row["shots"]),
            *(mib(row["memory_by_category"].get(name)) for name in names),
            mib(row["peak_tracked_bytes"]),
            f"{row['peak_tracked_bytes'] / _LITERATURE_GB:.3f}",
            mib(row["predicted_peak_bytes"]),
        ]
        for row in rows
        if row["memory_by_category"]
    ]
    head = (*(f"{name} MiB" for name in names), "sum MiB", 'sum, literature "GB"', "predicted sum MiB")
    return "\n\n".join([table(("method", *head), body), _MEMORY_LEGEND])


def _initialisations(rows: Sequence[Row]) -> list[str]:
    """What a start from squared gradients took, which is in no other figure."""
    return [
        f"{_at(row['method'], row['shots'])}: squared gradients of {found['examples']:,} training examples through the "
        f"whole backbone, once before training: {found['seconds']:.1f} s, tracked peak "
        f"{mib(found['peak_tracked_bytes'])} MiB, in no other figure here."
        for row in rows
        if (found := row["initialisation"])
    ]


def _cache(store: Mapping[str, Any]) -> str:
    seconds = store["build_seconds"]
    built = (
        f"built in {seconds:.1f} s" if isinstance(seconds, int | float) else "built over several sessions, time unknown"
    )
    if keys := store.get("imported_keys"):
        built = f"imported from features called {', '.join(text(str(key)) for key in keys)}, made elsewhere"
    return (
        f"`{store['digest'][:16]}`: {store['bytes'] / MIB:,.1f} MiB, {_form(store['form'])}, "
        f"{len(store['layers'])} layers ({', '.join(text(layer) for layer in store['layers'])}), {built}."
        f"{_lost(store['relative_errors'])}"
    )


def _form(form: Mapping[str, Any]) -> str:
    parts = [form["dtype"] + (" after normalising each channel" if form["per_channel"] else "")]
    parts += [] if form["tokens"] == "all" else [f"tokens {text(form['tokens'])}"]
    return ", ".join([*parts, *([f"compressed by {form['compression']}"] if form["compression"] else [])])


def _lost(errors: Any) -> str:
    """Notes of a store are untrusted: what is no number is not shown."""
    listed = errors.items() if isinstance(errors, Mapping) else ()
    found = {layer: error for layer, error in listed if isinstance(error, float)}
    if not found:
        return ""
    shown = ", ".join(f"{text(layer)} {error:.2g}" for layer, error in found.items())
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
    if outcome.request.lr not in (None, "auto") and "," not in str(outcome.request.lr):
        how = "as typed"
    elif outcome.few_shot_sizes:
        how = few_shot_report.rates(outcome)
    used = ", ".join(dict.fromkeys(f"{text(row['method'])} {row['lr']:g}" for row in rows if row["lr"]))
    sentence = f"{how[0].upper()}{how[1:]}: {used or 'none used'}."
    of_family = [
        f"{method}: {', '.join(f'{key}={str(value).lower()}' for key, value in found.options.items())} ({found.source})"
        for method, found in outcome.defaults.items()
    ]
    if not of_family:
        return sentence
    return "\n\n".join([sentence, "Defaults that hold for this family of tasks:", bullets(of_family)])


def _world(outcome: Outcome) -> str:
    """What the records say, not what is true now: a reused run may come from another version or machine."""
    worlds = [record.world for records in outcome.records.values() for record in records]
    lines = []
    for name in sorted({name for world in worlds for name in world}):
        found = list(dict.fromkeys(str(world.get(name)) for world in worlds))
        lines.append(f"{name}: {found[0]}" if len(found) == 1 else f"{name} differs between runs: {' / '.join(found)}")
    return bullets(lines)


def print_table(rows: Sequence[Row], score_name: str) -> None:
    """The table on stdout."""
    print_columns(columns(score_name, rows), [cells(row) for row in rows])


def print_columns(head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """A table on stdout, as wide as it needs to be where stdout is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE)
    for name in head:
        grid.add_column(Text(name))
    for row in body:
        grid.add_row(*map(Text, row))  # a name is text, never rich's markup
    console = Console()
    console = console if console.is_terminal else Console(width=220)
    console.print(grid)
