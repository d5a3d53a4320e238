"""Raw rows of a classification task, before they become examples: checks, classes and the limited subsample."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import SidebenchError
from ...cache.examples import Modality, Text

PART_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Rows:
    """Columns of equal length; `contents` are texts, pairs of texts or absolute image paths.

    `classes`: those of a published task, in the order of its head; some may lack examples.
    """

    modality: Modality
    ids: tuple[str, ...]
    labels: tuple[str, ...]
    contents: tuple[Text, ...] | tuple[Path, ...]
    parts: tuple[str, ...] | None
    classes: tuple[str, ...] | None = None

    def take(self, index: Iterable[int]) -> "Rows":
        """The rows at `index`, in that order."""
        chosen = list(index)
        return Rows(
            self.modality,
            tuple(self.ids[i] for i in chosen),
            tuple(self.labels[i] for i in chosen),
            tuple(self.contents[i] for i in chosen),  # type: ignore[arg-type]  # one type or the other, as it was
            None if self.parts is None else tuple(self.parts[i] for i in chosen),
            self.classes,
        )


def part_of(word: str, where: str) -> str:
    """Canonical part ("train", "val", "test") of a word in a split column; `where` names its place in the error."""
    part = PART_WORDS.get(word.strip().casefold())
    if part is None:
        raise SidebenchError(f"{where}: the split is {word!r}; write one of {', '.join(PART_WORDS)}.")
    return part


def classes_of(rows: Rows, uri: str) -> tuple[str, ...]:
    """Class names: the task's own, else sorted, as numbers if all of them are; refuses what cannot be classified."""
    if not rows.ids:
        raise SidebenchError(f"{uri} holds no examples; a task needs at least two classes of them.")
    seen: set[str] = set()
    for name in rows.ids:
        if name in seen:
            raise SidebenchError(f"{uri}: the id {name!r} stands twice; ids must differ.")
        seen.add(name)
    if rows.classes is not None:
        return rows.classes
    names = set(rows.labels)
    if len(names) == 1:
        raise SidebenchError(f"{uri} holds one class only, {rows.labels[0]!r}; a task needs at least two.")
    if all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def targets_of(rows: Rows, classes: tuple[str, ...]) -> NDArray[np.int64]:
    """(N,) class index per row."""
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[label] for label in rows.labels], dtype=np.int64)


def limited(rows: Rows, limit: int, uri: str, *, by_label: bool = True) -> Rows:
    """Subsample of `limit` rows with every class in it, in proportion (of class, then of part); the order is kept.

    Labels that are no classes (`by_label` false) have no share of their own.
    It depends on ids, labels and parts alone: which rows are left does not change with the order of the file.
    """
    by_class: dict[str, dict[str, list[int]]] = {}
    for i, label in enumerate(rows.labels):
        by_class.setdefault(label if by_label else "", {}).setdefault(rows.parts[i] if rows.parts else "", []).append(i)
    if limit < len(by_class):
        raise SidebenchError(f"limit {limit} is less than the {len(by_class)} classes of {uri}; type a larger --limit.")
    if limit >= len(rows.ids):
        return rows
    chosen: list[int] = []
    cells = [by_class[label] for label in sorted(by_class)]
    quotas = shares(limit, [sum(map(len, cell.values())) for cell in cells])
    for cell, quota in zip(cells, quotas, strict=True):
        parts = [cell[part] for part in sorted(cell, key=("", "train", "test", "val").index)]
        for members, share in zip(parts, shares(quota, [len(part) for part in parts]), strict=True):
            chosen += sorted(members, key=lambda i: id_order("limit", rows.ids[i]))[:share]
    return rows.take(sorted(chosen))


def id_order(salt: str, name: str) -> bytes:
    """Sort key that shuffles ids: fixed by salt and id alone, so a new example does not move the others."""
    return hashlib.sha256(f"{salt}\0{name}".encode()).digest()


def shares(total: int, sizes: Sequence[int]) -> list[int]:
    """Split `total` over groups of these sizes: one each first, the rest in proportion, by largest remainder."""
    if total < len(sizes):
        return [1] * total + [0] * (len(sizes) - total)
    rest, room = total - len(sizes), sum(sizes) - len(sizes)
    shares = [1 + (rest * (size - 1) // room if room else 0) for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(rest * (sizes[i] - 1) % room if room else 0), i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares
