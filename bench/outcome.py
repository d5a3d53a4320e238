"""What a comparison was asked for, and what came of it: all that tables and reports are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters._base import Defaults
from ..cache.build import CaptureOptions
from ..cache.memory_store import Tier
from .prepare import Inputs
from .record import RunRecord


@dataclass(frozen=True)
class Request:
    """What `bench compare` was asked for."""

    inputs: Inputs
    methods: tuple[str, ...]
    settings: Mapping[str, Mapping[str, str]]  # method key -> option -> value as typed
    seeds: tuple[int, ...] = (0, 1, 2)
    shots: tuple[int, ...] = ()  # few-shot: so many training examples of each class, one after the other
    epochs: int = 10
    steps: int | None = None  # in place of `epochs`: as many as so many steps allow, one at least
    batch_size: int = 32
    lr: str | None = None  # "auto"; or "X,Y,Z"; None: each method's default, with shots "auto"
    split_seed: int = 0
    precision: str = "fp32"
    capture: CaptureOptions = field(default_factory=CaptureOptions)
    tier: Tier = "auto"
    may_build: bool = True
    fresh: bool = False
    map_init: tuple[str, ...] = ()  # how pre-trained modules of other size may be taken up
    allow_overlap: bool = False  # whether they may have been pre-trained on examples of the task


@dataclass(frozen=True)
class Runs:
    """One method at one number of shots, if any: a record for each seed, and the file that holds it."""

    method: str
    shots: int | None
    records: Sequence[RunRecord]
    files: Sequence[Path]


@dataclass(frozen=True)
class Outcome:
    """Everything a report is made of: the runs in the order asked, and what could not run."""

    request: Request
    folder: Path
    runs: Sequence[Runs]
    skipped: Mapping[str, str]
    sizes: Mapping[str, int]
    score_name: str
    store: Mapping[str, Any] | None
    view: str = ""  # what an augmented view is, where there are any
    defaults: Mapping[str, Defaults] = field(default_factory=dict)  # of methods that had some for the task's family
    few_shot_sizes: Mapping[int, Mapping[str, int]] = field(default_factory=dict)  # by shots; the same for every seed
    twins: Mapping[str, str] = field(default_factory=dict)  # a pre-trained arm: the one that differs in nothing else

    @property
    def records(self) -> dict[str, list[RunRecord]]:
        """Of each method, in the order of `files`."""
        found: dict[str, list[RunRecord]] = {}
        for runs in self.runs:
            found.setdefault(runs.method, []).extend(runs.records)
        return found

    @property
    def files(self) -> list[Path]:
        """Of every record."""
        return [path for runs in self.runs for path in runs.files]
