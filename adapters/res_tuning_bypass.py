"""Res-Tuning-Bypass: Res-Tuning: A Flexible and Efficient Tuning Paradigm via Unbinding Tuner from Backbone.
Jiang, Mao, Huang, Ma, Lv, Shen, Zhao, Zhou. NeurIPS 2023, arXiv 2310.19859.

Tuners are taken out of the backbone and chained beside it: at every layer a horizontal one reads the frozen state, a
vertical one the bypass so far, and the gradient stays in the bypass.

    b_0 = H_0(x_0);  b_l = H_l(x_l) + b_(l-1) + V_l(b_(l-1));  tokens = x_final + b_L

The recurrence b_l = horizontal(x_l) + vertical(b_(l-1)) is the paper's, of which no more than the abstract was read. A
tuner is Linear, GELU, Linear as in ModelScope's SWIFT. There every tuner has a skip, so that the chain sums the states,
and the sum replaces what enters the final norm. Ours: the skip is the vertical one's alone, every last layer starts at
zero, and the bypass is added to the backbone's final tokens, which are exactly the output before training.

Cached: the L hidden states and the final layer. Trained, with bottleneck b, L states of width D, output width D:
    (2L - 1)(2Db + b + D)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..cache.architecture import Architecture
from ._base import Batch, Body, CachedMethod, TrainingConfig, WeightsLoader, option
from ._recompute import in_slices, recomputed


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Res-Tuning-Bypass's options."""

    lr: float = option(1e-3, "peak learning rate (ours: the paper's was not read)")
    bottleneck: int = option(32, "b: the width inside a tuner (32 in ModelScope's SWIFT)")
    lean: bool = option(
        True, "true: backward computes the tuners again, a slice of the batch at a time; false: it keeps them all"
    )


class ResTuningBypass(CachedMethod):
    """A chain of small tuners beside the backbone, each fed by a frozen state and by the tuner before it."""

    Config: ClassVar[type] = Config
    paper = "Res-Tuning, NeurIPS 2023, arXiv 2310.19859"

    def refusal(self, arch: Architecture) -> str | None:
        """It needs states to chain along, and a tuner some width."""
        if len(arch.states) < 2:
            return "it needs a backbone with blocks: it is a chain along their outputs"
        if len(set(arch.stages)) > 1:
            return f"it adds up layers token by token, and those of {arch.name} differ in size; try --tokens mean"
        return "a bottleneck of 0 lets nothing through; 1 or more" if self.config.bottleneck < 1 else None

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """The hidden states and the final layer."""
        return tuple(dict.fromkeys((*arch.states, arch.final_layer)))

    def build(self, arch: Architecture, widths: Mapping[str, int], weights: WeightsLoader) -> Body:
        """See CachedMethod."""
        return Bypass(arch.states, arch.final_layer, widths, self.config.bottleneck, lean=self.config.lean)


class Bypass(Body):
    """The chain of tuners; tokens (B, T, D) out."""

    def __init__(
        self, states: tuple[str, ...], final: str, widths: Mapping[str, int], bottleneck: int, *, lean: bool = True
    ) -> None:
        super().__init__()
        self.states = states
        self.final = final
        self.width = widths[final]
        self.lean = lean
        self.horizontal = nn.ModuleList(Tuner(widths[state], bottleneck, self.width) for state in states)
        self.vertical = nn.ModuleList(Tuner(self.width, bottleneck, self.width) for _ in states[1:])

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        return in_slices(self.chain, batch) if self.lean else self.chain(batch)

    def chain(self, batch: Batch) -> Tensor:
        """From the embeddings to the top. Of a lean chain backward keeps the bypass behind every fourth state."""
        run: Callable[..., Tensor] = recomputed if self.lean else lambda compute, *args: compute(*args)
        bypass = run(self.links, 0, 1, None, batch)
        for first in range(1, len(self.states), 4):
            bypass = run(self.links, first, min(first + 4, len(self.states)), bypass, batch)
        return batch.state(self.final) + bypass  # (B, T, D)

    def links(self, first: int, end: int, bypass: Tensor | None, batch: Batch) -> Tensor:
        """The bypass (B, T, D) behind state `end` - 1, from the one behind state `first` - 1."""
        for index in range(first, end):
            step = self.horizontal[index](batch.state(self.states[index]))
            bypass = step if bypass is None else step + bypass + self.vertical[index - 1](bypass)
        assert bypass is not None
        return bypass


class Tuner(nn.Module):
    """Linear, GELU, Linear through a bottleneck; zero everywhere before training."""

    def __init__(self, width: int, bottleneck: int, out_width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, out_width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.up(nn.functional.gelu(self.down(x)))
