"""What a run on questions reads besides activations: soft labels, the vocabulary, and the backbone's pooler."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.backbone import Backbone
from ..tasks.base import AnswerTask
from ..tasks.vqa import read_annotations


def answer_labels(task: AnswerTask, backbone: Backbone | None) -> dict[str, NDArray[Any]]:
    """The arrays of goals.answers.Answers."""
    labels, parts = task.labels, np.array(task.parts)
    found: dict[str, NDArray[Any]] = {
        "offsets": labels.offsets,
        "classes": labels.classes,
        "scores": labels.scores,
        "vocabulary": np.array(task.answers, dtype=np.str_),
    }
    if len(submit := np.flatnonzero(parts == "submit")):
        found |= {"submit": submit.astype(np.int64), "question_ids": np.array(task.question_ids)}
    if task.annotations is not None:
        tested = np.flatnonzero(parts == "test")
        people = read_annotations(task.annotations, [int(task.question_ids[i]) for i in tested])
        found |= {"people_of": tested.astype(np.int64), "people": np.array(people, dtype=np.str_)}
    for name, tensor in ({} if backbone is None else backbone.head_parts).items():
        found[name] = tensor.detach().cpu().numpy()
    return found
