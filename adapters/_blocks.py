"""The backbone's transformer block as a side network has it, and the activation functions of its MLP by name."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture


class SideBlock(nn.Module):
    """The backbone's block at width D/r with as many heads, pre- or post-norm and with layer scale as it has them."""

    def __init__(self, arch: Architecture, reduction: int) -> None:
        super().__init__()
        assert arch.heads is not None
        assert arch.mlp_width is not None
        width, hidden = arch.state_width // reduction, arch.mlp_width // reduction
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
