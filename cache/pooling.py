"""Means over tokens, as stored beside the activations and as every task pools a method's output."""

import torch
from torch import Tensor


def pooling_mask(mask: Tensor, prefix_tokens: int) -> Tensor:
    """(B, T) bool: the tokens a mean runs over. Padding is left out, and the class token and registers of an image."""
    if prefix_tokens == 0 or mask.shape[1] <= prefix_tokens:
        return mask
    return mask & (torch.arange(mask.shape[1], device=mask.device) >= prefix_tokens)


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens (B, T, D) that `mask` (B, T) keeps -> (B, D)."""
    weights = mask.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(1) / weights.sum(1)
