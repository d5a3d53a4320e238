"""From a store to training batches: the order is a pure function of the seed, the next batch is read ahead."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from .store import Activations, Index, Store

T = TypeVar("T")
_AHEAD = 2  # batches read while the current one is trained on


def epoch_order(examples: Index, *, seed: int, epoch: int, shuffle: bool = True) -> Index:
    """The order in which an epoch visits `examples`: the same for every method, machine and store."""
    if not shuffle:
        return examples
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(examples)


def batches_of(order: Index, batch_size: int) -> list[Index]:
    """Cut an order into batches; the last may be smaller."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def activation_batches(
    store: Store, batches: Sequence[Index], layers: Sequence[str]
) -> Iterator[tuple[Index, Activations]]:
    """Yield each batch of example indices with its activations, read ahead in a background thread."""
    return ahead(batches, lambda index: (index, store.read(index, layers)))


def ahead(items: Sequence[Index], make: Callable[[Index], T]) -> Iterator[T]:
    """Yield make(item) for every item, computed up to two items ahead in a thread; its errors are raised here."""
    done: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=_AHEAD)
    stop = threading.Event()

    def put(value: T | BaseException | None) -> None:
        while not stop.is_set():
            try:
                done.put(value, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                put(make(item))
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="sidebench-feed", daemon=True)
    thread.start()
    try:
        while (value := done.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stop.set()
        thread.join()
