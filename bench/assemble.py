"""From a job to what trains: the learner, its batches, the targets. One run in an interpreter, or several in turn.

It imports only what the method needs: a cached run loads neither transformers nor the data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters._base import Body, CachedMethod, LiveMethod, Method, PrefixMethod, WeightsLoader
from ..cache.backbone import Backbone
from ..cache.block_weights import BackboneWeights, read_weights
from ..cache.feed import epoch_order
from ..cache.form import Form
from ..cache.home import home
from ..cache.memory_store import Placed, Tier, place, tier_named
from ..cache.pair import STREAMS
from ..cache.preprocess import Prepared
from ..cache.store import Index
from ..cache.suffix import entering, restarted
from ..cache.zarr_store import ZarrStore
from .goals.base import Goal, Tower
from .goals.known import Labels, goal_of, layers_of
from .learner import CachedSource, LiveSource, Source
from .measure import Memory
from .record import Job
from .tasks.base import AnyTask, Pooling
from .towers import PairSource
from .training import Settings, optimizer_of, schedule_of


@dataclass
class Shared:
    """What the runs of one interpreter, which differ in shots alone, need not do twice."""

    task: AnyTask | None = None
    prepared: dict[str, Sequence[Prepared] | None] = field(default_factory=dict)  # by stream: a live method's inputs
    memory: dict[Any, Memory] = field(default_factory=dict)  # by the shapes of the step it was measured on


@dataclass(frozen=True)
class Assembled:
    """What trains. `names`: of what a test is made of, the examples or of pairs the items; see goals.base.Tested.

    fakes: by stream, of a method that changes the backbone, the backbone before it, without weights.
    """

    learner: Any  # nn.Module with a `head`, as the goal makes it
    source: Source
    names: Sequence[str]
    targets: Index
    goal: Goal
    fakes: Mapping[str, Backbone] = field(default_factory=dict)
    mapped: Sequence[str] = ()  # how pre-trained modules of other size were taken up

    @property
    def form(self) -> Form:
        """How the activations are kept that it reads."""
        store = getattr(getattr(self.source, "text", self.source), "store", None)
        return store.manifest.form if isinstance(store, ZarrStore) else Form()


@dataclass(frozen=True)
class _Stream:
    """One stream of the task: all but the method's body, which is built where the generators are seeded."""

    body: Callable[[], Body]
    prefix_tokens: int
    source: Source
    ids: tuple[str, ...]
    targets: Index
    backbone: Backbone | None = None  # that the body is to run
    fake: Backbone | None = None


def assemble(
    job: Job, method: Method, device: torch.device, weights: "Initial", shared: Shared, folder: Path | None = None
) -> Assembled:
    """The learner of a job, freshly initialised. Seeded here and nowhere else, so all methods draw from the same start.

    Pre-trained modules are put in behind that, so that nothing else differs from the arm that has none. folder: where
    what the task says besides targets lies, of one that says something (see goals.known).
    """
    goal, labels = goal_of(job, folder)
    streams = {name: _opened(job, name, method, device, weights, shared) for name in job.streams}
    with seeded(job.seed):
        towers = {name: Tower(stream.body(), stream.prefix_tokens, stream.backbone) for name, stream in streams.items()}
        learner = goal.learner(towers).to(device)
    fakes = {name: stream.fake for name, stream in streams.items() if stream.fake is not None}
    made = _joined(learner, streams, goal, labels, fakes)
    if job.init is None:
        return made
    from .pretrained import begin_pretrained

    return replace(made, mapped=begin_pretrained(job, method, made.learner))


def _joined(
    learner: nn.Module, streams: Mapping[str, _Stream], goal: Goal, labels: Labels, fakes: Mapping[str, Backbone]
) -> Assembled:
    if len(streams) == 1:
        (one,) = streams.values()
        return Assembled(learner, one.source, one.ids, one.targets, goal, fakes)
    visual, text = (streams[name] for name in STREAMS)
    source = PairSource(visual.source, text.source, text.targets, labels.get("frames"))
    names = labels["item_ids"].tolist() if "item_ids" in labels else visual.ids
    return Assembled(learner, source, names, text.targets, goal, fakes)


def _opened(job: Job, stream: str, method: Method, device: torch.device, weights: "Initial", shared: Shared) -> _Stream:
    if isinstance(method, CachedMethod):
        return _open_cached(job.of(stream), method, device, partial(weights, stream))
    if isinstance(method, PrefixMethod):
        return _open_suffix(job.of(stream), method, device)
    assert isinstance(method, LiveMethod)
    return _open_live(job.of(stream), stream, method, device, shared)


def _open_cached(job: Job, method: CachedMethod, device: torch.device, weights: WeightsLoader) -> _Stream:
    assert job.store is not None
    store = ZarrStore(Path(job.store))
    arch = store.architecture
    layers = tuple(dict.fromkeys((*layers_of(job.goal), *method.layers(arch))))
    widths = {spec.layer: spec.width for spec in store.manifest.specs}
    source = CachedSource(store, layers, device, store.lengths(), job.views)
    return _Stream(lambda: method.build(arch, widths, weights), arch.prefix_tokens, source, store.ids, store.targets)


def _open_suffix(job: Job, method: PrefixMethod, device: torch.device) -> _Stream:
    from ..cache.configs import without_weights

    assert job.store is not None
    store = ZarrStore(Path(job.store))
    first = method.first_block(store.architecture)
    backbone = backbone_of(job, torch.device("cpu"))  # whole on the host alone: the device sees the kept blocks
    fake = without_weights(backbone)
    suffix = restarted(backbone, first)
    suffix.module.to(device)
    layers = method.layers(store.architecture)
    source = CachedSource(store, layers, device, store.lengths(), job.views, entering(suffix.arch, first))
    return _Stream(
        lambda: method.build(suffix), suffix.arch.prefix_tokens, source, store.ids, store.targets, backbone, fake
    )


def _open_live(job: Job, stream: str, method: LiveMethod, device: torch.device, shared: Shared) -> _Stream:
    from ..cache.configs import without_weights
    from .tasks.load import load_any

    backbone = backbone_of(job, device)
    task = shared.task = shared.task or load_any(job.task, home=home(), limit=job.limit, say=lambda _: None)
    examples = task.streams[stream]
    fake = without_weights(backbone)
    source = LiveSource(
        backbone, examples, views=job.views, view_seed=job.view_seed, prepared=shared.prepared.get(stream)
    )
    shared.prepared[stream] = source.prepared
    prefix, ids, targets = backbone.arch.prefix_tokens, examples.ids, examples.targets
    return _Stream(lambda: method.network(backbone), prefix, source, ids, targets, backbone, fake)


def placed(source: Source, job: Job, device: torch.device) -> tuple[Source, Placed | None]:
    """The source read from the tier that the job asks for, and which that is; None of one that reads no cache.

    After memory was measured: a cache that is held in memory is there for speed and is named apart from the peak.
    """
    if isinstance(source, PairSource):
        visual, images = placed(source.visual, job, device)
        text, texts = placed(source.text, job, device)
        return replace(source, visual=visual, text=text), _both(images, texts)
    if not isinstance(source, CachedSource) or not isinstance(source.store, ZarrStore):
        return source, None
    found = place(source.store, source.layers, tier_named(job.tier), device)
    return replace(source, store=found.store), found


def _both(images: Placed | None, texts: Placed | None) -> Placed | None:
    """Where the two are, as one: where the slower of them is read from."""
    if images is None or texts is None:
        return None
    order: tuple[Tier, ...] = ("disk", "ram", "device")
    slower = min((images, texts), key=lambda one: order.index(one.tier))
    why = images.why if images.why == texts.why else f"images: {images.why}; texts: {texts.why}"
    return Placed(slower.store, slower.tier, images.resident_bytes + texts.resident_bytes, why)


def settings_of(job: Job, method: Method, lr: float, examples: int) -> Settings:
    """How a job trains on so many examples."""
    chosen, decay = (optimizer_of(method), *schedule_of(method)), method.config.weight_decay
    return Settings(job.seed, job.epochs_of(examples), job.batch_size, lr, decay, job.precision, job.score, *chosen)


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

    def __call__(self, stream: str = "") -> BackboneWeights:
        """The weights, and of a method that asks for it how much each of them matters."""
        if not self._examples:
            return read_weights(backbone_of(self._job.of(stream), torch.device("cpu")))  # gone when this returns
        from .importance import squared_gradients
        from .tasks.load import load_task

        job = self._job
        backbone = backbone_of(job, self._device)
        task = load_task(job.task, home=home(), limit=job.limit, say=lambda _: None)
        targets = torch.from_numpy(job.targets(task.examples.targets)).to(self._device)
        order = epoch_order(self._train, seed=job.seed, epoch=0)[: self._examples]
        pooling: Pooling = "cls" if job.pooling == "cls" else "mean"
        with seeded(job.seed):
            found = squared_gradients(
                backbone, LiveSource(backbone, task.examples), targets, order, job.num_outputs, pooling
            )
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
