"""Splits: disjoint, complete, stratified, the same every time, and refused where they would mislead."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidebench.bench.tasks.base import Task
from sidebench.bench.tasks.contents import TextExamples
from sidebench.bench.tasks.split import split
from sidebench.cache.errors import SidebenchError


def _task(labels: list[int], parts: list[str] | None = None, ids: list[str] | None = None) -> Task:
    names = tuple(ids or map(str, range(len(labels))))
    classes = tuple(f"class{i}" for i in range(max(labels) + 1))
    examples = TextExamples(names, np.array(labels, np.int64), classes, names)
    return Task("csv:x", examples, classes, tuple(parts) if parts else None)


@given(st.lists(st.integers(0, 3), max_size=80), st.integers(0, 5))
def test_a_split_is_disjoint_complete_and_trains_every_class(labels: list[int], seed: int) -> None:
    labels = [0, 0, 0, *labels]  # three of one class: no part is empty
    found = split(_task(labels), seed)
    together = np.concatenate([found.train, found.val, found.test])
    assert sorted(together.tolist()) == list(range(len(labels)))
    for part in (found.train, found.val, found.test):
        assert part.dtype == np.int64
        assert part.tolist() == sorted(part.tolist())
    sizes, targets = Counter(labels), np.array(labels)
    for label, size in sizes.items():
        train, val, test = (int((targets[part] == label).sum()) for part in (found.train, found.val, found.test))
        assert train >= 1
        assert abs(test - size / 10) <= 1
        assert abs(val - size / 10) <= 1


def test_a_hundred_examples_split_eighty_ten_ten_in_each_class() -> None:
    labels = [0] * 70 + [1] * 30
    found = split(_task(labels), 0)
    assert found.sizes() == {"train": 80, "val": 10, "test": 10}
    assert Counter(np.array(labels)[found.test].tolist()) == {0: 7, 1: 3}


def test_the_same_seed_gives_the_same_split_and_another_seed_another_one() -> None:
    task = _task([0, 1] * 50)
    assert split(task, 1).test.tolist() == split(task, 1).test.tolist()
    assert split(task, 1).test.tolist() != split(task, 2).test.tolist()


@given(st.permutations(list(range(40))))
def test_the_order_of_the_file_does_not_matter(order: list[int]) -> None:
    plain = split(_task([i % 2 for i in range(40)]), 0)
    mixed = split(_task([i % 2 for i in order], ids=[str(i) for i in order]), 0)
    assert sorted(order[i] for i in mixed.test) == plain.test.tolist()
    assert sorted(order[i] for i in mixed.val) == plain.val.tolist()


@given(st.integers(6, 100), st.integers(0, 3))
def test_one_more_example_moves_no_more_than_three_others(count: int, seed: int) -> None:
    def parts_of(size: int) -> dict[int, str]:
        found = split(_task([0] * size), seed)
        named = (("train", found.train), ("val", found.val), ("test", found.test))
        return {int(i): name for name, index in named for i in index}

    before, after = parts_of(count), parts_of(count + 1)
    assert sum(before[i] != after[i] for i in before) <= 3


@pytest.mark.parametrize(
    ("size", "want"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (14, (12, 1, 1)), (15, (11, 2, 2))]
)
def test_small_classes_keep_one_for_training(size: int, want: tuple[int, int, int]) -> None:
    labels = [0] * 10 + [1] * size
    found = split(_task(labels), 0)
    got = tuple(int((np.array(labels)[part] == 1).sum()) for part in (found.train, found.val, found.test))
    assert got == want


def test_a_task_too_small_for_three_parts_is_refused() -> None:
    with pytest.raises(SidebenchError, match="of 4 examples of 2 classes none is left for val"):
        split(_task([0, 1, 0, 1]), 0)


def test_the_parts_of_a_task_are_kept_as_they_are() -> None:
    found = split(_task([0, 1, 0, 1, 0, 1], ["train", "train", "val", "val", "test", "test"]), 5)
    assert (found.train.tolist(), found.val.tolist(), found.test.tolist()) == ([0, 1], [2, 3], [4, 5])


def test_a_missing_val_is_carved_out_of_train_by_label() -> None:
    labels = [0] * 40 + [1] * 20 + [0, 1]
    found = split(_task(labels, ["train"] * 60 + ["test"] * 2), 0)
    assert found.test.tolist() == [60, 61]
    assert Counter(np.array(labels)[found.val].tolist()) == {0: 4, 1: 2}
    assert sorted([*found.train.tolist(), *found.val.tolist()]) == list(range(60))


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_missing_train_or_test_part_is_named(missing: str) -> None:
    parts = [part for part in ("train", "val", "test") if part != missing] * 2
    with pytest.raises(SidebenchError, match=f"has no {missing} part, only"):
        split(_task([0, 1, 0, 1], parts), 0)


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_label_that_is_scored_but_never_trained_is_named(part: str) -> None:
    other = "val" if part == "test" else "test"
    with pytest.raises(SidebenchError, match=f"{part} has the label 'class1', which does not occur in train"):
        split(_task([0, 0, 0, 1], ["train", part, other, part]), 0)
