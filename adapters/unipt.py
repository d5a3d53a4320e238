"""UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter and Memory.
Diao, Wan, Zhang, Jia, Lu, Chen. CVPR 2024, arXiv 2308.14316.

Every frozen hidden state is projected down; the last is the anchor, the others are guides. Each guide is re-expressed
at the anchor's positions by a softmax-free attention map, all guides in parallel (parallel interaction), and the guides
are summed with confidences that a gate reads from pooled anchor and guide (confidence aggregation).

Cached: the L hidden states (single_anchor: and the final layer). Trained, with output width E and m = E // reduction:
    L(Dm + m + 2m) + (m² + m + 2m) + (mE + E) + (m + 1)             tokens (the paper's VSE-infinity, text)
    L(Dm + m + 2m) + (mE + E + Em + m + 2m) + (mE + E) + (m + 1)    mlp (CLIP-ViL)
    L(Dm + m) + (Em + m) + (m + 1) + (mE + E)                       single_anchor (CLIP4Clip; in _unipt_single.py)
    on the stage maps of a convolutional network                    see _unipt_stages.py (VSE-infinity, image)
    on an encoder and its decoder                                   see _unipt_two_stacks.py (MDETR)
The gate's bias shifts all confidences alike and cancels in their softmax: it is counted, as in the paper, and its
gradient is zero.

The lean form (default) has the same numbers and parameters; of all layers only their sum is kept for backward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture
from ..cache.pooling import masked_mean
from ._base import Batch, Body, CachedMethod, TrainingConfig, WeightsLoader, option
from ._stages import refused
from ._tokens import relu_l1
from ._unipt_parallel import Parallel
from ._unipt_single import SingleAnchor
from ._unipt_stages import StageAnchor
from ._unipt_two_stacks import TwoStacks, taps


@dataclass(frozen=True)
class Config(TrainingConfig):
    """UniPT's options."""

    lr: float = option(5e-4, "peak learning rate (UniPT's released scripts for VSE-infinity, CLIP-ViL VQA and MDETR)")
    weight_decay: float = option(1e-4, "AdamW's weight decay (UniPT's VSE-infinity and MDETR scripts)")
    reduction: int = option(2, "r: the side width is m = E // r (2 in the paper; 1 for its CLIP4Clip form)")
    width: int = option(
        0, "E: width of what it yields, forms tokens and mlp (1024 for VSE-infinity); 0: the backbone's own"
    )
    form: Literal["tokens", "mlp", "single_anchor"] = option(
        "tokens",
        "tokens: anchor = last state; mlp: the same with an MLP behind the sum (CLIP-ViL); single_anchor: anchor = the "
        "final layer's summary token (CLIP4Clip)",
    )
    lean: bool = option(
        True, "true: backward computes each layer again, a slice of the batch at a time; false: it keeps them all"
    )


class UniPT(CachedMethod):
    """Parallel interaction of all frozen states with the last one, summed by learned confidences."""

    Config: ClassVar[type] = Config
    paper = "UniPT, CVPR 2024, arXiv 2308.14316"
    two_stacks = True
    projected = True

    def refusal(self, arch: Architecture) -> str | None:
        """At least one guide beside the anchor is needed."""
        if arch.stages and self.config.form != "tokens":
            return f"form {self.config.form} reads tokens; leave unipt.form at tokens, which has a form for stage maps"
        if arch.stages and (reason := refused(arch)):
            return reason
        if arch.decoder_blocks and self.config.form != "tokens":
            return f"form {self.config.form} is for one stack; leave unipt.form at tokens, which has a form for two"
        if arch.projected_from and not self._single:
            return f"{arch.name} ends in one embedding, the anchor of another form: --set unipt.form=single_anchor"
        if arch.blocks < 1 and not arch.stages:
            return "it needs a backbone with blocks: at least one guide beside the anchor"
        if self.config.width < 0:
            return f"width {self.config.width} is none; 1 or more, or 0 for the backbone's own"
        if self.config.width and (self._single or arch.decoder_blocks):
            return "its forms for a single anchor and for two stacks yield the backbone's width; leave unipt.width out"
        width = self._width(arch)
        if width // max(self.config.reduction, 1) < 1 or self.config.reduction < 1:
            return f"reduction {self.config.reduction} leaves no side width of {width}"
        if self._single and arch.modality == "image" and not arch.prefix_tokens:
            return f"its single anchor is the class token, and {arch.name} has none; leave unipt.form at tokens"
        return None

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """The hidden states, and for a single anchor the final layer; of two stacks see `taps`."""
        if arch.decoder_blocks:
            encoder, decoder = taps(arch)
            return encoder + decoder
        return tuple(dict.fromkeys((*arch.states, arch.final_layer))) if self._single else arch.states

    def build(self, arch: Architecture, widths: Mapping[str, int], weights: WeightsLoader) -> Body:
        """See CachedMethod."""
        width, lean = self._width(arch), self.config.lean
        side_width = width // self.config.reduction
        if arch.stages:
            return StageAnchor(arch.grids, widths, side_width, width)
        if arch.decoder_blocks:
            return TwoStacks(arch, widths, side_width, lean=lean)
        if self._single:
            # A causal text tower (CLIP) sums a text up in its end token, others in their first.
            return SingleAnchor(arch.states, arch.final_layer, widths, side_width, last_real=arch.causal, lean=lean)
        form = MlpAnchor if self.config.form == "mlp" else TokenAnchor
        return form(arch.states, widths, side_width, width, lean=lean)

    def _width(self, arch: Architecture) -> int:
        return int(self.config.width) or arch.width

    @property
    def _single(self) -> bool:
        return bool(self.config.form == "single_anchor")


class TokenAnchor(Parallel):
    """The transformer form: tokens in, tokens (B, T, E) out."""

    eps = 1e-8  # in the denominator of the map

    def __init__(
        self, states: tuple[str, ...], widths: Mapping[str, int], side_width: int, width: int, *, lean: bool = True
    ) -> None:
        super().__init__()
        self.states = states
        self.width = width
        self.looks = len(states) - 1
        self.lean = lean
        self.down = nn.ModuleList(
            nn.Sequential(nn.Linear(widths[state], side_width), nn.LayerNorm(side_width)) for state in states
        )
        self.gate = nn.Linear(side_width, 1)
        self.project = nn.Sequential(nn.Linear(side_width, side_width), nn.LayerNorm(side_width))
        self.up = nn.Linear(side_width, width)

    def open(self, batch: Batch) -> tuple[Tensor, ...]:
        """Anchor tokens (B, T, m) and their mean (B, m)."""
        anchor = self.down[-1](batch.state(self.states[-1]))
        return anchor, masked_mean(anchor, batch.mask)

    def look(self, index: int, opened: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """See Parallel."""
        anchor, summary = opened
        guide = self.down[index](batch.state(self.states[index]))  # (B, T, m)
        scores = anchor @ guide.mT * batch.mask[:, None, :]  # (B, T, T), keys masked by multiplication
        # The identity is added after the normalisation: (P + I) X = P X + X.
        return relu_l1(scores, self.eps) @ guide + guide, self.gate(summary * masked_mean(guide, batch.mask))

    def close(self, opened: Sequence[Tensor], merged: Tensor) -> Tensor:
        """Tokens (B, T, E)."""
        return self.up(torch.relu(opened[0] + self.project(merged)))


class MlpAnchor(TokenAnchor):
    """The CLIP-ViL form: an MLP in place of the sum's projection, no ReLU at the end, and BERT's initialisation."""

    eps = 1e-6

    def __init__(
        self, states: tuple[str, ...], widths: Mapping[str, int], side_width: int, width: int, *, lean: bool = True
    ) -> None:
        super().__init__(states, widths, side_width, width, lean=lean)
        self.project = nn.Sequential(
            nn.Linear(side_width, width), nn.ReLU(), nn.Linear(width, side_width), nn.LayerNorm(side_width)
        )
        for module in self.modules():  # of the whole model, in CLIP-ViL's code
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def close(self, opened: Sequence[Tensor], merged: Tensor) -> Tensor:
        """Tokens (B, T, E)."""
        return self.up(opened[0] + self.project(merged))
