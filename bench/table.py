"""From run records to the rows and paired comparisons that the table, the report and --json show."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .compare import Outcome
from .record import RunRecord, read_predictions
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
    """One method against the reference on the same test examples; p_adjusted is Holm's over all of them."""

    method: str
    against: str
    difference: float
    ci95: tuple[float, float]
    p_value: float
    p_adjusted: float
    verdict: str


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    """One row per method, keys as the command line's contract has them. Scores are fractions, bytes exact."""
    return [_row(outcome, method, records) for method, records in outcome.records.items()]


def comparisons(outcome: Outcome) -> list[Compared]:
    """Every method against the reference by a paired test, adjusted for their number."""
    scores = {method: _predictions(outcome, method) for method in outcome.records}
    complete = {method: found for method, found in scores.items() if found is not None}
    if len(complete) < 2:
        return []
    reference = REFERENCE if REFERENCE in complete else next(iter(complete))
    others = [method for method in complete if method != reference]
    results = [_tested(outcome, complete[method], complete[reference]) for method in others]
    adjusted = holm([result.p_value for result in results])
    found = []
    for method, result, p in zip(others, results, adjusted, strict=True):
        verdict = verdict_of(result.difference, float(p))
        found.append(Compared(method, reference, result.difference, result.interval, result.p_value, float(p), verdict))
    return found


def document(
    outcome: Outcome, table: Sequence[Mapping[str, Any]], compared: Sequence[Compared], report: Path
) -> dict[str, Any]:
    """What `bench compare --json` prints."""
    return {
        "table": list(table),
        "comparisons": [asdict(comparison) for comparison in compared],
        "skipped": [{"method": method, "reason": reason} for method, reason in outcome.skipped.items()],
        "examples": dict(outcome.sizes),
        "cache": None if outcome.store is None else dict(outcome.store),
        "records": [str(path) for path in outcome.files],
        "report": str(report),
    }


def _row(outcome: Outcome, method: str, records: Sequence[RunRecord]) -> dict[str, Any]:
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
        "shots": None,
        "lr": first.get("lr"),
        "cache_bytes": outcome.store["bytes"] if cached and outcome.store else None,
        "cache_build_seconds": outcome.store["build_seconds"] if cached and outcome.store else None,
        "unavailable": first.get("unavailable") or {},
        "energy_joules_per_step": first.get("energy_joules_per_step"),
        "remarks": first.get("remarks") or {},
    }
    if measured and not errors:
        values = [float(m["score"]) for m in measured]
        predictions = _predictions(outcome, method)
        row["score"] = {
            "name": outcome.score_name,
            "mean": statistics.mean(values),
            "ci95": _list(t_interval(values)),
            "test_ci95": None if predictions is None else _list(_interval(outcome, *predictions)),
            "values": values,
            "parts": _parts(measured),
        }
    return row


def _parts(measured: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean over seeds of every figure that the score is made of."""
    names = measured[0].get("scores") or {}
    return {name: statistics.mean(m["scores"][name] for m in measured) for name in names}


def _interval(outcome: Outcome, predicted: Numbers, targets: Numbers) -> tuple[float, float]:
    if outcome.score_name == ACCURACY:
        return bootstrap_interval((predicted == targets).mean(0), _STATISTICS_SEED)
    score = score_named(outcome.score_name)
    return bootstrap_score(score.weighted, predicted, targets, _STATISTICS_SEED, draws=_draws(score))


def _tested(outcome: Outcome, ours: tuple[Numbers, Numbers], theirs: tuple[Numbers, Numbers]) -> PairedResult:
    """Accuracy is a mean over examples, whose test needs only what each one adds to it."""
    (a, targets), (b, _) = ours, theirs
    if outcome.score_name == ACCURACY:
        return paired_test(a == targets, b == targets, _STATISTICS_SEED)
    score = score_named(outcome.score_name)
    return paired_score_test(score.weighted, a, b, targets, _STATISTICS_SEED, draws=_draws(score))


def _draws(score: Score) -> int:
    """Numbers are ranked anew in every draw; classes are but counted."""
    return 2_000 if score.of_numbers else 10_000


def _predictions(outcome: Outcome, method: str) -> tuple[Numbers, Numbers] | None:
    """(seeds, N) what is scored per test example, and the targets (N,); None when a run of the method failed."""
    score, found = score_named(outcome.score_name), []
    targets = np.empty(0)
    for record, path in zip(outcome.records[method], _files_of(outcome, method), strict=True):
        if record.measured is None:
            return None
        logits, targets = read_predictions(path.with_suffix(".npz"))
        found.append(score.read(logits))
    return np.stack(found), targets.astype(np.float64)


def _files_of(outcome: Outcome, method: str) -> list[Path]:
    start = 0
    for name, records in outcome.records.items():
        if name == method:
            return list(outcome.files[start : start + len(records)])
        start += len(records)
    raise KeyError(method)


def _largest(measured: Sequence[Mapping[str, Any]], key: str) -> int | None:
    values = [m[key] for m in measured if m.get(key) is not None]
    return max(values) if values else None


def _list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
