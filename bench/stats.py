"""Intervals and tests for scores, each with what it does and does not cover; higher scores are better."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cache.errors import SidebenchError

Verdict = Literal["beats", "loses to", "no difference shown"]
Interval = tuple[float, float]
WeightedScore = Callable[[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""(predicted (N,), targets (N,), weights (R, N)) to (R,) scores: R times, how often each example counts."""

_BLOCK_ELEMENTS = 4_000_000  # 32 MB of float64 or int64 at a time


@dataclass(frozen=True)
class PairedResult:
    """Method a against method b on the same examples; `difference` is mean score of a minus that of b."""

    difference: float
    interval: Interval
    p_value: float
    verdict: Verdict


def t_interval(values: ArrayLike, level: float = 0.95) -> Interval | None:
    """Student-t interval for the mean of `values` (S,), one score per seed; None with fewer than two seeds.

    Covers what another seed (initialisation, order of examples) would change, if scores over seeds are roughly normal.
    Does not cover the choice of test examples: those are the same for every seed.
    """
    scores = _finite(values, 1, "values")
    if len(scores) < 2:
        return None
    from scipy import stats  # close to a second to import

    half = float(stats.t.ppf((1 + level) / 2, len(scores) - 1)) * float(scores.std(ddof=1)) / len(scores) ** 0.5
    return float(scores.mean()) - half, float(scores.mean()) + half


def bootstrap_interval(
    per_example_scores: ArrayLike, seed: int, *, draws: int = 10_000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap for the mean score; `per_example_scores` (N,) is already averaged over seeds.

    Covers which test examples were drawn, for the models as they were trained. Does not cover another training seed,
    nor examples that depend on each other (frames of one video), and is too narrow below some 30 examples.
    """
    scores = _finite(per_example_scores, 1, "per_example_scores")
    means = _resampled_means(scores, draws, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_test(a: ArrayLike, b: ArrayLike, seed: int, *, draws: int = 10_000) -> PairedResult:
    """Compare per-example scores `a` and `b`, both (seeds, N) over the same N test examples in the same order.

    Scores are averaged over seeds first (the numbers of seeds may differ). Interval: 95 % paired bootstrap over the
    examples. p-value: two-sided sign-flip permutation of the per-example differences, with 1 added to both counts, so
    it is never 0. Both speak of these trained models on new examples; neither covers retraining with another seed.
    Comparing many methods, pass the p-values through `holm` and take `verdict_of` on the adjusted ones.
    """
    first, second = _finite(a, 2, "a"), _finite(b, 2, "b")
    if first.shape[1] != second.shape[1]:
        raise SidebenchError(f"a paired test needs the same examples: a has {first.shape[1]}, b has {second.shape[1]}.")
    differences = first.mean(axis=0) - second.mean(axis=0)  # (N,)
    difference = float(differences.mean())
    for_bootstrap, for_flips = np.random.SeedSequence(seed).spawn(2)
    means = _resampled_means(differences, draws, np.random.default_rng(for_bootstrap))
    low, high = np.quantile(means, [0.025, 0.975])
    flipped = _sign_flipped_means(differences, draws, np.random.default_rng(for_flips))
    rounding = 1e-12 * float(np.abs(differences).max())  # equal sums in another order must count as equal
    p_value = (1 + int(np.count_nonzero(np.abs(flipped) >= abs(difference) - rounding))) / (draws + 1)
    return PairedResult(difference, (float(low), float(high)), p_value, verdict_of(difference, p_value))


def bootstrap_score(
    score: WeightedScore,
    predicted: ArrayLike,
    targets: ArrayLike,
    seed: int,
    *,
    draws: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """`bootstrap_interval` for a score that is no mean over examples; `predicted` (seeds, N), `targets` (N,).

    In every resample each seed is scored anew, and their scores are averaged.
    """
    cells, counts = _cells(_finite(targets, 1, "targets"), _finite(predicted, 2, "predicted"))
    found = _resampled(lambda weights: _mean_score(score, cells[1:], cells[0], weights), counts, draws, seed)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_score_test(
    score: WeightedScore, a: ArrayLike, b: ArrayLike, targets: ArrayLike, seed: int, *, draws: int = 10_000
) -> PairedResult:
    """`paired_test` for a score that is no mean over examples; `a` and `b` (seeds, N) are predictions.

    Interval: 95 % paired bootstrap over the examples. p-value: two-sided permutation, in which the predictions of a and
    b for an example (of all seeds at once) are swapped or not; for accuracy that is the sign-flip test. Exact where the
    two are interchangeable on every example, so numbers must be on one scale. Source: Noreen 1989, as Yeh 2000
    (COLING, cs/0008005) has it for F1.
    """
    first, second, wanted = _finite(a, 2, "a"), _finite(b, 2, "b"), _finite(targets, 1, "targets")
    if first.shape != second.shape or first.shape[1] != len(wanted):
        raise SidebenchError(
            "a paired test of scores needs the same examples and seeds: "
            f"a has {first.shape}, b has {second.shape}, there are {len(wanted)} targets."
        )
    cells, counts = _cells(wanted, np.concatenate([first, second]))
    target, one, other = cells[0], cells[1 : 1 + len(first)], cells[1 + len(first) :]

    def difference(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return _mean_score(score, one, target, weights) - _mean_score(score, other, target, weights)

    observed = float(difference(counts[None].astype(np.float64))[0])
    for_bootstrap, for_swaps = np.random.SeedSequence(seed).spawn(2)
    low, high = np.quantile(_resampled(difference, counts, draws, for_bootstrap), [0.025, 0.975])
    rng = np.random.default_rng(for_swaps)
    either, twice = np.concatenate([one, other], axis=1), np.concatenate([target, target])
    reached = 0
    for part in _blocks(draws, 2 * len(counts)):
        swapped = rng.binomial(counts, 0.5, size=(part.stop - part.start, len(counts)))
        weights = np.concatenate([counts - swapped, swapped], axis=1).astype(np.float64)
        mirrored = np.concatenate([swapped, counts - swapped], axis=1).astype(np.float64)
        found = _mean_score(score, either, twice, weights) - _mean_score(score, either, twice, mirrored)
        reached += int(np.count_nonzero(np.abs(found) >= abs(observed) - 1e-12))  # equal sums in another order
    p_value = (1 + reached) / (draws + 1)
    return PairedResult(observed, (float(low), float(high)), p_value, verdict_of(observed, p_value))


def verdict_of(difference: float, p_value: float, level: float = 0.05) -> Verdict:
    """Say in words what a (possibly adjusted) p-value allows to say."""
    if p_value >= level or difference == 0:
        return "no difference shown"
    return "beats" if difference > 0 else "loses to"


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjustment of p-values (M,), in the given order.

    Calling everything below 0.05 significant then keeps the chance of even one false call below 0.05 in that family
    of M comparisons, however they depend on each other; other families are not covered. Source: Holm 1979.
    """
    values = _finite(p_values, 1, "p_values", may_be_empty=True)
    if np.any((values < 0) | (values > 1)):
        raise SidebenchError("p_values must lie between 0 and 1.")
    order = np.argsort(values, kind="stable")
    factors = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    return adjusted


def _finite(values: ArrayLike, dimensions: int, name: str, *, may_be_empty: bool = False) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions:
        raise SidebenchError(f"{name} must have {dimensions} dimension(s), found shape {array.shape}.")
    if array.size == 0 and not may_be_empty:
        raise SidebenchError(f"{name} is empty.")
    if not np.isfinite(array).all():
        raise SidebenchError(f"{name} holds NaN or infinity: a failed run has no score, leave it out and say so.")
    return array


def _cells(
    targets: NDArray[np.float64], predicted: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Examples that no score can tell apart, once: (1 + seeds, cells) of targets and predictions, and how many each."""
    found, counts = np.unique(np.concatenate([targets[None], predicted]), axis=1, return_counts=True)
    return found, counts


def _mean_score(
    score: WeightedScore, predicted: NDArray[np.float64], targets: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    return np.mean([score(one, targets, weights) for one in predicted], axis=0)


def _resampled(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    counts: NDArray[np.int64],
    draws: int,
    seed: int | np.random.SeedSequence,
) -> NDArray[np.float64]:
    """The statistic (draws,) of as many examples drawn with replacement."""
    rng, examples = np.random.default_rng(seed), int(counts.sum())
    found = np.empty(draws)
    for part in _blocks(draws, len(counts)):
        size = part.stop - part.start
        found[part] = statistic(rng.multinomial(examples, counts / examples, size=size).astype(np.float64))
    return found


def _few_values(values: NDArray[np.float64], n: int) -> bool:
    """Accuracy takes few values; then one random count for each value replaces N random numbers, by the same law."""
    return len(values) * 8 <= n


def _resampled_means(scores: NDArray[np.float64], draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means (draws,) of N examples drawn with replacement."""
    n = len(scores)
    values, counts = np.unique(scores, return_counts=True)
    if _few_values(values, n):
        weights = counts / n
        return np.asarray(rng.multinomial(n, weights / weights.sum(), size=draws) @ values / n, dtype=np.float64)
    means = np.empty(draws)
    for part in _blocks(draws, n):
        drawn = rng.integers(0, n, size=(part.stop - part.start, n))
        means[part] = scores[drawn].mean(axis=1)
    return means


def _sign_flipped_means(differences: NDArray[np.float64], draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means (draws,) with the sign of each of the N differences drawn anew."""
    n = len(differences)
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    few = _few_values(sizes, n)
    sums = np.empty(draws)
    for part in _blocks(draws, len(sizes) if few else n):
        block = part.stop - part.start
        if few:
            sums[part] = (2 * rng.binomial(counts, 0.5, size=(block, len(sizes))) - counts) @ sizes
        else:
            bits = rng.integers(0, 256, size=(block, -(-n // 8)), dtype=np.uint8)
            positive = np.unpackbits(bits, axis=1, count=n)
            sums[part] = 2 * (positive @ differences) - differences.sum()
    return sums / n


def _blocks(draws: int, elements_per_draw: int) -> Iterator[slice]:
    block = max(1, _BLOCK_ELEMENTS // elements_per_draw)
    for start in range(0, draws, block):
        yield slice(start, min(start + block, draws))
