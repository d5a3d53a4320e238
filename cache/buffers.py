"""Batch buffers that are used again: fresh memory costs a page fault per 4 kB, half the time of reading a batch."""

import math
import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Buffers:
    """Hands out uninitialised arrays; the memory of one that nobody refers to any more serves the next request.

    The arrays are ordinary: whoever keeps one keeps its memory, so no batch ever changes under its reader's hands. What
    is held is at most what was in use at once. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []
        self._lock = threading.RLock()  # a finalizer may run in the thread that holds it

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array of this shape, its content arbitrary."""
        count = math.prod(shape) * np.dtype(dtype).itemsize
        memory = self._take(count)
        array = memory[:count].view(dtype).reshape(shape)
        # torch.from_numpy keeps the array alive as long as any view of its tensor lives.
        weakref.finalize(array, self._give_back, memory).atexit = False
        return array

    def _take(self, count: int) -> NDArray[np.uint8]:
        with self._lock:
            for position, memory in enumerate(self._free):
                if count <= len(memory):
                    return self._free.pop(position)
            # None is large enough: those that are too small would only pile up. A quarter more, since texts differ.
            if self._free:
                self._free.pop(0)
        return np.empty(count + count // 4, dtype=np.uint8)

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        with self._lock:
            self._free.append(memory)
            self._free.sort(key=len)
