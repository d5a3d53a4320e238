"""UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter and Memory.
Diao, Wan, Zhang, Jia, Lu, Chen. CVPR 2024, arXiv 2308.14316.

Every frozen hidden state is projected down; the last is the anchor, the others are guides. Each guide is re-expressed
at the anchor's positions by a softmax-free attention map, all guides in parallel (parallel interaction), and the guides
are summed with confidences that a gate reads from pooled anchor and guide (confidence aggregation).

Cached: the L hidden states (single_anchor: and the final layer). Trained, with m = D // reduction and output width E:
    L(Dm + m + 2m) + (m² + m + 2m) + (mE + E) + (m + 1)          text / transformer form
    L(Dm + m) + (Em + m) + (m + 1) + (mE + E)                    single-anchor form (the paper's CLIP4Clip)
The gate's bias shifts all confidences alike and cancels in their softmax: it is counted, as in the paper, and its
gradient is zero.

The lean form (default) has the same numbers and parameters; of all layers only their sum is kept for backward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..cache.backbone import Architecture
from ..cache.pooling import masked_mean
from ._base import Batch, Body, CachedMethod, TrainingConfig, WeightsLoader, option
from ._recompute import summed_in_turn


@dataclass(frozen=True)
class Config(TrainingConfig):
    """UniPT's options."""

    lr: float = option(5e-4, "peak learning rate (UniPT's released scripts for VSE-infinity, CLIP-ViL VQA and MDETR)")
    weight_decay: float = option(1e-4, "AdamW's weight decay (UniPT's VSE-infinity and MDETR scripts)")
    reduction: int = option(2, "r: the side width is m = D // r (2 in the paper; 1 for its CLIP4Clip form)")
    form: Literal["tokens", "single_anchor"] = option(
        "tokens", "tokens: anchor = last state; single_anchor: anchor = the final layer's summary token (CLIP4Clip)"
    )
    lean: bool = option(
        True, "true: backward computes each layer again, a slice of the batch at a time; false: it keeps them all"
    )


class UniPT(CachedMethod):
    """Parallel interaction of all frozen states with the last one, summed by learned confidences."""

    Config: ClassVar[type] = Config
    paper = "UniPT, CVPR 2024, arXiv 2308.14316"

    def refusal(self, arch: Architecture) -> str | None:
        """At least one guide beside the anchor is needed."""
        if arch.blocks < 1:
            return "it needs a backbone with blocks: at least one guide beside the anchor"
        if arch.width // max(self.config.reduction, 1) < 1 or self.config.reduction < 1:
            return f"reduction {self.config.reduction} leaves no side width of {arch.width}"
        if self._single and arch.modality == "image" and not arch.prefix_tokens:
            return f"its single anchor is the class token, and {arch.name} has none; leave unipt.form at tokens"
        return None

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """The hidden states, and for a single anchor the final layer."""
        return tuple(dict.fromkeys((*arch.states, arch.final_layer))) if self._single else arch.states

    def build(self, arch: Architecture, widths: Mapping[str, int], weights: WeightsLoader) -> Body:
        """See CachedMethod."""
        side_width, lean = arch.width // self.config.reduction, self.config.lean
        if self._single:
            # A causal text tower (CLIP) sums a text up in its end token, others in their first.
            return SingleAnchor(arch.states, arch.final_layer, widths, side_width, last_real=arch.causal, lean=lean)
        return TokenAnchor(arch.states, widths, side_width, arch.width, lean=lean)

    @property
    def _single(self) -> bool:
        return bool(self.config.form == "single_anchor")


class Parallel(Body):
    """Both forms: open an anchor, interact with each guide, sum by confidence, close."""

    looks: int  # guides
    lean: bool

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        if self.lean:
            return summed_in_turn(self, batch)
        opened = self.open(batch)
        enriched, logits = zip(*(self.look(index, opened, batch) for index in range(self.looks)), strict=True)
        merged = torch.einsum("bl,lb...->b...", confidences(logits), torch.stack(enriched))
        return self.close(opened, merged)

    def open(self, batch: Batch) -> tuple[Tensor, ...]:
        """The anchor, and what else the guides meet."""
        raise NotImplementedError

    def look(self, index: int, opened: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """A guide re-expressed at the anchor's positions (B, [T,] m), and its logit (B, 1)."""
        raise NotImplementedError

    def close(self, opened: Sequence[Tensor], merged: Tensor) -> Tensor:
        """The output from the anchor and the sum of the guides."""
        raise NotImplementedError


class TokenAnchor(Parallel):
    """The transformer form: tokens in, tokens (B, T, E) out."""

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
        return relu_l1(scores) @ guide + guide, self.gate(summary * masked_mean(guide, batch.mask))

    def close(self, opened: Sequence[Tensor], merged: Tensor) -> Tensor:
        """Tokens (B, T, E)."""
        return self.up(torch.relu(opened[0] + self.project(merged)))


class SingleAnchor(Parallel):
    """The CLIP4Clip form: one anchor token per example, all states are guides, a vector (B, E) out."""

    def __init__(
        self,
        states: tuple[str, ...],
        final: str,
        widths: Mapping[str, int],
        side_width: int,
        *,
        last_real: bool,
        lean: bool = True,
    ) -> None:
        super().__init__()
        self.states = states
        self.final = final
        self.width = widths[final]
        self.looks = len(states)
        self.last_real = last_real
        self.lean = lean
        self.anchor = nn.Linear(self.width, side_width)
        self.down = nn.ModuleList(nn.Linear(widths[state], side_width) for state in states)
        self.gate = nn.Linear(side_width, 1)
        self.up = nn.Linear(side_width, self.width)

    def open(self, batch: Batch) -> tuple[Tensor, ...]:
        """Anchor (B, m), the embedding (B, E) it is made of, and the position of its token (B)."""
        position = batch.mask.sum(1) - 1 if self.last_real else torch.zeros_like(batch.mask[:, 0], dtype=torch.long)
        embedding = summary_token(batch.state(self.final), position)
        return self.anchor(torch.relu(embedding)), embedding, position

    def look(self, index: int, opened: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """See Parallel."""
        anchor, _, position = opened
        guide = self.down[index](torch.relu(batch.state(self.states[index])))  # (B, T, m)
        scores = torch.einsum("bm,btm->bt", anchor, guide) * batch.mask
        # No identity here: the guide's own summary token is added instead.
        value = torch.einsum("bt,btm->bm", relu_l1_clamped(scores), guide) + summary_token(guide, position)
        return value, self.gate(anchor * masked_mean(guide, batch.mask))

    def close(self, opened: Sequence[Tensor], merged: Tensor) -> Tensor:
        """A vector (B, E)."""
        return opened[1] + self.up(torch.relu(merged))


def summary_token(tokens: Tensor, position: Tensor) -> Tensor:
    """The token of each example that sums it up: (B, D) from (B, T, D) and positions (B)."""
    return tokens[torch.arange(len(position), device=position.device), position]


def relu_l1(scores: Tensor) -> Tensor:
    """The map of sec. 1: ReLU, then divided by the sum over keys. A row with no positive score becomes all zeros."""
    positive = torch.relu(scores)
    return positive / (positive.sum(-1, keepdim=True) + 1e-8)


def relu_l1_clamped(scores: Tensor) -> Tensor:
    """The same with the denominator clamped, as the CLIP4Clip code does."""
    positive = torch.relu(scores)
    return positive / positive.sum(-1, keepdim=True).clamp(min=1e-6)


def confidences(logits: Sequence[Tensor]) -> Tensor:
    """Softmax over layers at temperature 1: (B, L) from L times (B, 1)."""
    return torch.cat(tuple(logits), dim=1).softmax(dim=1)
