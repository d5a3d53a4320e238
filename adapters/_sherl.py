"""What SHERL's forms share: a sum of layers in which a layer counts less the more the others resemble it."""

import torch
from torch import Tensor, nn

from ._tokens import relu_l1

EPS = 1e-8  # of cosines and weights
TEMPERATURE = 0.1  # of the gate


def without_repeats(score: nn.Linear, guide: Tensor, tiers: Tensor, eps: float) -> Tensor:
    """sum_l w_l Y_l (..., m) of the Y (..., L, m): w = l1_layers(relu(score(Y_l * guide)) / redundancy_l)."""
    weights = torch.relu(score(tiers * guide[..., None, :]).squeeze(-1)) / redundancy(tiers, eps)
    return torch.einsum("...l,...lm->...m", relu_l1(weights, eps), tiers)


def redundancy(tiers: Tensor, eps: float) -> Tensor:
    """(..., L): how much the layers, itself among them, point where a layer does: about 1 or more.

    A layer that is zero resembles nothing, not even itself; ours: it counts 1, where the formula would divide by 0.
    """
    directions = tiers / (tiers.norm(dim=-1, keepdim=True) + eps)
    found = torch.relu(directions @ directions.mT).sum(-1)
    return torch.where(found > 0, found, torch.ones_like(found))
