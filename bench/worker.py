"""One (method, seed) in a fresh interpreter: `python -m sidebench.bench.worker JOBS.json`.

Reads the jobs, which differ in shots alone. In turn: measures memory, trains each learning rate, and writes the record
and its predictions. Events go to stdout as JSON lines.
"""

import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters._base import FittedMethod, Method, trained
from ..adapters._registry import config_facts, find_method
from ..cache.errors import SidebenchError
from ..cache.feed import all_views
from ..cache.memory_store import Placed
from ..cache.store import Index
from ..cache.zarr_store import ZarrStore
from .assemble import Assembled, Initial, Shared, assemble, placed, seeded, settings_of
from .device_memory import DeviceMeter
from .environment import environment
from .goals.base import Tested
from .goals.classes import tested_classes
from .learner import longest_batch
from .measure import Memory, measure_fit, measure_training
from .predicted import with_fit_prediction, with_prediction
from .record import Cost, Job, RunRecord, read_split, trial_path, write_json, write_predictions
from .tasks.base import Split
from .training import Diverged, load_trained, score_of, snapshot, train


def main(jobs_path: Path) -> int:
    """Run the jobs beside whose file the records are to lie; 1 when one of them failed, each with a sentence."""
    shared, failed = Shared(), False
    for document in json.loads(jobs_path.read_text("utf-8")):
        job = Job(**{**document, "lrs": tuple(document["lrs"])})
        emit("started")
        try:
            run(job, jobs_path.parent, shared)
        except SidebenchError as error:
            emit("failed", message=str(error))
            failed = True
        else:
            emit("ended")
    return int(failed)


def run(job: Job, folder: Path, shared: Shared) -> None:
    """Run a job in `folder`, which holds the split. Several learning rates: leave a trial each, else a record."""
    device = torch.device(job.device)
    device_meter = DeviceMeter(device)  # before the first CUDA call, so that it knows the device without us
    method = find_method(job.method).configured(job.settings, job.family)
    split = read_split(folder / job.split_name)
    if isinstance(method, FittedMethod):
        return _run_fitted(job, method, split, device_meter, folder)
    initial = Initial(job, method, split.train, device, emit)
    assembled = assemble(job, method, device, initial, shared, folder)
    for how in assembled.mapped:
        emit("mapped", how=how)
    learner, goal, all_targets = assembled.learner, assembled.goal, job.targets(assembled.targets)
    targets = torch.from_numpy(all_targets).to(device)
    memory = _measured(job, method, assembled, targets, split, device_meter, shared)
    source, tier = placed(assembled.source, job, device)
    if tier is not None:
        emit("tier", tier=tier.tier, why=tier.why)
    start = snapshot(learner)
    for lr in job.lrs:
        load_trained(learner, start)  # every learning rate starts at the same point
        settings = settings_of(job, method, lr, len(split.train))
        try:
            with seeded(job.seed):  # a method that draws while it trains (dropout) draws the same for every rate
                found = train(learner, source, targets, split.train, split.val, settings, _tell_epoch, goal)
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
        tested = goal.test(learner, source, targets, split.test, settings)
        eval_seconds = time.perf_counter() - begun
        cost = _cost(learner, learner.head, memory, found.train_seconds, eval_seconds, found.examples_per_second)
        chosen = {"lr": lr, "best_epoch": found.best_epoch + 1, "val_score": found.val_score, "losses": found.losses}
        chosen |= {"sizes": split.sizes(), **initial.facts}
        chosen |= {"mapped": list(assembled.mapped)} if job.init is not None else {}
        _write(job, folder, method, tested, assembled.names, cost, {**chosen, **_tier_facts(tier)})
    return None


def _measured(
    job: Job,
    method: Method,
    assembled: Assembled,
    targets: Tensor,
    split: Split,
    device_meter: DeviceMeter,
    shared: Shared,
) -> Memory:
    """The memory of a step on the longest batch; of equal shapes it is measured once in an interpreter."""
    learner, source, goal = assembled.learner, assembled.source, assembled.goal
    index = longest_batch(split.train, source.lengths(), job.batch_size)
    batch = next(iter(source.batches([index])))
    shapes = batch.shapes()
    if shapes not in shared.memory:
        settings = settings_of(job, method, job.lrs[0], len(split.train))
        wanted = targets[torch.from_numpy(index)]
        memory = measure_training(learner, batch, wanted, settings, device_meter, goal)
        shared.memory[shapes] = with_prediction(memory, job, method, assembled, batch)
    return shared.memory[shapes]


def _tier_facts(tier: Placed | None) -> dict[str, Any]:
    return {} if tier is None else {"cache_tier": tier.tier, "cache_resident_bytes": tier.resident_bytes}


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
        logits = module(part(split.test)[0]).float().cpu().numpy()
    eval_seconds = time.perf_counter() - begun
    emit("epoch", epoch=1, epochs=1, val_score=chosen["val_score"])
    cost = _cost(module, module, memory, train_seconds, eval_seconds, len(train) / train_seconds)
    tested = tested_classes(job.score, logits, all_targets[split.test], split.test)
    _write(job, folder, method, tested, store.ids, cost, {**chosen, "sizes": split.sizes()})


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
    job: Job, folder: Path, method: Method, tested: Tested, names: Sequence[str], cost: Cost, chosen: Mapping[str, Any]
) -> None:
    """Predictions first, the record last: a record means that the run is whole."""
    write_predictions(folder / f"{job.stem}.npz", [names[i] for i in tested.rows], **tested.arrays)
    if tested.submission is not None:
        write_json(folder / f"{job.stem}.submission.json", list(tested.submission))
    asked = {**asdict(job), "config": config_facts(method)}
    measured = {"score": tested.score, "scores": dict(tested.figures), **asdict(cost), **chosen}
    write_json(folder / f"{job.stem}.json", asdict(RunRecord(asked, measured, environment())))


def _tell_epoch(event: Mapping[str, float]) -> None:
    emit("epoch", **event)


def emit(event: str, **values: Any) -> None:
    """Tell the parent something, as a JSON line."""
    print(json.dumps({"event": event, **values}), flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
