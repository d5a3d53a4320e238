"""Statistics against scipy, against slow references written out here, and against what they promise in simulation."""

import resource
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from sidebench.bench.stats import (
    bootstrap_interval,
    bootstrap_score,
    holm,
    paired_score_test,
    paired_test,
    t_interval,
    verdict_of,
)
from sidebench.bench.tasks.score import ACCURACY, ACCURACY_AND_F1, CORRELATIONS, MATTHEWS, score_named
from sidebench.cache.errors import SidebenchError

scores = st.lists(st.floats(0, 1, allow_nan=False, width=32), min_size=2, max_size=12)


def _naive_bootstrap(values: NDArray[np.float64], seed: int, draws: int = 10_000) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    means = [float(rng.choice(values, size=len(values)).mean()) for _ in range(draws)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _exact_sign_flip_p(differences: NDArray[np.float64]) -> float:
    """All 2^N sign patterns, one by one."""
    n = len(differences)
    observed = abs(differences.sum())
    patterns = (np.array([1 - 2 * (pattern >> bit & 1) for bit in range(n)]) for pattern in range(2**n))
    return sum(abs(signs @ differences) >= observed - 1e-12 for signs in patterns) / 2**n


@settings(deadline=None)
@given(scores)
def test_the_t_interval_is_scipys(values: list[float]) -> None:
    interval = t_interval(values)
    assert interval is not None
    mean, error = np.mean(values), scipy_stats.sem(values)
    expected = scipy_stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error) if error > 0 else (mean, mean)
    assert interval == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("values", [[], [0.7]])
def test_fewer_than_two_seeds_have_no_interval(values: list[float]) -> None:
    if values:
        assert t_interval(values) is None
    else:
        with pytest.raises(SidebenchError, match="empty"):
            t_interval(values)


def test_the_t_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        interval = t_interval(rng.normal(0.7, 0.02, size=5))
        assert interval is not None
        hits += interval[0] <= 0.7 <= interval[1]
    assert hits / 2000 == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("kind", ["accuracy", "continuous"])
def test_the_bootstrap_agrees_with_a_naive_one(kind: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, (3, 200)).mean(axis=0) if kind == "accuracy" else rng.random(200)
    standard_error = values.std() / 200**0.5
    assert bootstrap_interval(values, 1) == pytest.approx(_naive_bootstrap(values, 2), abs=0.08 * standard_error)


@pytest.mark.parametrize("kind", ["accuracy", "continuous"])
def test_the_bootstrap_covers_as_often_as_it_says(kind: str) -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(400):
        values = (rng.random(200) < 0.7).astype(float) if kind == "accuracy" else rng.normal(0.7, 0.1, 200)
        low, high = bootstrap_interval(values, trial, draws=1000)
        hits += low <= 0.7 <= high
    assert hits / 400 == pytest.approx(0.95, abs=0.035)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(0).random(100)
    assert bootstrap_interval(values, 3, draws=500) == bootstrap_interval(values, 3, draws=500)
    assert bootstrap_interval(values, 3, draws=500) != bootstrap_interval(values, 4, draws=500)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_a_hundred_thousand_examples_take_little_memory() -> None:
    values = np.random.default_rng(0).random(100_000)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bootstrap_interval(values, 0, draws=200)
    paired_test(values[None], values[None, ::-1], 0, draws=200)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 200_000


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=9))
def test_the_p_value_is_that_of_all_sign_patterns(differences: list[float]) -> None:
    values = np.array(differences)
    result = paired_test(values[None], np.zeros((1, len(values))), 0)
    assert result.p_value == pytest.approx(_exact_sign_flip_p(values), abs=0.025)


def test_the_p_value_of_many_equal_differences_is_that_of_a_sign_test() -> None:
    a = np.zeros((1, 100))
    a[0, :12] = 1  # a wins 12 examples, b wins 4, the rest is equal: few values, so flips are counted by binomials
    b = np.zeros((1, 100))
    b[0, 20:24] = 1
    exact = scipy_stats.binomtest(4, 16).pvalue
    assert paired_test(a, b, 0).p_value == pytest.approx(exact, abs=0.012)


@pytest.mark.parametrize("kind", ["accuracy", "continuous"])
def test_under_the_null_the_p_value_is_near_uniform(kind: str) -> None:
    rng = np.random.default_rng(0)
    p_values = []
    for trial in range(400):
        if kind == "accuracy":
            a, b = rng.integers(0, 2, (2, 3, 400))
        else:
            a, b = rng.normal(size=(2, 3, 60))
        p_values.append(paired_test(a, b, trial, draws=300).p_value)
    assert scipy_stats.kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.033)


@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_identical_methods_do_not_differ(seeds: int, examples: int, seed: int) -> None:
    a = np.random.default_rng(seed).random((seeds, examples))
    result = paired_test(a, a, seed, draws=50)
    assert (result.difference, result.interval, result.p_value) == (0.0, (0.0, 0.0), 1.0)
    assert result.verdict == "no difference shown"


def test_a_clear_winner_beats_and_the_loser_loses() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.random((3, 500)) < 0.8).astype(float), (rng.random((3, 500)) < 0.6).astype(float)
    won, lost = paired_test(a, b, 0), paired_test(b, a, 0)
    assert won.verdict == "beats"
    assert lost.verdict == "loses to"
    assert won.difference == pytest.approx(-lost.difference) == pytest.approx(a.mean() - b.mean())
    assert won.interval[0] > 0
    assert won.p_value == 1 / 10_001  # the smallest there is: it is never 0


def test_the_pairing_is_by_example() -> None:
    easy = np.random.default_rng(0).random(300)  # examples differ much, the methods by little but always
    result = paired_test(easy[None] + 0.01, easy[None], 0)
    assert result.verdict == "beats"
    assert result.interval == pytest.approx((0.01, 0.01), abs=1e-9)


def test_methods_may_have_different_numbers_of_seeds() -> None:
    a, b = np.ones((5, 20)), np.zeros((2, 20))
    assert paired_test(a, b, 0).difference == 1.0


def test_different_examples_cannot_be_paired() -> None:
    with pytest.raises(SidebenchError, match="a has 3, b has 4"):
        paired_test(np.zeros((1, 3)), np.zeros((1, 4)), 0)


def test_a_failed_run_has_no_score() -> None:
    with pytest.raises(SidebenchError, match="NaN"):
        bootstrap_interval([0.5, float("nan")], 0)


def test_scores_without_a_seed_axis_are_refused() -> None:
    with pytest.raises(SidebenchError, match=r"2 dimension\(s\), found shape \(3,\)"):
        paired_test(np.zeros(3), np.zeros(3), 0)


def test_holm_adjusts_a_worked_example() -> None:
    # 0.01 x 4, 0.02 x 3, then 0.03 x 2 and 0.04 x 1 may not fall below the one before
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert len(holm([])) == 0


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_lies_between_raw_and_bonferroni(p_values: list[float]) -> None:
    raw, adjusted = np.array(p_values), holm(p_values)
    assert np.all(adjusted >= raw)
    assert np.all(adjusted <= np.minimum(1, raw * len(raw)) + 1e-12)
    assert np.all(np.diff(adjusted[np.argsort(raw, kind="stable")]) >= 0)


def test_p_values_outside_their_range_are_refused() -> None:
    with pytest.raises(SidebenchError, match="between 0 and 1"):
        holm([0.5, 1.5])


@pytest.mark.parametrize(
    ("difference", "p_value", "verdict"),
    [
        (0.1, 0.049, "beats"),
        (-0.1, 0.049, "loses to"),
        (0.1, 0.05, "no difference shown"),
        (0.0, 0.001, "no difference shown"),
    ],
)
def test_the_verdict_needs_a_p_value_below_the_level(difference: float, p_value: float, verdict: str) -> None:
    assert verdict_of(difference, p_value) == verdict


# Scores that are no mean over examples


def _predictions(examples: int, seed: int, right: tuple[float, float] = (0.8, 0.8)) -> tuple[NDArray[np.float64], ...]:
    """Two methods of two seeds, right as often as said, and the targets."""
    rng = np.random.default_rng(seed)
    targets = (rng.random(examples) < 0.6).astype(float)
    methods = [np.where(rng.random((2, examples)) < share, targets, 1 - targets) for share in right]
    return methods[0], methods[1], targets


def _scored(predicted: NDArray[np.float64], targets: NDArray[np.float64], name: str = MATTHEWS) -> float:
    once = np.ones((1, len(targets)))
    return float(np.mean([score_named(name).weighted(one, targets, once)[0] for one in predicted]))


def test_the_bootstrap_of_a_score_agrees_with_one_that_draws_examples() -> None:
    a, _, targets = _predictions(80, seed=0)
    rng = np.random.default_rng(9)
    draws = [rng.integers(0, 80, 80) for _ in range(2000)]
    expected = np.quantile([_scored(a[:, drawn], targets[drawn]) for drawn in draws], [0.025, 0.975])
    assert bootstrap_score(score_named(MATTHEWS).weighted, a, targets, 0) == pytest.approx(expected, abs=0.02)


def test_the_bootstrap_of_accuracy_as_a_score_is_that_of_its_mean() -> None:
    a, _, targets = _predictions(200, seed=1)
    expected = bootstrap_interval((a == targets).mean(0), 0)
    assert bootstrap_score(score_named(ACCURACY).weighted, a, targets, 0) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("name", [MATTHEWS, ACCURACY_AND_F1, CORRELATIONS])
def test_the_p_value_of_a_score_is_that_of_all_swaps(name: str) -> None:
    a, b, targets = _predictions(10, seed=3, right=(0.9, 0.5))
    observed = abs(_scored(a, targets, name) - _scored(b, targets, name))
    reached = 0
    for pattern in range(2**10):
        swap = np.array([pattern >> bit & 1 for bit in range(10)], dtype=bool)
        one, other = np.where(swap, b, a), np.where(swap, a, b)
        reached += abs(_scored(one, targets, name) - _scored(other, targets, name)) >= observed - 1e-12
    found = paired_score_test(score_named(name).weighted, a, b, targets, 0)
    assert found.p_value == pytest.approx(reached / 2**10, abs=0.02)
    assert found.difference == pytest.approx(_scored(a, targets, name) - _scored(b, targets, name))


def test_swapping_tests_accuracy_as_flipping_signs_does() -> None:
    a, b, targets = _predictions(60, seed=4, right=(0.9, 0.8))
    flips = paired_test(a == targets, b == targets, 0)
    swaps = paired_score_test(score_named(ACCURACY).weighted, a, b, targets, 0)
    assert swaps.difference == pytest.approx(flips.difference)
    assert swaps.p_value == pytest.approx(flips.p_value, abs=0.02)
    assert swaps.interval == pytest.approx(flips.interval, abs=0.02)


@pytest.mark.parametrize("name", [MATTHEWS, ACCURACY_AND_F1])
def test_under_the_null_few_scores_are_called_different(name: str) -> None:
    p_values = []
    for seed in range(200):
        a, b, targets = _predictions(60, seed=100 + seed)
        p_values.append(paired_score_test(score_named(name).weighted, a, b, targets, 0, draws=300).p_value)
    assert np.mean(np.array(p_values) < 0.05) < 0.09
    assert np.mean(np.array(p_values) < 0.5) == pytest.approx(0.5, abs=0.12)


def test_numbers_are_drawn_one_by_one() -> None:
    rng = np.random.default_rng(5)
    targets = rng.random(300)
    good, bad = targets + rng.normal(0, 0.1, (2, 300)), targets + rng.normal(0, 1.0, (2, 300))
    found = paired_score_test(score_named(CORRELATIONS).weighted, good, bad, targets, 0, draws=500)
    assert (found.verdict, found.p_value) == ("beats", 1 / 501)
    assert 0 < found.interval[0] < found.difference < found.interval[1] < 1


def test_the_same_predictions_do_not_differ_in_any_score() -> None:
    a, _, targets = _predictions(40, seed=6)
    found = paired_score_test(score_named(MATTHEWS).weighted, a, a, targets, 0, draws=100)
    assert (found.difference, found.interval, found.p_value) == (0, (0, 0), 1)
    assert found.verdict == "no difference shown"


def test_scores_of_other_examples_or_seeds_cannot_be_paired() -> None:
    a, b, targets = _predictions(40, seed=7)
    for other, wanted in ((b[:, :-1], targets), (b[:1], targets), (b, targets[:-1])):
        with pytest.raises(SidebenchError, match="same examples and seeds"):
            paired_score_test(score_named(MATTHEWS).weighted, a, other, wanted, 0)
