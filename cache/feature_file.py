"""An HDF5 file of features as somebody happens to have it: which datasets are layers, and which row is whose."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import SidebenchError, unknown
from .hdf5 import check_plain, datasets, reading, strings
from .layout import ArrayLayout
from .manifest import ActivationSpec

_LARGEST_EXAMPLE_BYTES = 2**30
_WIDEST = 2**31
_NAMED = 5  # examples that a message names

Int = NDArray[np.int64]


@dataclass(frozen=True)
class FeatureFile:
    """Layers of an open file under the names of the hidden states; examples are numbered as in the task."""

    path: Path
    keys: tuple[str, ...]  # dataset paths with "." for "/", in forward order
    specs: tuple[ActivationSpec, ...]
    dtype: str
    starts: Int  # (N,) first row of each example in the file
    lengths: Int  # (N,) rows of each example in the file: 1 when dense
    arrays: tuple[Any, ...]

    @property
    def states(self) -> tuple[str, ...]:
        """The layers' names in the store."""
        return tuple(spec.layer for spec in self.specs)

    @property
    def ragged(self) -> bool:
        """Whether examples differ in their number of tokens."""
        return self.specs[0].tokens is None

    @property
    def tokens(self) -> Int:
        """(N,) tokens of each example."""
        return self.lengths if self.ragged else self.lengths * int(self.specs[0].tokens or 1)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """What is stored."""
        return ArrayLayout((1,), self.dtype, ("example",)).numpy_dtype

    def key_of(self, state: str) -> str:
        """The key that became this hidden state."""
        return self.keys[self.states.index(state)]

    def read(self, state: str, first: int, stop: int) -> NDArray[Any]:
        """Tokens (rows, D) of the examples `first` to `stop`, in task order and storage dtype."""
        array, spec = self.arrays[self.states.index(state)], self.specs[self.states.index(state)]
        starts, stops = self.starts[first:stop], (self.starts + self.lengths)[first:stop]
        breaks = (np.flatnonzero(starts[1:] != stops[:-1]) + 1).tolist()
        out = np.empty((int(self.lengths[first:stop].sum()), *array.shape[1:]), dtype=self.numpy_dtype)
        at = 0
        with reading(self.path), np.errstate(over="ignore"):  # what overflows is refused as infinite
            for low, high in zip([0, *breaks], [*breaks, len(starts)], strict=True):
                begin, end = int(starts[low]), int(stops[high - 1])
                out[at : at + end - begin] = array[begin:end]
                at += end - begin
        return out.reshape(-1, spec.width)


def describe(
    file: Any,
    path: Path,
    ids: tuple[str, ...],
    *,
    layers: tuple[str, ...] | None,
    prefix_tokens: int,
    say: Callable[[str], None],
) -> FeatureFile:
    """Find the layers of an open file and match its examples with the task's `ids`.

    Raises SidebenchError for whatever does not fit, naming the dataset or some of the examples.
    """
    found = _by_key(datasets(file, path), path)
    held = {name: found.pop(name, None) for name in ("ids", "offsets")}
    keys = _chosen(found, layers, path, say)
    arrays = tuple(found[key] for key in keys)
    for name, dataset in (*zip(keys, arrays, strict=True), *held.items()):
        if dataset is not None:
            check_plain(dataset, name, path)
    for name in ("ids", "offsets"):
        _check_count(held[name], name, len(ids), path)
    offsets = None if held["offsets"] is None else _offsets(held["offsets"], path)
    specs = _specs(keys, arrays, offsets, prefix_tokens, path)
    rows = len(arrays[0]) if offsets is None else len(offsets) - 1
    order = _order(held["ids"], ids, rows, path)
    starts = np.arange(rows, dtype=np.int64) if offsets is None else offsets[:-1]
    lengths = np.ones(rows, dtype=np.int64) if offsets is None else np.diff(offsets)
    return FeatureFile(path, keys, specs, _dtype(keys, arrays, say), starts[order], lengths[order], arrays)


def _by_key(found: dict[str, Any], path: Path) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, dataset in found.items():
        if (key := name.replace("/", ".")) in keys:
            raise SidebenchError(f"{path}: two datasets would both be called {key}; rename one.")
        keys[key] = dataset
    return keys


def _check_count(dataset: Any, name: str, examples: int, path: Path) -> None:
    """Before it is read: a compressed dataset may be a thousand times what the file takes."""
    if dataset is not None and dataset.size > 16 * (examples + 64):
        raise SidebenchError(f"{path}: {name} has {dataset.size:,} entries, the task {examples:,} examples.")


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key by which layer.2 comes before layer.10."""
    pieces = re.split(r"([0-9]{1,18})", text)
    return [(0, int(p), "") if i % 2 else (1, 0, p) for i, p in enumerate(pieces) if p]


def _chosen(
    found: dict[str, Any], layers: tuple[str, ...] | None, path: Path, say: Callable[[str], None]
) -> tuple[str, ...]:
    if layers is not None:
        keys = tuple(layer.strip("/").replace("/", ".") for layer in layers)
        for key in keys:
            if key not in found:
                raise unknown(f"layer in {path}", key, found)
        if not keys or len(set(keys)) != len(keys):
            raise SidebenchError(f"--layers wants each layer once; found {','.join(layers)!r}.")
        for key in keys:
            check_plain(found[key], key, path)
            if found[key].dtype.kind != "f":
                raise SidebenchError(f"{path}: {key} holds {found[key].dtype}; a layer wants float16, 32 or 64.")
        return keys
    for key, dataset in found.items():
        check_plain(dataset, key, path)
    keys = tuple(sorted((k for k, d in found.items() if d.dtype.kind == "f" and d.ndim > 1), key=natural))
    if not keys:
        raise SidebenchError(
            f"{path} holds no layers; wanted float datasets of shape (N, T, D) or (N, D), found "
            f"{', '.join(f'{k} {d.shape} of {d.dtype}' for k, d in list(found.items())[:_NAMED]) or 'nothing'}."
        )
    if others := sorted(set(found) - set(keys)):
        say(f"left out, as they are no features: {', '.join(others)}")
    say(f"layers, in this order (--layers gives another): {', '.join(keys)}")
    return keys


def _specs(
    keys: Sequence[str], arrays: Sequence[Any], offsets: Int | None, prefix_tokens: int, path: Path
) -> tuple[ActivationSpec, ...]:
    specs = []
    for number, (key, array) in enumerate(zip(keys, arrays, strict=True)):
        state = f"blocks.{number - 1}" if number else "embeddings"
        specs.append(ActivationSpec(state, *_token_shape(key, array, offsets, path)))
    counts = {spec.tokens: key for spec, key in zip(specs, keys, strict=True)}
    if len(counts) > 1:
        shown = ", ".join(f"{key} has {tokens}" for tokens, key in counts.items())
        raise SidebenchError(f"{path}: layers differ in tokens per example: {shown}; choose some with --layers.")
    sizes = {len(array): key for array, key in zip(arrays, keys, strict=True)}
    if len(sizes) > 1:
        shown = ", ".join(f"{key} has {size}" for size, key in sizes.items())
        raise SidebenchError(f"{path}: layers differ in length: {shown}; choose some with --layers.")
    least = specs[0].tokens or 0
    if prefix_tokens and prefix_tokens >= least:
        raise SidebenchError(
            f"--prefix-tokens {prefix_tokens} leaves none of the {specs[0].tokens or 'differing numbers of'} tokens "
            "for a mean; type fewer."
        )
    return tuple(specs)


def _token_shape(key: str, array: Any, offsets: Int | None, path: Path) -> tuple[int | None, int]:
    """(tokens, width) of one example, and that it fits into memory."""
    wanted = (2, 3) if offsets is None else (2,)
    if array.ndim not in wanted or not all(array.shape) or array.shape[-1] > _WIDEST:
        forms = "(N, T, D) or (N, D)" if offsets is None else "(rows, D) beside offsets"
        raise SidebenchError(f"{path}: {key} has shape {array.shape}; wanted {forms}, none of them 0.")
    if offsets is not None and offsets[-1] != len(array):
        raise SidebenchError(f"{path}: offsets end at {offsets[-1]}, {key} has {len(array)} rows; they must be equal.")
    longest = int(np.diff(offsets).max()) if offsets is not None else (array.shape[1] if array.ndim == 3 else 1)
    if longest * array.shape[-1] * 8 > _LARGEST_EXAMPLE_BYTES:
        raise SidebenchError(
            f"{path}: one example of {key} has {longest} x {array.shape[-1]} values; that is too many."
        )
    return None if offsets is not None else longest, int(array.shape[-1])


def _offsets(dataset: Any, path: Path) -> Int:
    if dataset.ndim != 1 or dataset.dtype.kind not in "iu" or len(dataset) < 2:
        raise SidebenchError(f"{path}: offsets wants N + 1 whole numbers; found {dataset.shape} of {dataset.dtype}.")
    with reading(path):
        offsets = dataset[:].astype(np.int64)
    if offsets[0] != 0 or (np.diff(offsets) <= 0).any():
        raise SidebenchError(f"{path}: offsets must begin with 0 and rise, at least one row per example.")
    return offsets


def _order(dataset: Any, ids: tuple[str, ...], rows: int, path: Path) -> Int:
    """Which example of the file is the task's first, second, …"""
    if dataset is None:
        if rows != len(ids):
            raise SidebenchError(
                f"{path} holds {rows} examples, the task {len(ids)}; add a dataset `ids`, or give the task that "
                "the features are of (and its --limit)."
            )
        return np.arange(rows, dtype=np.int64)
    names = strings(dataset, "ids", path)
    if len(names) != rows:
        raise SidebenchError(f"{path}: ids names {len(names)} examples, the layers hold {rows}.")
    position = {name: i for i, name in enumerate(names)}
    repeated = sorted({name for i, name in enumerate(names) if position[name] != i})
    problems = {
        "twice in the file": repeated,
        "missing from the file": [name for name in ids if name not in position],
        "not in the task": sorted(set(names) - set(ids)),
    }
    said = [
        f"{len(found)} {what}, as {', '.join(map(repr, found[:_NAMED]))}" for what, found in problems.items() if found
    ]
    if said:
        raise SidebenchError(f"{path}: its ids are not those of the task: {'; '.join(said)}.")
    return np.array([position[name] for name in ids], dtype=np.int64)


def _dtype(keys: Sequence[str], arrays: Sequence[Any], say: Callable[[str], None]) -> str:
    """One storage dtype for all: float16 if all are, else float32."""
    sizes = {array.dtype.itemsize for array in arrays}
    doubles = [key for key, array in zip(keys, arrays, strict=True) if array.dtype.itemsize > 4]
    if doubles:
        say(f"float64 is stored as float32, which keeps 7 digits: {', '.join(doubles)}")
    if sizes == {2}:
        return "float16"
    if 2 in sizes:
        say("the layers differ in dtype; all are stored as float32")
    return "float32"
