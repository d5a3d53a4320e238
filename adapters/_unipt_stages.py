"""UniPT's form for stage maps of a convolutional network, the paper's VSE-infinity image branch.

The last map F_L is the anchor. An earlier map F_l is first brought to its grid: each k x k cell is summed with weights
that a saliency, made of F_L, gives its pixels (content-aware down-sampling). A 1 x 1 convolution is a Linear on tokens.
Trained, with C_l the channels of the maps (C_L = D), output width E and m = E // reduction:
    sum_{l<L} (D C_l + C_l) + sum_l (C_l m + m + 2m) + (m² + m + 2m) + (mE + E) + (m + 1)

Batch norms are in train mode while training, so the examples of a batch depend on each other and there is no lean
execution; a bias before one is counted, as in the paper, and its gradient is zero. Evaluation uses running statistics
(PyTorch's momentum, 0.1), which need some tens of steps to be those of the data.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ._base import Batch
from ._stages import LinearNorm
from ._tokens import relu_l1
from ._unipt_parallel import Parallel


class StageAnchor(Parallel):
    """Maps in, tokens (B, T, E) of the last map's grid out."""

    def __init__(
        self, grids: Mapping[str, tuple[int, int]], widths: Mapping[str, int], side_width: int, width: int
    ) -> None:
        super().__init__()
        self.states = tuple(grids)
        self.grids = dict(grids)
        self.width = width
        self.looks = len(self.states) - 1
        self.lean = False
        *guides, anchor = (widths[state] for state in self.states)
        self.saliency = nn.ModuleList(nn.Linear(anchor, channels) for channels in guides)
        self.down = nn.ModuleList(LinearNorm(channels, side_width) for channels in (*guides, anchor))
        self.gate = nn.Linear(side_width, 1)
        self.project = LinearNorm(side_width, side_width)
        self.up = nn.Linear(side_width, width)

    def open(self, batch: Batch) -> tuple[Tensor, ...]:
        """Anchor tokens (B, T, m), their mean (B, m) and the last map itself (B, T, D)."""
        last = batch.state(self.states[-1])
        anchor = self.down[-1](last)
        return anchor, anchor.mean(1), last

    def look(self, index: int, opened: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """See Parallel."""
        anchor, summary, last = opened
        cells = self.cells(batch.state(self.states[index]), self.states[index])
        weights = cell_weights(cells, torch.relu(self.saliency[index](last)))
        guide = self.down[index](torch.einsum("btk,btkc->btc", weights, cells))  # (B, T, m)
        # The identity is added after the normalisation: (P + I) X = P X + X.
        return relu_l1(anchor @ guide.mT) @ guide + guide, self.gate(summary * guide.mean(1))

    def close(self, opened: Sequence[Tensor], merged: Tensor) -> Tensor:
        """Tokens (B, T, E)."""
        return self.up(torch.relu(opened[0] + self.project(merged)))

    def cells(self, tokens: Tensor, state: str) -> Tensor:
        """The pixels (B, H W, C) of a map by the position of the last map that their cell lies at: (B, T, k², C)."""
        (height, width), (rows, columns) = self.grids[state], self.grids[self.states[-1]]
        parted = tokens.unflatten(1, (rows, height // rows, columns, width // columns))  # (B, h, k, w, k, C)
        return parted.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def cell_weights(cells: Tensor, wanted: Tensor) -> Tensor:
    """(B, T, k²) weights of the pixels (B, T, k², C) of each cell, from what is wanted there (B, T, C).

    They sum to 2, or to 1 (the plain mean) where no pixel is salient.
    """
    return relu_l1(torch.einsum("btkc,btc->btk", cells, wanted)) + 1 / cells.shape[2]
