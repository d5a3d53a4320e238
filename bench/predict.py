"""Predict the memory of a training step without weights, data or a GPU: the step that is measured, on fake tensors.

The same learner, loss, optimiser and tracker as in `measure`, so under CPU semantics the bytes are the tracked ones.
Under CUDA semantics the figure is what a CUDA run would request; that is a prediction until a GPU confirms it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..adapters._base import Batch, CachedMethod, LiveMethod, Method, PrefixMethod, trained
from ..cache.backbone import Backbone
from ..cache.block_weights import BackboneWeights, read_weights
from ..cache.configs import emptied, fake_mode, without_weights
from ..cache.errors import SidebenchError
from ..cache.load import said
from ..cache.reduction import reduction_of
from ..cache.suffix import restarted
from .allocator import AllocatorPeaks, replay_allocator
from .cuda_semantics import CudaSemantics, use_foreach
from .fake_building import building
from .goals.base import Tower
from .step import Step, batch_for, kept_shapes
from .towers import PairBatch
from .tracker import Event, TrackedPeak, Tracker
from .training import Settings, make_optimizer, optimizer_of

_FEW = slice(0, 2)  # rows of the first step


@dataclass(frozen=True)
class Prediction:
    """Requested bytes by category and phase, and what the caching allocator would make of them (None on a CPU)."""

    peak: TrackedPeak
    allocator: AllocatorPeaks | None
    trainable_params: int  # the head's included
    head_params: int
    events: int  # in the log: how much work the prediction was


class Unpredictable(SidebenchError):
    """The method asks for values that a fake tensor does not have."""


def predict(method: Method, backbone: Backbone, step: Step) -> Prediction:
    """Peak memory of the second training step of `method` on `backbone`, whose weights (if any) are not touched.

    Raises Unpredictable where the step depends on values, SidebenchError for what the method or a kernel refuses.
    """
    if not isinstance(method, CachedMethod | PrefixMethod | LiveMethod):
        raise Unpredictable("it is not trained in steps")
    if not isinstance(method, CachedMethod) or fake_mode(backbone) is None:
        backbone = without_weights(backbone)  # a method that holds it changes it
    mode = fake_mode(backbone)
    assert mode is not None
    with _refusing(), mode:
        batch = batch_for(method, backbone, step)  # first: a live method may lengthen the token sequence
        return _run(_learner(method, {"": backbone}, step), batch, step, method)


def predict_copy(method: CachedMethod, learner: nn.Module, batch: Batch | PairBatch, step: Step) -> Prediction:
    """The same for a cached method whose learner and batch are at hand: on fake copies, neither is touched."""
    with _refusing(), FakeTensorMode():
        return _run(emptied(learner, {}), _emptied(batch), step, method)


def predict_again(
    method: PrefixMethod | LiveMethod, backbones: Mapping[str, Backbone], batch: Batch | PairBatch, step: Step
) -> Prediction:
    """The same for a method that changes its backbones, whose batch is at hand; by stream, as they were before it."""
    return predict_towers(method, backbones, lambda _: _emptied(batch), step)


def predict_towers(
    method: CachedMethod | PrefixMethod | LiveMethod,
    backbones: Mapping[str, Backbone],
    batch_of: Callable[[Mapping[str, Backbone]], Batch | PairBatch],
    step: Step,
) -> Prediction:
    """The same of backbones by stream, none of which is touched; `batch_of` is given copies without weights."""
    with _refusing(), FakeTensorMode():
        copies = {name: emptied(one, {id(one.preprocess): one.preprocess}) for name, one in backbones.items()}
        batch = batch_of(copies)  # first: a live method may lengthen the token sequence
        return _run(_learner(method, copies, step), batch, step, method)


@contextmanager
def _refusing() -> Iterator[None]:
    """Say in a sentence why a step does not run on fake tensors."""
    try:
        yield
    except DataDependentOutputException as error:
        raise Unpredictable(f"its memory depends on values ({error.func}), which a prediction does not have") from None
    except (RuntimeError, NotImplementedError) as error:  # whatever a method from outside does that a fake one cannot
        raise Unpredictable(f"its step does not run on fake tensors: {said(error)}") from error


def _emptied(batch: Batch | PairBatch) -> Batch | PairBatch:
    """A copy on fake tensors; needs a FakeTensorMode to be on."""
    known = {id(t): torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu") for t in batch.tensors()}
    return copy.deepcopy(batch, known)


def _run(learner: Any, batch: Batch | PairBatch, step: Step, method: Method) -> Prediction:
    """The steps of `track`."""
    goal, targets = step.aim, step.aim.blank_targets(len(batch.mask))
    learner.train()
    config = method.config
    settings = Settings(
        0, 1, step.batch_size, config.lr, config.weight_decay, step.precision, optimizer=optimizer_of(method)
    )

    def loss(rows: slice) -> Tensor:
        return goal.loss(learner, batch.rows(rows), targets[rows], step.precision)

    with building():  # bitsandbytes looks at the values of its code book
        optimizer = make_optimizer(learner, settings)
    peak, allocator, events = predict_steps(
        learner,
        optimizer,
        [targets, *batch.tensors()],
        loss,
        semantics=step.semantics,
        attention=step.attention,
        precision=step.precision,
    )
    return Prediction(
        peak,
        allocator,
        trainable_params=sum(p.numel() for p in trained(learner).values()),
        head_params=sum(p.numel() for p in learner.head.parameters()),
        events=events,
    )


def predict_steps(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Sequence[Tensor],
    loss: Callable[[slice], Tensor],
    *,
    semantics: str = "cuda",
    attention: str = "auto",
    precision: str = "fp32",
) -> tuple[TrackedPeak, AllocatorPeaks | None, int]:
    """Train two steps on fake tensors; return the second's peak, the allocator's (None on a CPU) and the log's length.

    The caller's FakeTensorMode is on, and `module` was built in it (see `building`). `loss(rows)` is the scalar loss on
    those rows of the batch `inputs`: a few in the first step, which is there for the optimiser's state, the same for
    any batch; all in the second.
    """
    on_cuda = semantics == "cuda"
    if on_cuda:
        use_foreach(optimizer)
    mode = CudaSemantics(attention) if on_cuda else nullcontext()
    statistics = nullcontext() if precision == "fp32" else _TrueStatistics()
    with statistics, Tracker(module, optimizer, inputs) as tracker, mode:
        starts = []
        for rows in (_FEW, slice(None)):
            starts.append(len(tracker.events))
            tracker.begin_step()
            with tracker.phase("forward"):
                found = loss(rows)
            with tracker.phase("backward"):
                found.backward()
            with tracker.phase("step"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            del found
        if on_cuda:
            _leave_on_host(tracker, optimizer)
    allocator = _allocated(tracker.events, *starts) if on_cuda else None
    return tracker.peak(), allocator, len(tracker.events)


def _allocated(events: Sequence[Event], first: int, second: int) -> AllocatorPeaks:
    """What the allocator makes of two whole steps: the first leaves segments behind that the second uses.

    Its forward and backward are those of the second over again; its optimiser's step, where the state is born, is that
    of the step on a few rows, which does not depend on them.
    """
    before, whole = list(events[:first]), list(events[second:])
    own = {e.storage for e in whole if e.storage >= 0} - {e.storage for e in events[:second]}
    made = {e.storage for e in events[first:second] if e.phase == "step" and e.delta_bytes > 0}
    again = [e._replace(storage=-2 - e.storage) for e in whole if e.storage in own and e.phase != "step"]
    update = [e for e in events[first:second] if e.storage in made]
    left: dict[int, int] = {}
    for event in again:
        left[event.storage] = left.get(event.storage, 0) + event.delta_bytes
    freed = [Event("death", -size, storage, "step") for storage, size in left.items() if size]
    warm = [*before, *again, *update, *freed]
    return replay_allocator([*warm, *whole], len(warm))


def _leave_on_host(tracker: Tracker, optimizer: torch.optim.Optimizer) -> None:
    """AdamW's step counters are on the host in a CUDA run (torch/optim/adam.py, without `capturable`)."""
    counters = [state["step"] for state in optimizer.state.values() if isinstance(state.get("step"), Tensor)]
    host = {number for counter in counters for number in tracker.see(counter, "a step counter")}
    tracker.events[:] = [e._replace(delta_bytes=0) if e.storage in host else e for e in tracker.events]


def _learner(
    method: CachedMethod | PrefixMethod | LiveMethod, backbones: Mapping[str, Backbone], step: Step
) -> nn.Module:
    with building():
        return step.aim.learner({name: _tower(method, backbone, step) for name, backbone in backbones.items()})


def _tower(method: CachedMethod | PrefixMethod | LiveMethod, backbone: Backbone, step: Step) -> Tower:
    if isinstance(method, CachedMethod):
        arch = reduction_of(step.form.tokens, backbone.arch, step.form.seed).seen
        widths = {layer: shape[-1] for layer, shape in kept_shapes(method, backbone, step).items()}
        return Tower(method.build(arch, widths, lambda: _fake_weights(backbone)), arch.prefix_tokens)
    if isinstance(method, PrefixMethod):
        body = method.build(restarted(backbone, method.first_block(backbone.arch)))
        return Tower(body, backbone.arch.prefix_tokens, backbone)
    return Tower(method.network(backbone), backbone.arch.prefix_tokens, backbone)


def _fake_weights(backbone: Backbone) -> BackboneWeights:
    """Shapes are all that an initialisation can change of a byte."""
    weights = read_weights(backbone)
    return replace(weights, importance=weights)


class _TrueStatistics(TorchDispatchMode):
    """Layer norm of bfloat16 with float32 weights: kernels keep its statistics in float32, fake ones in bfloat16."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_layer_norm.default and args[2] is not None:
            return (found[0], *(t.to(torch.promote_types(t.dtype, args[2].dtype)) for t in found[1:]))
        return found
