"""LST's form for stage maps of a convolutional network. Ours throughout: no published one was read.

A ladder over the stages F_0 … F_(n-1), with S_l = max(C_l // r, 1) channels beside C_l. A rung is a 1 x 1 convolution,
which is a Linear on tokens, a side block a bottleneck, and a strided convolution leads from a side map to the next.

    s_0 = Block_0(W_0 F_0);  s_l = Block_l(mu_l D_l s_(l-1) + (1 - mu_l) W_l F_l),  mu_l = sigmoid(alpha_l / T)
    Block(x) = x + up(gelu(conv3x3(gelu(down(norm(x))))));  tokens = W_up norm(s_(n-1))

D_l has a kernel of 2k - 1 pixels a side where the map shrinks by k, so that it sees every pixel. The norms take an
example's whole map together (GroupNorm of one group), so examples stay independent and a batch may be sliced. Nothing
of the backbone is copied: its blocks have batch norms, and widths that r need not divide.
Trained, with n maps, I_l = max(S_l // 4, 1) and output width D = C_(n-1):
    sum_l (C_l S_l + S_l) + sum_(l>0) ((2k_l - 1)² S_(l-1) S_l + S_l) + (n - 1)
    + sum_l (2S_l + 2 S_l I_l + S_l + 9I_l² + 2I_l) + 2S_(n-1) + S_(n-1) D + D [+ 1 merge_last] [- (n - 1) no gate]
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture
from ._base import Batch, Body
from ._recompute import in_slices, recomputed

Grid = tuple[int, int]


def refused(arch: Architecture) -> str | None:
    """Why there is no ladder over these maps; None when there is one."""
    for (above, larger), (below, smaller) in pairwise(arch.grids.items()):
        if strides(larger, smaller) is None:
            return (
                f"no stride leads from the {larger[0]} x {larger[1]} map {above} to the {smaller[0]} x {smaller[1]} of "
                f"{below}; choose another --image-size"
            )
    return None


def strides(larger: Grid, smaller: Grid) -> Grid | None:
    """(down, across): of a convolution from one grid to the other; None where none leads there."""
    down, across = (-(-a // b) for a, b in zip(larger, smaller, strict=True))
    reached = tuple(-(-side // stride) for side, stride in zip(larger, (down, across), strict=True))
    return (down, across) if reached == smaller else None


class StageLadder(Body):
    """Maps in, tokens (B, T, D) of the last map's grid out."""

    def __init__(
        self,
        arch: Architecture,
        widths: Mapping[str, int],
        reduction: int,
        temperature: float,
        *,
        gated: bool = True,
        merge_last: bool = False,
        lean: bool = True,
    ) -> None:
        super().__init__()
        self.grids, self.states = dict(arch.grids), arch.states
        self.width = widths[self.states[-1]]
        self.temperature = temperature
        self.lean = lean
        sides = [max(widths[state] // reduction, 1) for state in self.states]
        self.down = nn.ModuleList(
            nn.Linear(widths[state], side) for state, side in zip(self.states, sides, strict=True)
        )
        self.carry = nn.ModuleList(self._carry(index, *sides[index : index + 2]) for index in range(len(sides) - 1))
        self.alpha = nn.Parameter(torch.zeros(len(self.carry))) if gated and self.carry else None  # mu = 0.5 at first
        self.blocks = nn.ModuleList(SideBottleneck(side) for side in sides)
        self.norm = nn.GroupNorm(1, sides[-1])
        self.up = nn.Linear(sides[-1], self.width)
        self.alpha_last = nn.Parameter(torch.zeros(())) if merge_last else None
        for linear in (*self.down, self.up):  # N(0, 0.01), bias 0 (LST's released code)
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        return in_slices(self.climb, batch) if self.lean else self.climb(batch)

    def climb(self, batch: Batch) -> Tensor:
        """From the first map to the last. Of a lean climb backward keeps the side maps."""
        run: Callable[..., Tensor] = recomputed if self.lean else lambda compute, *args: compute(*args)
        side = run(self.first, batch)
        for index in range(len(self.carry)):
            side = run(self.step, index, side, batch)
        return run(self.top, side, batch)

    def first(self, batch: Batch) -> Tensor:
        """The side map (B, S, H, W) beside the first stage."""
        return self.blocks[0](self.rung(0, batch))

    def step(self, index: int, side: Tensor, batch: Batch) -> Tensor:
        """The side map beside stage index + 1 from the one before it."""
        carried, rung = self.carry[index](side), self.rung(index + 1, batch)
        mixed = carried + rung if self.alpha is None else self.mixed(self.alpha[index], carried, rung)
        return self.blocks[index + 1](mixed)

    def top(self, side: Tensor, batch: Batch) -> Tensor:
        """Tokens (B, T, D), mixed with the backbone's own final ones where they are to be."""
        tokens = self.up(self.norm(side).flatten(2).mT)
        return tokens if self.alpha_last is None else self.mixed(self.alpha_last, tokens, batch.state(self.states[-1]))

    def mixed(self, alpha: Tensor, ours: Tensor, frozen: Tensor) -> Tensor:
        """The gate: mu ours + (1 - mu) frozen."""
        gate = torch.sigmoid(alpha / self.temperature)
        return gate * ours + (1 - gate) * frozen

    def rung(self, index: int, batch: Batch) -> Tensor:
        """What a frozen map brings in: W F (B, S, H, W)."""
        state = self.states[index]
        return self.down[index](batch.state(state)).mT.unflatten(2, self.grids[state])

    def _carry(self, index: int, inputs: int, outputs: int) -> nn.Conv2d:
        stride = strides(self.grids[self.states[index]], self.grids[self.states[index + 1]])
        assert stride is not None  # `refused` says so
        down, across = stride
        return nn.Conv2d(inputs, outputs, (2 * down - 1, 2 * across - 1), stride, (down - 1, across - 1))


class SideBottleneck(nn.Module):
    """A residual bottleneck (B, S, H, W) -> the same, normalised at its entrance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(width // 4, 1)
        self.norm = nn.GroupNorm(1, width)
        self.down = nn.Conv2d(width, inner, 1)
        self.middle = nn.Conv2d(inner, inner, 3, padding=1)
        self.up = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        gelu = nn.functional.gelu  # with an inner channel or two, a ReLU might close for good
        return x + self.up(gelu(self.middle(gelu(self.down(self.norm(x))))))
