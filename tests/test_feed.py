"""The feed: an order that is a pure function of the seed, and batches read ahead in a thread that never lingers."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

from sidebench.cache.backbone import Backbone
from sidebench.cache.errors import SidebenchError
from sidebench.cache.feed import activation_batches, ahead, batches_of, epoch_order
from sidebench.cache.store import Index, LiveStore
from sidebench.cache.zarr_store import ZarrStore

INDICES = st.lists(st.integers(0, 10**6), max_size=200, unique=True).map(lambda v: np.array(v, dtype=np.int64))
SEEDS = st.integers(0, 2**32)


def _feeding() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("sidebench-feed")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert _feeding() == []


# Order


@given(examples=INDICES, seed=SEEDS, epoch=st.integers(0, 1000))
def test_an_epoch_visits_every_example_once_in_an_order_fixed_by_seed_and_epoch(
    examples: Index, seed: int, epoch: int
) -> None:
    before = examples.copy()
    order = epoch_order(examples, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == sorted(examples.tolist())
    assert order.tolist() == epoch_order(examples, seed=seed, epoch=epoch).tolist()
    assert examples.tolist() == before.tolist(), "the caller's list stays as it is"


@given(seed=SEEDS, epoch=st.integers(0, 1000))
def test_another_seed_or_epoch_gives_another_order(seed: int, epoch: int) -> None:
    examples = np.arange(100)
    near = [(seed, epoch), (seed + 1, epoch), (seed, epoch + 1)]
    orders = [epoch_order(examples, seed=s, epoch=e).tolist() for s, e in near]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_order_is_the_same_on_every_machine() -> None:
    """PCG64 is pinned by numpy's stream policy; Fisher-Yates below draws from it as `permutation` is documented to."""
    assert epoch_order(np.arange(8), seed=7, epoch=3).tolist() == [int(i) for i in _shuffled(8, seed=7, epoch=3)]


def _shuffled(count: int, *, seed: int, epoch: int) -> Index:
    values = np.arange(count)
    np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).shuffle(values)
    return values


def test_without_shuffling_the_order_is_as_given() -> None:
    assert epoch_order(np.array([5, 1, 3]), seed=1, epoch=1, shuffle=False).tolist() == [5, 1, 3]


@given(examples=INDICES, batch_size=st.integers(1, 70))
def test_batches_cover_the_order_and_only_the_last_is_short(examples: Index, batch_size: int) -> None:
    batches = batches_of(examples, batch_size)
    assert [i for batch in batches for i in batch.tolist()] == examples.tolist()
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(0 < len(batch) <= batch_size for batch in batches)


# Batches of activations


def test_every_store_feeds_the_same_examples_in_the_same_order(tiny_bert: Backbone, tmp_path: Path) -> None:
    examples = toys.make_texts(50)
    on_disk = ZarrStore(toys.build_store(tiny_bert, examples, tmp_path).folder)
    live = LiveStore(tiny_bert, toys.prepare(tiny_bert, examples))
    rows = {layer: [live.read(np.array([i]), [layer]).layers[layer][0] for i in range(50)] for layer in live.layers}
    in_ram = toys.in_memory(tiny_bert.arch, rows)
    batches = batches_of(epoch_order(np.arange(50), seed=0, epoch=0), 16)
    epochs = [list(activation_batches(store, batches, ["blocks.1"])) for store in (on_disk, live, in_ram)]
    for (index, one), (index_live, two), (index_ram, three) in zip(*epochs, strict=True):
        assert index.tolist() == index_live.tolist() == index_ram.tolist()
        for other in (two, three):
            assert torch.equal(one.mask, other.mask)
            torch.testing.assert_close(one.layers["blocks.1"], other.layers["blocks.1"], rtol=1e-4, atol=1e-4)


def test_a_damaged_chunk_stops_the_training_thread(tiny_bert: Backbone, tmp_path: Path) -> None:
    folder = toys.build_store(tiny_bert, toys.make_texts(50), tmp_path).folder
    chunk = folder / "layers" / "blocks.1" / "c" / "0" / "0"
    damaged = bytearray(chunk.read_bytes())
    damaged[100] ^= 4
    chunk.write_bytes(damaged)
    batches = batches_of(np.arange(50), 8)
    with pytest.raises(SidebenchError, match=r"is damaged: layers/blocks\.1/c/0/0"):
        list(activation_batches(ZarrStore(folder), batches, ["blocks.1"]))


# The thread


def _items(count: int) -> list[Index]:
    return [np.array([i]) for i in range(count)]


def test_results_come_in_order_and_all_of_them() -> None:
    def slow_at_first(item: Index) -> int:
        time.sleep(0.02 if item[0] < 2 else 0)
        return int(item[0])

    assert list(ahead(_items(20), slow_at_first)) == list(range(20))


def test_nothing_to_do_is_an_empty_epoch() -> None:
    assert list(ahead([], lambda item: item)) == []


def test_an_error_comes_after_the_batches_before_it() -> None:
    def fail_at_three(item: Index) -> int:
        if item[0] == 3:
            raise SidebenchError("the fourth is broken")
        return int(item[0])

    feed = ahead(_items(10), fail_at_three)
    assert [next(feed), next(feed), next(feed)] == [0, 1, 2]
    with pytest.raises(SidebenchError, match="the fourth is broken"):
        next(feed)


def test_an_error_that_is_no_exception_is_raised_too() -> None:
    def interrupted(_: Index) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(ahead(_items(3), interrupted))


@pytest.mark.parametrize("taken", [1, 2, 5])
def test_an_epoch_given_up_early_leaves_no_thread(taken: int) -> None:
    feed = ahead(_items(1000), lambda item: item)
    for _ in range(taken):
        next(feed)
    assert _feeding()
    feed.close()
    assert not _feeding()


def test_breaking_out_of_the_loop_is_giving_up() -> None:
    for _ in ahead(_items(1000), lambda item: item):
        break
    assert not _feeding()


def test_an_epoch_that_is_never_begun_starts_no_thread() -> None:
    _ = ahead(_items(3), lambda item: item)
    assert not _feeding()


def test_it_reads_ahead_but_never_the_whole_epoch() -> None:
    made: list[int] = []

    def make(item: Index) -> int:
        made.append(int(item[0]))
        return int(item[0])

    feed = ahead(_items(100), make)
    next(feed)
    deadline = time.monotonic() + 2
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(made) == 2, "one handed out, one waiting: memory for two batches"
    feed.close()
