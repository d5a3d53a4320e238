"""Two streams of one task, each with its backbone, store and body: what is paired, and where its batches come from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adapters._base import Batch
from ..cache.store import Index
from .learner import Learner, Source


@dataclass(frozen=True)
class PairBatch:
    """Captions and the items that they describe, row by row.

    frames: (B + 1,) where each item's frames begin in `visual`, and where the last one's end; None: an item is one
    image. Numbers of Python, because no tensor's values are known in a prediction of memory.
    """

    visual: Batch
    text: Batch
    frames: tuple[int, ...] | None = None

    @property
    def mask(self) -> Tensor:
        """(B, T) real tokens of the captions."""
        return self.text.mask

    def tensors(self) -> list[Tensor]:
        """Everything that takes memory."""
        return [*self.visual.tensors(), *self.text.tensors()]

    def shapes(self) -> Any:
        """See Batch."""
        return self.visual.shapes(), self.text.shapes(), self.frames

    def rows(self, rows: slice) -> "PairBatch":
        """These pairs alone."""
        if self.frames is None:
            return replace(self, visual=self.visual.rows(rows), text=self.text.rows(rows))
        starts = self.frames[:-1][rows]
        ends = self.frames[1:][rows]
        visual = self.visual.rows(slice(starts[0], ends[-1]))
        frames = tuple(start - starts[0] for start in (*starts, ends[-1]))
        return replace(self, visual=visual, text=self.text.rows(rows), frames=frames)


class Towers(nn.Module):
    """A learner for each stream; both end in directions of one space."""

    def __init__(self, visual: Learner, text: Learner) -> None:
        super().__init__()
        self.visual = visual
        self.text = text

    @property
    def head(self) -> nn.Module:
        """What belongs to the task."""
        return nn.ModuleList([self.visual.head, self.text.head])

    def forward(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Directions (B, E) of the items and of the captions."""
        return self.embed_visual(batch.visual, batch.frames), self.embed_text(batch.text)

    def embed_visual(self, batch: Batch, frames: Sequence[int] | None) -> Tensor:
        """Directions (B, E): of several frames that of the mean of theirs (CLIP4Clip's meanP, methods.md 1.5)."""
        found = functional.normalize(self.visual(batch), dim=-1)
        if frames is None:
            return found
        counts = np.diff(frames).tolist()
        owner = torch.tensor([item for item, count in enumerate(counts) for _ in range(count)], device=found.device)
        total = found.new_zeros((len(counts), found.shape[1])).index_add(0, owner, found)
        return functional.normalize(total, dim=-1)

    def embed_text(self, batch: Batch) -> Tensor:
        """Directions (B, E)."""
        return functional.normalize(self.text(batch), dim=-1)


@dataclass(frozen=True)
class PairSource:
    """Captions with the items that they describe. See Source: what it counts as examples are the captions."""

    visual: Source
    text: Source
    owners: Index  # (captions,) the item that each describes
    frames: Index | None = None  # (items + 1,) first frame of each item; None: an item is one image

    @property
    def views(self) -> int:
        """None: no augmentation is drawn for pairs."""
        return 0

    def batches(self, batches: Sequence[Index]) -> Iterator[PairBatch]:
        """See Source. An item that several captions of a batch describe is read for each of them."""
        visual = self.visual_batches([self.owners[index] for index in batches])
        for (images, frames), text in zip(visual, self.text.batches(batches), strict=True):
            yield PairBatch(images, text, frames)

    def visual_batches(self, batches: Sequence[Index]) -> Iterator[tuple[Batch, tuple[int, ...] | None]]:
        """Batches of these items, and of videos where each one's frames begin."""
        if self.frames is None:
            for batch in self.visual.batches(batches):
                yield batch, None
            return
        starts, ends = self.frames[:-1], self.frames[1:]
        rows = [np.concatenate([np.arange(starts[i], ends[i]) for i in items]) for items in batches]
        for items, batch in zip(batches, self.visual.batches(rows), strict=True):
            yield batch, (0, *np.cumsum((ends - starts)[items]).tolist())

    def lengths(self) -> Index:
        """(captions,) tokens of the caption and of what it describes."""
        visual = self.visual.lengths()
        if self.frames is not None:
            visual = np.add.reduceat(visual, self.frames[:-1])
        return visual[self.owners] + self.text.lengths()
