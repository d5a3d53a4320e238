"""A control of pre-training: network and source head as they are, on the test part of a task with the same classes.

Measured once, after training, printed beside the result and used for no choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters._base import Method
from ..adapters._pretrained import HASH_BYTES
from ..cache.build import CaptureOptions, Progress
from ..cache.errors import SidebenchError
from ..cache.store import Index
from ..cache.zarr_store import ZarrStore
from .assemble import Assembled, backbone_of
from .choice import layers_read
from .learner import CachedSource, LiveSource, Source
from .prepare import Say, Tower, plan_store, store_for
from .record import Job
from .tasks.base import Task
from .tasks.contents import example_hashes
from .tasks.load import load_task
from .tasks.split import split as split_task
from .training import Settings, predict, score_of


@dataclass(frozen=True)
class Control:
    """The other task, and where its activations are."""

    task: Task
    test: Index
    hashes: Sequence[bytes]  # of the examples of `test`
    store: Path | None  # None: of a live method

    def tried(self, made: Assembled, job: Job, settings: Settings, seen: Tensor) -> dict[str, Any]:
        """The source head's score there, and how many of these test examples are among those hashed in `seen`."""
        known = {bytes(row) for row in seen.numpy()}
        targets = torch.from_numpy(job.targets(self.task.examples.targets[self.test]))
        outputs = predict(made.learner, self._source(made.source, job), self.test, settings)
        return {
            "task": self.task.uri,
            "score": score_of(job.score, outputs, targets),
            "name": job.score,
            "examples": len(self.test),
            "seen": sum(digest in known for digest in self.hashes),
        }

    def _source(self, source: Source, job: Job) -> Source:
        if self.store is None:
            return LiveSource(backbone_of(job, torch.device(job.device)), self.task.examples)
        assert isinstance(source, CachedSource)
        store = ZarrStore(self.store)
        return replace(source, store=store, tokens=store.lengths(), views=0)


def control_of(
    uri: str | None,
    source: Task,
    tower: Tower,
    method: Method,
    capture: CaptureOptions,
    split_seed: int,
    home: Path,
    say: Say,
    progress: Progress,
) -> Control | None:
    """Load the other task than `source`, and find or build its cache where the method reads one.

    Raises SidebenchError unless its classes have the names of the source's, in one order.
    """
    if uri is None:
        return None
    task = load_task(uri, home=home, say=say)
    if source.values is not None or task.classes != source.classes or task.score_name != source.score_name:
        foreign = sorted({*task.classes} ^ {*source.classes})[:4]
        raise SidebenchError(
            f"--zero-shot {uri} wants the classes and the score of {source.uri}"
            + (f"; only one of them has {', '.join(map(repr, foreign))}." if foreign else ".")
        )
    layers = layers_read([method], tower.arch)
    test = split_task(task, split_seed).test
    hashes = [bytes(row) for row in example_hashes(task.examples, HASH_BYTES)[test]]
    if not layers:
        return Control(task, test, hashes, None)
    there = Tower(replace(tower.inputs, task=uri, limit=None), tower.backbone, task.examples, tower.cache_dir)
    planned = plan_store(there, replace(capture, views=0))
    store = store_for(there, planned, layers, may_build=True, progress=progress, say=say)
    return Control(task, test, hashes, store.folder)
