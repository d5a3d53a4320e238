"""The token that sums an example up, and weights without a softmax: what anchors and their guides are met with."""

import torch
from torch import Tensor


def summary_position(mask: Tensor, *, last_real: bool) -> Tensor:
    """(B,) where each example's summary token is: first, or last of the real ones, as in a causal text tower (CLIP)."""
    return mask.sum(1) - 1 if last_real else torch.zeros_like(mask[:, 0], dtype=torch.long)


def summary_token(tokens: Tensor, position: Tensor) -> Tensor:
    """The token of each example that sums it up: (B, D) from (B, T, D) and positions (B)."""
    return tokens[torch.arange(len(position), device=position.device), position]


def relu_l1(scores: Tensor, eps: float = 1e-8) -> Tensor:
    """ReLU, then divided by the sum over the last axis. A row with no positive score becomes all zeros."""
    positive = torch.relu(scores)
    return positive / (positive.sum(-1, keepdim=True) + eps)


def relu_l1_clamped(scores: Tensor) -> Tensor:
    """The same with the denominator clamped, as UniPT's CLIP4Clip code does."""
    positive = torch.relu(scores)
    return positive / positive.sum(-1, keepdim=True).clamp(min=1e-6)
