"""GPO, the learnt pooling of VSE-infinity (Chen et al., CVPR 2021, arXiv 2011.04305): which ranks of a channel count.

Each channel's values are sorted; a weight per rank, the same for all channels, sums them up. The weights come from the
ranks' sinusoidal positions through a bidirectional GRU, so they depend on how many tokens there are and on nothing
else. Trained, with positions and states of width 32: 2 (6 * 32² + 6 * 32) + 32 = 12,704.
"""

import math

import torch
from torch import Tensor, nn

_FILL = -10_000.0
_TEMPERATURE = 0.1


class GPO(nn.Module):
    """Tokens (B, T, E) and their mask (B, T), the real ones first, to vectors (B, E)."""

    def __init__(self, positions: int = 32, hidden: int = 32) -> None:
        super().__init__()
        self.positions = positions
        self.onward = nn.GRU(positions, hidden, batch_first=True)
        self.backward_ = nn.GRU(positions, hidden, batch_first=True)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See the class."""
        lengths = mask.sum(1, keepdim=True)  # (B, 1)
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths  # (B, T)
        ranked = tokens.masked_fill(~mask[..., None], float("-inf")).sort(1, descending=True).values
        ranked = ranked.masked_fill(~real[..., None], 0)
        return torch.einsum("bt,bte->be", self.weights(real, lengths).to(ranked.dtype), ranked)

    def weights(self, real: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) of every rank, 0 where there is none, from real (B, T) and lengths (B, 1)."""
        ranks = torch.arange(real.shape[1], device=real.device)
        codes = sinusoids(ranks, self.positions).to(self.score.weight.dtype)  # (T, P)
        onward, _ = self.onward(codes[None])  # the same for every length
        # Read from the last real rank: what padding adds comes behind, where nothing looks.
        mirrored = torch.where(real, lengths - 1 - ranks, ranks)  # (B, T), its own inverse
        back, _ = self.backward_(codes[mirrored])
        back = back.gather(1, mirrored[..., None].expand_as(back))
        scores = self.score((onward + back) / 2).squeeze(-1).masked_fill(~real, _FILL)
        return (scores / _TEMPERATURE).softmax(1)


def sinusoids(ranks: Tensor, width: int) -> Tensor:
    """(T, width) of ranks (T): sines and cosines by turns, of wavelengths from 2 pi to 10,000 times that."""
    rates = torch.exp(torch.arange(0, width, 2, device=ranks.device) * (-math.log(10_000) / width))
    angles = ranks[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
