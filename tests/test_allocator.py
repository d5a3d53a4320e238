"""The replay of the CUDA caching allocator: sizes by the rules of its source, invariants on any program."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sidebench.bench.allocator import CachingAllocator, replay_allocator, round_up, segment_bytes
from sidebench.bench.tracker import Event, Tracker

MIB = 2**20


def _blocks_tile_the_segments(allocator: CachingAllocator, used: list) -> None:
    blocks = sorted([*allocator.free_blocks(), *used], key=lambda block: block.address)
    end = 0
    for block in blocks:
        assert block.address == end, "a hole, or two blocks at one address"
        end += block.size_bytes
    assert end == allocator.reserved_bytes
    for block in allocator.free_blocks():
        assert block.free
        for neighbour in (block.before, block.after):
            assert neighbour is None or not neighbour.free, "two free neighbours were not merged"
            assert neighbour is None or neighbour.small == block.small


sizes = st.one_of(st.integers(1, 4096), st.integers(MIB - 600, MIB + 600), st.integers(MIB, 40 * MIB))


@given(st.lists(st.one_of(sizes, st.floats(0, 0.999)), max_size=60))
def test_requested_is_at_most_allocated_is_at_most_reserved(program: list[int | float]) -> None:
    """A whole number allocates so many bytes, a fraction frees the block at that place in the list."""
    allocator, used = CachingAllocator(), []
    for item in program:
        if isinstance(item, int):
            used.append(allocator.malloc(item))
        elif used:
            allocator.release(used.pop(int(item * len(used))))
        assert allocator.requested_bytes <= allocator.allocated_bytes <= allocator.reserved_bytes
        assert allocator.allocated_bytes == sum(block.size_bytes for block in used)
        _blocks_tile_the_segments(allocator, used)
    for block in used:
        allocator.release(block)
    assert allocator.requested_bytes == allocator.allocated_bytes == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3 * MIB)), max_size=40), st.integers(0, 40))
def test_the_replay_keeps_the_order_of_the_three_peaks(resizes: list[tuple[int, int]], start: int) -> None:
    held: dict[int, int] = {}
    events = []
    for storage, size in resizes:
        events.append(Event("op", size - held.get(storage, 0), storage, "forward"))
        held[storage] = size
    peaks = replay_allocator(events, min(start, len(events)))
    assert peaks.requested_bytes <= peaks.allocated_bytes <= peaks.reserved_bytes


@pytest.mark.parametrize(
    ("asked", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),  # a large block: the rest of 19 MiB is cut off
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # the rest is no more than 1 MiB: it stays with the block
        (21 * MIB - 1, 22 * MIB, 22 * MIB),
    ],
)
def test_a_first_request_takes_what_the_rules_say(asked: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(asked)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


def test_nothing_is_allocated_for_nothing() -> None:
    assert CachingAllocator().malloc(0) is None
    assert replay_allocator([Event("born", 0, 0, "forward")]).reserved_bytes == 0


def test_a_freed_block_serves_the_next_request_and_the_smallest_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    big, small = allocator.malloc(64 * MIB), allocator.malloc(32 * MIB)
    assert big is not None
    assert small is not None
    place = small.address
    allocator.release(big)
    allocator.release(small)
    again = allocator.malloc(31 * MIB + 512)
    assert again is not None
    assert again.address == place
    assert allocator.reserved_bytes == 96 * MIB


def test_the_pools_do_not_share_segments() -> None:
    allocator = CachingAllocator()
    large = allocator.malloc(2 * MIB)
    assert large is not None
    allocator.release(large)
    allocator.malloc(512)
    assert allocator.reserved_bytes == (20 + 2) * MIB


def test_small_blocks_are_cut_to_the_byte_and_merged_again() -> None:
    allocator = CachingAllocator()
    three = [allocator.malloc(1000) for _ in range(3)]
    assert allocator.allocated_bytes == 3 * 1024
    for block in (three[0], three[2], three[1]):
        assert block is not None
        allocator.release(block)
    (whole,) = allocator.free_blocks()
    assert whole.size_bytes == 2 * MIB


def test_a_resized_storage_has_both_blocks_for_a_moment() -> None:
    events = [Event("born", 4 * MIB, 0, "forward"), Event("resize", 4 * MIB, 0, "forward")]
    peaks = replay_allocator(events)
    assert peaks.allocated_bytes == 12 * MIB
    assert replay_allocator(events, 2).allocated_bytes == 0  # nothing happened from there on


def test_reserved_never_shrinks_and_counts_what_earlier_steps_took() -> None:
    events = [
        Event("born", 30 * MIB, 0, "forward"),
        Event("death", -30 * MIB, 0, "forward"),
        Event("born", 2 * MIB, 1, "forward"),
    ]
    peaks = replay_allocator(events, 2)
    assert (peaks.requested_bytes, peaks.allocated_bytes, peaks.reserved_bytes) == (2 * MIB, 2 * MIB, 30 * MIB)


def test_rounding() -> None:
    assert [round_up(n, 512) for n in (1, 512, 513)] == [512, 512, 1024]
    assert [segment_bytes(n) // MIB for n in (512, MIB, MIB + 512, 10 * MIB, 10 * MIB + 512)] == [2, 2, 20, 10, 12]


def test_the_requested_peak_is_that_of_the_tracker() -> None:
    model, x = nn.Sequential(nn.Linear(300, 700), nn.ReLU(), nn.Linear(700, 5)), torch.randn(64, 300)
    with Tracker(model, None, [x]) as tracker:
        tracker.begin_step()
        with tracker.phase("forward"):
            loss = model(x).sum()
        with tracker.phase("backward"):
            loss.backward()
    peaks = replay_allocator(tracker.events)
    assert peaks.requested_bytes == tracker.peak().peak_bytes
    assert peaks.allocated_bytes <= peaks.requested_bytes + 512 * len(tracker.events) + MIB
