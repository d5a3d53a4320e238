"""SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited Transfer Learning.
Diao, Wan, Jia, Zhuge, Zhang, Lu, Chen. ECCV 2024, arXiv 2407.07523. The form for transformers (its text side of
VSE-infinity); for a trunk of bottlenecks see _sherl_stages.py, for CLIP4Clip `sherl_single_anchor`.

Early route, token by token: the states before the last block are projected and summed with weights in which a layer
counts less the more the others resemble it. Late route: the sum goes through the last frozen block, with gradient.

    X_l = LN(W_l H_l), l = 0 … L-1;  g = X_(L-1), all others are shallow;  rho_l = sum_j relu(cos(X_l, X_j)), j shallow
    w = l1_layers(relu(fc(X_l * g)) / rho_l);  z = g + sum_l w_l X_l
    u = LN(W_up relu(z)) + tanh(gamma / 0.1) H_(L-1);  tokens = norm(Block_(L-1)(u))

gamma starts at 0: the state itself comes in as training asks for it. No mask: tokens do not meet before the block.
Ours: a single shallow state (two blocks) has nothing to be weighed against, so its weight is 1 and there is no fc.
Behind the block come the task's pooling and head, in place of a Linear to the embedding's width and GPO; and no dropout
on LN(W_up relu(z)) (0.1 there), as everywhere in this comparison.

Cached: what enters each block. The last block is in memory. Trained, with L blocks and m = D // r:
    L(Dm + m + 2m) + (m + 1) + (mD + D + 2D) + 1       [two blocks: without m + 1]
Lean (default): of the early route u alone is kept for backward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture
from ..cache.suffix import ENTERING, MASK, LastBottleneck, Suffix
from ._base import BackboneBody, Batch, Body, PrefixMethod, TrainingConfig, option
from ._live import lacks_blocks
from ._recompute import in_slices, recomputed
from ._sherl import EPS, TEMPERATURE, without_repeats
from ._sherl_stages import EarlyStages, maps_read, refused_stages

NORM_EPS = 1e-12  # of the norm behind W_up: BERT's


@dataclass(frozen=True)
class Config(TrainingConfig):
    """SHERL's options."""

    lr: float = option(5e-4, "peak learning rate (SHERL's VSE-infinity scripts, which keep UniPT's)")
    weight_decay: float = option(1e-2, "AdamW's weight decay (SHERL's VSE-infinity scripts)")
    reduction: int = option(2, "r: the side width is m = D // r (2 in the paper)")
    side_width: int = option(0, "m itself (512 on both sides of VSE-infinity); 0: D // r")
    lean: bool = option(
        True, "true: backward computes the early route again, a slice of the batch at a time; false: it keeps it all"
    )


class Sherl(PrefixMethod):
    """All early states, the redundant ones weighing less, summed up and sent through the last frozen block."""

    Config: ClassVar[type] = Config
    paper = "SHERL, ECCV 2024, arXiv 2407.07523"

    def refusal(self, arch: Architecture) -> str | None:
        """It needs the last block and a shallow state beside the one that enters it."""
        if arch.blocks < 2 and not arch.stages:
            return f"it needs two states before the last block, and {arch.name} has {arch.blocks} blocks"
        if self.config.side_width < 0:
            return f"side_width {self.config.side_width} is none; 1 or more, or 0 for D // r"
        if not self.config.side_width and (self.config.reduction < 1 or arch.width // self.config.reduction < 1):
            return f"reduction {self.config.reduction} leaves no side width of {arch.width}"
        return refused_stages(arch) if arch.stages else lacks_blocks(arch)

    def first_block(self, arch: Architecture) -> int:
        """See PrefixMethod: the last one."""
        return arch.blocks - 1

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """What enters each block; or the maps that `maps_read` names."""
        return maps_read(arch) if arch.stages else arch.states[:-1]

    def build(self, suffix: Suffix) -> Body:
        """See PrefixMethod."""
        arch = suffix.arch
        side_width = self.config.side_width or arch.width // self.config.reduction
        if isinstance(suffix, LastBottleneck):
            return TwoRoutes(suffix, EarlyStages(arch, suffix.widths, side_width), lean=False)
        early = EarlyRoute(self.layers(arch), arch.width, side_width)
        return TwoRoutes(suffix, early, lean=self.config.lean)


class EarlyRoute(nn.Module):
    """The trained part: from the states before the last block to what enters it instead."""

    def __init__(self, states: tuple[str, ...], width: int, side_width: int) -> None:
        super().__init__()
        self.states = states
        self.down = nn.ModuleList(nn.Sequential(nn.Linear(width, side_width), nn.LayerNorm(side_width)) for _ in states)
        self.score = nn.Linear(side_width, 1) if len(states) > 2 else None
        self.up = nn.Sequential(nn.Linear(side_width, width), nn.LayerNorm(width, eps=NORM_EPS))
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch) -> Tensor:
        """u (B, T, D)."""
        *shallow, deep = (down(batch.state(state)) for down, state in zip(self.down, self.states, strict=True))
        merged = shallow[0] if self.score is None else without_repeats(self.score, deep, torch.stack(shallow, -2), EPS)
        gate = torch.tanh(self.gamma / TEMPERATURE)
        return self.up(torch.relu(deep + merged)) + gate * batch.state(self.states[-1])


class TwoRoutes(BackboneBody):
    """The early route, then the last block as it is; tokens (B, T, D) out."""

    def __init__(self, suffix: Suffix, early: EarlyRoute | EarlyStages, *, lean: bool = True) -> None:
        super().__init__(suffix)
        self.early = early
        self.lean = lean

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        rise: Callable[[Batch], Tensor] = self.early
        state = in_slices(lambda part: recomputed(rise, part), batch) if self.lean else rise(batch)
        return self._backbone.tokens({ENTERING: state, MASK: batch.inputs[MASK]})
