"""UniPT's form for an encoder and its decoder, the paper's MDETR one.

In each stack the last output is the anchor, and every second state before it is a guide: of 6 layers the outputs of
layers 1, 3 and 5, as in MDETR. The encoder's sum is a side memory, from which each guide of the decoder is enriched
before it meets the decoder's anchor. That anchor is taken behind the decoder's final norm, every other state before it.
Trained, with g guides in the encoder and h in the decoder, and side width s = D // reduction:
    (g + h + 2)(Ds + s + 2s) + 2(s + 1) + 2(sD + D + Ds + s + 2s) + h(s² + s + 2s) + (sD + D + 2D)

Ours is what it does at other depths and on other networks: no code of UniPT's for T5 is public. With reduction=4 it
trains 3,039,746 parameters on T5-base, the 1.36 % that is reported; on T5-large 1.21 %, where 0.92 % is reported.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..cache.architecture import Architecture
from ..cache.pooling import masked_mean
from ._base import Batch
from ._tokens import relu_l1
from ._unipt_parallel import Parallel

EPS = 1e-7  # in the denominator of every map


def taps(arch: Architecture) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The layers that are read of the encoder and of the decoder: guides in order, then the anchor."""
    encoder, decoder = (states[-2::-2][::-1] for states in (arch.states, arch.decoder_states))
    return (*encoder, arch.states[-1]), (*decoder, arch.final_layer)


class SideStack(Parallel):
    """The side of one stack: tokens (B, T, s), the anchor's plus an MLP of the guides' sum."""

    def __init__(self, layers: Sequence[str], widths: Mapping[str, int], side_width: int, *, lean: bool) -> None:
        super().__init__()
        *self.guides, self.anchor = layers
        self.width = side_width
        self.looks = len(self.guides)
        self.lean = lean
        inner = widths[self.anchor]
        self.down = nn.ModuleList(linear_norm(widths[layer], side_width) for layer in layers)
        self.gate = nn.Linear(side_width, 1)
        self.project = nn.Sequential(nn.Linear(side_width, inner), nn.ReLU(), *linear_norm(inner, side_width))

    def open(self, batch: Batch) -> tuple[Tensor, ...]:
        """Anchor tokens (B, T, s) and their mean (B, s)."""
        anchor = self.down[-1](batch.state(self.anchor))
        return anchor, masked_mean(anchor, batch.mask_of(self.anchor))

    def guide(self, index: int, opened: Sequence[Tensor], batch: Batch) -> Tensor:
        """Tokens (B, T, s) of a guide."""
        return self.down[index](batch.state(self.guides[index]))

    def look(self, index: int, opened: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """See Parallel."""
        anchor, summary = opened[:2]
        guide, mask = self.guide(index, opened, batch), batch.mask_of(self.anchor)
        # The identity is added after the normalisation: (P + I) X = P X + X.
        return read(anchor, guide, mask) + guide, self.gate(summary * masked_mean(guide, mask))

    def close(self, opened: Sequence[Tensor], merged: Tensor) -> Tensor:
        """Tokens (B, T, s)."""
        return opened[0] + self.project(merged)


class TwoStacks(SideStack):
    """The decoder's side, with the encoder's as its memory: the decoder's tokens (B, T_dec, D) out."""

    def __init__(self, arch: Architecture, widths: Mapping[str, int], side_width: int, *, lean: bool = True) -> None:
        encoder, decoder = taps(arch)
        super().__init__(decoder, widths, side_width, lean=lean)
        self.width = arch.width
        self.memory = SideStack(encoder, widths, side_width, lean=lean)
        self.enrich = nn.ModuleList(linear_norm(side_width, side_width) for _ in self.guides)
        self.up = nn.Sequential(nn.ReLU(), *linear_norm(side_width, self.width))
        for parameter in self.parameters():
            if parameter.ndim > 1:  # as in MDETR's code; biases keep torch's default
                nn.init.xavier_uniform_(parameter)

    def open(self, batch: Batch) -> tuple[Tensor, ...]:
        """Anchor tokens (B, T_dec, s), their mean (B, s) and the side memory (B, T_enc, s)."""
        return *super().open(batch), self.memory(batch)

    def guide(self, index: int, opened: Sequence[Tensor], batch: Batch) -> Tensor:
        """Tokens (B, T_dec, s) of a guide, enriched."""
        guide = super().guide(index, opened, batch)
        return guide + self.enrich[index](read(guide, opened[2], batch.mask_of(self.memory.anchor)))

    def close(self, opened: Sequence[Tensor], merged: Tensor) -> Tensor:
        """Tokens (B, T_dec, D)."""
        return self.up(super().close(opened, merged))

    def levels(self, batch: Batch) -> list[Tensor]:
        """What MDETR's losses read, each (B, T_dec, D): the guides for the auxiliary ones, then the output."""
        opened = self.open(batch)
        return [*(self.up(self.guide(index, opened, batch)) for index in range(self.looks)), self(batch)]


def read(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """The keys (B, K, s) at the positions of the queries (B, Q, s), by a map whose rows sum to 0 or 1 -> (B, Q, s)."""
    return relu_l1(queries @ keys.mT * mask[:, None, :], EPS) @ keys


def linear_norm(inputs: int, outputs: int) -> nn.Sequential:
    """A Linear and the LayerNorm behind it."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs))
