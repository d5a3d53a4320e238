"""A self-supervised objective: two augmented views of an example are to agree, against all others of the batch.

NT-Xent of SimCLR (Chen, Kornblith, Norouzi, Hinton. ICML 2020, arXiv 2002.05709). What is compared is the output of a
projection, which takes the head's place and is thrown away like it. The projection is linear, the negatives are those
of the batch: ours. Its validation score is the loss with its sign turned, on the first two views of every example.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adapters._base import Batch
from ..cache.feed import batches_of
from ..cache.store import Index
from .learner import Source
from .training import Settings, autocast

PROJECTION = 128  # how wide the projection is


@dataclass(frozen=True)
class Contrastive:
    """NT-Xent at a temperature. See training.Objective."""

    temperature: float = 0.1

    def items(self, index: Index, *, examples: int, views: int, seed: int, epoch: int) -> Index:
        """Two different views of each example, drawn anew in every epoch: all first ones, then all second ones."""
        draw = np.random.Generator(np.random.PCG64([seed, epoch, views]))
        first = draw.integers(0, views, examples)
        second = (first + draw.integers(1, views, examples)) % views
        return np.concatenate([index + examples * (1 + view[index]) for view in (first, second)])

    def loss(self, learner: nn.Module, batch: Batch, targets: Tensor, precision: str, epoch: int = 0) -> Tensor:
        """The mean over all views of a batch; no label is looked at."""
        with autocast(targets.device, precision):
            projected = learner(batch)
        return nt_xent(projected.float(), self.temperature)

    def score(self, learner: nn.Module, source: Source, targets: Tensor, index: Index, settings: Settings) -> float:
        """The larger the better."""
        learner.eval()
        batches = batches_of(index, settings.batch_size)
        pairs = [np.concatenate([batch + len(targets), batch + 2 * len(targets)]) for batch in batches]
        total = 0.0
        with torch.inference_mode():
            for examples, batch in zip(batches, source.batches(pairs), strict=True):
                total += float(self.loss(learner, batch, targets, settings.precision)) * len(examples)
        return -total / len(index)


def nt_xent(projected: Tensor, temperature: float) -> Tensor:
    """Of (2 B, P), row i and row i + B being views of one example: mean cross-entropy of finding one's partner."""
    directions = functional.normalize(projected, dim=1)
    likeness = directions @ directions.T / temperature
    itself = torch.eye(len(projected), dtype=torch.bool, device=projected.device)
    partner = torch.arange(len(projected), device=projected.device).roll(len(projected) // 2)
    return functional.cross_entropy(likeness.masked_fill(itself, float("-inf")), partner)
