"""Augmented views: the same whoever draws them, gentle to what must stay, trained on and never evaluated on."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sidebench.bench.learner import LiveSource
from sidebench.bench.tasks.base import Task
from sidebench.cache.backbone import Backbone
from sidebench.cache.feed import all_views, drawn_views
from sidebench.cache.views import COLOUR, TOKEN_DROPOUT, image_view, prepare_items, text_view
from sidebench.cache.zarr_store import ZarrStore

VIEWS = 3
N = 20


@pytest.fixture(params=["text", "image"])
def pair(request: pytest.FixtureRequest, tiny_bert: Backbone, tiny_vit: Backbone) -> tuple[Backbone, Any]:
    text = request.param == "text"
    return (tiny_bert, toys.make_texts(N)) if text else (tiny_vit, toys.make_images(N))


def _items(pair: tuple[Backbone, Any], items: Sequence[int], seed: int = 0) -> list[torch.Tensor]:
    return prepare_items(pair[0].preprocess, pair[1], items, seed)


def _equal(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# Drawing them


def test_view_zero_is_the_plain_example(pair: tuple[Backbone, Any]) -> None:
    assert _equal(_items(pair, range(N)), toys.prepare(*pair))


def test_a_view_does_not_depend_on_the_batch_or_the_order_it_is_drawn_in(pair: tuple[Backbone, Any]) -> None:
    total = N * (1 + VIEWS)
    whole = _items(pair, range(total))
    order = np.random.default_rng(0).permutation(total)
    for batch in np.array_split(order, 7):
        assert _equal(_items(pair, batch.tolist()), [whole[i] for i in batch])


def test_views_differ_from_each_other_and_with_the_seed(pair: tuple[Backbone, Any]) -> None:
    example = int(np.argmax([len(ids) for ids in toys.prepare(*pair)]))  # the longest text has most to lose
    views = _items(pair, [example + N * view for view in range(40)])
    assert len({view.numpy().tobytes() for view in views}) > 10
    others = _items(pair, [example + N * view for view in range(40)], seed=1)
    assert torch.equal(views[0], others[0])
    assert [v.numpy().tobytes() for v in views[1:]] != [v.numpy().tobytes() for v in others[1:]]


def test_equal_examples_are_augmented_each_in_its_own_way(tiny_bert: Backbone) -> None:
    texts = toys.make_texts(N)
    same = dataclasses.replace(texts, raw=("a very good film and the cast is fine",) * N)
    views = prepare_items(tiny_bert.preprocess, same, range(N, 2 * N), 0)
    assert len({tuple(view.tolist()) for view in views}) > N // 4


IDS = st.lists(st.integers(0, 8), min_size=1, max_size=40).map(lambda ids: torch.tensor(ids))
SPECIAL = frozenset({0, 1, 2})


@given(ids=IDS, seed=st.integers(0, 10**6))
def test_a_text_view_is_its_text_with_words_left_out(ids: torch.Tensor, seed: int) -> None:
    view = text_view(ids, SPECIAL, np.random.default_rng(seed)).tolist()
    rest = iter(ids.tolist())
    assert all(token in rest for token in view), "in the text's own order"
    assert [i for i in view if i in SPECIAL] == [i for i in ids.tolist() if i in SPECIAL]
    if any(i not in SPECIAL for i in ids.tolist()):
        assert any(i not in SPECIAL for i in view), "one word at least"


def test_a_tenth_of_the_words_is_left_out() -> None:
    ids, draw = torch.arange(3, 1003), np.random.default_rng(0)
    kept = [len(text_view(ids, SPECIAL, draw)) for _ in range(20)]
    assert np.mean(kept) == pytest.approx(1000 * (1 - TOKEN_DROPOUT), abs=15)


def test_a_text_of_one_word_keeps_it_whatever_is_drawn() -> None:
    ids = torch.tensor([2, 9, 3])
    assert {tuple(text_view(ids, frozenset({2, 3}), np.random.default_rng(s)).tolist()) for s in range(200)} == {
        (2, 9, 3)
    }


@given(width=st.integers(1, 60), height=st.integers(1, 60), seed=st.integers(0, 10**6))
def test_an_image_view_has_the_size_and_the_mode_of_its_image(width: int, height: int, seed: int) -> None:
    view = image_view(Image.new("RGB", (width, height), (90, 120, 30)), np.random.default_rng(seed))
    assert (view.size, view.mode) == ((width, height), "RGB")


def test_a_plain_image_stays_plain_and_its_brightness_near() -> None:
    """Crops and mirrors of one colour are that colour, so what is left is the shift of colours."""
    for seed in range(30):
        pixels = np.asarray(image_view(Image.new("RGB", (16, 16), (100, 100, 100)), np.random.default_rng(seed)))
        assert len(np.unique(pixels)) == 1
        assert 100 * (1 - COLOUR) - 2 <= pixels[0, 0, 0] <= 100 * (1 + COLOUR) + 2


def test_an_image_view_is_a_part_of_its_image_mirrored_half_the_time() -> None:
    ramp = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 3, 64, 0).repeat(3, 2))
    views = [np.asarray(image_view(ramp, np.random.default_rng(seed))).mean((0, 2)) for seed in range(200)]
    rising = [bool(v[-1] > v[0]) for v in views]
    assert 0.35 < np.mean(rising) < 0.65
    shown = [abs(v[-1] - v[0]) / (v.mean() + 1) for v in views]
    assert len({round(float(s), 3) for s in shown}) > 100, "crops differ"


# Choosing among them


@given(
    data=st.data(),
    examples=st.integers(1, 50),
    views=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 99),
)
def test_the_view_of_an_example_depends_on_seed_and_epoch_and_not_on_its_batch(
    data: st.DataObject, examples: int, views: int, seed: int, epoch: int
) -> None:
    order = np.array(data.draw(st.lists(st.integers(0, examples - 1), min_size=1, max_size=20)))
    whole = drawn_views(np.arange(examples), examples=examples, views=views, seed=seed, epoch=epoch)
    drawn = drawn_views(order, examples=examples, views=views, seed=seed, epoch=epoch)
    assert drawn.tolist() == whole[order].tolist()
    assert (drawn % examples).tolist() == order.tolist()
    assert set((drawn // examples).tolist()) <= set(range(1, views + 1)), "never the plain one"


def test_views_are_drawn_evenly_and_anew_in_every_epoch() -> None:
    order = np.arange(30)
    epochs = [drawn_views(order, examples=30, views=4, seed=5, epoch=e) // 30 for e in range(100)]
    counts = Counter(np.concatenate(epochs).tolist())
    assert set(counts) == {1, 2, 3, 4}
    assert all(650 < count < 850 for count in counts.values())
    assert not np.array_equal(epochs[0], epochs[1])


def test_without_views_examples_are_themselves() -> None:
    order = np.array([4, 1])
    assert drawn_views(order, examples=9, views=0, seed=0, epoch=0).tolist() == [4, 1]
    assert all_views(order, examples=9, views=0).tolist() == [4, 1]


@given(index=st.lists(st.integers(0, 19), unique=True, min_size=1), views=st.integers(1, 5))
def test_a_solver_sees_every_view_of_its_examples_once(index: list[int], views: int) -> None:
    found = all_views(np.array(index), examples=20, views=views).tolist()
    assert sorted(found) == sorted(i + 20 * view for view in range(1, views + 1) for i in index)
    assert [i % 20 for i in found[: len(index)]] == index


# Live methods meet the same


def test_live_methods_see_what_the_cache_was_built_from(pair: tuple[Backbone, Any], tmp_path: Path) -> None:
    backbone, examples = pair
    store = ZarrStore(toys.build_store(backbone, examples, tmp_path, views=VIEWS, seed=4).folder)
    live = LiveSource(backbone, examples, views=VIEWS, view_seed=4)
    assert live.lengths().tolist() == store.lengths().tolist()
    assert len(store) == N * (1 + VIEWS)
    final = backbone.final_layer
    for index in np.array_split(np.random.default_rng(1).permutation(len(store)), 4):
        (batch,) = live.batches([index])
        stored = store.read(index, [final])
        with torch.no_grad():
            tokens = backbone.tokens(dict(batch.inputs))
        assert torch.equal(batch.mask, stored.mask)
        torch.testing.assert_close(stored.layers[final], tokens * batch.mask[..., None], rtol=1e-4, atol=1e-4)


def test_images_prepared_batch_by_batch_are_the_same_views(tiny_vit: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    from sidebench.bench import learner

    task = Task("toy", toys.make_images(N), ("no", "yes"), None)
    index = np.array([3, N + 3, 3 * N + 1])
    (kept,) = LiveSource(tiny_vit, task.examples, views=VIEWS, view_seed=2).batches([index])
    monkeypatch.setattr(learner, "_PREPARED_IN_RAM_BYTES", 0)
    source = LiveSource(tiny_vit, task.examples, views=VIEWS, view_seed=2)
    (made,) = source.batches([index])
    assert torch.equal(kept.inputs["pixel_values"], made.inputs["pixel_values"])
    assert len(source.lengths()) == N * (1 + VIEWS)
