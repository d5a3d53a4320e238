"""UniPT's single-anchor form, the paper's CLIP4Clip one: parameters L(Dm + m) + (Em + m) + (m + 1) + (mE + E).

Unlike the token form: ReLU before each projection and no LayerNorm; no identity in the map, the guide's own summary
token is added instead; the denominator is clamped; the output starts from the embedding.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..cache.pooling import masked_mean
from ._base import Batch
from ._tokens import relu_l1_clamped, summary_position, summary_token
from ._unipt_parallel import Parallel


class SingleAnchor(Parallel):
    """One anchor token per example, all states are guides, a vector (B, E) out."""

    def __init__(
        self,
        states: tuple[str, ...],
        final: str,
        widths: Mapping[str, int],
        side_width: int,
        *,
        last_real: bool,
        lean: bool = True,
    ) -> None:
        super().__init__()
        self.states = states
        self.final = final
        self.width = widths[final]
        self.looks = len(states)
        self.last_real = last_real
        self.lean = lean
        self.anchor = nn.Linear(self.width, side_width)
        self.down = nn.ModuleList(nn.Linear(widths[state], side_width) for state in states)
        self.gate = nn.Linear(side_width, 1)
        self.up = nn.Linear(side_width, self.width)

    def open(self, batch: Batch) -> tuple[Tensor, ...]:
        """The anchor (B, m), and the embedding (B, E) it is made of."""
        position = summary_position(batch.mask_of(self.final), last_real=self.last_real)
        embedding = summary_token(batch.state(self.final), position)
        return self.anchor(torch.relu(embedding)), embedding

    def look(self, index: int, opened: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """See Parallel."""
        anchor, mask = opened[0], batch.mask_of(self.states[index])
        position = summary_position(mask, last_real=self.last_real)
        guide = self.down[index](torch.relu(batch.state(self.states[index])))  # (B, T, m)
        scores = torch.einsum("bm,btm->bt", anchor, guide) * mask
        value = torch.einsum("bt,btm->bm", relu_l1_clamped(scores), guide) + summary_token(guide, position)
        return value, self.gate(anchor * masked_mean(guide, mask))

    def close(self, opened: Sequence[Tensor], merged: Tensor) -> Tensor:
        """A vector (B, E)."""
        return opened[1] + self.up(torch.relu(merged))
