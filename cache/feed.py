"""From a store to training batches: the order is a pure function of the seed, the next batch is read ahead."""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from .store import Activations, Index, Store

S = TypeVar("S")
T = TypeVar("T")


def epoch_order(examples: Index, *, seed: int, epoch: int, shuffle: bool = True) -> Index:
    """The order in which an epoch visits `examples`: the same for every method, machine and store."""
    if not shuffle:
        return examples
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(examples)


def drawn_views(order: Index, *, examples: int, views: int, seed: int, epoch: int) -> Index:
    """The item to train on for each example of `order`: one of its augmented views, drawn anew in every epoch.

    The same for every method and batch size, whatever the order; without views the examples themselves.
    """
    if views == 0:
        return order
    drawn = np.random.Generator(np.random.PCG64([seed, epoch, views])).integers(1, views + 1, examples)
    return order + examples * drawn[order]


def all_views(index: Index, *, examples: int, views: int) -> Index:
    """Every augmented view of these examples, view by view; without views the examples themselves."""
    return np.concatenate([index + examples * view for view in range(1, views + 1)]) if views else index


def batches_of(order: Index, batch_size: int) -> list[Index]:
    """Cut an order into batches; the last may be smaller."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def activation_batches(
    store: Store, batches: Sequence[Index], layers: Sequence[str]
) -> Iterator[tuple[Index, Activations]]:
    """Yield each batch of example indices with its activations, read ahead in a background thread."""
    return ahead(batches, lambda index: (index, store.read(index, layers)))


def ahead(items: Sequence[S], make: Callable[[S], T]) -> Generator[T]:
    """Yield make(item) for every item, the next one computed in a thread meanwhile; its errors are raised here.

    One ahead is enough to overlap, and no more than two results exist at a time: the caller's and the next.
    """
    with ThreadPoolExecutor(1, "sidebench-feed") as pool:
        following = pool.submit(make, items[0]) if len(items) else None
        for position in range(1, len(items) + 1):
            assert following is not None
            value = following.result()
            following = pool.submit(make, items[position]) if position < len(items) else None
            yield value
