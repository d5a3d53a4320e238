"""How much each weight of a backbone matters to a task: squared gradients, summed over examples once before training.

LST's Fisher initialisation asks for them (CachedMethod.gradient_examples). It is the one step of a cached method that
back-propagates through the whole backbone, so its time and memory are measured, recorded and predicted apart.

The loss is the cross-entropy of the true labels, one example at a time. LST's backbone had a pretrained output layer to
take it from; ours has none, so a linear probe stands in: fitted on the pooled outputs for the same examples, at a fixed
L2 weight. A freshly drawn one would not know the labels: with two classes the square of its gradient forgets them.

A run finds them once, for all learning rates that it tries. Under `--lr auto` the trials of a seed and its final run
are two processes, so they are found twice: the sums are as large as the backbone, and a file of them, which would have
to be known for what it is and cleaned away, is not worth the second pass. The record tells of the final run's alone.
"""

import dataclasses
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters._base import BackboneBody, Batch
from ..adapters.full import FullFineTuning
from ..adapters.linear_probe import Config, LinearProbe, Probe
from ..cache.backbone import Backbone
from ..cache.block_weights import BackboneWeights, read_weights
from ..cache.configs import fake_mode, without_weights
from ..cache.feed import batches_of
from ..cache.load import said
from ..cache.store import Index
from .cuda_semantics import CudaSemantics
from .learner import Learner, Source
from .predict import Unpredictable
from .step import Step, batch_for
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
    peak_tracked_bytes: int  # of one example's pass, the longest: weights, sums, activations, and a gradient at a time

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
    labels = targets[torch.from_numpy(order).to(targets.device)]
    learner = Learner(BackboneBody(backbone), num_outputs, pooling, backbone.arch.prefix_tokens).eval()
    learner.head = _fitted_head(learner, source, labels, order, num_outputs)
    sums = _summing(backbone.module)
    peak = 0
    for label, batch in zip(labels, source.batches(batches_of(order, 1)), strict=True):
        if peak:
            _add(learner, batch, label[None])
        else:
            peak = _tracked(learner, batch, label[None].clone(), sums)
    with torch.no_grad():
        for parameter, total in zip(backbone.module.parameters(), sums, strict=True):
            parameter.copy_(total)  # so that they are read under the same names
    found = replace(weights, importance=read_weights(backbone))
    return Measured(found, len(order), time.perf_counter() - begun, peak)


def predicted_peak(backbone: Backbone, step: Step) -> int:
    """What `peak_tracked_bytes` would be for an example of the longest kind, on fake tensors as in `predict`.

    Under CUDA semantics the bytes that a CUDA run would request. The backbone given is left as it is. Raises
    Unpredictable where something in the backbone does not run on fake tensors.
    """
    backbone = without_weights(backbone)
    mode = fake_mode(backbone)
    assert mode is not None
    with mode:
        batch = batch_for(FullFineTuning(), backbone, replace(step, batch_size=1))
        label = step.aim.blank_targets(1)
        learner = Learner(BackboneBody(backbone), step.num_outputs, step.pooling, backbone.arch.prefix_tokens).eval()
        features = torch.zeros(1, backbone.arch.width, dtype=torch.float64)
        learner.head = Probe(features, step.num_outputs).requires_grad_(False)
        sums = _summing(backbone.module)
        try:
            with CudaSemantics(step.attention) if step.semantics == "cuda" else nullcontext():
                return _tracked(learner, batch, label, sums)
        except (RuntimeError, NotImplementedError) as error:
            raise Unpredictable(f"its initialisation does not run on fake tensors: {said(error)}") from error


def _summing(module: nn.Module) -> list[Tensor]:
    """A sum per parameter, to which every backward from now on adds the squared gradient and lets the gradient go.

    So one gradient is there at a time. That of the word table holds rows of the words that occur alone, not of all.
    """
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    words = max((table.weight for table in tables), key=torch.numel, default=None)
    for table in tables:
        if table.weight is words:
            table.sparse, table.padding_idx = True, None  # a batch of one text has no padding to leave out
    sums = []
    for parameter in module.requires_grad_(True).parameters():
        sums.append(torch.zeros_like(parameter))
        parameter.register_post_accumulate_grad_hook(_adding(sums[-1]))
    return sums


def _adding(total: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if not gradient.is_sparse:
            total.addcmul_(gradient, gradient)
            return
        places, rows = gradient._indices()[0], gradient._values()
        same = (places[:, None] == places).to(rows.dtype)  # a word that occurs n times has n rows: add up, then square
        total.index_add_(0, places, (same @ rows).square() / same.sum(1, keepdim=True))

    return add


def _add(learner: Learner, batch: Batch, label: Tensor) -> None:
    loss_of(learner, batch, label, "fp32").backward()


def _tracked(learner: Learner, batch: Batch, label: Tensor, sums: list[Tensor]) -> int:
    """`_add`, and the peak of tracked bytes meanwhile."""
    with Tracker(learner, None, [*sums, label, batch.mask, *batch.inputs.values()]) as tracker:
        tracker.begin_step()
        _add(learner, batch, label)
    return tracker.peak().peak_bytes


def _fitted_head(learner: Learner, source: Source, labels: Tensor, order: Index, num_outputs: int) -> nn.Module:
    learner.head = nn.Identity()
    with torch.inference_mode():
        features = torch.cat([learner(batch) for batch in source.batches(batches_of(order, 1))])
    labelled = (features.clone(), labels)
    probe, _ = LinearProbe(Config(smallest_l2=L2, largest_l2=L2, candidates=1)).fit(labelled, labelled, num_outputs)
    probe.zero_grad()  # the solver's last one
    return probe.requires_grad_(False)
