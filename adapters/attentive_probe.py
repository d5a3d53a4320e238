"""Attentive probe: learned queries that look at the frozen network's last tokens, and a linear head on what they see.
The form is that of AIM (El-Nouby et al., ICML 2024, arXiv 2401.08541): a query is free, so nothing projects it, and
nothing is projected after the values. Where AIM has a batch norm before and averages several queries, a layer norm
follows here and the queries' vectors stand side by side, so that the head can tell them apart.

    a_qh = softmax over real tokens t of  Q_qh . (W_k x_t)_h / sqrt(D/H);   out_q = LN(concat_h sum_t a_qht (W_v x_t)_h)

Both maps are linear, so W_k is folded into the queries and W_v is applied to the weighted means: the same numbers, and
no projected copy of the tokens is made or kept for backward. Cached: the final layer. Trained, with k queries:
    k D + 2 D² + 2 D
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture
from ._base import Batch, Body, CachedMethod, TrainingConfig, WeightsLoader, option


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Options of the probe."""

    lr: float = option(1e-3, "peak learning rate (ours: AIM's recipe was not read)")
    queries: int = option(1, "k: number of learned queries (1 in AIM's code)")
    heads: int = option(0, "H: attention heads; 0 takes as many as the backbone has, 1 where that is unknown (AIM: 12)")


class AttentiveProbe(CachedMethod):
    """Learned queries attend to the final tokens; what they gather is the vector for the head."""

    Config: ClassVar[type] = Config
    paper = "attentive probe as in AIM, ICML 2024, arXiv 2401.08541"

    def refusal(self, arch: Architecture) -> str | None:
        """The width must split into heads."""
        if self.config.queries < 1:
            return f"{self.config.queries} queries are none; 1 or more"
        if arch.width % self._heads(arch):
            return (
                f"width {arch.width} does not split into {self._heads(arch)} heads; try --set attentive_probe.heads=1"
            )
        return None

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """The final layer alone."""
        return (arch.final_layer,)

    def build(self, arch: Architecture, widths: Mapping[str, int], weights: WeightsLoader) -> Body:
        """See CachedMethod."""
        return Queries(arch.final_layer, widths[arch.final_layer], self.config.queries, self._heads(arch))

    def _heads(self, arch: Architecture) -> int:
        return int(self.config.heads or arch.heads or 1)


class Queries(Body):
    """A vector (B, k D) out."""

    def __init__(self, layer: str, token_width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.layer = layer
        self.width = queries * token_width
        self.heads = heads
        self.query = nn.Parameter(0.02 * torch.randn(queries, token_width))  # as in AIM's code
        # No biases: a key's would shift all scores of a query alike, a value's is the layer norm's.
        self.key = nn.Linear(token_width, token_width, bias=False)
        self.value = nn.Linear(token_width, token_width, bias=False)
        self.norm = nn.LayerNorm(token_width)

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        tokens = batch.state(self.layer)  # (B, T, D)
        mixed = self.weights(tokens, batch.mask) @ tokens  # (B, k H, D)
        mixed = mixed.unflatten(1, (-1, self.heads))
        gathered = torch.einsum("bqhd,hed->bqhe", mixed, self._by_head(self.value))
        return self.norm(gathered.flatten(2)).flatten(1)

    def weights(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """How much each head of each query takes of each token (B, k H, T): sums of 1, and 0 of padding."""
        query = self.query.unflatten(1, (self.heads, -1)) * (tokens.shape[2] / self.heads) ** -0.5
        looks = torch.einsum("qhe,hed->qhd", query, self._by_head(self.key)).flatten(0, 1)  # (k H, D)
        scores = looks @ tokens.mT  # (B, k H, T)
        return scores.masked_fill(~mask[:, None, :], -torch.inf).softmax(-1)

    def _by_head(self, linear: nn.Linear) -> Tensor:
        return linear.weight.unflatten(0, (self.heads, -1))  # (H, D/H, D)
