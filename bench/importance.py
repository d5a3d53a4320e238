"""How much each weight of a backbone matters to a task: squared gradients, summed over examples once before training.

LST's Fisher initialisation asks for them (CachedMethod.gradient_examples). It is the one step of a cached method that
back-propagates through the whole backbone, so its time and memory are measured and recorded apart.

The loss is the cross-entropy of the true labels, one example at a time. LST's backbone had a pretrained output layer to
take it from; ours has none, so a linear probe stands in: fitted on the pooled outputs for the same examples, at a fixed
L2 weight. A freshly drawn one would not know the labels: with two classes the square of its gradient forgets them.
"""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters._base import BackboneBody, Batch
from ..adapters.linear_probe import Config, LinearProbe
from ..cache.backbone import Backbone
from ..cache.block_weights import BackboneWeights, read_weights
from ..cache.feed import batches_of
from ..cache.store import Index
from .learner import Learner, Source
from .tasks.base import Pooling
from .tracker import Tracker
from .training import loss_of

L2 = 1e-2  # of the probe; ours


@dataclass(frozen=True)
class Measured:
    """The weights with their importance, and what finding it took."""

    weights: BackboneWeights
    examples: int
    seconds: float
    peak_tracked_bytes: int  # of one example's pass, the longest: weights, sums, gradients and activations

    def facts(self) -> dict[str, Any]:
        """For the run's record."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "weights"}


def squared_gradients(
    backbone: Backbone, source: Source, targets: Tensor, order: Index, num_outputs: int, pooling: Pooling
) -> Measured:
    """Sum the squared gradients of the loss on the examples `order`, batch size 1. The backbone is used up.

    targets: (N,) of all examples. Raises SidebenchError for a backbone whose blocks `read_weights` cannot name.
    """
    begun = time.perf_counter()
    weights = read_weights(backbone)
    longest = source.lengths()[order].argmax()
    order = np.concatenate([order[longest : longest + 1], np.delete(order, longest)])
    learner = Learner(BackboneBody(backbone), num_outputs, pooling, backbone.arch.prefix_tokens).eval()
    learner.head = _fitted_head(learner, source, targets, order, num_outputs)
    parameters = list(backbone.module.requires_grad_(True).parameters())
    sums = [torch.zeros_like(parameter) for parameter in parameters]

    def add(index: Index, batch: Batch) -> None:
        loss = loss_of(learner, batch, targets[torch.from_numpy(index).to(targets.device)], "fp32")
        for total, gradient in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                total.addcmul_(gradient, gradient)

    examples = zip(batches_of(order, 1), source.batches(batches_of(order, 1)), strict=True)
    with Tracker(learner, None, sums) as tracker:
        tracker.begin_step()
        add(*next(examples))
    for index, batch in examples:
        add(index, batch)
    with torch.no_grad():
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.copy_(total)  # so that they are read under the same names
    found = dataclasses.replace(weights, importance=read_weights(backbone))
    return Measured(found, len(order), time.perf_counter() - begun, tracker.peak().peak_bytes)


def _fitted_head(learner: Learner, source: Source, targets: Tensor, order: Index, num_outputs: int) -> nn.Module:
    learner.head = nn.Identity()
    with torch.inference_mode():
        features = torch.cat([learner(batch) for batch in source.batches(batches_of(order, 1))])
    labelled = (features.clone(), targets[torch.from_numpy(order).to(targets.device)])
    probe, _ = LinearProbe(Config(smallest_l2=L2, largest_l2=L2, candidates=1)).fit(labelled, labelled, num_outputs)
    return probe.requires_grad_(False)
