"""From run records to the rows and paired comparisons that the table, the report and --json show."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import SidebenchError
from .outcome import Outcome, Runs
from .record import read_predictions
from .stats import (
    PairedResult,
    bootstrap_interval,
    bootstrap_score,
    holm,
    paired_score_test,
    paired_test,
    t_interval,
    verdict_of,
)
from .tasks.score import ACCURACY, Numbers, Score, score_named

REFERENCE = "linear_probe"  # what every method is tested against, where it was run: the bar to beat
Labels = NDArray[Any]
_STATISTICS_SEED = 0
_PEAKS = (
    "peak_device_bytes",
    "peak_requested_bytes",
    "peak_reserved_bytes",
    "peak_nvml_bytes",
    "nvml_device_growth_bytes",
    "context_bytes",
    "peak_tracked_bytes",
    "peak_host_bytes",
    "predicted_peak_bytes",
)


@dataclass(frozen=True)
class Compared:
    """One method against another on the same test examples; p_adjusted is Holm's over all of them.

    seeds_ci95: Student t over the seeds' differences, each of the two arms of one seed; None with one seed.
    """

    method: str
    against: str
    difference: float
    ci95: tuple[float, float]
    p_value: float
    p_adjusted: float
    verdict: str
    shots: int | None = None
    seeds_ci95: tuple[float, float] | None = None


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    """One row per method and shots, keys as the command line's contract has them. Scores are fractions, bytes exact."""
    return [_row(outcome, runs) for runs in outcome.runs]


def comparisons(outcome: Outcome) -> list[Compared]:
    """Every method against the reference, and against its twin the one that was pre-trained; at each number of shots.

    By paired tests, adjusted for their number.
    """
    pairs: list[tuple[Runs, Runs]] = []
    read: dict[tuple[str, int | None], tuple[Numbers, Labels]] = {}
    for shots in dict.fromkeys(runs.shots for runs in outcome.runs):
        complete = {runs.method: runs for runs in outcome.runs if runs.shots == shots and _is_complete(runs)}
        read |= {(method, shots): _predictions(outcome, runs) for method, runs in complete.items()}
        reference = REFERENCE if REFERENCE in complete else next(iter(complete), None)
        for method, runs in complete.items():
            against = dict.fromkeys([reference, outcome.twins.get(method)])
            pairs += [(runs, complete[other]) for other in against if other in complete and other != method]
    results = [_tested(outcome, *(read[runs.method, runs.shots] for runs in pair)) for pair in pairs]
    adjusted = holm([result.p_value for result in results])
    return [
        Compared(
            one.method,
            other.method,
            result.difference,
            result.interval,
            result.p_value,
            float(p),
            verdict_of(result.difference, float(p)),
            one.shots,
            t_interval(np.subtract(_scores(one), _scores(other))),
        )
        for (one, other), result, p in zip(pairs, results, adjusted, strict=True)
    ]


def gains(outcome: Outcome, compared: Sequence[Compared]) -> list[Compared]:
    """Of these, what a pre-trained initialisation gains on the method's own, nothing else being different."""
    return [c for c in compared if outcome.twins.get(c.method) == c.against]


def document(
    outcome: Outcome, table: Sequence[Mapping[str, Any]], compared: Sequence[Compared], report: Path
) -> dict[str, Any]:
    """What `bench compare --json` prints."""
    return {
        "table": list(table),
        "comparisons": [asdict(comparison) for comparison in compared],
        "gains": [asdict(gain) for gain in gains(outcome, compared)],
        "skipped": [{"method": method, "reason": reason} for method, reason in outcome.skipped.items()],
        "examples": dict(outcome.sizes),
        "few_shot_examples": {shots: dict(sizes) for shots, sizes in outcome.few_shot_sizes.items()},
        "cache": None if outcome.store is None else dict(outcome.store),
        "records": [str(path) for path in outcome.files],
        "report": str(report),
    }


def _row(outcome: Outcome, runs: Runs) -> dict[str, Any]:
    method, records = runs.method, runs.records
    kind = str(records[0].asked["kind"])
    measured = [record.measured for record in records if record.measured is not None]
    errors = [record.error for record in records if record.error]
    row: dict[str, Any] = {"method": method, "kind": kind, "score": None, "error": errors[0] if errors else None}
    first: Mapping[str, Any] = measured[0] if measured else {}
    row |= {key: first.get(key) for key in ("trainable_params", "head_params", "total_params", "memory_by_category")}
    row |= {key: _largest(measured, key) for key in _PEAKS}
    for key in ("train_seconds", "eval_seconds", "examples_per_second"):
        row[key] = statistics.mean(m[key] for m in measured) if measured else None
    cached = outcome.store is not None and kind != "live"
    row |= {
        "shots": runs.shots,
        "lr": first.get("lr"),
        "cache_bytes": outcome.store["bytes"] if cached and outcome.store else None,
        "cache_build_seconds": outcome.store["build_seconds"] if cached and outcome.store else None,
        "unavailable": first.get("unavailable") or {},
        "energy_joules_per_step": first.get("energy_joules_per_step"),
        "remarks": first.get("remarks") or {},
        "initialisation": _initialisation([m["initialisation"] for m in measured if m.get("initialisation")]),
    }
    if measured and not errors:
        values = [float(m["score"]) for m in measured]
        predictions = _predictions(outcome, runs)
        row["score"] = {
            "name": outcome.score_name,
            "mean": statistics.mean(values),
            "ci95": _list(t_interval(values)),
            "test_ci95": _list(_interval(outcome, *predictions)),
            "values": values,
            "parts": _parts(measured),
        }
    return row


def _initialisation(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What finding squared gradients took: seconds as a mean over seeds, the peak of the largest."""
    if not found:
        return None
    return {
        "examples": found[0]["examples"],
        "seconds": statistics.mean(one["seconds"] for one in found),
        "peak_tracked_bytes": _largest(found, "peak_tracked_bytes"),
    }


def _parts(measured: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean over seeds of every figure that the score is made of."""
    names = measured[0].get("scores") or {}
    return {name: statistics.mean(m["scores"][name] for m in measured) for name in names}


def _interval(outcome: Outcome, predicted: Numbers, targets: Labels) -> tuple[float, float]:
    score = score_named(outcome.score_name)
    if (added := _added(score, predicted, targets)) is not None:
        return bootstrap_interval(added.mean(0), _STATISTICS_SEED)
    return bootstrap_score(score.weighted, predicted, targets, _STATISTICS_SEED, draws=_draws(score))


def _tested(outcome: Outcome, ours: tuple[Numbers, Labels], theirs: tuple[Numbers, Labels]) -> PairedResult:
    (a, targets), (b, others) = ours, theirs
    if not np.array_equal(targets, others):
        raise SidebenchError("two methods were tested on different examples; run the comparison again with --fresh.")
    score = score_named(outcome.score_name)
    first, second = _added(score, a, targets), _added(score, b, targets)
    if first is not None and second is not None:
        return paired_test(first, second, _STATISTICS_SEED)
    return paired_score_test(score.weighted, a, b, targets, _STATISTICS_SEED, draws=_draws(score))


def _added(score: Score, predicted: Numbers, targets: Labels) -> Numbers | None:
    """(seeds, N) what each test example adds to a score that is their mean; None of one that is no mean."""
    if score.of_examples:
        return predicted
    return (predicted == targets).astype(np.float64) if score.name == ACCURACY else None


def _draws(score: Score) -> int:
    """Numbers are ranked anew in every draw; classes are but counted."""
    return 2_000 if score.of_numbers else 10_000


def _predictions(outcome: Outcome, runs: Runs) -> tuple[Numbers, Labels]:
    """(seeds, N) what is scored per test example, and the targets (N,), of runs that are complete.

    Of a score that is a mean over examples what each adds, and their ids.
    """
    score = score_named(outcome.score_name)
    if score.of_examples:
        found = [read_predictions(path.with_suffix(".npz"), ("contributions", "ids")) for path in runs.files]
        return np.stack([added for added, _ in found]), found[-1][1]
    read = [read_predictions(path.with_suffix(".npz")) for path in runs.files]
    return np.stack([score.read(logits) for logits, _ in read]), read[-1][1].astype(np.float64)


def _is_complete(runs: Runs) -> bool:
    return all(record.measured is not None for record in runs.records)


def _scores(runs: Runs) -> list[float]:
    return [float(record.measured["score"]) for record in runs.records if record.measured is not None]


def _largest(measured: Sequence[Mapping[str, Any]], key: str) -> int | None:
    values = [m[key] for m in measured if m.get(key) is not None]
    return max(values) if values else None


def _list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
