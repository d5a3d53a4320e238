"""What MDETR is trained by: boxes matched to queries, then four losses (Kamath et al. ICCV 2021, arXiv 2104.12763).

Matching (DETR, arXiv 2005.12872) gives every box the query that costs least: by class, 5 times L1, twice GIoU. Then a
matched query is to spread its class over the tokens that name its box (soft token prediction), the others are to say
"no object"; its box is to be right, by L1 and GIoU; and its projection is to lie close to those of its tokens
(contrastive alignment). Levels are matched and trained each by themselves. One thing is ours: padding is no negative of
the alignment, so that the loss of an example does not depend on how long the others' texts are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from ...cache.errors import SidebenchError
from .box_head import TOKENS, Found
from .overlap import corners, overlaps

WEIGHTS = {"class": 1.0, "L1": 5.0, "GIoU": 2.0, "alignment": 1.0}
_COSTS = {"class": 1.0, "L1": 5.0, "GIoU": 2.0}
_NO_OBJECT = 0.1  # weight of a query without a box: most have none
_TEMPERATURE = 0.07
_WORST = 1e6  # cost of what is no number


@dataclass(frozen=True)
class Wanted:
    """The M boxes of a batch, those of its first example first."""

    boxes: Tensor  # (M, 4) centre, width and height in fractions of the image
    named: Tensor  # (M, T) bool: the text's tokens that name the box
    counts: Sequence[int]  # (B,) boxes per example


def box_loss(found: Found, wanted: Wanted, text_mask: Tensor) -> Tensor:
    """The weighted sum over losses and levels. text_mask (B, T): tokens that are no padding."""
    losses = box_losses(found, wanted, text_mask)
    return torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum()


def box_losses(found: Found, wanted: Wanted, text_mask: Tensor) -> dict[str, Tensor]:
    """Each loss by name, without its weight, divided by the number of boxes and summed over levels.

    Raises SidebenchError for texts of more tokens than there are classes.
    """
    example, soft = _example(wanted), _soft(wanted.named)
    losses = {name: found.boxes.new_zeros(()) for name in WEIGHTS}
    for level, (box, query) in enumerate(matched(found, wanted)):
        row, guess, right = example[box], found.boxes[level, example[box], query], wanted.boxes[box]
        summed = {
            "class": _class(found.logits[level], row, query, soft[box]),
            "L1": (guess - right).abs().sum(),
            "GIoU": (1 - overlaps(corners(guess), corners(right))[1]).sum(),
            "alignment": _alignment(found.queries[level], found.tokens, text_mask, row, query, wanted.named[box]),
        }
        losses = {name: loss + summed[name] / max(len(example), 1) for name, loss in losses.items()}
    return losses


@torch.no_grad()
def matched(found: Found, wanted: Wanted) -> list[tuple[Tensor, Tensor]]:
    """For each level, boxes (P,) and the queries (P,) they are matched to; of an example's boxes, at most Q."""
    from scipy.optimize import linear_sum_assignment

    example = _example(wanted)
    probability = found.logits.softmax(-1)[:, example]  # (L, M, Q, 256)
    guess, right = found.boxes[:, example], wanted.boxes[:, None]  # (L, M, Q, 4), (M, 1, 4)
    cost = (
        _COSTS["L1"] * (guess - right).abs().sum(-1)
        - _COSTS["GIoU"] * overlaps(corners(guess), corners(right))[1]
        - _COSTS["class"] * torch.einsum("lmqc,mc->lmq", probability, _soft(wanted.named).to(probability.dtype))
    )
    # A run that diverges is to be seen by its loss, not by an assignment that fails.
    cost = cost.double().nan_to_num(_WORST, _WORST, _WORST)
    # Of a fake one no value is known, and the memory of a step depends on none.
    costs = np.zeros(tuple(cost.shape)) if isinstance(cost, FakeTensor) else cost.cpu().numpy()
    ends = np.cumsum(wanted.counts).tolist()
    starts = [end - count for end, count in zip(ends, wanted.counts, strict=True)]
    found_pairs = []
    for level in costs:
        pairs = [
            (start + box, query)
            for start, end in zip(starts, ends, strict=True)
            for box, query in zip(*linear_sum_assignment(level[start:end]), strict=True)
        ]
        box, query = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).to(cost.device).unbind(1)
        found_pairs.append((box, query))
    return found_pairs


def _class(logits: Tensor, row: Tensor, query: Tensor, soft: Tensor) -> Tensor:
    """Sum over logits (B, Q, 256): soft (P, 256) is wanted of the matched queries, "no object" of the others."""
    said = logits.log_softmax(-1)
    return torch.index_put(-_NO_OBJECT * said[..., -1], (row, query), -(soft * said[row, query]).sum(-1)).sum()


def _alignment(queries: Tensor, tokens: Tensor, text_mask: Tensor, row: Tensor, query: Tensor, named: Tensor) -> Tensor:
    """Half of: matched queries (B, Q, 64) in search of their tokens (B, T, 64), and tokens of their queries."""
    similar = queries @ tokens.mT / _TEMPERATURE  # (B, Q, T)
    similar = similar.masked_fill(~text_mask[:, None], torch.finfo(similar.dtype).min)
    partners = torch.zeros_like(similar, dtype=torch.bool)
    partners[row, query] = named
    return (_search(similar, partners, -1) + _search(similar, partners, 1)) / 2


def _search(similar: Tensor, partners: Tensor, along: int) -> Tensor:
    """Sum over those that have partners along this axis: minus their mean similarity, plus logsumexp over all."""
    mean = similar.where(partners, 0).sum(along) / partners.sum(along).clamp_min(1)
    return (similar.logsumexp(along) - mean).where(partners.any(along), 0).sum()


def _example(wanted: Wanted) -> Tensor:
    """(M,) which example each box is of."""
    owners = [example for example, count in enumerate(wanted.counts) for _ in range(count)]
    return torch.tensor(owners, dtype=torch.int64, device=wanted.boxes.device)


def _soft(named: Tensor) -> Tensor:
    """(M, 256) what the class of a matched query is to be: spread evenly over the tokens (M, T) that name the box."""
    if named.shape[1] > TOKENS:
        raise SidebenchError(f"a text has {named.shape[1]} tokens, and a box can be named by {TOKENS} at most.")
    even = named / named.sum(1, keepdim=True).clamp_min(1)
    return functional.pad(even, (0, TOKENS + 1 - named.shape[1]))
