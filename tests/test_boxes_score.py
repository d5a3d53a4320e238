"""Overlap of boxes and precision at places, against loops over boxes; boxes without extent and ties included."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidebench.bench.goals.boxes_score import NOWHERE, grounded
from sidebench.bench.goals.overlap import corners, overlaps

Box = tuple[float, float, float, float]
edges = st.integers(0, 8).map(float)
boxes = st.tuples(edges, edges, edges, edges)  # points, lines and boxes that are inside out among them
proper = st.tuples(edges, edges, st.integers(1, 8), st.integers(1, 8)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def _naive(a: Box, b: Box) -> tuple[float, float]:
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    either = _area(a) + _area(b) - shared
    around = _area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    iou = shared / either if either else 0.0
    return iou, iou - ((around - either) / around if around else 0.0)


def _found(a: Box, b: Box) -> tuple[float, float]:
    iou, giou = overlaps(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    return float(iou), float(giou)


@given(boxes, boxes)
def test_overlaps_are_areas_shared_and_areas_around(a: Box, b: Box) -> None:
    assert _found(a, b) == pytest.approx(_naive(a, b), abs=1e-12)
    assert _found(b, a) == pytest.approx(_naive(a, b), abs=1e-12)


@given(proper, proper, st.floats(0.01, 100), st.floats(0.01, 100))
def test_overlaps_do_not_change_when_an_axis_is_scaled(a: Box, b: Box, x: float, y: float) -> None:
    wide = [tuple(edge * (x, y)[i % 2] for i, edge in enumerate(box)) for box in (a, b)]
    assert _found(wide[0], wide[1]) == pytest.approx(_naive(a, b), abs=1e-9)  # type: ignore[arg-type]


@given(proper, proper)
def test_overlaps_are_bounded(a: Box, b: Box) -> None:
    iou, giou = _found(a, b)
    assert 0 <= iou <= 1
    assert -1 <= giou <= iou
    assert _found(a, a) == (1, 1)


def test_boxes_without_extent_have_finite_overlaps_and_gradients() -> None:
    points = torch.zeros(3, 4, requires_grad=True)
    total = sum(part.sum() for part in overlaps(points, torch.tensor([[0.0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])))
    assert isinstance(total, torch.Tensor)
    total.backward()
    assert torch.isfinite(total)
    assert points.grad is not None
    assert torch.isfinite(points.grad).all()


def test_corners_are_half_a_side_from_the_centre() -> None:
    assert corners(torch.tensor([[5.0, 4, 2, 6]])).tolist() == [[4, 1, 6, 7]]


scores_of = st.integers(0, 3).map(float)  # few, so that there are ties


def _naive_hit(scores: list[float], candidates: list[Box], wanted: Box, k: int, which: int) -> bool:
    """Is there a hit among the first k, where a miss is put before a hit of the same score?"""
    hits = [_naive(box, wanted)[which] >= 0.5 for box in candidates]
    order = sorted(range(len(scores)), key=lambda q: (-scores[q], hits[q]))
    return any(hits[q] for q in order[:k])


@given(st.data(), st.integers(1, 12), st.integers(1, 4))
def test_precision_asks_whether_one_of_the_first_hits(data: st.DataObject, queries: int, count: int) -> None:
    near = st.tuples(*[st.integers(0, 1), st.integers(0, 1), st.integers(3, 5), st.integers(3, 5)])
    some = data.draw(st.lists(st.lists(near, min_size=queries, max_size=queries), min_size=count, max_size=count))
    scores = data.draw(
        st.lists(st.lists(scores_of, min_size=queries, max_size=queries), min_size=count, max_size=count)
    )
    wanted = data.draw(st.lists(near, min_size=count, max_size=count))
    found = grounded(np.array(scores), np.array(some), np.array(wanted))
    figures = found.figures()
    for which, name in ((0, "P@{}"), (1, "P@{} by GIoU")):
        for k in (1, 5, 10):
            hits = [_naive_hit(s, b, w, k, which) for s, b, w in zip(scores, some, wanted, strict=True)]
            assert figures[name.format(k)] == np.mean(hits)
    assert found.contributions().mean() == figures["P@1"]
    order = data.draw(st.permutations(range(queries)))
    moved = grounded(np.array(scores)[:, order], np.array(some)[:, order], np.array(wanted))
    assert moved.figures() == figures


def test_iou_of_exactly_half_hits_and_giou_may_not() -> None:
    wanted = np.array([[0.0, 0, 10, 10]])
    found = grounded(
        np.zeros((2, 1)), np.array([[[0.0, 0, 10, 5]], [[1.8, 1.8, 11.8, 11.8]]]), np.repeat(wanted, 2, axis=0)
    )
    assert found.by_iou.tolist() == [0, 0]
    assert found.by_giou.tolist() == [0, NOWHERE]


def test_what_is_no_number_neither_hits_nor_steps_back() -> None:
    right, wrong = [0.0, 0, 1, 1], [5.0, 5, 6, 6]
    boxes_ = np.array([[right, wrong], [right, wrong], [[np.nan] * 4, wrong], [right, right]])
    scores = np.array([[1.0, np.nan], [np.nan, 0.0], [1.0, 0.0], [np.nan, 0.0]])
    assert grounded(scores, boxes_, np.array([right] * 4)).by_iou.tolist() == [1, NOWHERE, NOWHERE, 0]
