"""One run, one JSON record: what was asked, what was measured, in which world. Predictions lie beside it."""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import SidebenchError
from ..cache.manifest import canonical_json
from ..cache.pair import STREAMS, is_pair, towers_of
from .tasks.base import Split
from .tasks.score import ACCURACY


@dataclass(frozen=True)
class Job:
    """Everything one (method, seed) needs, and all that decides its result. Plain JSON."""

    method: str
    settings: Mapping[str, str]
    seed: int
    kind: str
    backbone: str
    task: str
    image_size: int | None
    max_length: int | None
    limit: int | None
    split_seed: int
    epochs: int
    batch_size: int
    lrs: tuple[float, ...]  # one: train and test; several: trials, which see validation only
    precision: str
    device: str
    data: Mapping[str, str]  # hashes of dataset, weights and (cached) store: a changed world is another job
    num_outputs: int
    pooling: str
    store: str | None = None  # folder of the activation cache; None for a live method
    tier: str = "auto"  # where the cache is read from; see cache.memory_store
    views: int = 0
    view_seed: int | None = None
    score: str = ACCURACY
    values: Sequence[float] = ()  # of a regression: the number that each class index stands for
    family: str | None = None  # of tasks, whose defaults the method takes
    shots: int | None = None  # few-shot: so many training examples of each class
    init: Mapping[str, Any] | None = None  # of pre-trained modules: the file's hash, what it is, how it is mapped
    steps: int | None = None  # as many epochs as they allow, one at least; None: `epochs` says it
    stores: Mapping[str, str] = field(default_factory=dict)  # of a task of several streams: `store` of each
    goal: Mapping[str, Any] | None = None  # what it is trained for, where that is no class (see goals.known)

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams of the task; "" is the only one of a task that has but one."""
        return STREAMS if is_pair(self.backbone) else ("",)

    def of(self, stream: str) -> "Job":
        """The same on one stream alone: its backbone and its store."""
        if not stream:
            return self
        return replace(self, backbone=towers_of(self.backbone)[stream], store=self.stores.get(stream), stores={})

    @property
    def digest(self) -> str:
        """Names the run's files; the folders of stores are left out, their digests are in `data`."""
        facts = {key: value for key, value in asdict(self).items() if key not in ("store", "stores")}
        return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:12]

    def targets(self, classes: NDArray[np.int64]) -> NDArray[Any]:
        """What the outputs are to be for these class indices: the same, or the numbers (float32) of a regression."""
        return np.array(self.values, dtype=np.float32)[classes] if self.values else classes

    @property
    def split_name(self) -> str:
        """The file beside the runs that holds the parts of the task; of few shots, the seed's own."""
        return split_name(self.shots, self.seed)

    def epochs_of(self, examples: int) -> int:
        """How many passes over so many training examples."""
        return epochs_within(self.steps, examples, self.batch_size) or self.epochs

    @property
    def stem(self) -> str:
        """File name of the record without its ending: readable, then unique."""
        method, _, behind = self.method.partition("@")
        last = behind.partition("@")[0] if behind.startswith("last") else ""
        pretrained = "pretrained" if self.init else ""
        shots = "" if self.shots is None else f"{self.shots}shot"
        name = "-".join(filter(None, (Path(method).stem or method, last, pretrained, shots)))
        name = "".join(c if c.isalnum() else "-" for c in name)[:60]
        return f"{name}-seed{self.seed}-{self.digest}"


@dataclass(frozen=True)
class Cost:
    """What a run took. A figure that was not measured is None and `unavailable` says why."""

    trainable_params: int
    head_params: int
    total_params: int  # parameters in memory while training: with a live method the whole backbone's
    train_seconds: float
    eval_seconds: float
    examples_per_second: float
    peak_device_bytes: int | None = None  # CUDA's max_memory_allocated
    peak_reserved_bytes: int | None = None
    peak_requested_bytes: int | None = None  # what a prediction predicts
    peak_nvml_bytes: int | None = None  # of this process
    nvml_device_growth_bytes: int | None = None
    context_bytes: int | None = None
    energy_joules_per_step: float | None = None
    peak_tracked_bytes: int | None = None
    peak_host_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    memory_by_category: Mapping[str, int] | None = None
    memory_by_phase: Mapping[str, int] | None = None
    memory_peak_at: str | None = None
    remarks: Mapping[str, str] = field(default_factory=dict)  # what qualifies a figure that was measured
    unavailable: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """The JSON of one run."""

    asked: Mapping[str, Any]
    measured: Mapping[str, Any] | None
    world: Mapping[str, Any]
    error: str | None = None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends, so the file is either the old one or the whole new one.

    The name is this process's own: another comparison may write into the same folder. Raises SidebenchError when the
    disk is full or read-only.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise SidebenchError(
            f"cannot write {path} ({error.strerror or error}); make room, or choose another folder with --runs-dir. "
            "Finished runs are kept."
        ) from error
    finally:
        with suppress(OSError):  # gone, where all went well
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_record(path: Path) -> RunRecord:
    """Read a record; it is untrusted. Raises SidebenchError when it is not one."""
    try:
        document = json.loads(path.read_text("utf-8"))
        return RunRecord(document["asked"], document["measured"], document["world"], document["error"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SidebenchError(f"{path} is no run record: {type(error).__name__}: {error}") from None


def write_predictions(path: Path, ids: Sequence[str], **arrays: NDArray[Any]) -> None:
    """Keep what is left of the test part as npz without pickle: ids (N,), and of classes logits and targets."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, ids=np.array(ids, dtype=np.str_), **arrays)


def read_predictions(path: Path, names: Sequence[str] = ("logits", "targets")) -> tuple[NDArray[Any], ...]:
    """These arrays of a run's test part. Raises SidebenchError when the file is not readable."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return tuple(found[name] for name in names)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SidebenchError(f"the predictions {path} cannot be read: {error}.") from None


def epochs_within(steps: int | None, examples: int, batch_size: int) -> int | None:
    """How many passes so many training steps allow, one at least; None where no steps are given."""
    return None if steps is None else max(1, steps // -(-examples // batch_size))


def split_name(shots: int | None, seed: int) -> str:
    """File of a split: one for all seeds, or of few shots one each."""
    return "split.npz" if shots is None else f"split-{shots}shot-seed{seed}.npz"


def write_split(path: Path, split: Split) -> None:
    """Keep the parts of the task beside the runs that used them."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, train=split.train, val=split.val, test=split.test)


def read_split(path: Path) -> Split:
    """Read what `write_split` wrote."""
    with np.load(path, allow_pickle=False) as found:
        return Split(found["train"], found["val"], found["test"])


def trial_path(folder: Path, job: Job, lr: float) -> Path:
    """Where a learning-rate trial leaves its validation score."""
    return folder / "trials" / f"{job.stem}-lr{lr!r}.json"
