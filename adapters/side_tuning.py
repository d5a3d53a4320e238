"""Side-Tuning: A Baseline for Network Adaptation via Additive Side Networks.
Zhang, Sax, Zamir, Guibas, Malik. ECCV 2020, arXiv 1912.13503.

A small network of its own runs beside the frozen one, from the input to the output, and a learned scalar blends both:
    y = sigma(a) backbone(x) + (1 - sigma(a)) side(x),   a = 0 at the start

The paper's side network sees the image (VPT's version of it is an AlexNet). A cache holds no image, so ours reads the
embeddings, that is what enters block 0: the input in tokens, before any of the backbone's mixing. They are all that a
small transformer needs, and so it is one: `depth` pre-norm blocks of width S = D/r between two linear maps. Its
architecture and its size are ours. At the start the output is half the side network's: the frozen function is not kept.

Cached: the embeddings and the final layer. Backward computes the side network again, a slice of the batch at a time.
Trained, with widths D_0 and D of the two layers:
    D_0 S + S + depth (12 S² + 13 S) + 2 S + S D + D + 1
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture
from ..cache.errors import SidebenchError
from ._base import Batch, Body, CachedMethod, TrainingConfig, WeightsLoader, option
from ._recompute import in_slices, recomputed

_INPUT = "embeddings"


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Options of side-tuning."""

    lr: float = option(1e-3, "peak learning rate (ours: the paper's settings were not read)")
    reduction: int = option(8, "r: the side network's width is S = D // r (ours)")
    depth: int = option(2, "number of the side network's blocks (ours)")
    heads: int = option(4, "attention heads of the side network (ours)")


class SideTuning(CachedMethod):
    """A small transformer on the embeddings, blended with the frozen output by one learned scalar."""

    Config: ClassVar[type] = Config
    paper = "Side-Tuning, ECCV 2020, arXiv 1912.13503"

    def refusal(self, arch: Architecture) -> str | None:
        """The side network needs blocks, and a width that splits into heads."""
        r, heads = self.config.reduction, self.config.heads
        if arch.stages:
            return f"it reads what enters block 0, and {arch.name} has stage maps instead"
        if self.config.depth < 1 or heads < 1:
            return f"depth {self.config.depth} with {heads} heads is no side network; 1 or more of each"
        if r < 1 or arch.width < r:
            return f"side_tuning.reduction={r} leaves no side network of width {arch.width}"
        if arch.width // r % heads:
            return (
                f"width {arch.width} divided by side_tuning.reduction={r} does not split into {heads} heads; "
                "try --set side_tuning.heads=1"
            )
        return None

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """What enters block 0 and what a head would read."""
        return tuple(dict.fromkeys((_INPUT, arch.final_layer)))

    def build(self, arch: Architecture, widths: Mapping[str, int], weights: WeightsLoader) -> Body:
        """See CachedMethod."""
        side_width, width = arch.width // self.config.reduction, widths[arch.final_layer]
        side = SideNetwork(widths[_INPUT], side_width, width, self.config.depth, self.config.heads)
        return Blend(side, arch.final_layer, width)


class Blend(Body):
    """Tokens (B, T, D) out."""

    def __init__(self, side: "SideNetwork", final: str, width: int) -> None:
        super().__init__()
        self.side = side
        self.final = final
        self.width = width
        self.alpha = nn.Parameter(torch.zeros(()))  # an even blend at the start

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        return in_slices(lambda part: recomputed(self.blend, part), batch)

    def blend(self, batch: Batch) -> Tensor:
        """The same of a few examples."""
        frozen = batch.state(self.final)
        beside = self.side(batch.state(_INPUT), batch.mask)
        if beside.shape != frozen.shape:
            raise SidebenchError(
                f"side_tuning blends token by token, and {self.final} has {frozen.shape[1]} tokens where {_INPUT} has "
                f"{beside.shape[1]}; leave it out on this backbone."
            )
        share = torch.sigmoid(self.alpha)
        return share * frozen + (1 - share) * beside


class SideNetwork(nn.Module):
    """A thin pre-norm transformer: (B, T, D_0) -> (B, T, D)."""

    def __init__(self, in_width: int, width: int, out_width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_width, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, out_width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Padding, where `mask` (B, T) is False, is not attended to."""
        x = self.down(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.up(self.norm(x))


class Block(nn.Module):
    """Attention and an MLP of four times the width, each behind its norm and beside a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, S) -> (B, T, S)."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, S/H)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))
