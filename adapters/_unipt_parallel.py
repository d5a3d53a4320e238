"""What all forms of UniPT share: an anchor, guides that are looked at in parallel, and their sum by confidence.

A form is one class: `Parallel` with `looks` guides, `lean`, `open`, `look` and `close`; it then has both executions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._base import Batch, Body
from ._recompute import summed_in_turn


class Parallel(Body):
    """Open an anchor, interact with each guide, sum by confidence, close."""

    looks: int  # guides
    lean: bool

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        if self.lean:
            return summed_in_turn(self, batch)
        opened = self.open(batch)
        enriched, logits = zip(*(self.look(index, opened, batch) for index in range(self.looks)), strict=True)
        merged = torch.einsum("bl,lb...->b...", confidences(logits), torch.stack(enriched))
        return self.close(opened, merged)

    def open(self, batch: Batch) -> tuple[Tensor, ...]:
        """The anchor, and what else the guides meet."""
        raise NotImplementedError

    def look(self, index: int, opened: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """A guide re-expressed at the anchor's positions (B, [T,] m), and its logit (B, 1)."""
        raise NotImplementedError

    def close(self, opened: Sequence[Tensor], merged: Tensor) -> Tensor:
        """The output from the anchor and the sum of the guides."""
        raise NotImplementedError


def confidences(logits: Sequence[Tensor]) -> Tensor:
    """Softmax over layers at temperature 1: (B, L) from L times (B, 1)."""
    return torch.cat(tuple(logits), dim=1).softmax(dim=1)
