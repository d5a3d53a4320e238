"""k examples of each class: the same ones for every method, drawn from the train part by seed and id alone."""

from collections.abc import Sequence

import numpy as np

from ...cache.errors import SidebenchError
from .base import Split, Task
from .rows import id_order

MOST_VALIDATION = 4  # examples per class that validate; k of fewer, since more would be no few-shot protocol


def few_shot(task: Task, parts: Split, shots: int, seed: int) -> Split:
    """`shots` training and min(shots, 4) validation examples of each class out of `parts.train`; test as it was.

    A class with fewer trains with all that it has, and validates with what is left. Of one seed fewer shots are some of
    more; training is drawn from one end of a class and validation from the other, so that what validates at few shots
    trains at many only where the class is small. How PVP (arXiv 2304.13639) draws its 1 to 16 was not read: ours.
    """
    if task.values is not None:
        raise SidebenchError(f"{task.uri} is a regression; --shots takes so many examples of each class, and has none.")
    train: list[int] = []
    val: list[int] = []
    for members in _drawn(task, parts.train.tolist(), seed):
        train += members[:shots]
        val += members[shots:][-min(shots, MOST_VALIDATION) :]  # from the other end, so that it changes little with k
    if not val:
        raise SidebenchError(
            f"{task.uri}: with {shots} shots every class trains with all its examples and none is left to validate; "
            "type fewer --shots."
        )
    return Split(np.array(sorted(train), dtype=np.int64), np.array(sorted(val), dtype=np.int64), parts.test)


def _drawn(task: Task, pool: Sequence[int], seed: int) -> list[list[int]]:
    """The examples of the pool by class, in the order in which they are drawn."""
    members: dict[int, list[int]] = {}
    for i in sorted(pool, key=lambda i: id_order(f"shots {seed}", task.examples.ids[i])):
        members.setdefault(int(task.examples.targets[i]), []).append(i)
    return [members[target] for target in sorted(members)]
