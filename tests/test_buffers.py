"""Buffers used again: never while anybody can still see them."""

import gc

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidebench.cache.buffers import Buffers


def test_the_memory_of_a_dropped_batch_serves_the_next() -> None:
    buffers = Buffers()
    first = buffers.empty((4, 8), np.float32)
    place = first.ctypes.data
    del first
    gc.collect()
    assert buffers.empty((4, 8), np.float32).ctypes.data == place


def test_a_tensor_or_a_view_of_one_keeps_its_memory() -> None:
    buffers = Buffers()
    view = torch.from_numpy(buffers.empty((4, 8), np.float32)).view(torch.int32)[1:, 2:]
    view.fill_(7)
    for _ in range(3):
        buffers.empty((4, 8), np.float32)[:] = 0
    gc.collect()
    assert bool((view == 7).all())


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=40))
def test_no_two_living_arrays_share_memory(requests: list[tuple[int, bool]]) -> None:
    buffers = Buffers()
    kept: list[tuple[np.ndarray, int]] = []
    for number, (rows, keep) in enumerate(requests):
        array = buffers.empty((rows, 3), np.int64)
        array[:] = number
        if keep:
            kept.append((array, number))
        del array
    for array, number in kept:
        assert (array == number).all()


def test_what_is_held_does_not_grow_with_the_number_of_requests() -> None:
    buffers = Buffers()
    rng = np.random.default_rng(0)
    for rows in rng.integers(1, 1000, 200).tolist():
        buffers.empty((rows, 100), np.float32)
    assert sum(memory.nbytes for memory in buffers._free) <= 1000 * 100 * 4 * 1.25
