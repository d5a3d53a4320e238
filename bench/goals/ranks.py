"""How well captions and what they describe find each other: ranks, recalls and Rsum, in float64.

Images (as VSE++ has it, arXiv 1707.05612, with five folds for COCO-1K): an image searches among all captions, and the
best of its own counts. Videos (MSVD as in CLIP4Clip, arXiv 2104.08860): a video searches among videos, each of
which stands for its best caption, so a rival with three better captions costs one place where an image would lose
three. Recall at 1 is the same either way, and with one caption per item everything is. A caption always searches among
the items. Ties count against, and so does what is not a number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import SidebenchError
from ...cache.store import Index
from ..tasks.score import Numbers

RECALLS = (1, 5, 10)
_TIE = 1e-12  # of cosines in float64: what the order of a sum changes is a tie
_BLOCK_ELEMENTS = 4_000_000  # 32 MB of similarities at a time


@dataclass(frozen=True)
class OneWay:
    """What was found in one direction, the mean over folds. The first rank is 1."""

    recalls: tuple[float, ...]  # fractions, in the order of RECALLS
    median: float  # of images rounded down, as published
    mean: float


@dataclass(frozen=True)
class Ranks:
    """How many wrong candidates come before the right one; 0 is found first."""

    items: Index  # (I,) of an item's best caption
    captions: Index  # (C,) of a caption's item
    owner: Index  # (C,) item that each caption describes
    folds: int = 1
    video: bool = False

    def contributions(self) -> Numbers:
        """(I,) what each item and its captions add, so that the mean is `rsum`: percent, 0 to 600.

        A caption weighs so that the captions of every fold together weigh as much as the fold's items.
        """
        size = len(self.items) // self.folds
        per_fold = np.bincount(self.owner // size, minlength=self.folds)
        hits = (self.captions[:, None] < RECALLS).sum(1) * (size / per_fold)[self.owner // size]
        of_captions = np.bincount(self.owner, weights=hits, minlength=len(self.items))
        return 100 * ((self.items[:, None] < RECALLS).sum(1) + of_captions)

    @property
    def rsum(self) -> float:
        """Sum of the six recalls in percent."""
        return float(self.contributions().mean())

    @cached_property
    def to_text(self) -> OneWay:
        """Items in search of a caption."""
        return self._one_way(self.items, np.arange(len(self.items)))

    @cached_property
    def to_visual(self) -> OneWay:
        """Captions in search of their item."""
        return self._one_way(self.captions, self.owner)

    def figures(self) -> dict[str, float]:
        """All of it under the names that are published: Rsum in percent, recalls as fractions, ranks from 1."""
        seen, median, mean = ("V", "MdR", "MnR") if self.video else ("I", "MedR", "MeanR")
        named = {"Rsum": self.rsum}
        for way, found in ((f"{seen}→T", self.to_text), (f"T→{seen}", self.to_visual)):
            named |= {f"{way} R@{k}": recall for k, recall in zip(RECALLS, found.recalls, strict=True)}
            named |= {f"{way} {median}": found.median, f"{way} {mean}": found.mean}
        return named

    def _one_way(self, ranks: Index, item: Index) -> OneWay:
        """Of ranks (R,) whose item (R,) says which fold each is of."""
        fold = item // (len(self.items) // self.folds)
        per_fold = [ranks[fold == i] for i in range(self.folds)]
        medians = [np.median(some) if self.video else np.floor(np.median(some)) for some in per_fold]
        return OneWay(
            tuple(float(np.mean([np.mean(some < k) for some in per_fold])) for k in RECALLS),
            float(np.mean(medians)) + 1,
            float(np.mean([some.mean() for some in per_fold])) + 1,
        )


def ranks_of(
    visual: NDArray[np.floating[Any]],
    text: NDArray[np.floating[Any]],
    owner: Index,
    *,
    folds: int = 1,
    video: bool = False,
) -> Ranks:
    """Ranks by inner product of unit vectors, items `visual` (I, E) and captions `text` (C, E).

    folds: so many consecutive parts of the items, each searched alone. Raises SidebenchError where an item has no
    caption, or the folds are not equal.
    """
    count = len(visual)
    _check(count, text, owner, folds)
    order = np.argsort(owner, kind="stable")
    captions = np.empty(len(owner), dtype=np.int64)
    items = np.empty(count, dtype=np.int64)
    size = count // folds
    bounds = np.searchsorted(owner[order], np.arange(0, count + 1, size))
    for fold, (start, stop) in enumerate(pairwise(bounds)):
        own = order[start:stop]
        part = slice(fold * size, (fold + 1) * size)
        items[part], captions[own] = _ranks(
            visual[part].astype(np.float64), text[own].astype(np.float64), owner[own] - part.start, video
        )
    return Ranks(items, captions, owner, folds, video)


def _check(count: int, text: NDArray[Any], owner: Index, folds: int) -> None:
    if len(text) != len(owner):
        raise SidebenchError(f"there are {len(text)} captions, and what they describe is said of {len(owner)}.")
    if len(owner) and not 0 <= owner.min() <= owner.max() < count:
        raise SidebenchError(f"captions describe items {owner.min()} to {owner.max()}, and there are {count} items.")
    without = np.flatnonzero(np.bincount(owner, minlength=count) == 0)
    if not count or len(without):
        raise SidebenchError(f"{len(without)} of {count} items have no caption, so there is nothing to find for them.")
    if count % folds:
        raise SidebenchError(f"{count} items cannot be searched in {folds} parts of equal size.")


def _ranks(visual: Numbers, text: Numbers, owner: Index, video: bool) -> tuple[Index, Index]:
    """Ranks of items (I,) and captions (C,), which are sorted by owner."""
    first = np.searchsorted(owner, np.arange(len(visual)))  # (I,) first caption of each item
    right = np.concatenate([np.einsum("ce,ce->c", visual[owner[some]], text[some]) for some in _rows(text)])
    right = np.where(np.isnan(right), -np.inf, right)  # not a number is the worst that a right one can be
    best = np.maximum.reduceat(right, first)
    items, captions = np.empty(len(visual), dtype=np.int64), np.zeros(len(text), dtype=np.int64)
    for some in _rows(visual, len(text)):
        similar = visual[some] @ text.T  # (some, C)
        similar[np.isnan(similar)] = np.inf  # and the best that a wrong one can be
        own = np.flatnonzero((owner >= some.start) & (owner < some.stop))
        similar[owner[own] - some.start, own] = np.nan  # never before itself
        captions += (similar >= right - _TIE).sum(0)
        rivals = np.maximum.reduceat(similar, first, axis=1) if video else similar
        items[some] = (rivals >= best[some, None] - _TIE).sum(1)
    return items, captions


def _rows(of: NDArray[Any], across: int | None = None) -> Iterator[slice]:
    """Slices of the rows of (N, E) that go with so many columns each."""
    step = max(1, _BLOCK_ELEMENTS // (across or of.shape[1]))
    for start in range(0, len(of), step):
        yield slice(start, min(start + step, len(of)))
