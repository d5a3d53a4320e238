"""LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning.
Sung, Cho, Bansal. NeurIPS 2022, arXiv 2206.06522.

A copy of the backbone with every width divided by r runs beside it; before each of its blocks a gated ladder mixes in
the frozen block's output. The gradient stays in the side network.

    s_0 = W_e embeddings;  s_i = SideBlock_i(mu_i s_(i-1) + (1 - mu_i) W_i b_i),  mu_i = sigmoid(alpha_i / 0.1)
    tokens = W_up norm(s_L)

b_i is block i's raw output: before the backbone's final norm, and after the block it is mixed in front of the side copy
of. Cached: the L hidden states. Trained, with S = D/r, F = mlp/r, L blocks:
    (L+1)(DS + S) + L + L(4(S²+S) + 2SF + F + S + 4S [+ 2S layer scale]) + 2S + SD + D
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..cache.backbone import Architecture
from ..cache.block_weights import BackboneWeights, BlockWeights
from ..cache.errors import SidebenchError
from ._base import Batch, Body, CachedMethod, TrainingConfig, WeightsLoader, option
from ._recompute import in_slices, recomputed

Pair = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Config(TrainingConfig):
    """LST's options."""

    lr: float = option(3e-3, "peak learning rate (LST's released GLUE scripts)")
    reduction: int = option(8, "r: every width is divided by it (8 for T5 on GLUE in the paper)")
    init: Literal["magnitude", "random"] = option(
        "magnitude", "magnitude: the backbone's own weights, pruned by |w| (sec. 2.2; no backward needed); or random"
    )
    temperature: float = option(0.1, "T of the gate sigmoid(alpha / T)")
    lean: bool = option(
        True, "true: backward computes the side blocks again, a slice of the batch at a time; false: it keeps them all"
    )


class LST(CachedMethod):
    """A slim copy of the backbone beside it, fed by gated ladders from every block."""

    Config: ClassVar[type] = Config
    paper = "LST, NeurIPS 2022, arXiv 2206.06522"

    def refusal(self, arch: Architecture) -> str | None:
        """The side network copies the backbone's block, so that block must be known and divide by r."""
        r = self.config.reduction
        if arch.norm is None or arch.heads is None or arch.mlp_width is None:
            return f"it copies the backbone's block, and {arch.name} has none this code can copy"
        if arch.activation is not None and arch.activation not in ACTIVATIONS:
            return f"it copies the backbone's block, and not the activation {arch.activation!r} of {arch.name}'s MLP"
        if arch.width % arch.heads:
            return f"it copies the backbone's block, and width {arch.width} does not split into {arch.heads} heads"
        if self.config.temperature <= 0:
            return f"temperature {self.config.temperature} is none for a gate; more than 0"
        if r < 1 or arch.width % r or arch.mlp_width % r or arch.width // r % arch.heads:
            return (
                f"width {arch.width} divided by lst.reduction={r} does not split into {arch.heads} heads; "
                f"try --set lst.reduction={self._dividing(arch)}"
            )
        return None

    def build(self, arch: Architecture, widths: Mapping[str, int], weights: WeightsLoader) -> Body:
        """See CachedMethod."""
        ladder = Ladder(arch, widths, self.config.reduction, self.config.temperature, lean=self.config.lean)
        if self.config.init == "magnitude":
            copy_pruned(ladder, weights())
        return ladder

    def _dividing(self, arch: Architecture) -> int:
        assert arch.heads is not None
        assert arch.mlp_width is not None
        both = math.gcd(arch.width // arch.heads, arch.mlp_width)
        return next(r for r in (8, 4, 2, 1) if both % r == 0)


class Ladder(Body):
    """The side network; tokens (B, T, D) out."""

    def __init__(
        self, arch: Architecture, widths: Mapping[str, int], reduction: int, temperature: float, *, lean: bool = True
    ) -> None:
        super().__init__()
        self.states = arch.states
        self.width = arch.width
        self.temperature = temperature
        self.lean = lean
        side_width = arch.width // reduction
        self.down = nn.ModuleList(nn.Linear(widths[state], side_width) for state in self.states)
        self.alpha = nn.Parameter(torch.zeros(arch.blocks))  # mu = 0.5 at the start
        self.blocks = nn.ModuleList(SideBlock(arch, reduction) for _ in range(arch.blocks))
        self.norm = nn.LayerNorm(side_width, eps=arch.norm_eps)
        self.up = nn.Linear(side_width, self.width)
        for linear in (*self.down, self.up):  # N(0, 0.01), bias 0 (LST's released code)
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        return in_slices(self.climb, batch) if self.lean else self.climb(batch)

    def climb(self, batch: Batch) -> Tensor:
        """From the embeddings to the top. Of a lean climb backward keeps the side state behind every other block."""
        run: Callable[..., Tensor] = recomputed if self.lean else lambda compute, *args: compute(*args)
        side = run(self.rung, 0, batch)
        for first in range(0, len(self.blocks), 2):
            side = run(self.pass_two, first, side, batch)
        return self.up(self.norm(side))  # (B, T, D)

    def pass_two(self, first: int, side: Tensor, batch: Batch) -> Tensor:
        """The side state (B, T, S) behind block `first` and the one after it from the state before them."""
        gates = torch.sigmoid(self.alpha / self.temperature)
        for index in range(first, min(first + 2, len(self.blocks))):
            mixed = gates[index] * side + (1 - gates[index]) * self.rung(index + 1, batch)
            side = self.blocks[index](mixed, batch.mask)
        return side

    def rung(self, index: int, batch: Batch) -> Tensor:
        """What a frozen state brings in: W_index b_index (B, T, S)."""
        return self.down[index](batch.state(self.states[index]))


class SideBlock(nn.Module):
    """The backbone's block at width D/r with as many heads, pre- or post-norm and with layer scale as it has them."""

    def __init__(self, arch: Architecture, reduction: int) -> None:
        super().__init__()
        assert arch.heads is not None
        assert arch.mlp_width is not None
        width, hidden = arch.width // reduction, arch.mlp_width // reduction
        self.heads = arch.heads
        self.pre_norm = arch.norm == "pre"
        self.causal = arch.causal
        self.activation = ACTIVATIONS[arch.activation or "gelu"]
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=arch.norm_eps) for _ in range(2))
        self.scale1 = nn.Parameter(torch.ones(width)) if arch.layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if arch.layer_scale else None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, S) and the (B, T) mask of real tokens -> (B, T, S)."""
        if self.pre_norm:
            x = x + scaled(self.attend(self.norm1(x), mask), self.scale1)
            return x + scaled(self.mlp(self.norm2(x)), self.scale2)
        x = self.norm1(x + scaled(self.attend(x, mask), self.scale1))
        return self.norm2(x + scaled(self.mlp(x), self.scale2))

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """Softmax attention over real keys, and earlier ones only where the backbone is causal."""
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        seen = mask[:, None, None, :]
        if self.causal:
            seen = seen & torch.ones(seen.shape[-1:] * 2, dtype=torch.bool, device=x.device).tril()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)  # (B, H, T, S/H)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        """The two-layer MLP."""
        return self.fc2(self.activation(self.fc1(x)))


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of the GELU."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of the GELU."""
    return nn.functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "quick_gelu": quick_gelu,
    "relu": torch.relu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "silu": nn.functional.silu,
}


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """Layer scale, where the backbone has it."""
    return x if scale is None else x * scale


@torch.no_grad()
def copy_pruned(ladder: Ladder, weights: BackboneWeights) -> None:
    """Structural pruning (sec. 3.2 of the paper, "without residual") with |w| as importance.

    Layers are walked in forward order with the set of kept indices: inputs are the last set, outputs are the rows of
    largest importance, which become the next set. Consistency along the residual stream is not enforced, as in the
    released code. Raises SidebenchError for a block or an embedding whose widths do not follow each other.
    """
    side_width = ladder.up.in_features
    gated = any(len(block.fc1[0]) != block.fc2[0].shape[1] for block in weights.blocks)  # SwiGLU
    if gated or weights.embedding.shape[1] != ladder.width:  # ELECTRA's table is narrower than its blocks
        raise SidebenchError(
            "this backbone's weights cannot be pruned: its embedding is narrower than its blocks, or its MLP is gated. "
            "Try --set lst.init=random."
        )
    kept = strongest(weights.embedding.abs().sum(0), side_width)
    for block, source in zip(ladder.blocks, weights.blocks, strict=True):
        assert isinstance(block, SideBlock)
        kept = _copy_block(block, source, kept)
    if weights.norm is not None:
        _take_vector(ladder.norm, weights.norm, kept)


def _copy_block(block: SideBlock, source: BlockWeights, kept: Tensor) -> Tensor:
    side_width, hidden = block.out.out_features, block.fc1.out_features
    if block.pre_norm:
        _take_vector(block.norm1, source.norm1, kept)
    attended = kept_rows((source.query, source.key, source.value), kept, side_width)
    for linear, pair in ((block.query, source.query), (block.key, source.key), (block.value, source.value)):
        _take(linear, pair, attended, kept)
    after_attention = kept_rows((source.out,), attended, side_width)
    _take(block.out, source.out, after_attention, attended)
    _take_vector(
        block.norm2 if block.pre_norm else block.norm1,
        source.norm2 if block.pre_norm else source.norm1,
        after_attention,
    )
    inner = kept_rows((source.fc1,), after_attention, hidden)
    _take(block.fc1, source.fc1, inner, after_attention)
    after_mlp = kept_rows((source.fc2,), inner, side_width)
    _take(block.fc2, source.fc2, after_mlp, inner)
    if not block.pre_norm:
        _take_vector(block.norm2, source.norm2, after_mlp)
    if block.scale1 is not None and block.scale2 is not None and source.scales is not None:
        block.scale1.copy_(source.scales[0][after_attention])
        block.scale2.copy_(source.scales[1][after_mlp])
    return after_mlp


def kept_rows(group: Iterable[Pair], columns: Tensor, count: int) -> Tensor:
    """Rows of largest l1 importance, the importances of a group (q, k, v) multiplied elementwise."""
    importance = torch.stack([weight[:, columns].abs() for weight, _ in group]).prod(0)  # (rows, kept columns)
    return strongest(importance.sum(1), count)


def strongest(importance: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest entries, in their own order."""
    return importance.topk(count).indices.sort().values


def _take(linear: nn.Linear, source: Pair, rows: Tensor, columns: Tensor) -> None:
    linear.weight.copy_(source[0][rows][:, columns])
    linear.bias.copy_(source[1][rows] if source[1] is not None else torch.zeros_like(linear.bias))


def _take_vector(norm: nn.LayerNorm, source: Pair, kept: Tensor) -> None:
    norm.weight.copy_(source[0][kept])
    norm.bias.copy_(source[1][kept] if source[1] is not None else torch.zeros_like(norm.bias))
