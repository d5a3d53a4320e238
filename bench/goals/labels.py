"""What a comparison leaves beside its runs: what they are for, and the arrays that they need besides targets."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.architecture import Architecture
from ...cache.backbone import Backbone
from ...cache.errors import SidebenchError
from ..record import replacing
from ..tasks.base import AnswerTask, AnyTask, BoxTask, PairTask, Task
from .answer_labels import answer_labels
from .box_labels import box_labels
from .known import LABELS, Labels


def goal_facts(task: AnyTask, archs: Mapping[str, Architecture]) -> dict[str, Any] | None:
    """What a job says of its goal, as plain JSON; None of classes, of which it says all that there is.

    Raises SidebenchError for a backbone that does not yield what the goal reads.
    """
    if isinstance(task, Task):
        return None
    if isinstance(task, PairTask):
        facts = {"width": task.width, "pooling": task.pooling, "loss_name": task.loss, "folds": task.folds}
        return {"kind": "pairs", **facts, "video": task.frames is not None}
    (arch,) = archs.values()
    if isinstance(task, AnswerTask):
        return {"kind": "answers", "score_name": task.score_name, "keys": list(task.keys)}
    if not arch.decoder_blocks:
        raise SidebenchError(f"{task.uri} has boxes found by the queries of a decoder, and {arch.name} has no decoder.")
    return {"kind": "boxes", "memory": arch.states[-1]}


def labels_of(task: AnyTask, backbones: Mapping[str, Backbone]) -> Labels:
    """The arrays that a run of this task reads; none of classes."""
    if isinstance(task, Task):
        return {}
    if isinstance(task, PairTask):
        frames = {} if task.frames is None else {"frames": task.frames}
        return {"item_ids": np.array(task.item_ids, dtype=np.str_), **frames}
    backbone = backbones.get("")
    return box_labels(task, backbone) if isinstance(task, BoxTask) else answer_labels(task, backbone)


def labels_sha256(labels: Labels) -> str:
    """Hash over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(labels.items()):
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write_labels(folder: Path, labels: Labels) -> None:
    """Keep them beside the runs, where there are any."""
    if not labels:
        return
    with replacing(folder / LABELS) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **labels)
