"""The goal of a job, from what the job says and the arrays beside the runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..record import Job
from .answers import Answers
from .base import Goal
from .boxes import Boxes
from .classes import Classes
from .pairs import Pairs

Labels = Mapping[str, NDArray[Any]]
"""What a task says besides the targets of its examples, and what a head takes over from the backbone."""
LABELS = "labels.npz"


def layers_of(goal: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The layers that a head reads beside a method's body."""
    return () if goal is None or "memory" not in goal else (str(goal["memory"]),)


def goal_of(job: Job, folder: Path | None) -> tuple[Goal, Labels]:
    """What a job is for, with the labels that lie in `folder`."""
    if job.goal is None:
        return Classes(job.num_outputs, "cls" if job.pooling == "cls" else "mean", job.score), {}
    assert folder is not None
    with np.load(folder / LABELS, allow_pickle=False) as found:
        labels = dict(found)
    facts = {key: value for key, value in job.goal.items() if key != "kind"}
    if job.goal["kind"] == "pairs":
        return Pairs(**facts), labels
    if job.goal["kind"] == "answers":
        return Answers(facts["score_name"], labels, tuple(facts["keys"])), labels
    return Boxes(facts["memory"], labels), labels
