"""One (method, seed) in a fresh interpreter: `python -m sidebench.bench.worker JOB.json`.

Reads the job, measures memory, trains each learning rate, and writes the record and its predictions. It imports only
what its method needs: a cached run loads neither transformers nor the data. Events go to stdout as JSON lines.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..adapters._base import Body, CachedMethod, FittedMethod, LiveMethod, Method, PrefixMethod, WeightsLoader, trained
from ..adapters._registry import config_facts, find_method
from ..cache.backbone import Backbone
from ..cache.block_weights import BackboneWeights, read_weights
from ..cache.errors import SidebenchError
from ..cache.feed import all_views, epoch_order
from ..cache.form import Form
from ..cache.home import home
from ..cache.memory_store import place, tier_named
from ..cache.store import Index
from ..cache.suffix import Suffix, entering_layer
from ..cache.zarr_store import ZarrStore
from .device_memory import DeviceMeter
from .environment import environment
from .learner import CachedSource, Learner, LiveSource, Source, longest_batch
from .measure import Memory, measure_fit, measure_training
from .predicted import with_fit_prediction, with_prediction
from .record import Cost, Job, RunRecord, replacing, write_json, write_predictions
from .tasks.base import Pooling, Split
from .tasks.score import score_named
from .training import Diverged, Settings, load_trained, optimizer_of, predict, score_of, snapshot, train

SPLIT = "split.npz"


def main(job_path: Path) -> int:
    """Run the job beside whose file the record is to lie; 0 when it did, 1 when it failed with a sentence."""
    document = json.loads(job_path.read_text("utf-8"))
    job = Job(**{**document, "lrs": tuple(document["lrs"])})
    try:
        run(job, job_path.parent)
    except SidebenchError as error:
        emit("error", message=str(error))
        return 1
    return 0


def run(job: Job, folder: Path) -> None:
    """Run a job in `folder`, which holds the split. Several learning rates: leave a trial each, else a record."""
    device = torch.device(job.device)
    device_meter = DeviceMeter(device)  # before the first CUDA call, so that it knows the device without us
    method = find_method(job.method).configured(job.settings)
    split = read_split(folder / SPLIT)
    if isinstance(method, FittedMethod):
        return _run_fitted(job, method, split, device_meter, folder)
    initial = _Initial(job, method, split.train, device)
    learner, source, ids, all_targets, fake = _assemble(job, method, device, initial)
    all_targets = job.targets(all_targets)
    targets = torch.from_numpy(all_targets).to(device)
    settings = _settings(job, method, job.lrs[0])
    index = longest_batch(split.train, source.lengths(), job.batch_size)
    batch = next(iter(source.batches([index])))
    memory = measure_training(learner, batch, targets[torch.from_numpy(index)], settings, device_meter)
    memory = with_prediction(memory, job, method, learner, batch, _form(source), fake)
    del batch
    source, placed = _placed(source, job, device)
    start = snapshot(learner)
    for lr in job.lrs:
        load_trained(learner, start)  # every learning rate starts at the same point
        settings = _settings(job, method, lr)
        try:
            with seeded(job.seed):  # a method that draws while it trains (dropout) draws the same for every rate
                found = train(learner, source, targets, split.train, split.val, settings, _tell_epoch)
        except Diverged as error:
            if len(job.lrs) == 1:
                raise
            write_json(trial_path(folder, job, lr), {"lr": lr, "val_score": None, "reason": str(error)})
            continue
        if len(job.lrs) > 1:
            write_json(trial_path(folder, job, lr), {"lr": lr, "val_score": found.val_score})
            continue
        load_trained(learner, found.state)
        begun = time.perf_counter()
        logits = predict(learner, source, split.test, settings).cpu()  # which waits for the device
        eval_seconds = time.perf_counter() - begun
        cost = _cost(learner, learner.head, memory, found.train_seconds, eval_seconds, found.examples_per_second)
        chosen = {"lr": lr, "best_epoch": found.best_epoch + 1, "val_score": found.val_score, "losses": found.losses}
        chosen |= initial.facts
        _write(job, folder, method, split.test, ids, logits, all_targets, cost, {**chosen, **placed})
    return None


def _placed(source: Source, job: Job, device: torch.device) -> tuple[Source, dict[str, Any]]:
    """The source read from the tier asked for, and what the record says of it.

    After memory was measured: a cache that is held in memory is there for speed and is named apart from the peak.
    """
    if not isinstance(source, CachedSource) or not isinstance(source.store, ZarrStore):
        return source, {}
    placed = place(source.store, source.layers, tier_named(job.tier), device)
    emit("tier", tier=placed.tier, why=placed.why)
    facts = {"cache_tier": placed.tier, "cache_resident_bytes": placed.resident_bytes}
    return dataclasses.replace(source, store=placed.store), facts


def trial_path(folder: Path, job: Job, lr: float) -> Path:
    """Where a learning-rate trial leaves its validation score."""
    return folder / "trials" / f"{job.stem}-lr{lr!r}.json"


def _form(source: Source) -> Form:
    if isinstance(source, CachedSource) and isinstance(source.store, ZarrStore):
        return source.store.manifest.form
    return Form()


def _assemble(
    job: Job, method: Method, device: torch.device, weights: WeightsLoader
) -> tuple[Learner, Source, tuple[str, ...], Index, Backbone | None]:
    """The learner and its batches; of a method that changes the backbone, the backbone before it without weights.

    Seeded here and nowhere else, so every method draws from the same start.
    """
    if isinstance(method, CachedMethod):
        assert job.store is not None
        store = ZarrStore(Path(job.store))
        layers = method.layers(store.architecture)
        widths = {spec.layer: spec.width for spec in store.manifest.specs}
        with seeded(job.seed):
            body = method.build(store.architecture, widths, weights)
            learner = _learner(job, body, store.architecture.prefix_tokens).to(device)
        return learner, CachedSource(store, layers, device, store.lengths(), job.views), store.ids, store.targets, None
    if isinstance(method, PrefixMethod):
        return _assemble_suffix(job, method, device)
    assert isinstance(method, LiveMethod)
    from ..cache.configs import without_weights
    from .tasks.load import load_task

    backbone = _backbone(job, device)
    task = load_task(job.task, home=home(), limit=job.limit, say=lambda _: None)
    fake = without_weights(backbone)
    source = LiveSource(backbone, task, views=job.views, view_seed=job.view_seed)
    with seeded(job.seed):
        learner = _learner(job, method.network(backbone), backbone.arch.prefix_tokens).to(device)
    return learner, source, task.examples.ids, task.examples.targets, fake


def _assemble_suffix(
    job: Job, method: PrefixMethod, device: torch.device
) -> tuple[Learner, Source, tuple[str, ...], Index, Backbone]:
    from ..cache.configs import without_weights

    assert job.store is not None
    store = ZarrStore(Path(job.store))
    first = method.first_block(store.architecture)
    backbone = _backbone(job, torch.device("cpu"))  # whole on the host alone: the device sees the kept blocks
    fake = without_weights(backbone)
    suffix = Suffix(backbone, first)
    suffix.module.to(device)
    with seeded(job.seed):
        learner = _learner(job, method.build(suffix), suffix.arch.prefix_tokens).to(device)
    layers = method.layers(store.architecture)
    source = CachedSource(store, layers, device, store.lengths(), job.views, entering_layer(first))
    return learner, source, store.ids, store.targets, fake


def _learner(job: Job, body: Body, prefix_tokens: int) -> Learner:
    pooling: Pooling = "cls" if job.pooling == "cls" else "mean"
    return Learner(body, job.num_outputs, pooling, prefix_tokens)


def _run_fitted(job: Job, method: FittedMethod, split: Split, device_meter: DeviceMeter, folder: Path) -> None:
    assert job.store is not None
    device = torch.device(job.device)
    store = ZarrStore(Path(job.store))
    all_targets = job.targets(store.targets)
    column = 0 if job.pooling == "cls" else 1
    pooled = {layer: store.pooled(layer) for layer in method.layers(store.architecture)}
    features = method.features(pooled, column).to(device)  # (N, D)
    del pooled
    targets = torch.from_numpy(all_targets).to(device)

    def part(index: Index) -> tuple[Tensor, Tensor]:
        where = torch.from_numpy(index).to(device)
        return features[where], targets[where % len(targets)]

    train = all_views(split.train, examples=store.examples, views=job.views)
    memory = measure_fit(method, part(train), job.num_outputs, device_meter)
    memory = with_fit_prediction(memory, job, method, part(train)[0])
    begun = time.perf_counter()
    method.score = functools.partial(score_of, job.score)
    module, chosen = method.fit(part(train), part(split.val), job.num_outputs)
    train_seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    with torch.inference_mode():
        logits = module(part(split.test)[0]).float().cpu()
    eval_seconds = time.perf_counter() - begun
    emit("epoch", epoch=1, epochs=1, val_score=chosen["val_score"])
    cost = _cost(module, module, memory, train_seconds, eval_seconds, len(train) / train_seconds)
    _write(job, folder, method, split.test, store.ids, logits, all_targets, cost, chosen)


def _cost(
    module: nn.Module, head: nn.Module, memory: Memory, train_seconds: float, eval_seconds: float, speed: float
) -> Cost:
    return Cost(
        trainable_params=sum(p.numel() for p in trained(module).values()),
        head_params=sum(p.numel() for p in head.parameters()),
        total_params=sum(p.numel() for p in module.parameters()),
        train_seconds=train_seconds,
        eval_seconds=eval_seconds,
        examples_per_second=speed,
        unavailable=memory.unavailable,
        **memory.values,
    )


def _write(
    job: Job,
    folder: Path,
    method: Method,
    test: Index,
    ids: tuple[str, ...],
    logits: Tensor,
    targets: NDArray[Any],
    cost: Cost,
    chosen: Mapping[str, Any],
) -> None:
    """Predictions first, the record last: a record means that the run is whole."""
    scores = score_named(job.score).measured(logits.numpy(), targets[test])
    write_predictions(folder / f"{job.stem}.npz", tuple(ids[i] for i in test), logits.numpy(), targets[test])
    asked = {**asdict(job), "config": config_facts(method)}
    score = sum(scores.values()) / len(scores)
    measured = {"score": score, "scores": scores, **asdict(cost), **chosen}
    write_json(folder / f"{job.stem}.json", asdict(RunRecord(asked, measured, environment())))


def _settings(job: Job, method: Method, lr: float) -> Settings:
    optimizer = optimizer_of(method)
    return Settings(
        job.seed, job.epochs, job.batch_size, lr, method.config.weight_decay, job.precision, job.score, optimizer
    )


def _backbone(job: Job, device: torch.device) -> Backbone:
    from ..cache.load import load_backbone

    return load_backbone(job.backbone, home=home(), device=device, image_size=job.image_size, max_length=job.max_length)


class _Initial:
    """The WeightsLoader of a run; `facts`: what the record says of it, where it did more than read."""

    def __init__(self, job: Job, method: Method, train: Index, device: torch.device) -> None:
        self._job, self._train, self._device = job, train, device
        self._examples = method.gradient_examples if isinstance(method, CachedMethod) else 0
        self.facts: dict[str, Any] = {}

    def __call__(self) -> BackboneWeights:
        if not self._examples:
            return read_weights(_backbone(self._job, torch.device("cpu")))  # which is gone when this returns
        from .importance import squared_gradients
        from .tasks.load import load_task

        job = self._job
        backbone = _backbone(job, self._device)
        task = load_task(job.task, home=home(), limit=job.limit, say=lambda _: None)
        targets = torch.from_numpy(job.targets(task.examples.targets)).to(self._device)
        order = epoch_order(self._train, seed=job.seed, epoch=0)[: self._examples]
        pooling: Pooling = "cls" if job.pooling == "cls" else "mean"
        with seeded(job.seed):
            found = squared_gradients(backbone, LiveSource(backbone, task), targets, order, job.num_outputs, pooling)
        self.facts = {"initialisation": found.facts()}
        emit("initialisation", **found.facts())
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


def write_split(path: Path, split: Split) -> None:
    """Keep the parts of the task beside the runs that used them."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, train=split.train, val=split.val, test=split.test)


def read_split(path: Path) -> Split:
    """Read what `write_split` wrote."""
    with np.load(path, allow_pickle=False) as found:
        return Split(found["train"], found["val"], found["test"])


def _tell_epoch(event: Mapping[str, float]) -> None:
    emit("epoch", **event)


def emit(event: str, **values: Any) -> None:
    """Tell the parent something, as a JSON line."""
    print(json.dumps({"event": event, **values}), flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
