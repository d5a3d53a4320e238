"""Building against the plain forward, and an epoch from the cache against RAM and against the live frozen backbone."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from timing import interleaved, show

from sidebench.adapters._base import Batch
from sidebench.adapters._registry import find_method
from sidebench.bench.learner import CachedSource, Learner
from sidebench.bench.tasks.load import load_task
from sidebench.bench.training import Settings, loss_of, make_optimizer
from sidebench.cache.block_weights import read_weights
from sidebench.cache.build import CaptureOptions, build, plan
from sidebench.cache.feed import ahead, batches_of, epoch_order
from sidebench.cache.home import home
from sidebench.cache.load import load_backbone
from sidebench.cache.memory_store import MemoryStore
from sidebench.cache.store import LiveStore, Store
from sidebench.cache.zarr_store import ZarrStore

CPU = torch.device("cpu")


def building(folder: Path) -> None:
    """A whole build against the plain frozen forward over the same batches, text and images."""
    for backbone_uri, task_uri, size, limit in (
        ("sample:minilm-l6", "sample:movie-reviews", None, 768),
        ("sample:dinov2-small", "sample:textile", 112, 384),
    ):
        backbone = load_backbone(backbone_uri, home=home(), device=CPU, image_size=size)
        task = load_task(task_uri, home=home(), limit=limit, say=lambda _: None)
        planned = plan(backbone, task.examples, CaptureOptions())
        prepared = planned.prepared or backbone.preprocess.prepare([task.examples.load(i) for i in range(limit)])

        starts = range(0, limit, 64)

        def run(batches: Iterable[Sequence[torch.Tensor]], backbone=backbone) -> None:  # type: ignore[no-untyped-def]
            with torch.inference_mode():
                for batch in batches:
                    inputs, _ = backbone.preprocess.collate(batch)
                    backbone.module(**inputs, **backbone.forward_options)

        def forward(turn: int, run=run, prepared=prepared, starts=starts) -> None:  # type: ignore[no-untyped-def]
            run(prepared[start : start + 64] for start in starts)

        def preparing(turn: int, run=run, planned=planned, starts=starts) -> None:  # type: ignore[no-untyped-def]
            """As a live epoch does: raw examples, the next batch prepared in a thread."""
            preprocess, examples = planned.backbone.preprocess, planned.examples
            run(ahead(starts, lambda start: preprocess.prepare([examples.load(i) for i in range(start, start + 64)])))

        def whole(turn: int, planned=planned, name=task.examples.modality) -> None:  # type: ignore[no-untyped-def]
            build(planned, folder / f"build-{name}-{turn}", notes={})

        found = interleaved({"forward": forward, "preparing": preparing, "build": whole}, rounds=3)
        show(
            f"building {backbone_uri} on {task_uri}, {limit} examples",
            [
                ("build / plain forward of prepared batches", f"{found['build'] / found['forward']:.2f}", "goal 1.10"),
                ("build / plain forward from raw examples", f"{found['build'] / found['preparing']:.2f}", ""),
            ],
        )


def epoch(folder: Path) -> None:
    """An epoch of unipt and lst on MiniLM: cached, from RAM, and with the live frozen backbone."""
    backbone = load_backbone("sample:minilm-l6", home=home(), device=CPU)
    task = load_task("sample:movie-reviews", home=home(), limit=512, say=lambda _: None)
    planned = plan(backbone, task.examples, CaptureOptions())
    build(planned, folder / "warm", notes={})
    result = build(planned, folder / "epoch", notes={})
    disk = ZarrStore(result.folder)
    everything = np.arange(len(disk), dtype=np.int64)
    live = LiveStore(backbone, planned.prepared or [])
    sources: dict[str, Store] = {"disk": disk, "ram": MemoryStore.of(disk, disk.layers, CPU), "live": live}
    targets = torch.from_numpy(task.examples.targets)
    settings = Settings(0, 1, 32, 1e-3, 0.0, "fp32")
    for name in ("unipt", "lst"):
        method = find_method(name).configured({})
        layers = method.layers(backbone.arch)  # type: ignore[attr-defined]
        widths = {layer: backbone.arch.width for layer in layers}

        def train(turn: int, store: Store, method=method, layers=layers, widths=widths) -> None:  # type: ignore[no-untyped-def]
            torch.manual_seed(0)
            body = method.build(backbone.arch, widths, lambda: read_weights(backbone))
            learner = Learner(body, 2, "mean", 0)
            optimizer = make_optimizer(learner, settings)
            order = batches_of(epoch_order(everything, seed=0, epoch=turn), 32)
            source = CachedSource(store, tuple(layers), CPU, everything)
            for index, batch in zip(order, source.batches(order), strict=True):
                step(learner, optimizer, batch, targets[index])

        found = interleaved(
            {where: (lambda turn, store=store, train=train: train(turn, store)) for where, store in sources.items()},
            rounds=3,
        )
        forward = found["live"] - found["ram"]
        bound = found["live"] / found["ram"]
        show(
            f"an epoch of {name} on MiniLM, 512 movie reviews",
            [
                ("cached / from RAM", f"{found['disk'] / found['ram']:.2f}", "goal 1.10"),
                ("live frozen / cached", f"{found['live'] / found['disk']:.2f}", f"bound {bound:.2f}; goal 0.9 of it"),
                (
                    "break-even, epochs",
                    f"{(result.build_seconds or 0) / (found['live'] - found['disk']):.2f}",
                    "goal 1.5",
                ),
                ("frozen forward / side step", f"{forward / found['ram']:.2f}", ""),
            ],
        )


def step(learner: Learner, optimizer: torch.optim.Optimizer, batch: Batch, targets: torch.Tensor) -> None:
    """One training step."""
    loss_of(learner, batch, targets, "fp32").backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
