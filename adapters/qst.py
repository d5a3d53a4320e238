"""QST: Quantized Side Tuning: Fast and Memory-Efficient Tuning of Quantized Large Language Models.
Zhang, Zhao, Miao, Oliaro, Zhang, Li, Jiang, Jia. ACL 2024, arXiv 2401.07159.

A ladder side network (compare lst) for a backbone in few bits: the frozen states are brought to the side width by
low-rank adapters or by pooling channels, and gates open channel by channel.

    s_0 = down_1(embeddings);  s_i = SideBlock_i((1 - z_i) down_i(b_i) + z_i s_(i-1));  z_i = sigmoid(g_i), g_i = 0.5
    tokens = (1 - z) up(norm(s_L)) + z h;  z = sigmoid(g), g = 1;  h: the backbone's final tokens
    down(x) = norm(W_2 silu(W_1 x)), or means of neighbouring channels

In the paper the backbone computes in 4 bits. Here it does not run at all, and what it would compute is what is kept in
few bits: an int8 or fp8 cache (`--dtype int8`). Any other form works too. A state is upcast when its turn comes, alone.
Ours: side blocks are of the backbone's kind, with as many of its heads as divide the side width; no dropout (0.1 before
the adapters in the released code), as everywhere in this comparison.

Cached: the embeddings, L block outputs and the final layer. Trained, with S = D/r, F = mlp/r, rank k, final width E:
    L(Dk + kS + 2S) + L S + L(4(S²+S) + 2SF + F + S + 4S [+ 2S layer scale]) + 2S + SE + E + E
and without the first term for the pooled form.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture
from ._base import Batch, Body, CachedMethod, TrainingConfig, WeightsLoader, option
from ._blocks import ACTIVATIONS, SideBlock
from ._recompute import in_slices, recomputed

LEAST_WIDTH = 4  # layer norm leaves next to nothing of fewer channels


@dataclass(frozen=True)
class Config(TrainingConfig):
    """QST's options."""

    lr: float = option(5e-4, "peak learning rate (QST's released GLUE script: 4e-4 or 5e-4)")
    weight_decay: float = option(0.01, "AdamW's weight decay (QST's released GLUE script)")
    reduction: int = option(8, "r: every width is divided by it (ours: QST has 16, for LLMs several times as wide)")
    down: Literal["low_rank", "mean_pool"] = option(
        "low_rank",
        "how a state gets to width D/r: a low-rank map, or means of neighbouring channels",
    )
    rank: int = option(16, "k: rank of the adapters (QST's released code)")
    lean: bool = option(
        True, "true: backward computes the side blocks again, a slice of the batch at a time; false: it keeps them all"
    )


class QST(CachedMethod):
    """A slim ladder beside quantised states, with low-rank or pooled rungs and a gate per channel."""

    Config: ClassVar[type] = Config
    paper = "QST, ACL 2024, arXiv 2401.07159"

    def refusal(self, arch: Architecture) -> str | None:
        """Its blocks are of the backbone's kind, which must be known and leave some width after division by r."""
        r = self.config.reduction
        if arch.norm is None or arch.heads is None or arch.mlp_width is None:
            return f"its side blocks are of the backbone's kind, and {arch.name} has none this code can build"
        if arch.activation is not None and arch.activation not in ACTIVATIONS:
            return (
                f"its side blocks are of the backbone's kind, and {arch.activation!r} of {arch.name}'s MLP is unknown"
            )
        if r < 1 or min(arch.width, arch.mlp_width) // r < LEAST_WIDTH:
            return f"qst.reduction={r} leaves no side width of {LEAST_WIDTH} or more of {arch.width}"
        return "an adapter of rank 0 lets nothing through; qst.rank is 1 or more" if self.config.rank < 1 else None

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """The hidden states and the final layer."""
        return tuple(dict.fromkeys((*arch.states, arch.final_layer)))

    def build(self, arch: Architecture, widths: Mapping[str, int], weights: WeightsLoader) -> Body:
        """See CachedMethod."""
        config = self.config
        rank = config.rank if config.down == "low_rank" else None
        return SideNetwork(arch, widths, config.reduction, rank, lean=config.lean)


class SideNetwork(Body):
    """The side network; tokens (B, T, D) out. Without a rank its maps down are pools."""

    def __init__(
        self, arch: Architecture, widths: Mapping[str, int], reduction: int, rank: int | None, *, lean: bool = True
    ) -> None:
        super().__init__()
        self.states = arch.states
        self.final = arch.final_layer
        self.width = widths[self.final]
        self.lean = lean
        assert arch.heads is not None
        side_width = arch.width // reduction
        slim = dataclasses.replace(arch, heads=math.gcd(arch.heads, side_width))
        self.down = nn.ModuleList(down(widths[state], rank, side_width) for state in self.states[1:])
        self.gates = nn.Parameter(torch.full((arch.blocks, side_width), 0.5))  # (L, S)
        self.blocks = nn.ModuleList(SideBlock(slim, reduction) for _ in range(arch.blocks))
        self.norm = nn.LayerNorm(side_width, eps=arch.norm_eps)
        self.up = nn.Linear(side_width, self.width)
        self.last_gate = nn.Parameter(torch.ones(self.width))

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        return in_slices(self.climb, batch) if self.lean else self.climb(batch)

    def climb(self, batch: Batch) -> Tensor:
        """From the embeddings to the top. Of a lean climb backward keeps the side state behind every other block."""
        run: Callable[..., Tensor] = recomputed if self.lean else lambda compute, *args: compute(*args)
        side = run(self.rung, 0, batch)
        for first in range(0, len(self.blocks), 2):
            side = run(self.pass_two, first, side, batch)
        return run(self.close, side, batch)

    def pass_two(self, first: int, side: Tensor, batch: Batch) -> Tensor:
        """The side state (B, T, S) behind block `first` and the one after it from the state before them."""
        for index in range(first, min(first + 2, len(self.blocks))):
            gate = torch.sigmoid(self.gates[index])  # (S,)
            side = self.blocks[index]((1 - gate) * self.rung(index + 1, batch) + gate * side, batch.mask)
        return side

    def rung(self, index: int, batch: Batch) -> Tensor:
        """A frozen state at the side width (B, T, S). The embeddings share the first block's way down."""
        return self.down[max(index - 1, 0)](batch.state(self.states[index]))

    def close(self, side: Tensor, batch: Batch) -> Tensor:
        """The side network's result mixed with the backbone's (B, T, D)."""
        gate = torch.sigmoid(self.last_gate)  # (D,)
        return (1 - gate) * self.up(self.norm(side)) + gate * batch.state(self.final)


def down(width: int, rank: int | None, side_width: int) -> nn.Module:
    """From (B, T, D) to (B, T, S)."""
    if rank is None:
        return nn.AdaptiveAvgPool1d(side_width)  # over the last axis
    first, second = nn.Linear(width, rank, bias=False), nn.Linear(rank, side_width, bias=False)
    return nn.Sequential(first, nn.SiLU(), second, nn.LayerNorm(side_width))
