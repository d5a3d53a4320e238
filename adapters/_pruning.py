"""Structural pruning: side blocks that begin as the most important rows and columns of a backbone's own blocks.

LST's initialisation (sec. 3.2 of the paper, "without residual"). Layers are walked in forward order with the set of
kept indices: inputs are the last set, outputs are the rows of largest l1 importance, which become the next set.
Consistency along the residual stream is not enforced, as in the released code.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..cache.block_weights import BackboneWeights, BlockWeights
from ..cache.errors import SidebenchError
from ._blocks import SideBlock

Pair = tuple[Tensor, Tensor | None]


class Kept(NamedTuple):
    """Indices kept of what enters a block, of its attention's inside and outcome, and of its MLP's."""

    entering: Tensor
    attended: Tensor
    after_attention: Tensor
    inner: Tensor
    after_mlp: Tensor


@torch.no_grad()
def copy_pruned(
    blocks: Mapping[int, nn.Module], norm: nn.LayerNorm, weights: BackboneWeights, importance: BackboneWeights
) -> None:
    """Fill side blocks (by the index of the backbone's block) and the final norm with what is kept of `weights`.

    `importance` says of every weight how much it matters, by its absolute value: the weights themselves, or squared
    gradients. The walk goes through every block, also those without a side block (ours: methods that drop some do not
    say). Raises SidebenchError for a block or an embedding whose widths do not follow each other.
    """
    gated = any(len(block.fc1[0]) != block.fc2[0].shape[1] for block in weights.blocks)  # SwiGLU
    if gated or weights.embedding.shape[1] != weights.blocks[0].query[0].shape[1]:
        raise SidebenchError(  # ELECTRA's table is narrower than its blocks
            "this backbone's weights cannot be pruned: its embedding is narrower than its blocks, or its MLP is gated. "
            "Try --set lst.init=random."
        )
    first = next(iter(blocks.values()))
    assert isinstance(first, SideBlock)
    width, hidden = first.out.out_features, first.fc1.out_features
    kept = strongest(importance.embedding.abs().sum(0), width)
    for index, (source, measure) in enumerate(zip(weights.blocks, importance.blocks, strict=True)):
        chosen = _choose(kept, measure, width, hidden)
        if (block := blocks.get(index)) is not None:
            _copy_block(block, source, chosen)
        kept = chosen.after_mlp
    if weights.norm is not None:
        take_vector(norm, weights.norm, kept)


def _choose(entering: Tensor, measure: BlockWeights, width: int, hidden: int) -> Kept:
    attended = kept_rows((measure.query, measure.key, measure.value), entering, width)
    after_attention = kept_rows((measure.out,), attended, width)
    inner = kept_rows((measure.fc1,), after_attention, hidden)
    return Kept(entering, attended, after_attention, inner, kept_rows((measure.fc2,), inner, width))


def _copy_block(block: nn.Module, source: BlockWeights, kept: Kept) -> None:
    assert isinstance(block, SideBlock)
    for linear, pair in ((block.query, source.query), (block.key, source.key), (block.value, source.value)):
        take(linear, pair, kept.attended, kept.entering)
    take(block.out, source.out, kept.after_attention, kept.attended)
    take(block.fc1, source.fc1, kept.inner, kept.after_attention)
    take(block.fc2, source.fc2, kept.after_mlp, kept.inner)
    # A norm keeps what reaches it: the inputs of attention and MLP, or, behind the sums, their outcomes.
    pre = (kept.entering, kept.after_attention)
    first, second = pre if block.pre_norm else (kept.after_attention, kept.after_mlp)
    take_vector(block.norm1, source.norm1, first)
    take_vector(block.norm2, source.norm2, second)
    if block.scale1 is not None and block.scale2 is not None and source.scales is not None:
        block.scale1.copy_(source.scales[0][kept.after_attention])
        block.scale2.copy_(source.scales[1][kept.after_mlp])


def kept_rows(group: Iterable[Pair], columns: Tensor, count: int) -> Tensor:
    """Rows of largest l1 importance, the importances of a group (q, k, v) multiplied elementwise.

    In float64: a product of three squared gradients leaves float32's range.
    """
    importance = torch.stack([weight[:, columns].double().abs() for weight, _ in group]).prod(0)  # (rows, columns)
    return strongest(importance.sum(1), count)


def strongest(importance: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest entries, in their own order."""
    return importance.topk(count).indices.sort().values


def take(linear: nn.Linear, source: Pair, rows: Tensor, columns: Tensor) -> None:
    """Fill a Linear with these rows and columns of a larger one."""
    linear.weight.copy_(source[0][rows][:, columns])
    linear.bias.copy_(source[1][rows] if source[1] is not None else torch.zeros_like(linear.bias))


def take_vector(norm: nn.LayerNorm, source: Pair, kept: Tensor) -> None:
    """Fill a norm with these entries of a larger one."""
    norm.weight.copy_(source[0][kept])
    norm.bias.copy_(source[1][kept] if source[1] is not None else torch.zeros_like(norm.bias))
