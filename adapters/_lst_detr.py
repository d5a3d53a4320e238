"""LST's form for DETR's two stacks, of which MDETR is one (ours: no code of LST's for them is public).

As on T5 (see _lst_two_stacks.py) a slim copy climbs beside each stack, and the decoder's reads the encoder's side
output. The blocks are DETR's: they normalise behind each sum, attend both ways and have biases. Positions are left out,
since the ladders' states carry them, the queries' too. No norm stands behind the encoder's side, as none does behind
DETR's encoder. Trained, with S = D/r, F = mlp/r, and K kept of L blocks in the encoder, k of l in the decoder:
    encoder (K+1)(DS + S) + L + K(4(S² + S) + 2SF + F + S + 4S);
    decoder (k+1)(DS + S) + l + k(8(S² + S) + 2SF + F + S + 6S) + 2S;  and SD + D [+ 1 merge_last] [- L - l no gate]
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture
from ..cache.block_weights import BackboneWeights, BlockWeights, CrossWeights
from ._base import Batch
from ._blocks import SideBlock
from ._lst_two_stacks import Memory, Stack, TwoLadders
from ._pruning import kept_rows, strongest, take, take_vector


class Across(nn.Module):
    """What a decoder's block reads the encoder's side with, and the norm behind the sum."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(B, Q, S) -> (B, Q, S)."""
        pairs = ((self.query, x), (self.key, memory[0]), (self.value, memory[0]))
        q, k, v = (linear(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear, y in pairs)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=memory[1][:, None, None, :])
        return self.norm(x + self.out(mixed.transpose(1, 2).flatten(2)))


class DetrBlock(SideBlock):
    """DETR's block; a decoder's with cross-attention between self-attention and MLP."""

    def __init__(self, arch: Architecture, reduction: int, *, across: bool) -> None:
        super().__init__(arch, reduction)
        self.across = Across(self.out.out_features, self.heads, arch.norm_eps) if across else None

    def forward(self, x: Tensor, mask: Tensor, memory: Memory | None = None) -> Tensor:
        """(B, T, S) and the (B, T) mask of real tokens -> (B, T, S)."""
        x = self.norm1(x + self.attend(x, mask))
        if self.across is not None:
            assert memory is not None
            x = self.across(x, memory)
        return self.norm2(x + self.mlp(x))


class DetrStack(Stack):
    """Of DETR's blocks."""

    def __init__(
        self,
        arch: Architecture,
        states: tuple[str, ...],
        widths: Mapping[str, int],
        side_width: int,
        kept: tuple[int, ...],
        **options: Any,
    ) -> None:
        super().__init__(states, widths, side_width, kept, **options)
        reduction = arch.width // side_width
        self.blocks = nn.ModuleList(DetrBlock(arch, reduction, across=self.decoder) for _ in kept)
        self.norm = nn.LayerNorm(side_width, eps=arch.norm_eps) if self.decoder else nn.Identity()

    def around(self, side: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """The real tokens (B, T)."""
        return (batch.mask_of(self.states[0]),)


class DetrLadders(TwoLadders):
    """Both sides; the decoder's tokens (B, T_dec, D) out."""

    stack: ClassVar[type[Any]] = DetrStack

    @torch.no_grad()
    def begin_as(self, weights: BackboneWeights, importance: BackboneWeights) -> None:
        """Start as the most important parts of the backbone's own: one walk, as on T5."""
        pairs = iter(zip(weights.blocks, importance.blocks, strict=True))
        kept = strongest(importance.embedding.abs().sum(0), self.up.in_features)
        for stack in (self.encoder, self.decoder):
            blocks = dict(zip(stack.kept, stack.blocks, strict=True))
            for index in range(stack.depth):
                kept = _copy_block(blocks.get(index), *next(pairs), kept)
        if weights.norm is not None:
            take_vector(self.decoder.norm, weights.norm, kept)


def _copy_block(side: DetrBlock | None, source: BlockWeights, measure: BlockWeights, entering: Tensor) -> Tensor:
    """Fill a side block, where there is one, and say which indices leave it; a norm keeps what its sum has."""
    kept = _copy_attention(side, None if side is None else side.norm1, source, measure, entering)
    if source.across is not None and measure.across is not None:
        across = None if side is None else side.across
        kept = _copy_attention(across, None if across is None else across.norm, source.across, measure.across, kept)
    inner = kept_rows((measure.fc1,), kept, len(measure.fc1[0]) * len(entering) // len(measure.out[0]))
    leaving = kept_rows((measure.fc2,), inner, len(entering))
    if side is not None:
        take(side.fc1, source.fc1, inner, kept)
        take(side.fc2, source.fc2, leaving, inner)
        take_vector(side.norm2, source.norm2, leaving)
    return leaving


def _copy_attention(
    side: DetrBlock | Across | None,
    norm: nn.LayerNorm | None,
    source: BlockWeights | CrossWeights,
    measure: BlockWeights | CrossWeights,
    entering: Tensor,
) -> Tensor:
    attended = kept_rows((measure.query, measure.key, measure.value), entering, len(entering))
    leaving = kept_rows((measure.out,), attended, len(entering))
    if side is not None and norm is not None:
        for linear, pair in ((side.query, source.query), (side.key, source.key), (side.value, source.value)):
            take(linear, pair, attended, entering)
        take(side.out, source.out, leaving, attended)
        take_vector(norm, source.norm1, leaving)
    return leaving
