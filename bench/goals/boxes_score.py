"""How well expressions are grounded: precision at 1, 5 and 10 of boxes that overlap the right one by half.

Kept is how many boxes that miss are scored at least as high as the first that hits; ties count against. The released
MDETR code (arXiv 2104.12763) takes GIoU where the literature says IoU: both are reported, IoU is the score.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...cache.store import Index
from ..tasks.score import Numbers
from .overlap import overlaps

PLACES = (1, 5, 10)
NOWHERE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Grounded:
    """Place (N,) of the first box that hits, 0 being the top; NOWHERE where none does."""

    by_iou: Index
    by_giou: Index

    def contributions(self) -> Numbers:
        """(N,) 1 where the box with the highest score hits by IoU: the mean is P@1."""
        return (self.by_iou == 0).astype(np.float64)

    def figures(self) -> dict[str, float]:
        """Precisions as fractions."""
        return {f"P@{k}": float(np.mean(self.by_iou < k)) for k in PLACES} | {
            f"P@{k} by GIoU": float(np.mean(self.by_giou < k)) for k in PLACES
        }


def grounded(
    scores: NDArray[np.floating[Any]],
    boxes: NDArray[np.floating[Any]],
    wanted: NDArray[np.floating[Any]],
    *,
    at: float = 0.5,
) -> Grounded:
    """Places of `wanted` (N, 4) among `boxes` (N, Q, 4) with `scores` (N, Q); boxes as corners in the same unit."""
    found, right = (torch.from_numpy(some.astype(np.float64)) for some in (boxes, wanted[:, None]))
    by_iou, by_giou = (_places(scores.astype(np.float64), overlap.numpy() >= at) for overlap in overlaps(found, right))
    return Grounded(by_iou, by_giou)


def _places(scores: Numbers, hits: NDArray[np.bool_]) -> Index:
    """How many misses are scored at least as high as the best hit. A score that is no number is one to a miss only."""
    best = np.where(hits & ~np.isnan(scores), scores, -np.inf).max(1, keepdims=True)
    before = (~hits & ~(scores < best)).sum(1)
    return np.where(best[:, 0] > -np.inf, before, NOWHERE)
