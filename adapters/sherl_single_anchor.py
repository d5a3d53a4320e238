"""SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited Transfer Learning.
Diao, Wan, Jia, Zhuge, Zhang, Lu, Chen. ECCV 2024, arXiv 2407.07523. The form for CLIP4Clip, which has no late route.

Each layer is summed up into one vector by token weights that the final embedding guides; the layers are then added up
with weights in which a layer counts less the more the others resemble it (redundancy).

    g = W_g relu(q);  X_l = W_l relu(H_l);  v_l = l1_tokens(relu(fc_l(X_l * g)));  b_l = X_l at the summary token
    Y_l = sum_n v_ln X_ln + sigmoid(gamma_l / 0.1) b_l;  rho_l = sum_j relu(cos(Y_l, Y_j)), j over all layers
    w = l1_layers(relu(fc(Y_l * g)) / rho_l);  output = q + W_up relu(g + sum_l w_l Y_l)

q is the summary token of the final layer. Cached: the L hidden states and the final layer. Trained, with m = E // r:
    L(Dm + m) + (Em + m) + L(m + 1) + (m + 1) + (mE + E) [+ L gates, without them MSVD's form]

Lean (default): one slice of one layer at a time; of a layer its Y_l is kept for backward.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture
from ._base import Batch, Body, CachedMethod, TrainingConfig, WeightsLoader, option
from ._recompute import in_slices, recomputed
from ._sherl import without_repeats
from ._tokens import relu_l1, summary_position, summary_token

EPS = 1e-6  # everywhere in this form
TEMPERATURE = 0.1  # of the gates


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Options of SHERL's single-anchor form."""

    lr: float = option(1e-4, "peak learning rate (UniPT's CLIP4Clip scripts; SHERL keeps UniPT's settings)")
    weight_decay: float = option(0.01, "AdamW's weight decay (SHERL's MSR-VTT script; 0 in its MSVD script)")
    reduction: int = option(1, "r: the side width is m = E // r, E the width of the final layer (1 in the paper)")
    gates: bool = option(True, "true: a gate per layer on its summary token (MSR-VTT); false: none (MSVD)")
    lean: bool = option(
        True, "true: backward computes each layer again, a slice of the batch at a time; false: it keeps them all"
    )


class SherlSingleAnchor(CachedMethod):
    """All layers summed up under the guidance of the final embedding, the redundant ones weighing less."""

    Config: ClassVar[type] = Config
    paper = "SHERL, ECCV 2024, arXiv 2407.07523 (its CLIP4Clip form)"
    projected = True

    def refusal(self, arch: Architecture) -> str | None:
        """A token that sums an example up is needed, and a layer beside it."""
        if arch.blocks < 1:
            return "it needs a backbone with blocks: at least one layer beside the final embedding"
        if self.config.reduction < 1 or arch.width // self.config.reduction < 1:
            return f"reduction {self.config.reduction} leaves no side width of {arch.width}"
        if arch.modality == "image" and not arch.prefix_tokens:
            return f"its anchor is the class token, and {arch.name} has none"
        return None

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """The hidden states and the final layer."""
        return tuple(dict.fromkeys((*arch.states, arch.final_layer)))

    def build(self, arch: Architecture, widths: Mapping[str, int], weights: WeightsLoader) -> Body:
        """See CachedMethod."""
        return TieredAnchor(
            arch.states,
            arch.final_layer,
            widths,
            arch.width // self.config.reduction,
            last_real=arch.causal,  # a causal text tower (CLIP) sums a text up in its end token, others in their first
            gated=self.config.gates,
            lean=self.config.lean,
        )


class TieredAnchor(Body):
    """The side network; a vector (B, E) out."""

    def __init__(
        self,
        states: tuple[str, ...],
        final: str,
        widths: Mapping[str, int],
        side_width: int,
        *,
        last_real: bool,
        gated: bool,
        lean: bool = True,
    ) -> None:
        super().__init__()
        self.states = states
        self.final = final
        self.width = widths[final]
        self.last_real = last_real
        self.lean = lean
        self.guide = nn.Linear(self.width, side_width)
        self.down = nn.ModuleList(nn.Linear(widths[state], side_width) for state in states)
        self.of_tokens = nn.ModuleList(nn.Linear(side_width, 1) for _ in states)
        self.of_layers = nn.Linear(side_width, 1)
        self.gamma = nn.Parameter(torch.ones(len(states))) if gated else None  # open: sigmoid(10)
        self.up = nn.Linear(side_width, self.width)

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        return in_slices(self.rise, batch) if self.lean else self.rise(batch)

    def rise(self, batch: Batch) -> Tensor:
        """From all layers to a vector (B, E)."""
        run: Callable[..., Tensor] = recomputed if self.lean else lambda compute, *args: compute(*args)
        position = summary_position(batch.mask_of(self.final), last_real=self.last_real)
        embedding = summary_token(batch.state(self.final), position)
        guide = self.guide(torch.relu(embedding))  # (B, m)
        tiers = [run(self.summed_up, index, guide, batch) for index in range(len(self.states))]
        merged = guide + without_repeats(self.of_layers, guide, torch.stack(tiers, 1), EPS)
        return embedding + self.up(torch.relu(merged))

    def summed_up(self, index: int, guide: Tensor, batch: Batch) -> Tensor:
        """Y_l (B, m): a layer's tokens by weight, and its summary token."""
        mask = batch.mask_of(self.states[index])
        tokens = self.down[index](torch.relu(batch.state(self.states[index])))  # (B, T, m)
        scores = self.of_tokens[index](tokens * guide[:, None]).squeeze(-1) * mask
        base = summary_token(tokens, summary_position(mask, last_real=self.last_real))
        if self.gamma is not None:
            base = base * torch.sigmoid(self.gamma[index] / TEMPERATURE)
        return torch.einsum("bt,btm->bm", relu_l1(scores, EPS), tokens) + base
