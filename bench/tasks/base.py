"""What every task has: examples, classes or numbers, splits, the pooling of tokens and the score."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...cache.examples import Examples
from .score import ACCURACY

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
    """Single-label classification, or regression of one number; pooling, loss and score are the same for all methods.

    Targets are class indices. The classes of a regression are its distinct numbers, and `values` says each one's.
    """

    uri: str
    examples: Examples
    classes: tuple[str, ...]
    parts: tuple[str, ...] | None  # the split column: "train" | "val" | "test" per example; None: split it ourselves
    pooling: Pooling = "mean"
    score_name: str = ACCURACY
    values: tuple[float, ...] | None = None
    has_own_classes: bool = False  # as published, rather than found in the examples: some may not occur in train

    @property
    def num_outputs(self) -> int:
        """How wide the head is: one output per class, or one number."""
        return len(self.classes) if self.values is None else 1
