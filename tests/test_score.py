"""What tasks are scored by, against loops in float64 and scipy, with and without weights."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from sidebench.bench.tasks.score import (
    ACCURACY,
    ACCURACY_AND_F1,
    CORRELATIONS,
    MATTHEWS,
    accuracy,
    f1,
    matthews,
    pearson,
    score_named,
    spearman,
)
from sidebench.cache.errors import SidebenchError

pairs_of_classes = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30)
few_numbers = st.integers(-3, 3).map(lambda i: i / 2)  # few, so that there are ties
pairs_of_numbers = st.lists(st.tuples(few_numbers, few_numbers), min_size=2, max_size=20)


def _counts(pairs: list[tuple[int, int]]) -> tuple[int, int, int, int]:
    found = {(p, t): 0 for p in (0, 1) for t in (0, 1)}
    for pair in pairs:
        found[pair] += 1
    return found[1, 1], found[1, 0], found[0, 1], found[0, 0]


def _naive_f1(pairs: list[tuple[int, int]]) -> float:
    tp, fp, fn, _ = _counts(pairs)
    if not tp:
        return 0.0
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return 2 * precision * recall / (precision + recall)


def _naive_matthews(pairs: list[tuple[int, int]]) -> float:
    tp, fp, fn, tn = _counts(pairs)
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(below) if below else 0.0


def _naive_pearson(pairs: list[tuple[float, float]]) -> float:
    n = len(pairs)
    mean = [math.fsum(pair[side] for pair in pairs) / n for side in (0, 1)]
    both = math.fsum((x - mean[0]) * (y - mean[1]) for x, y in pairs)
    spread = [math.fsum((pair[side] - mean[side]) ** 2 for pair in pairs) for side in (0, 1)]
    return both / math.sqrt(spread[0] * spread[1]) if min(spread) > 1e-12 else 0.0


def _naive_spearman(pairs: list[tuple[float, float]]) -> float:
    def rank(side: int, value: float) -> float:
        below = sum(pair[side] < value for pair in pairs)
        return below + (sum(pair[side] == value for pair in pairs) + 1) / 2

    return _naive_pearson([(rank(0, x), rank(1, y)) for x, y in pairs])


def _columns(pairs: list[tuple[float, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    columns = np.array(pairs, dtype=np.float64).T
    return columns[0], columns[1]


@given(pairs_of_classes)
def test_scores_of_classes_are_those_of_their_definitions(pairs: list[tuple[int, int]]) -> None:
    once = np.ones((1, len(pairs)))
    assert accuracy(*_columns(pairs), once)[0] == pytest.approx(sum(p == t for p, t in pairs) / len(pairs), abs=1e-12)
    assert f1(*_columns(pairs), once)[0] == pytest.approx(_naive_f1(pairs), abs=1e-12)
    assert matthews(*_columns(pairs), once)[0] == pytest.approx(_naive_matthews(pairs), abs=1e-12)


@given(pairs_of_numbers)
def test_correlations_are_those_of_their_definitions(pairs: list[tuple[float, float]]) -> None:
    once = np.ones((1, len(pairs)))
    assert pearson(*_columns(pairs), once)[0] == pytest.approx(_naive_pearson(pairs), abs=1e-9)
    assert spearman(*_columns(pairs), once)[0] == pytest.approx(_naive_spearman(pairs), abs=1e-9)


def test_correlations_of_long_columns_are_scipys() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 26, 700) / 5
    predicted = targets + rng.normal(0, 1, 700)
    once = np.ones((1, 700))
    assert pearson(predicted, targets, once)[0] == pytest.approx(scipy_stats.pearsonr(predicted, targets)[0], abs=1e-12)
    expected = scipy_stats.spearmanr(predicted, targets)[0]
    assert spearman(predicted, targets, once)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("part", [accuracy, f1, matthews, pearson, spearman])
def test_a_weight_is_so_many_copies_of_the_example(part: object) -> None:
    assert callable(part)
    rng = np.random.default_rng(1)
    predicted, targets = rng.integers(0, 2, (2, 12)).astype(float)
    weights = rng.integers(0, 4, (5, 12)).astype(float)
    found = part(predicted, targets, weights)
    for row, value in zip(weights.astype(int), found, strict=True):
        expanded = np.repeat(predicted, row), np.repeat(targets, row)
        assert value == pytest.approx(part(*expanded, np.ones((1, row.sum())))[0], abs=1e-12)


def test_a_score_of_two_figures_is_their_mean_and_keeps_both() -> None:
    logits = np.array([[0, 1], [0, 1], [1, 0], [1, 0]], dtype=np.float32)
    targets = np.array([1, 0, 0, 0])
    score = score_named(ACCURACY_AND_F1)
    assert score.measured(logits, targets) == pytest.approx({"accuracy": 0.75, "F1": 2 / 3})
    assert score.value(logits, targets) == pytest.approx((0.75 + 2 / 3) / 2)


def test_no_correlation_notices_the_scale_of_the_outputs_and_all_notice_the_sign() -> None:
    rng = np.random.default_rng(2)
    targets = rng.random(30).astype(np.float32)
    outputs = (targets + rng.normal(0, 0.1, 30))[:, None].astype(np.float32)
    score = score_named(CORRELATIONS)
    value = score.value(outputs, targets)
    assert value > 0.8
    assert score.value(7 * outputs + 100, targets) == pytest.approx(value, abs=1e-3)
    assert score.value(-outputs, targets) == pytest.approx(-value, abs=1e-6)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_outputs_that_do_not_vary_or_are_not_finite_correlate_with_nothing(broken: float) -> None:
    score, targets = score_named(CORRELATIONS), np.arange(5, dtype=np.float32)
    assert score.value(np.full((5, 1), 0.1, dtype=np.float32), targets) == 0
    alike = np.full(3, 0.1)  # whose mean is not quite 0.1
    assert pearson(alike, alike, np.ones((1, 3))) == 0
    assert score.value(np.array([[1], [2], [broken], [4], [5]], dtype=np.float32), targets) == 0


def test_one_class_predicted_has_no_matthews_correlation() -> None:
    assert score_named(MATTHEWS).value(np.array([[1, 0]] * 4, dtype=np.float32), np.array([0, 1, 1, 0])) == 0


def test_a_mistyped_score_is_a_sentence() -> None:
    with pytest.raises(SidebenchError, match=r"no score 'acuracy'\. Did you mean 'accuracy'"):
        score_named("acuracy")
    assert score_named(ACCURACY).name == "accuracy"
