"""SHERL's form for a trunk of residual bottlenecks, its image side of VSE-infinity: what enters the last one.

The maps of all stages but the last, and the map before the last bottleneck, which is the deep one, are each pooled to
the last grid by the largest plus the mean of each k x k cell; then position by position:

    X_l = BN(W_l (maxpool + avgpool)(F_l));  g the deep one's, all others shallow;  z = g + sum_l w_l X_l as in sherl.py
    u = relu(BN(W_up z)) + tanh(gamma / 0.1) F_deep;  tokens = Bottleneck(u), the last one, frozen, with gradient

Ours: what the bottleneck yields is not pooled to half its sides, which the paper does by the same sum of two poolings:
the task's own pooling takes every position. Trained, with C_l the channels of the n maps (C_(n-1) = D) and m:
    sum_l (C_l m + m + 2m) + (m + 1) + (mD + D + 2D) + 1       [two maps: without m + 1]

Batch norms are in train mode while training, so the examples of a batch depend on each other and nothing is computed
again in slices (no lean execution).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..cache.architecture import BEFORE_LAST, Architecture
from ._base import Batch
from ._sherl import EPS, TEMPERATURE, without_repeats
from ._stages import LinearNorm, refused

Grid = tuple[int, int]


def refused_stages(arch: Architecture) -> str | None:
    """Why this network has no late route, or no early one; None when it has both."""
    if not arch.bottlenecks:
        return f"its late route is the last of the bottlenecks that {arch.name}'s stages would consist of, and has none"
    return refused(arch)


def maps_read(arch: Architecture) -> tuple[str, ...]:
    """The shallow maps and the deep one."""
    return (*arch.states[:-1], BEFORE_LAST)


class EarlyStages(nn.Module):
    """The trained part: from the maps to what enters the last bottleneck instead."""

    def __init__(self, arch: Architecture, widths: Mapping[str, int], side_width: int) -> None:
        super().__init__()
        self.maps = maps_read(arch)
        self.grids: dict[str, Grid] = {**arch.grids, BEFORE_LAST: arch.stages[-1]}
        self.down = nn.ModuleList(LinearNorm(widths[name], side_width) for name in self.maps)
        self.score = nn.Linear(side_width, 1) if len(self.maps) > 2 else None
        self.up = LinearNorm(side_width, widths[BEFORE_LAST])
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch) -> Tensor:
        """u (B, T, D)."""
        *shallow, deep = (down(self.pooled(name, batch)) for down, name in zip(self.down, self.maps, strict=True))
        merged = shallow[0] if self.score is None else without_repeats(self.score, deep, torch.stack(shallow, -2), EPS)
        gate = torch.tanh(self.gamma / TEMPERATURE)
        return torch.relu(self.up(deep + merged)) + gate * batch.state(self.maps[-1])

    def pooled(self, name: str, batch: Batch) -> Tensor:
        """A map on the last grid (B, T, C): of each cell the largest and the mean, summed; of one pixel its double."""
        (height, width), (rows, columns) = self.grids[name], self.grids[BEFORE_LAST]
        cell = (height // rows, width // columns)
        values = batch.state(name).mT.unflatten(2, (height, width))
        pooled = nn.functional.max_pool2d(values, cell) + nn.functional.avg_pool2d(values, cell)
        return pooled.flatten(2).mT
