"""Which canonical batches a chunk needs, and how the chunks of a build are shared out among workers."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import SidebenchError
from .layout import ArrayLayout
from .manifest import Manifest

Chunks = Mapping[str, Sequence[int]]
"""Chunk numbers by array path."""

Offsets = NDArray[np.int64] | None
"""(items + 1,) first row of every item of ragged layers; None where a row is an item."""


def batch_size(manifest: Manifest) -> int:
    """Examples per canonical batch. Raises SidebenchError where a foreign manifest holds none."""
    size = manifest.forward.get("batch_size")
    if not isinstance(size, int) or size < 1:
        raise SidebenchError(f"the manifest's canonical batch holds {str(size)[:40]!r} examples; wanted 1 or more.")
    return size


def batches_for(manifest: Manifest, chunks: Chunks, offsets: Offsets) -> list[int]:
    """First examples of the canonical batches that hold a row of `chunks`, ascending."""
    size, layouts = batch_size(manifest), manifest.arrays()
    found: set[int] = set()
    for path, numbers in chunks.items():
        for chunk in numbers:
            first, last = _examples_in(layouts[path], chunk, offsets)
            found.update(range(first // size * size, last + 1, size))
    return sorted(found)


def share_out(manifest: Manifest, chunks: Chunks, offsets: Offsets, workers: int) -> list[Chunks]:
    """Split chunks of layers into at most `workers` parts of neighbouring examples; every chunk has one owner.

    Chunks of all layers that begin with the same example go together, so only a batch that straddles the border
    between two parts is computed twice.
    """
    layouts = manifest.arrays()
    together: dict[int, list[tuple[str, int]]] = {}
    for path, numbers in chunks.items():
        for chunk in numbers:
            together.setdefault(_examples_in(layouts[path], chunk, offsets)[0], []).append((path, chunk))
    begins = sorted(together)
    parts = np.array_split(np.array(begins, dtype=np.int64), max(min(workers, len(begins)), 1))
    return [_by_path(owned for first in part.tolist() for owned in together[first]) for part in parts if len(part)]


def _by_path(chunks: Iterable[tuple[str, int]]) -> Chunks:
    found: dict[str, list[int]] = {}
    for path, chunk in chunks:
        found.setdefault(path, []).append(chunk)
    return found


def _examples_in(layout: ArrayLayout, chunk: int, offsets: Offsets) -> tuple[int, int]:
    """The first and the last example with a row in this chunk."""
    first = chunk * layout.chunk_rows
    last = min(first + layout.chunk_rows, layout.shape[0]) - 1
    if offsets is None or layout.axes[0] != "token":
        return first, last
    return int(np.searchsorted(offsets, first, "right")) - 1, int(np.searchsorted(offsets, last, "right")) - 1
