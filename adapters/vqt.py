"""VQT: Visual Query Tuning: Towards Effective Usage of Intermediate Representations for Parameter and Memory Efficient
Transfer Learning. Tu, Mai, Chao. CVPR 2023, arXiv 2212.03220.

Learned query tokens stand in every block on the query side alone: they look at the frozen tokens, which do not see
them. What leaves the frozen block at their places sums the block up, and the head reads the summaries of all blocks.

    Z_l = Block_l(P_l; keys and values from x_l);  vector = [summary of the final tokens; Z_0; ...; Z_(L-1)]

x_l is what enters block l. Since no frozen token depends on a query, only the queries are run through the blocks here;
the released code runs all tokens and so keeps the whole stream for backward. Nor are keys and values computed: both are
linear in x_l, so W_k moves to the few queries and W_v behind their weighted means of x_l (a key's bias shifts all
scores of a query alike and cancels). That is cheaper while a block has fewer queries than a head has channels.

A query sees every real token, also where the backbone is causal: it stands behind the last. Ours, too: no dropout on
the queries (0.1 in the released code), as everywhere in this comparison.

Cached: what enters each block, and the final layer. In memory are frozen copies of the blocks' weights. Trained: L T D,
and the head is (LT + 1) D wide.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..cache.architecture import Architecture
from ..cache.block_weights import BackboneWeights, BlockWeights
from ..cache.errors import SidebenchError
from ..cache.pooling import masked_mean, pooling_mask
from ._base import Batch, Body, CachedMethod, TrainingConfig, WeightsLoader, option
from ._blocks import ACTIVATIONS, scaled
from ._recompute import in_slices, recomputed
from ._tokens import summary_position, summary_token


@dataclass(frozen=True)
class Config(TrainingConfig):
    """VQT's options."""

    lr: float = option(1e-3, "peak learning rate (ours: VQT's grids were not read)")
    queries: int = option(1, "T: query tokens per block (1 in VQT's released code)")
    summary: Literal["token", "mean"] = option(
        "token", "of the final tokens: the class token (of causal texts the last) as in VQT; or the mean of the others"
    )
    normalise: bool = option(False, "divide each summary by its l2 norm (an option of VQT's released code)")
    lean: bool = option(
        True, "true: backward computes the blocks again, a slice of the batch at a time; false: it keeps them all"
    )


class VQT(CachedMethod):
    """Learned queries that sum every frozen block up without changing what runs through it."""

    Config: ClassVar[type] = Config
    paper = "VQT, CVPR 2023, arXiv 2212.03220"
    runs_blocks = True

    def refusal(self, arch: Architecture) -> str | None:
        """It runs the backbone's own blocks, so they must be known."""
        if arch.norm is None or arch.heads is None or arch.mlp_width is None or arch.width % arch.heads:
            return f"it runs queries through the backbone's own blocks, and {arch.name} has none this code can copy"
        if arch.activation is not None and arch.activation not in ACTIVATIONS:
            return f"it runs the backbone's own blocks, and does not know {arch.activation!r} of {arch.name}'s MLP"
        if self.config.summary == "token" and arch.modality == "image" and not arch.prefix_tokens:
            return f"it reads the class token, and {arch.name} has none; try --set vqt.summary=mean"
        return f"{self.config.queries} queries are none; 1 or more" if self.config.queries < 1 else None

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """What enters each block, and the final layer."""
        return (*arch.states[:-1], arch.final_layer)

    def build(self, arch: Architecture, widths: Mapping[str, int], weights: WeightsLoader) -> Body:
        """See CachedMethod. Raises SidebenchError for states or blocks that do not fit each other."""
        narrow = {layer: widths[layer] for layer in self.layers(arch) if widths[layer] != arch.width}
        if narrow:
            raise SidebenchError(
                f"vqt runs the backbone's blocks on states of width {arch.width}; the cache holds {narrow}. "
                "Type --tokens all."
            )
        body = QueriedBlocks(arch, weights(), self.config.queries, summary=self.config.summary)
        body.normalise, body.lean = self.config.normalise, self.config.lean
        return body


class QueriedBlocks(Body):
    """The queries and the blocks they are run through; a vector (B, (1 + L T) D) out."""

    normalise = False
    lean = True

    def __init__(self, arch: Architecture, weights: BackboneWeights, queries: int, *, summary: str = "token") -> None:
        super().__init__()
        self.inputs = arch.states[:-1]
        self.final = arch.final_layer
        self.summary = summary
        self.last_real = arch.causal
        self.prefix_tokens = arch.prefix_tokens
        self.width = (1 + arch.blocks * queries) * arch.width
        # Uniform within sqrt(6 / (3 P² + D)), Xavier's bound for the patch embedding (VQT's released code); a text
        # backbone has no patches, so its token embedding's own fan, D, stands in for 3 P².
        fan_in = len(weights.embedding) if arch.modality == "image" else arch.width
        bound = (6 / (fan_in + arch.width)) ** 0.5
        self.queries = nn.Parameter(torch.empty(arch.blocks, queries, arch.width).uniform_(-bound, bound))  # (L, T, D)
        self.blocks = nn.ModuleList(FrozenBlock(arch, block) for block in weights.blocks)

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        return in_slices(self.look, batch) if self.lean else self.look(batch)

    def look(self, batch: Batch) -> Tensor:
        """The final summary and those of all blocks, one after the other (B, (1 + L T) D)."""
        run: Callable[..., Tensor] = recomputed if self.lean else lambda compute, *args: compute(*args)
        found = [self.final_summary(batch), *(run(self.block_summary, i, batch) for i in range(len(self.blocks)))]
        summaries = torch.cat(found, dim=1)  # (B, 1 + L T, D)
        return (functional.normalize(summaries, dim=-1) if self.normalise else summaries).flatten(1)

    def final_summary(self, batch: Batch) -> Tensor:
        """(B, 1, D)."""
        tokens = batch.state(self.final)
        if self.summary == "mean":
            return masked_mean(tokens, pooling_mask(batch.mask, self.prefix_tokens))[:, None]
        return summary_token(tokens, summary_position(batch.mask, last_real=self.last_real))[:, None]

    def block_summary(self, index: int, batch: Batch) -> Tensor:
        """Z_index (B, T, D)."""
        return self.blocks[index](self.queries[index], batch.state(self.inputs[index]), batch.mask)


class FrozenBlock(nn.Module):
    """A block of the backbone with its own weights, for tokens that look at others."""

    def __init__(self, arch: Architecture, source: BlockWeights) -> None:
        super().__init__()
        if len(source.fc1[0]) != source.fc2[0].shape[1]:
            raise SidebenchError("vqt cannot run this backbone's blocks: their MLP is gated. Leave vqt out.")
        assert arch.heads is not None
        self.heads = arch.heads
        self.pre_norm = arch.norm == "pre"
        self.eps = arch.norm_eps
        self.activation = ACTIVATIONS[arch.activation or "gelu"]
        self.query, self.key, self.value, self.out = map(Frozen, (source.query, source.key, source.value, source.out))
        self.fc1, self.fc2, self.norm1, self.norm2 = map(Frozen, (source.fc1, source.fc2, source.norm1, source.norm2))
        scales = source.scales or (None, None)
        self.scale1, self.scale2 = (s if s is None else nn.Parameter(s, requires_grad=False) for s in scales)

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Queries (T, D), the same for all examples, that see the real tokens (B, N, D) -> (B, T, D)."""
        if self.pre_norm:
            seen = self.attend(self.normed(queries, self.norm1), self.normed(tokens, self.norm1), mask)
            x = queries + scaled(seen, self.scale1)
            return x + scaled(self.mlp(self.normed(x, self.norm2)), self.scale2)
        x = self.normed(queries + scaled(self.attend(queries, tokens, mask), self.scale1), self.norm1)
        return self.normed(x + scaled(self.mlp(x), self.scale2), self.norm2)

    def attend(self, queries: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Softmax attention of (T, D) to (B, N, D), keys and values never made. m: the D channels of a token."""
        q = linear(queries, self.query).unflatten(-1, (self.heads, -1))  # (T, H, D/H)
        to_keys, to_values = (w.weight.unflatten(0, (self.heads, -1)) for w in (self.key, self.value))  # (H, D/H, D)
        probes = torch.einsum("thd,hdm->htm", q, to_keys) * q.shape[-1] ** -0.5
        scores = torch.einsum("htm,bnm->bhtn", probes, tokens)
        weights = scores.masked_fill(~mask[:, None, None, :], float("-inf")).softmax(-1)
        means = torch.einsum("bhtn,bnm->bhtm", weights, tokens)
        mixed = torch.einsum("bhtm,hdm->bthd", means, to_values).flatten(2)  # (B, T, D)
        return linear(mixed if self.value.bias is None else mixed + self.value.bias, self.out)

    def mlp(self, x: Tensor) -> Tensor:
        """The two-layer MLP."""
        return linear(self.activation(linear(x, self.fc1)), self.fc2)

    def normed(self, x: Tensor, norm: "Frozen") -> Tensor:
        """Layer normalisation."""
        return functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, self.eps)


class Frozen(nn.Module):
    """A weight and its bias, of a linear map or of a norm, that do not train."""

    def __init__(self, pair: tuple[Tensor, Tensor | None]) -> None:
        super().__init__()
        weight, bias = pair
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


def linear(x: Tensor, by: Frozen) -> Tensor:
    """x W^T + b."""
    return functional.linear(x, by.weight, by.bias)
