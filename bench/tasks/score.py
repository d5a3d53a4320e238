"""What a task is scored by, in float64: classes by accuracy, F1 or Matthews correlation, numbers by correlation.

A score is computed with weights: how often each test example counts. With ones it is the score itself, with the counts
of a resample it is that resample's, so intervals and tests need no second implementation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import unknown

Numbers = NDArray[np.float64]
Weighted = Callable[[Numbers, Numbers, Numbers], Numbers]
"""(predicted (N,), targets (N,), weights (R, N)) to (R,) scores."""


@dataclass(frozen=True)
class Score:
    """One or more figures whose mean is the score; higher is better, 1 is perfect."""

    name: str
    parts: Mapping[str, Weighted]
    of_numbers: bool = False  # of one number per example (a regression), not of a class
    of_examples: bool = False  # a mean of what each test example adds, which a run keeps as `contributions`: no parts
    is_fraction: bool = True  # of 1, and shown in percent; else in its natural unit

    def weighted(self, predicted: Numbers, targets: Numbers, weights: Numbers) -> Numbers:
        """(R,) scores of predictions (N,) as `read` gives them, under weights (R, N)."""
        return np.mean([part(predicted, targets, weights) for part in self.parts.values()], axis=0)

    def read(self, outputs: NDArray[np.float32]) -> Numbers:
        """What is scored of outputs (N, K): the class of the largest logit, or the number, standardised.

        No correlation notices a scale; on a common one the numbers of two methods can be swapped for each other.
        """
        if not self.of_numbers:
            return outputs.argmax(1).astype(np.float64)
        numbers = outputs[:, 0].astype(np.float64)
        if not np.isfinite(numbers).all():
            return np.zeros(len(numbers))  # which correlates with nothing
        spread = numbers.std()
        return (numbers - numbers.mean()) / (spread if spread > 0 else 1.0)

    def measured(self, outputs: NDArray[np.float32], targets: NDArray[np.generic]) -> dict[str, float]:
        """Each part on outputs (N, K) and targets (N,): class indices, or numbers."""
        predicted, wanted, once = self.read(outputs), targets.astype(np.float64), np.ones((1, len(targets)))
        return {name: float(part(predicted, wanted, once)[0]) for name, part in self.parts.items()}

    def value(self, outputs: NDArray[np.float32], targets: NDArray[np.generic]) -> float:
        """The score itself."""
        return float(np.mean(list(self.measured(outputs, targets).values())))


def accuracy(predicted: Numbers, targets: Numbers, weights: Numbers) -> Numbers:
    """Share of examples whose class is right."""
    return weights @ (predicted == targets) / weights.sum(1)


def f1(predicted: Numbers, targets: Numbers, weights: Numbers) -> Numbers:
    """Harmonic mean of precision and recall of class 1; 0 where there is nothing to find and nothing found."""
    tp, fp, fn, _ = _confusion(predicted, targets, weights)
    return _ratio(2 * tp, 2 * tp + fp + fn)


def matthews(predicted: Numbers, targets: Numbers, weights: Numbers) -> Numbers:
    """Matthews correlation of two classes (Biochim. Biophys. Acta 405, 1975); 0 where all are of one class."""
    tp, fp, fn, tn = _confusion(predicted, targets, weights)
    return _ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def pearson(predicted: Numbers, targets: Numbers, weights: Numbers) -> Numbers:
    """Pearson correlation; 0 (ours: it is not defined) where one side does not vary."""
    return _correlation(predicted[None], targets[None], weights)


def spearman(predicted: Numbers, targets: Numbers, weights: Numbers) -> Numbers:
    """Pearson correlation of the ranks, equal numbers sharing their mean rank."""
    return _correlation(_ranks(predicted, weights), _ranks(targets, weights), weights)


def _confusion(predicted: Numbers, targets: Numbers, weights: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Weights of (true positives, false positives, false negatives, true negatives), class 1 being the positive."""
    yes, right = predicted == 1, predicted == targets
    return weights @ (yes & right), weights @ (yes & ~right), weights @ (~yes & ~right), weights @ (~yes & right)


def _correlation(x: Numbers, y: Numbers, weights: Numbers) -> Numbers:
    """Of x and y (R, N) or (1, N). Their moments are taken about a mean, so that little cancels."""
    total = weights.sum(1)
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    weighted_x, weighted_y = weights * x, weights * y
    mean_x, mean_y = weighted_x.sum(1) / total, weighted_y.sum(1) / total
    spread = [
        np.where(square - mean**2 > 1e-12 * square, square - mean**2, 0)  # a constant's is not quite 0
        for square, mean in ((_sum(weighted_x, x) / total, mean_x), (_sum(weighted_y, y) / total, mean_y))
    ]
    return _ratio(_sum(weighted_x, y) / total - mean_x * mean_y, np.sqrt(spread[0] * spread[1]))


def _sum(a: Numbers, b: Numbers) -> Numbers:
    return np.asarray(np.einsum("rn,rn->r", a, b))


def _ranks(values: Numbers, weights: Numbers) -> Numbers:
    """(R, N) mean rank of every example among `weights` copies of each."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks = counts.cumsum(1) - (counts - 1) / 2
    group = np.empty(len(values), dtype=np.int64)
    group[order] = np.repeat(np.arange(len(starts)), np.diff([*starts, len(values)]))
    return ranks[:, group]


def _ratio(above: Numbers, below: Numbers) -> Numbers:
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below > 0)


ACCURACY = "accuracy"
MATTHEWS = "Matthews correlation"
ACCURACY_AND_F1 = "accuracy and F1"
CORRELATIONS = "Pearson and Spearman"
RSUM = "Rsum"
SOFT_ACCURACY = "soft accuracy"  # VQA's
EXACT_MATCH = "exact match"  # GQA's
PRECISION_AT_1 = "P@1"
NATURAL = (RSUM, "MedR", "MeanR", "MdR", "MnR")  # ends of the names of figures that are no fractions
_SCORES = {
    score.name: score
    for score in (
        Score(ACCURACY, {"accuracy": accuracy}),
        Score(MATTHEWS, {"Matthews correlation": matthews}),
        Score(ACCURACY_AND_F1, {"accuracy": accuracy, "F1": f1}),
        Score(CORRELATIONS, {"Pearson": pearson, "Spearman": spearman}, of_numbers=True),
        Score(RSUM, {}, of_examples=True, is_fraction=False),
        Score(SOFT_ACCURACY, {}, of_examples=True),
        Score(EXACT_MATCH, {}, of_examples=True),
        Score(PRECISION_AT_1, {}, of_examples=True),
    )
}


def shown(name: str, value: float) -> float:
    """A score (or a difference of two) as it is printed: fractions in percent, others as they are."""
    return 100 * value if score_named(name).is_fraction else value


def printed(name: str, value: float) -> str:
    """The same as text."""
    return f"{shown(name, value):.2f}{' %' if score_named(name).is_fraction else ''}"


def unit(name: str) -> str:
    """What stands behind the name of the score in a heading."""
    return f"{name} %" if score_named(name).is_fraction else name


def score_named(name: str) -> Score:
    """The score of this name, as a task and a record have it. Raises SidebenchError for another name."""
    if name not in _SCORES:
        raise unknown("score", name, _SCORES)
    return _SCORES[name]
