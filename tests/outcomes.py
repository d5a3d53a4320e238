"""Tiny tasks on disk, and outcomes of comparisons made by hand, for the tests of tables, reports and commands."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import toys

from sidebench.bench import worker
from sidebench.bench.assemble import Shared
from sidebench.bench.launch import Listener
from sidebench.bench.outcome import Outcome, Request, Runs
from sidebench.bench.prepare import Inputs
from sidebench.bench.record import Job, RunRecord, write_predictions
from sidebench.cache.errors import SidebenchError

MEASURED: Mapping[str, Any] = {
    "trainable_params": 1234,
    "head_params": 66,
    "total_params": 5678,
    "train_seconds": 2.0,
    "eval_seconds": 0.5,
    "examples_per_second": 40.0,
    "peak_device_bytes": None,
    "peak_reserved_bytes": None,
    "peak_nvml_bytes": None,
    "peak_tracked_bytes": 3 * 2**20,
    "peak_host_bytes": 2**20,
    "memory_by_category": dict.fromkeys(
        ("parameters", "gradients", "optimizer", "activations", "inputs", "temporaries"), 2**19
    ),
    "unavailable": {"peak_device_bytes": "no device memory is measured on 'cpu'"},
    "lr": 0.001,
}
CATEGORIES = tuple(MEASURED["memory_by_category"])

# The command line in a process of its own. A shell starts what stands before an & deaf to SIGINT; this one hears it.
COMMAND = (
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from sidebench.cli import app; app()",
)
# A cached method; {forward} is a statement that it runs first.
METHOD_FILE = '''
import os, signal, sys, time
from pathlib import Path
from torch import nn
from sidebench.adapters._base import Body, CachedMethod

class Mine(CachedMethod):
    """A method in a file of its own."""
    paper = "none"
    def build(self, arch, widths, weights):
        return Net(widths[arch.states[-1]], arch.states[-1])

class Net(Body):
    def __init__(self, width, layer):
        super().__init__()
        self.width, self.layer = width, layer
        self.map = nn.Linear(width, width)
    def forward(self, batch):
        {forward}
        return self.map(batch.state(self.layer))
'''


def here(job: Job, folder: Path, listener: Listener, shared: Shared | None = None) -> str | None:
    """Run a job in this process; the sentence that says how it failed, or None."""
    try:
        worker.run(job, folder, shared or Shared())
    except SidebenchError as error:
        return str(error)
    return None


def spawning(run: Callable[..., str | None] | None = None) -> Callable[..., list[str | None]]:
    """What takes the place of `launch.spawn`: runs each job by `run` (job, folder, listener), or here, in turn."""

    def spawn(jobs: Sequence[Job], folder: Path, listener: Listener) -> list[str | None]:
        shared = Shared()
        return [run(job, folder, listener) if run else here(job, folder, listener, shared) for job in jobs]

    return spawn


def write_texts(path: Path, count: int = 60, *, parts: bool = False) -> str:
    """A jsonl task of toy sentences at `path`; returns its URI."""
    texts = toys.make_texts(count)
    rows = [
        {"text": text, "label": "yes" if target else "no", "id": name}
        | ({"split": ("train", "train", "val", "test")[i % 4]} if parts else {})
        for i, (text, target, name) in enumerate(zip(texts.raw, texts.targets, texts.ids, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return f"jsonl:{path}"


def make_outcome(
    folder: Path, right: Mapping[str, Sequence[Sequence[int]] | str], *, kind: str = "cached", **changes: Any
) -> Outcome:
    """An outcome whose method m has one run per row of right[m], 1 where a test example is right; a text is its error.

    `changes` replace what was measured in every run.
    """
    records: dict[str, list[RunRecord]] = {}
    files: list[Path] = []
    seeds = max([len(found) for found in right.values() if not isinstance(found, str)], default=1)
    examples = 0
    for number, (method, found) in enumerate(right.items()):
        records[method] = []
        for seed, row in enumerate([found] * seeds if isinstance(found, str) else found):
            path = folder / f"{number}-{seed}.json"
            files.append(path)
            asked = {"method": method, "seed": seed, "kind": kind}
            if isinstance(row, str):
                records[method].append(RunRecord(asked, None, {"python": "3"}, row))
                continue
            examples = len(row)
            logits = np.stack([np.zeros(examples), np.array(row) - 0.5], 1).astype(np.float32)
            targets = np.ones(examples, dtype=np.int64)
            write_predictions(
                path.with_suffix(".npz"), tuple(map(str, range(examples))), logits=logits, targets=targets
            )
            measured = {**MEASURED, "score": float(np.mean(row)), **changes}
            records[method].append(RunRecord(asked, measured, {"python": "3"}))
    request = Request(Inputs("hf:toy", "jsonl:toy"), tuple(right), {}, seeds=tuple(range(seeds)))
    sizes = {"train": 80, "val": 10, "test": examples}
    runs = [
        Runs(method, None, found, files[number * seeds : (number + 1) * seeds])
        for number, (method, found) in enumerate(records.items())
    ]
    return Outcome(request, folder, runs, {}, sizes, "accuracy", None)
