"""What the formulas of side networks are made of, in loops and float64: on one token, and the block they share."""

import math

import torch
from torch import Tensor, nn

from sidebench.adapters._blocks import SideBlock
from sidebench.cache.architecture import Architecture

Row = list[float]


def dot(a: Row, b: Row) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def plus(a: Row, b: Row) -> Row:
    return [x + y for x, y in zip(a, b, strict=True)]


def linear(layer: nn.Module, x: Row) -> Row:
    assert isinstance(layer, nn.Linear)
    found = [dot(row, x) for row in layer.weight.tolist()]
    return found if layer.bias is None else plus(found, layer.bias.tolist())


def layer_norm(norm: nn.Module, x: Row) -> Row:
    assert isinstance(norm, nn.LayerNorm)
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + norm.eps)
    return [(v - mean) / deviation * s + b for v, s, b in zip(x, norm.weight.tolist(), norm.bias.tolist(), strict=True)]


# --- tokens (T, D) of one example ------------------------------------------------------------------------------------


def linears(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.tensor([linear(layer, row) for row in x.tolist()], dtype=x.dtype)


def layer_norms(norm: nn.Module, x: Tensor) -> Tensor:
    return torch.tensor([layer_norm(norm, row) for row in x.tolist()], dtype=x.dtype)


def side_block(block: nn.Module, x: Tensor, arch: Architecture, heads: int) -> Tensor:
    """The slim copy of a backbone's block, of real tokens alone."""
    assert isinstance(block, SideBlock)
    one = torch.ones(x.shape[1], dtype=x.dtype)
    scale1, scale2 = (one if s is None else s.detach() for s in (block.scale1, block.scale2))

    def mlp(y: Tensor) -> Tensor:
        hidden = linears(block.fc1, y)
        return linears(block.fc2, hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))

    if arch.norm == "pre":
        x = x + scale1 * _attention(block, layer_norms(block.norm1, x), heads)
        return x + scale2 * mlp(layer_norms(block.norm2, x))
    x = layer_norms(block.norm1, x + scale1 * _attention(block, x, heads))
    return layer_norms(block.norm2, x + scale2 * mlp(x))


def _attention(block: SideBlock, x: Tensor, heads: int) -> Tensor:
    q, k, v = (linears(layer, x) for layer in (block.query, block.key, block.value))
    size = x.shape[1] // heads
    rows = []
    for i in range(len(x)):
        parts = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = torch.stack([(q[i, part] * k[j, part]).sum() / math.sqrt(size) for j in range(len(x))])
            weights = torch.exp(scores) / torch.exp(scores).sum()
            parts.append(sum((w * v[j, part] for j, w in enumerate(weights)), torch.zeros(size, dtype=x.dtype)))
        rows.append(torch.cat(parts))
    return linears(block.out, torch.stack(rows))
