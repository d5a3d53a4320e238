"""What every task has: examples, classes, splits, the pooling of tokens and the score."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...cache.examples import Examples

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True)
class Split:
    """Sorted example indices of the three parts; disjoint."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]

    def sizes(self) -> dict[str, int]:
        """Number of examples per part, as the JSON of the command line prints it."""
        return {"train": len(self.train), "val": len(self.val), "test": len(self.test)}


@dataclass(frozen=True)
class Task:
    """Single-label classification; the pooling and the score are the task's, so they are the same for every method."""

    uri: str
    examples: Examples
    classes: tuple[str, ...]
    parts: tuple[str, ...] | None  # the split column: "train" | "val" | "test" per example; None: split it ourselves
    pooling: Pooling = "mean"
    score_name: str = "accuracy"
