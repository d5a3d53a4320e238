"""Split a task into train, val and test: as its own parts say, else 80/10/10 by label, the same every time."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import SidebenchError
from .base import AnyTask, PairTask, Split, Task
from .rows import id_order

Index = NDArray[np.int64]


def split(task: AnyTask, seed: int) -> Split:
    """Parts of `task`, of pairs its captions; where it has no classes, its items are split as if of one class."""
    if isinstance(task, Task):
        return _of_classes(task, seed)
    if isinstance(task, PairTask):
        return _of_pairs(task, seed)
    return _named(task.uri, np.array(task.parts))


def parts_of(task: AnyTask) -> tuple[str, ...] | None:
    """The parts that a task names itself: of its examples, or of pairs of their items."""
    return task.item_parts if isinstance(task, PairTask) else task.parts


def _of_pairs(task: PairTask, seed: int) -> Split:
    """The captions of every part's items; what is not named is a tenth of the items, or of those that train."""
    ids = task.item_ids
    part = np.array(task.item_parts if task.item_parts is not None else ["train"] * len(ids), dtype="<U5")
    for name in ("val",) if task.item_parts is not None else ("test", "val"):
        if name not in part:
            pool = np.flatnonzero(part == "train").tolist()
            order = sorted(pool, key=lambda i: id_order(f"split {seed}", ids[i]))
            part[order[: _held_out(len(ids) if task.item_parts is None else len(pool))]] = name
    return _named(task.uri, part[task.text.targets])


def _named(uri: str, parts: NDArray[np.str_]) -> Split:
    train, val, test = (np.flatnonzero(parts == part).astype(np.int64) for part in ("train", "val", "test"))
    for part, index in (("train", train), ("val", val), ("test", test)):
        if not len(index):
            raise SidebenchError(f"{uri}: of {len(parts)} examples none is left for {part}; give it more.")
    return Split(train, val, test)


def _of_classes(task: Task, seed: int) -> Split:
    """Parts of `task`; the seed decides only what the task leaves open.

    Without parts of its own, each class of n examples gives `_held_out(n)` to test and as many to val, in an order
    fixed by seed and id alone. A class of two gives one to test only, a single example trains. With train and test but
    no val, val is carved out of train in the same way.
    """
    everything = np.arange(len(task.examples), dtype=np.int64)
    found = _of_whole(task, everything, seed) if task.parts is None else _of_parts(task, everything, seed)
    for part, index in (("train", found.train), ("val", found.val), ("test", found.test)):
        if not len(index):
            raise SidebenchError(
                f"{task.uri}: of {len(everything)} examples of {len(task.classes)} classes none is left for {part}; "
                "wanted at least three examples of some class."
            )
    _check_labels(task, found)
    return found


def _of_whole(task: Task, everything: Index, seed: int) -> Split:
    train: list[int] = []
    val: list[int] = []
    test: list[int] = []
    for members in _shuffled_classes(task, everything, seed):
        held = _held_out(len(members))
        first = held if len(members) > 1 else 0
        second = first + held if len(members) > 2 else first
        test += members[:first]
        val += members[first:second]
        train += members[second:]
    return Split(_sorted(train), _sorted(val), _sorted(test))


def _of_parts(task: Task, everything: Index, seed: int) -> Split:
    named = np.array(task.parts)
    train, val, test = (everything[named == part] for part in ("train", "val", "test"))
    for part, index in (("train", train), ("test", test)):
        if not len(index):
            raise SidebenchError(
                f"{task.uri} names its own split but has no {part} part, only {' and '.join(sorted(set(named)))}; "
                f"mark some examples as {part}, or remove the split."
            )
    if len(val):
        return Split(train, val, test)
    kept: list[int] = []
    carved: list[int] = []
    for members in _shuffled_classes(task, train, seed):
        held = _held_out(len(members)) if len(members) > 1 else 0
        carved += members[:held]
        kept += members[held:]
    return Split(_sorted(kept), _sorted(carved), test)


def _held_out(count: int) -> int:
    """A tenth, rounded half up, and at least one, so that every part sees every class where it can."""
    return max(1, (count + 5) // 10)


def _shuffled_classes(task: Task, index: Index, seed: int) -> list[list[int]]:
    """The examples of `index` by class; sorted by a hash of seed and id, so a new example does not move the others."""
    members: dict[int, list[int]] = {}
    for i in index.tolist():
        members.setdefault(int(task.examples.targets[i]), []).append(i)
    ids = task.examples.ids
    return [sorted(members[target], key=lambda i: id_order(f"split {seed}", ids[i])) for target in sorted(members)]


def _sorted(index: Iterable[int]) -> Index:
    return np.array(sorted(index), dtype=np.int64)


def _check_labels(task: Task, found: Split) -> None:
    """A label that is scored but never trained would make every method look bad for the same wrong reason.

    Numbers are no labels: between those that are trained lie others. Published classes are scored as published.
    """
    if task.values is not None or task.has_own_classes:
        return
    trained = set(task.examples.targets[found.train].tolist())
    for part, index in (("val", found.val), ("test", found.test)):
        missing = sorted(set(task.examples.targets[index].tolist()) - trained)
        if missing:
            labels = ", ".join(repr(task.classes[target]) for target in missing[:5])
            raise SidebenchError(
                f"{task.uri}: {part} has the label {labels}, which does not occur in train; "
                "move an example of it to train or remove the label."
            )
