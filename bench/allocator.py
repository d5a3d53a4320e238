"""Replay a tracker's log through PyTorch's CUDA caching allocator: what a step would allocate and reserve on a GPU.

The rules and constants are those of c10/cuda/CUDACachingAllocator.cpp (PyTorch 2.13) with its defaults: one stream, no
expandable segments, no `max_split_size_mb`, no garbage collection, and a device that is never full. A full device gives
unused segments back and tries again, so a run may survive with less than is reserved here, never with less than is
allocated. What no tensor shows (library workspaces, the CUDA context) is in neither figure.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from .tracker import Event

_MIB = 2**20
MIN_BLOCK_BYTES = 512  # kMinBlockSize: every size is rounded up to a multiple
SMALL_BYTES = _MIB  # kSmallSize: requests up to here live in the small pool
SMALL_SEGMENT_BYTES = 2 * _MIB  # kSmallBuffer
LARGE_SEGMENT_BYTES = 20 * _MIB  # kLargeBuffer: segments for requests below MIN_LARGE_BYTES
MIN_LARGE_BYTES = 10 * _MIB  # kMinLargeAlloc
ROUND_LARGE_BYTES = 2 * _MIB  # kRoundLarge: segments of larger requests are rounded up to a multiple


@dataclass
class Block:
    """A piece of a segment. Neighbours are linked; two free neighbours never stay apart."""

    address: int
    size_bytes: int
    small: bool
    free: bool = False
    before: "Block | None" = None
    after: "Block | None" = None


class CachingAllocator:
    """Bytes asked for, in blocks, and in segments taken from the device: requested <= allocated <= reserved, always."""

    def __init__(self) -> None:
        self.requested_bytes = 0
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # by pool: (size, address, block)
        self._asked: dict[int, int] = {}  # address -> bytes asked for
        self._end = 0  # segments get addresses one behind the other

    def malloc(self, size_bytes: int) -> Block | None:
        """A block of at least so many bytes; None for 0 bytes, for which the allocator does nothing."""
        if size_bytes == 0:
            return None
        rounded = round_up(size_bytes, MIN_BLOCK_BYTES)
        block = self._best_fit(rounded) or self._new_segment(rounded)
        self._split(block, rounded)
        block.free = False
        self._asked[block.address] = size_bytes
        self.requested_bytes += size_bytes
        self.allocated_bytes += block.size_bytes
        return block

    def release(self, block: Block) -> None:
        """Take a block back: merged with free neighbours and kept for later, never returned to the device."""
        self.requested_bytes -= self._asked.pop(block.address)
        self.allocated_bytes -= block.size_bytes
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._take_out(neighbour)
                _join(block, neighbour)
        block.free = True
        bisect.insort(self._free[block.small], (block.size_bytes, block.address, block))

    def free_blocks(self) -> list[Block]:
        """The blocks that wait for use, smallest first within each pool."""
        return [block for pool in self._free.values() for _, _, block in pool]

    def _best_fit(self, size_bytes: int) -> Block | None:
        pool = self._free[size_bytes <= SMALL_BYTES]
        position = bisect.bisect_left(pool, (size_bytes, -1))
        return pool.pop(position)[2] if position < len(pool) else None

    def _take_out(self, block: Block) -> None:
        pool = self._free[block.small]
        del pool[bisect.bisect_left(pool, (block.size_bytes, block.address))]

    def _new_segment(self, size_bytes: int) -> Block:
        segment = segment_bytes(size_bytes)
        block = Block(self._end, segment, size_bytes <= SMALL_BYTES)
        self._end += segment
        self.reserved_bytes += segment
        return block

    def _split(self, block: Block, size_bytes: int) -> None:
        """Cut off the rest where it is worth a block: any rest in the small pool, more than 1 MiB in the large one."""
        rest = block.size_bytes - size_bytes
        if rest < MIN_BLOCK_BYTES if block.small else rest <= SMALL_BYTES:
            return
        other = Block(block.address + size_bytes, rest, block.small, True, block, block.after)
        if block.after is not None:
            block.after.before = other
        block.after, block.size_bytes = other, size_bytes
        bisect.insort(self._free[block.small], (rest, other.address, other))


def _join(block: Block, neighbour: Block) -> None:
    """Widen `block` by a free neighbour, which ceases to be."""
    if neighbour is block.before:
        block.before, block.address = neighbour.before, neighbour.address
        if block.before is not None:
            block.before.after = block
    else:
        block.after = neighbour.after
        if block.after is not None:
            block.after.before = block
    block.size_bytes += neighbour.size_bytes


def round_up(size_bytes: int, multiple: int) -> int:
    """The smallest multiple that is not below."""
    return -(-size_bytes // multiple) * multiple


def segment_bytes(size_bytes: int) -> int:
    """What is taken from the device for a request (rounded to 512 bytes) that no free block serves."""
    if size_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size_bytes < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return round_up(size_bytes, ROUND_LARGE_BYTES)


@dataclass(frozen=True)
class AllocatorPeaks:
    """The largest of each within the events looked at, as `torch.cuda.memory_stats` reports them after a reset."""

    requested_bytes: int  # requested_bytes.all.peak
    allocated_bytes: int  # allocated_bytes.all.peak = max_memory_allocated
    reserved_bytes: int  # reserved_bytes.all.peak = max_memory_reserved


def replay_allocator(events: Sequence[Event], step_start: int = 0) -> AllocatorPeaks:
    """Run a tracker's whole log through the allocator; the peaks are those from index `step_start` on.

    A storage that is resized gets its new block before the old one goes, as `untyped_storage().resize_` does.
    """
    allocator = CachingAllocator()
    sizes: dict[int, int] = {}
    blocks: dict[int, Block | None] = {}
    peaks = (0, 0, 0)
    for position, event in enumerate(events):
        if event.delta_bytes:
            sizes[event.storage] = sizes.get(event.storage, 0) + event.delta_bytes
            old = blocks.pop(event.storage, None)
            blocks[event.storage] = allocator.malloc(sizes[event.storage])
            if position >= step_start:
                peaks = _largest(peaks, allocator)
            if old is not None:
                allocator.release(old)
        if position >= step_start:
            peaks = _largest(peaks, allocator)
    return AllocatorPeaks(*peaks)


def _largest(peaks: tuple[int, int, int], allocator: CachingAllocator) -> tuple[int, int, int]:
    return (
        max(peaks[0], allocator.requested_bytes),
        max(peaks[1], allocator.allocated_bytes),
        max(peaks[2], allocator.reserved_bytes),
    )
