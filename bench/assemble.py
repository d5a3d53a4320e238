"""From a job to what trains: the learner, its batches, the targets. One run in an interpreter, or several in turn.

It imports only what the method needs: a cached run loads neither transformers nor the data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters._base import Batch, Body, CachedMethod, LiveMethod, Method, PrefixMethod, WeightsLoader
from ..cache.backbone import Backbone
from ..cache.block_weights import BackboneWeights, read_weights
from ..cache.encode import tensors_of
from ..cache.feed import epoch_order
from ..cache.form import Form
from ..cache.home import home
from ..cache.memory_store import Placed, place, tier_named
from ..cache.store import Index
from ..cache.suffix import Suffix, entering_layer
from ..cache.zarr_store import ZarrStore
from .learner import CachedSource, Learner, LiveSource, Source
from .measure import Memory
from .record import Job
from .tasks.base import Pooling, Task
from .training import Settings, optimizer_of, schedule_of


@dataclass
class Shared:
    """What the runs of one interpreter, which differ in shots alone, need not do twice."""

    task: Task | None = None
    prepared: list[Tensor] | None = None  # the inputs of a live method, by item
    memory: dict[Any, Memory] = field(default_factory=dict)  # by the shapes of the step it was measured on


@dataclass(frozen=True)
class Assembled:
    """What trains. `fake`: of a method that changes the backbone, the backbone before it, without weights."""

    learner: Learner
    source: Source
    ids: tuple[str, ...]
    targets: Index
    fake: Backbone | None = None
    mapped: Sequence[str] = ()  # how pre-trained modules of other size were taken up

    @property
    def form(self) -> Form:
        """How the activations are kept that it reads."""
        if isinstance(self.source, CachedSource) and isinstance(self.source.store, ZarrStore):
            return self.source.store.manifest.form
        return Form()


def assemble(job: Job, method: Method, device: torch.device, weights: WeightsLoader, shared: Shared) -> Assembled:
    """The learner of a job, freshly initialised. Seeded here and nowhere else, so all methods draw from the same start.

    Pre-trained modules are put in behind that, so that nothing else differs from the arm that has none.
    """
    made = _assembled(job, method, device, weights, shared)
    if job.init is None:
        return made
    from .pretrained import begin_pretrained

    return replace(made, mapped=begin_pretrained(job, method, made.learner))


def _assembled(job: Job, method: Method, device: torch.device, weights: WeightsLoader, shared: Shared) -> Assembled:
    if isinstance(method, CachedMethod):
        return _assemble_cached(job, method, device, weights)
    if isinstance(method, PrefixMethod):
        return _assemble_suffix(job, method, device)
    assert isinstance(method, LiveMethod)
    return _assemble_live(job, method, device, shared)


def _assemble_cached(job: Job, method: CachedMethod, device: torch.device, weights: WeightsLoader) -> Assembled:
    assert job.store is not None
    store = ZarrStore(Path(job.store))
    layers = method.layers(store.architecture)
    widths = {spec.layer: spec.width for spec in store.manifest.specs}
    with seeded(job.seed):
        body = method.build(store.architecture, widths, weights)
        learner = _learner(job, body, store.architecture.prefix_tokens).to(device)
    source = CachedSource(store, layers, device, store.lengths(), job.views)
    return Assembled(learner, source, store.ids, store.targets)


def _assemble_suffix(job: Job, method: PrefixMethod, device: torch.device) -> Assembled:
    from ..cache.configs import without_weights

    assert job.store is not None
    store = ZarrStore(Path(job.store))
    first = method.first_block(store.architecture)
    backbone = backbone_of(job, torch.device("cpu"))  # whole on the host alone: the device sees the kept blocks
    fake = without_weights(backbone)
    suffix = Suffix(backbone, first)
    suffix.module.to(device)
    with seeded(job.seed):
        learner = _learner(job, method.build(suffix), suffix.arch.prefix_tokens).to(device)
    layers = method.layers(store.architecture)
    source = CachedSource(store, layers, device, store.lengths(), job.views, entering_layer(first))
    return Assembled(learner, source, store.ids, store.targets, fake)


def _assemble_live(job: Job, method: LiveMethod, device: torch.device, shared: Shared) -> Assembled:
    from ..cache.configs import without_weights
    from .tasks.load import load_task

    backbone = backbone_of(job, device)
    task = shared.task = shared.task or load_task(job.task, home=home(), limit=job.limit, say=lambda _: None)
    fake = without_weights(backbone)
    source = LiveSource(backbone, task, views=job.views, view_seed=job.view_seed, prepared=shared.prepared)
    shared.prepared = source.prepared
    with seeded(job.seed):
        learner = _learner(job, method.network(backbone), backbone.arch.prefix_tokens).to(device)
    return Assembled(learner, source, task.examples.ids, task.examples.targets, fake)


def _learner(job: Job, body: Body, prefix_tokens: int) -> Learner:
    pooling: Pooling = "cls" if job.pooling == "cls" else "mean"
    return Learner(body, job.num_outputs, pooling, prefix_tokens)


def placed(source: Source, job: Job, device: torch.device) -> tuple[Source, Placed | None]:
    """The source read from the tier that the job asks for, and which that is; None of one that reads no cache.

    After memory was measured: a cache that is held in memory is there for speed and is named apart from the peak.
    """
    if not isinstance(source, CachedSource) or not isinstance(source.store, ZarrStore):
        return source, None
    found = place(source.store, source.layers, tier_named(job.tier), device)
    return replace(source, store=found.store), found


def settings_of(job: Job, method: Method, lr: float, examples: int) -> Settings:
    """How a job trains on so many examples."""
    chosen, decay = (optimizer_of(method), *schedule_of(method)), method.config.weight_decay
    return Settings(job.seed, job.epochs_of(examples), job.batch_size, lr, decay, job.precision, job.score, *chosen)


def shapes_of(batch: Batch) -> Any:
    """What the memory of a step on this batch depends on; a mask that hides nothing may be dropped by the network."""
    activations = tuple(
        (layer, tuple(tuple(tensor.shape) for tensor in tensors_of(stored)))
        for layer, stored in batch.activations.items()
    )
    inputs = tuple((name, tuple(value.shape)) for name, value in batch.inputs.items())
    return tuple(batch.mask.shape), bool(batch.mask.all()), activations, inputs


def backbone_of(job: Job, device: torch.device) -> Backbone:
    """The backbone of a job."""
    from ..cache.load import load_backbone

    return load_backbone(job.backbone, home=home(), device=device, image_size=job.image_size, max_length=job.max_length)


class Initial:
    """The WeightsLoader of a run; `facts`: what the record says of it, where it did more than read."""

    def __init__(self, job: Job, method: Method, train: Index, device: torch.device, tell: Callable[..., None]) -> None:
        self._tell = tell
        self._job, self._train, self._device = job, train, device
        self._examples = method.gradient_examples if isinstance(method, CachedMethod) else 0
        self.facts: dict[str, Any] = {}

    def __call__(self) -> BackboneWeights:
        """The weights, and of a method that asks for it how much each of them matters."""
        if not self._examples:
            return read_weights(backbone_of(self._job, torch.device("cpu")))  # which is gone when this returns
        from .importance import squared_gradients
        from .tasks.load import load_task

        job = self._job
        backbone = backbone_of(job, self._device)
        task = load_task(job.task, home=home(), limit=job.limit, say=lambda _: None)
        targets = torch.from_numpy(job.targets(task.examples.targets)).to(self._device)
        order = epoch_order(self._train, seed=job.seed, epoch=0)[: self._examples]
        pooling: Pooling = "cls" if job.pooling == "cls" else "mean"
        with seeded(job.seed):
            found = squared_gradients(backbone, LiveSource(backbone, task), targets, order, job.num_outputs, pooling)
        self.facts = {"initialisation": found.facts()}
        self._tell("initialisation", **found.facts())
        return found.weights


class seeded:
    """Torch's generators start at `seed` inside the block and go on as before after it."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._fork = torch.random.fork_rng()

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *exception: Any) -> None:
        self._fork.__exit__(*exception)
