"""Ranks, recalls and Rsum against loops over whole rows, with ties, folds, videos and embeddings that are no number."""

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sidebench.bench.goals.ranks import Ranks, ranks_of
from sidebench.cache.errors import SidebenchError

Table = list[list[float]]


def _naive(table: Table, owner: list[int], video: bool) -> tuple[list[int], list[int]]:
    """Of similarities (I, C): how many wrong candidates are at least as similar as the right one."""
    items, captions = [], []
    for i, row in enumerate(table):
        best = max(row[c] for c in range(len(owner)) if owner[c] == i)
        if video:
            rivals = [max(row[c] for c in range(len(owner)) if owner[c] == j) for j in range(len(table)) if j != i]
        else:
            rivals = [row[c] for c in range(len(owner)) if owner[c] != i]
        items.append(sum(rival >= best for rival in rivals))
    for c, i in enumerate(owner):
        captions.append(sum(table[j][c] >= table[i][c] for j in range(len(table)) if j != i))
    return items, captions


def _naive_rsum(folds: list[tuple[list[int], list[int]]]) -> float:
    recalls = [sum(r < k for r in way) / len(way) for fold in folds for way in fold for k in (1, 5, 10)]
    return 100 * math.fsum(recalls) / len(folds)


def _found(table: Table, owner: list[int], folds: int = 1, video: bool = False) -> Ranks:
    """Any table is inner products: of its rows with unit vectors."""
    rows = np.array(table)
    return ranks_of(rows, np.eye(rows.shape[1]), np.array(owner), folds=folds, video=video)


@st.composite
def _searches(draw: st.DrawFn, folds: int = 1) -> tuple[Table, list[int]]:
    """A table of few values, so that there are ties, and owners in any order."""
    items = folds * draw(st.integers(1, 14 if folds == 1 else 4))
    owner = draw(st.permutations([*range(items), *draw(st.lists(st.integers(0, items - 1), max_size=10))]))
    row = st.lists(st.integers(-2, 2).map(lambda n: n / 2), min_size=len(owner), max_size=len(owner))
    return draw(st.lists(row, min_size=items, max_size=items)), owner


@given(_searches(), st.booleans())
def test_ranks_count_the_wrong_candidates_that_are_as_similar(search: tuple[Table, list[int]], video: bool) -> None:
    table, owner = search
    found = _found(table, owner, video=video)
    assert (found.items.tolist(), found.captions.tolist()) == _naive(table, owner, video)


@given(_searches(folds=3), st.booleans())
def test_contributions_average_to_the_rsum_of_folds_searched_alone(
    search: tuple[Table, list[int]], video: bool
) -> None:
    table, owner = search
    size = len(table) // 3
    naive = []
    for start in range(0, len(table), size):
        own = [c for c, i in enumerate(owner) if start <= i < start + size]
        part = [[row[c] for c in own] for row in table[start : start + size]]
        naive.append(_naive(part, [owner[c] - start for c in own], video))
    found = _found(table, owner, folds=3, video=video)
    assert found.contributions().shape == (len(table),)
    assert found.contributions().mean() == pytest.approx(_naive_rsum(naive), abs=1e-9)
    assert found.rsum == found.contributions().mean()
    figures = found.figures()
    recalls = [value for name, value in figures.items() if "R@" in name]
    assert len(recalls) == 6
    assert 100 * math.fsum(recalls) == pytest.approx(found.rsum, abs=1e-9)


@given(_searches(), st.randoms())
def test_the_order_of_captions_and_of_items_changes_no_figure(search: tuple[Table, list[int]], random: Random) -> None:
    table, owner = search
    items, captions = list(range(len(table))), list(range(len(owner)))
    random.shuffle(items)
    random.shuffle(captions)
    moved = [[table[i][c] for c in captions] for i in items]
    found = _found(moved, [items.index(owner[c]) for c in captions])
    assert found.figures() == pytest.approx(_found(table, owner).figures())


@given(_searches())
def test_a_video_is_found_no_later_than_an_image_and_first_when_an_image_is(search: tuple[Table, list[int]]) -> None:
    table, owner = search
    image, video = _found(table, owner), _found(table, owner, video=True)
    assert (video.items <= image.items).all()
    assert ((video.items == 0) == (image.items == 0)).all()
    assert (video.captions == image.captions).all()


@given(_searches())
def test_with_one_caption_each_both_forms_are_the_rank_on_the_diagonal(search: tuple[Table, list[int]]) -> None:
    square = [row[: len(search[0])] for row in search[0]]
    owner = list(range(len(square)))
    image, video = _found(square, owner), _found(square, owner, video=True)
    turned = _found([list(column) for column in zip(*square, strict=True)], owner)
    assert image.items.tolist() == video.items.tolist() == turned.captions.tolist()
    assert image.captions.tolist() == turned.items.tolist()


def test_rivals_with_several_captions_cost_an_image_more_than_a_video() -> None:
    table = [[0.5, 0.9, 0.8, 0.7], [0.0, 1.0, 1.0, 1.0]]
    assert _found(table, [0, 1, 1, 1]).items.tolist() == [3, 0]
    assert _found(table, [0, 1, 1, 1], video=True).items.tolist() == [1, 0]


def test_five_captions_each_in_blocks_are_as_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    visual = _unit(generator.normal(size=(60, 8)))
    text = _unit(np.repeat(visual, 5, axis=0) + 0.8 * generator.normal(size=(300, 8)))
    owner = np.repeat(np.arange(60), 5)
    monkeypatch.setattr("sidebench.bench.goals.ranks._BLOCK_ELEMENTS", 700)  # two items at a time
    found = ranks_of(visual.astype(np.float32), text.astype(np.float32), owner)
    exact = visual.astype(np.float32).astype(np.float64) @ text.astype(np.float32).astype(np.float64).T
    assert (found.items.tolist(), found.captions.tolist()) == _naive(exact.tolist(), owner.tolist(), False)
    assert 0 < found.to_text.recalls[0] < found.to_text.recalls[2] < 1


def test_the_same_vector_is_a_tie_wherever_it_stands() -> None:
    """A product of matrices sums the same numbers in another order at its edges."""
    vector = _unit(np.random.default_rng(1).normal(size=(1, 37)))
    found = ranks_of(np.repeat(vector, 13, axis=0), np.repeat(vector, 29, axis=0), np.arange(29) % 13)
    assert found.captions.tolist() == [12] * 29
    assert found.items.tolist() == [29 - np.count_nonzero(np.arange(29) % 13 == i) for i in range(13)]


@pytest.mark.parametrize("video", [False, True])
def test_what_is_no_number_finds_nothing_and_stands_before_all(video: bool) -> None:
    visual, text = np.eye(3), np.eye(3)
    visual[1] = np.nan
    found = ranks_of(visual, text, np.arange(3), video=video)
    assert found.items.tolist() == [0, 2, 0]
    assert found.captions.tolist() == [1, 2, 1]


def test_nothing_but_nan_scores_next_to_nothing() -> None:
    found = ranks_of(np.full((30, 4), np.nan), np.full((60, 4), np.nan), np.arange(60) // 2)
    assert found.rsum == 0


def test_medians_of_images_are_rounded_down_and_those_of_videos_are_not() -> None:
    ranks, owner = np.array([0, 1, 2, 7]), np.arange(4)
    image, video = Ranks(ranks, ranks, owner), Ranks(ranks, ranks, owner, video=True)
    assert (image.to_text.median, video.to_text.median) == (2.0, 2.5)
    assert image.to_text.mean == video.to_visual.mean == 3.5
    assert image.figures()["I→T MedR"] == 2.0
    assert video.figures()["T→V MdR"] == 2.5
    assert image.figures()["T→I R@5"] == 0.75


def test_folds_average_what_each_measures() -> None:
    ranks = np.array([0, 3, 4, 9])
    assert Ranks(ranks, ranks, np.arange(4), folds=2).to_text.median == ((1 + 1) + (6 + 1)) / 2


@pytest.mark.parametrize(
    ("items", "owner", "folds", "said"),
    [
        (3, [0, 1, 2], 2, "3 items cannot be searched in 2 parts of equal size"),
        (3, [0, 0, 2], 1, "1 of 3 items have no caption"),
        (2, [0, 1, 2], 1, "describe items 0 to 2, and there are 2 items"),
        (2, [0, -1, 1], 1, "describe items -1 to 1"),
        (2, [0, 1], 1, "there are 3 captions, and what they describe is said of 2"),
        (0, [], 1, "0 of 0 items have no caption"),
    ],
)
def test_what_cannot_be_searched_is_refused(items: int, owner: list[int], folds: int, said: str) -> None:
    text = np.zeros((3 if "3 captions" in said else len(owner), 2))
    with pytest.raises(SidebenchError, match=said):
        ranks_of(np.zeros((items, 2)), text, np.array(owner, dtype=np.int64), folds=folds)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))
