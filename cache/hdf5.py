"""HDF5 files as untrusted input: only plain datasets that lie whole inside the file itself are handed on.

Nothing is unpickled, no other file is opened (external links, external storage, virtual datasets), no filter is loaded
from a plugin, and no size is believed before it is held against the file. What this cannot prevent: on some damaged
heaps of variable-length strings the HDF5 library itself never returns.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from .errors import SidebenchError

_MOST_OBJECTS = 20_000
_LARGEST_CHUNK_BYTES = 2**30
_STRINGS_BYTES = 2**26  # read at a time
_CHUNK_CACHE_BYTES = 2**26  # rows in another order than the file's touch a compressed chunk again and again
_BUILT_IN_FILTERS = {1, 2, 3, 4, 5, 6, 32000}  # gzip, shuffle, fletcher32, szip, nbit, scaleoffset, lzf


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in a sentence what the library met; for a damaged file it raises any of these."""
    try:
        yield
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, NotImplementedError, MemoryError) as error:
        lines = str(error).strip().strip("'\"").splitlines()
        said = lines[0][:200] if lines else type(error).__name__
        raise SidebenchError(
            f"{path} cannot be read as HDF5: {said}. It may be cut short or damaged; copy or write it again."
        ) from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The file, open for reading. Raises SidebenchError when it is missing, no HDF5 file, or cut short."""
    if not path.is_file():
        raise SidebenchError(f"there is no file {path}; name an HDF5 file.")
    with reading(path):
        if not h5py.is_hdf5(path):
            raise SidebenchError(f"{path} is no HDF5 file; wanted one written by `bench cache export` or by h5py.")
        file = h5py.File(path, "r", rdcc_nbytes=_CHUNK_CACHE_BYTES, locking="best-effort")
    try:
        yield file
    finally:
        file.close()


def datasets(file: Any, path: Path) -> dict[str, Any]:
    """Every dataset by its path inside the file. Raises SidebenchError for any link but a plain (hard) one."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    pending = [("", file)]
    with reading(path):
        while pending:
            prefix, group = pending.pop()
            address = h5py.h5o.get_info(group.id).addr
            if address in seen:
                raise SidebenchError(f"{path}: the group {prefix} is reached twice; write each group once.")
            seen.add(address)
            if len(group) + len(found) + len(seen) + len(pending) > _MOST_OBJECTS:
                raise SidebenchError(f"{path} holds more than {_MOST_OBJECTS} objects; no file of features does.")
            for name, member in _members(group, prefix, path):
                if isinstance(member, h5py.Group):
                    pending.append((f"{name}/", member))
                else:
                    found[name] = member
    return found


def _members(group: Any, prefix: str, path: Path) -> Iterator[tuple[str, Any]]:
    for name in group:
        where = f"{prefix}{name}"
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            kind = "an external" if isinstance(link, h5py.ExternalLink) else "a soft"
            raise SidebenchError(f"{path}: {where} is {kind} link; copy the data itself into the file.")
        member = group[name]
        if not isinstance(member, h5py.Group | h5py.Dataset):
            raise SidebenchError(f"{path}: {where} is neither a group nor a dataset; take it out of the file.")
        yield where, member


def check_plain(dataset: Any, name: str, path: Path) -> None:
    """Raise SidebenchError unless all of a dataset's numbers or strings lie in the file and can be read safely."""
    with reading(path):
        reason = _elsewhere(dataset) or _unsafe(dataset) or _incomplete(dataset, path.stat().st_size)
    if reason:
        raise SidebenchError(f"{path}: the dataset {name} {reason}.")


def _elsewhere(dataset: Any) -> str | None:
    if dataset.is_virtual:  # asked first: the shape of a virtual dataset may open other files
        return "is virtual, its data lie in other files; copy them into this one"
    if dataset.external:
        return "keeps its data in an external file; copy them into this one"
    return None


def _unsafe(dataset: Any) -> str | None:
    if dataset.dtype.hasobject and h5py.check_string_dtype(dataset.dtype) is None:
        return "holds objects; wanted plain numbers (and strings for ids)"
    properties = dataset.id.get_create_plist()
    filters = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())}
    if foreign := sorted(filters - _BUILT_IN_FILTERS):
        return f"is compressed by the plugin filter {foreign[0]}; write it again with gzip, lzf or not at all"
    if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > _LARGEST_CHUNK_BYTES:
        return f"has chunks of more than {_LARGEST_CHUNK_BYTES:,} bytes; write it again with smaller ones"
    return None


def _incomplete(dataset: Any, file_bytes: int) -> str | None:
    """What was never written reads as zeros, silently; and a forged shape claims more than the file can hold."""
    if dataset.shape is None:
        return "is empty"
    if dataset.chunks is None:
        claimed, stored = dataset.size * dataset.dtype.itemsize, dataset.id.get_storage_size()
        if min(stored, file_bytes) < claimed:
            return f"claims {claimed:,} bytes and {min(stored, file_bytes):,} are there; it was never written whole"
        return None
    wanted = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    if (held := dataset.id.get_num_chunks()) != wanted:
        return f"has {held:,} of its {wanted:,} chunks; it was never written whole"
    return None


def strings(dataset: Any, name: str, path: Path) -> tuple[str, ...]:
    """The strings (or whole numbers) of a checked one-dimensional dataset.

    Few at a time: many strings of one file may point to one and the same long text.
    """
    text = h5py.check_string_dtype(dataset.dtype) is not None
    if dataset.ndim != 1 or not (text or dataset.dtype.kind in "iu"):
        raise SidebenchError(f"{path}: the dataset {name} wants one string per example; found {dataset.dtype}.")
    largest = max(path.stat().st_size if dataset.dtype.hasobject else dataset.dtype.itemsize, 1)
    step = max(1, min(4096, _STRINGS_BYTES // largest))
    found: list[str] = []
    with reading(path):
        for start in range(0, len(dataset), step):
            block = dataset[start : start + step].tolist()
            found += [value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in block]
    return tuple(found)
