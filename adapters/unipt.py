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
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..cache.backbone import Architecture
from ..cache.pooling import masked_mean
from ._base import Batch, Body, CachedMethod, TrainingConfig, WeightsLoader, option


@dataclass(frozen=True)
class Config(TrainingConfig):
    """UniPT's options."""

    lr: float = option(5e-4, "peak learning rate (UniPT's released scripts for VSE-infinity, CLIP-ViL VQA and MDETR)")
    weight_decay: float = option(1e-4, "AdamW's weight decay (UniPT's VSE-infinity and MDETR scripts)")
    reduction: int = option(2, "r: the side width is m = D // r (2 in the paper; 1 for its CLIP4Clip form)")
    form: Literal["tokens", "single_anchor"] = option(
        "tokens", "tokens: anchor = last state; single_anchor: anchor = the final layer's summary token (CLIP4Clip)"
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
        side_width = arch.width // self.config.reduction
        if self._single:
            # A causal text tower (CLIP) sums a text up in its end token, others in their first.
            return SingleAnchor(arch.states, arch.final_layer, widths, side_width, last_real=arch.causal)
        return TokenAnchor(arch.states, widths, side_width, arch.width)

    @property
    def _single(self) -> bool:
        return bool(self.config.form == "single_anchor")


class TokenAnchor(Body):
    """The transformer form: tokens in, tokens (B, T, E) out."""

    def __init__(self, states: tuple[str, ...], widths: Mapping[str, int], side_width: int, width: int) -> None:
        super().__init__()
        self.states = states
        self.width = width
        self.down = nn.ModuleList(
            nn.Sequential(nn.Linear(widths[state], side_width), nn.LayerNorm(side_width)) for state in states
        )
        self.gate = nn.Linear(side_width, 1)
        self.project = nn.Sequential(nn.Linear(side_width, side_width), nn.LayerNorm(side_width))
        self.up = nn.Linear(side_width, width)

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        *guides, anchor = (down(batch.state(s)) for down, s in zip(self.down, self.states, strict=True))
        summary = masked_mean(anchor, batch.mask)  # (B, m)
        enriched, logits = [], []
        for guide in guides:
            scores = anchor @ guide.mT * batch.mask[:, None, :]  # (B, T, T), keys masked by multiplication
            # The identity is added after the normalisation: (P + I) X = P X + X.
            enriched.append(relu_l1(scores) @ guide + guide)  # (B, T, m)
            logits.append(self.gate(summary * masked_mean(guide, batch.mask)))  # (B, 1)
        merged = torch.einsum("bl,lbtm->btm", confidences(logits), torch.stack(enriched))
        return self.up(torch.relu(anchor + self.project(merged)))  # (B, T, E)


class SingleAnchor(Body):
    """The CLIP4Clip form: one anchor token per example, all states are guides, a vector (B, E) out."""

    def __init__(
        self, states: tuple[str, ...], final: str, widths: Mapping[str, int], side_width: int, *, last_real: bool
    ) -> None:
        super().__init__()
        self.states = states
        self.final = final
        self.width = widths[final]
        self.last_real = last_real
        self.anchor = nn.Linear(self.width, side_width)
        self.down = nn.ModuleList(nn.Linear(widths[state], side_width) for state in states)
        self.gate = nn.Linear(side_width, 1)
        self.up = nn.Linear(side_width, self.width)

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        position = batch.mask.sum(1) - 1 if self.last_real else torch.zeros_like(batch.mask[:, 0], dtype=torch.long)
        rows = torch.arange(len(position), device=position.device)
        embedding = batch.state(self.final)[rows, position]  # (B, E)
        anchor = self.anchor(torch.relu(embedding))  # (B, m)
        enriched, logits = [], []
        for down, state in zip(self.down, self.states, strict=True):
            guide = down(torch.relu(batch.state(state)))  # (B, T, m)
            scores = torch.einsum("bm,btm->bt", anchor, guide) * batch.mask
            # No identity here: the guide's own summary token is added instead.
            enriched.append(torch.einsum("bt,btm->bm", relu_l1_clamped(scores), guide) + guide[rows, position])
            logits.append(self.gate(anchor * masked_mean(guide, batch.mask)))
        merged = torch.einsum("bl,lbm->bm", confidences(logits), torch.stack(enriched))
        return embedding + self.up(torch.relu(merged))


def relu_l1(scores: Tensor) -> Tensor:
    """The map of sec. 1: ReLU, then divided by the sum over keys. A row with no positive score becomes all zeros."""
    positive = torch.relu(scores)
    return positive / (positive.sum(-1, keepdim=True) + 1e-8)


def relu_l1_clamped(scores: Tensor) -> Tensor:
    """The same with the denominator clamped, as the CLIP4Clip code does."""
    positive = torch.relu(scores)
    return positive / positive.sum(-1, keepdim=True).clamp(min=1e-6)


def confidences(logits: list[Tensor]) -> Tensor:
    """Softmax over layers at temperature 1: (B, L) from L times (B, 1)."""
    return torch.cat(logits, dim=1).softmax(dim=1)
