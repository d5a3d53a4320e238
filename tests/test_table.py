"""Rows and paired comparisons of records made by hand, against figures computed another way."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from outcomes import make_outcome

from sidebench.bench.table import comparisons, document, rows

PROBE = [[1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0], [1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 1]]
BETTER = [[1] * 12, [1] * 11 + [0]]
ALIKE = [[0, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0]]
WORSE = [[0] * 12, [0] * 11 + [1]]


def _sign_flip_p(a: list[list[int]], b: list[list[int]]) -> float:
    """Two-sided, over all 2^N ways to flip the signs of the differences of the seed-averaged scores."""
    differences = np.mean(a, 0) - np.mean(b, 0)
    observed = abs(differences.mean())
    means = [abs((differences * signs).mean()) for signs in product((-1, 1), repeat=len(differences))]
    return float(np.mean([mean >= observed - 1e-12 for mean in means]))


def test_each_method_is_tested_against_the_probe_wherever_it_stands(tmp_path: Path) -> None:
    found = comparisons(make_outcome(tmp_path, {"better": BETTER, "linear_probe": PROBE, "alike": ALIKE}))
    assert [(c.method, c.against) for c in found] == [("better", "linear_probe"), ("alike", "linear_probe")]


def test_without_the_probe_the_first_method_is_the_reference(tmp_path: Path) -> None:
    found = comparisons(make_outcome(tmp_path, {"alike": ALIKE, "better": BETTER}))
    assert [(c.method, c.against) for c in found] == [("better", "alike")]


def test_difference_and_p_value_are_those_of_the_exact_test(tmp_path: Path) -> None:
    methods = {"better": BETTER, "alike": ALIKE, "worse": WORSE}
    found = comparisons(make_outcome(tmp_path, {"linear_probe": PROBE, **methods}))
    exact = [_sign_flip_p(right, PROBE) for right in methods.values()]
    for compared, right, p in zip(found, methods.values(), exact, strict=True):
        assert compared.difference == pytest.approx(np.mean(right) - np.mean(PROBE))
        assert compared.p_value == pytest.approx(p, abs=0.02)
        assert compared.ci95[0] <= compared.difference <= compared.ci95[1]


def test_beats_and_loses_to_are_said_only_of_what_the_test_shows(tmp_path: Path) -> None:
    methods = {"linear_probe": PROBE, "better": BETTER, "alike": ALIKE, "worse": WORSE}
    long = {name: [row * 4 for row in right] for name, right in methods.items()}
    found = comparisons(make_outcome(tmp_path, long))
    assert [c.verdict for c in found] == ["beats", "no difference shown", "loses to"]


def test_p_values_are_adjusted_by_holm_over_all_comparisons(tmp_path: Path) -> None:
    found = comparisons(
        make_outcome(tmp_path, {"linear_probe": PROBE, "better": BETTER, "alike": ALIKE, "worse": WORSE})
    )
    ordered = sorted(found, key=lambda c: c.p_value)
    expected, largest = {}, 0.0
    for rank, compared in enumerate(ordered):  # Holm 1979: the smallest times m, the next times m - 1, never falling
        largest = max(largest, min(1.0, compared.p_value * (len(ordered) - rank)))
        expected[compared.method] = largest
    assert {c.method: c.p_adjusted for c in found} == pytest.approx(expected)


def test_a_difference_that_holds_alone_but_not_after_holm_is_no_verdict(tmp_path: Path) -> None:
    probe = [[0] * 6 + [1] * 6]
    once = [[1] * 6 + [1] * 6]  # six examples better, none worse: p = 2 / 64 = 0.031
    many = {f"m{i}": once for i in range(3)}
    (alone,) = comparisons(make_outcome(tmp_path, {"linear_probe": probe, "m": once}))
    assert (alone.p_value < 0.05, alone.verdict) == (True, "beats")
    for compared in comparisons(make_outcome(tmp_path, {"linear_probe": probe, **many})):
        assert compared.p_value < 0.05 < compared.p_adjusted
        assert compared.verdict == "no difference shown"


def test_a_method_of_which_a_run_failed_is_in_no_comparison(tmp_path: Path) -> None:
    found = comparisons(make_outcome(tmp_path, {"linear_probe": PROBE, "broken": "it broke", "alike": ALIKE}))
    assert [c.method for c in found] == ["alike"]


def test_a_failed_probe_leaves_the_first_complete_method_as_reference(tmp_path: Path) -> None:
    found = comparisons(make_outcome(tmp_path, {"linear_probe": "it broke", "alike": ALIKE, "better": BETTER}))
    assert [(c.method, c.against) for c in found] == [("better", "alike")]


def test_one_method_alone_is_compared_with_nothing(tmp_path: Path) -> None:
    assert comparisons(make_outcome(tmp_path, {"alike": ALIKE})) == []


def test_the_score_of_a_row_is_the_mean_over_seeds_with_both_intervals(tmp_path: Path) -> None:
    (row,) = rows(make_outcome(tmp_path, {"alike": ALIKE}))
    values = [np.mean(right) for right in ALIKE]
    assert row["score"]["values"] == pytest.approx(values)
    assert row["score"]["mean"] == pytest.approx(np.mean(values))
    half = 12.7062 * np.std(values, ddof=1) / 2**0.5  # Student's t, one degree of freedom
    assert row["score"]["ci95"] == pytest.approx([np.mean(values) - half, np.mean(values) + half], rel=1e-4)
    low, high = row["score"]["test_ci95"]
    assert 0 <= low < row["score"]["mean"] < high <= 1


def test_with_one_seed_there_is_no_interval_over_seeds(tmp_path: Path) -> None:
    (row,) = rows(make_outcome(tmp_path, {"alike": ALIKE[:1]}))
    assert row["score"]["ci95"] is None


def test_a_failed_row_has_an_error_and_no_figure_at_all(tmp_path: Path) -> None:
    (row,) = rows(make_outcome(tmp_path, {"broken": "it broke"}))
    assert (row["score"], row["error"]) == (None, "it broke")
    figures = [key for key in row if key.endswith(("_bytes", "_params", "_seconds", "_per_second"))]
    assert len(figures) > 10
    assert all(row[key] is None for key in figures)


def test_a_peak_is_the_largest_over_seeds_and_none_when_no_run_has_it(tmp_path: Path) -> None:
    outcome = make_outcome(tmp_path, {"alike": ALIKE})
    for record, peak in zip(outcome.records["alike"], (5, 9), strict=True):
        record.measured["peak_tracked_bytes"] = peak  # type: ignore[index]
    (row,) = rows(outcome)
    assert row["peak_tracked_bytes"] == 9
    assert row["peak_device_bytes"] is None
    assert row["unavailable"]["peak_device_bytes"]


def test_a_start_from_squared_gradients_is_a_mean_of_seconds_and_the_largest_peak(tmp_path: Path) -> None:
    outcome = make_outcome(tmp_path, {"lst": ALIKE[:2]})
    (plain,) = rows(outcome)
    assert plain["initialisation"] is None
    for record, seconds, peak in zip(outcome.runs[0].records, (1.0, 3.0), (9, 5), strict=True):
        record.measured["initialisation"] = {"examples": 7, "seconds": seconds, "peak_tracked_bytes": peak}  # type: ignore[index]
    (row,) = rows(outcome)
    assert row["initialisation"] == {"examples": 7, "seconds": 2.0, "peak_tracked_bytes": 9}


def test_the_document_names_what_was_skipped_and_where_the_records_are(tmp_path: Path) -> None:
    outcome = make_outcome(tmp_path, {"linear_probe": PROBE, "better": BETTER})
    object.__setattr__(outcome, "skipped", {"vpt": "no blocks"})
    found = document(outcome, rows(outcome), comparisons(outcome), tmp_path / "report.md")
    assert found["skipped"] == [{"method": "vpt", "reason": "no blocks"}]
    assert found["records"] == [str(path) for path in outcome.files]
    assert found["report"] == str(tmp_path / "report.md")
    assert [c["verdict"] for c in found["comparisons"]] == ["beats"]
