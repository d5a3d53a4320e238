"""Reads a committed store straight from its chunk files: memory maps, no codec pipeline, each chunk checked once."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .buffers import Buffers
from .encode import Stored, from_numpy, to_numpy
from .errors import SidebenchError
from .layout import CHECKSUM_BYTES, checksum, trailer
from .manifest import StoredObject, read_manifest
from .quantise import Quantised
from .store import Activations, Index, Store, activations, check_index, require_layers

_OPEN_MAPS = 512  # one map per chunk of a large store would pass the kernel's limit
_DECODED_BYTES = 2**28  # decompressed chunks that are kept; whoever needs more loads the store into RAM


@dataclass(frozen=True)
class BadChunk:
    """One object of a store that is not what was written, and how."""

    layer: str
    chunk: str
    reason: str


class ZarrStore(Store):
    """A committed activation cache on a local disk. Refuses a folder without a manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest, self._objects = read_manifest(folder)
        self.architecture = self.manifest.seen
        self.layers = self.manifest.layers
        self._layouts = self.manifest.arrays()
        self._maps: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()
        self._buffers = Buffers()
        self._channels: dict[str, Tensor] = {}
        self._held: dict[tuple[str, int], NDArray[Any]] = {}
        self._decoded_bytes = 0
        self._lock = threading.Lock()
        self._checked: set[tuple[str, int]] = set()
        self._offsets = self._whole("offsets").numpy() if self.manifest.ragged else None
        self._check_offsets()

    def __len__(self) -> int:
        return self.manifest.items

    @property
    def examples(self) -> int:
        """Number of examples N; views of them follow as further items."""
        return self.manifest.examples

    @property
    def targets(self) -> NDArray[np.int64]:
        """(N,) class index per example."""
        return self._whole("targets").numpy()

    @property
    def ids(self) -> tuple[str, ...]:
        """Example ids in task order."""
        if problem := _object_problem(self.folder, "ids.json", self._objects["ids.json"]):
            raise self._damaged("ids.json", problem)
        ids = json.loads((self.folder / "ids.json").read_text("ascii"))
        if len(ids) != self.examples:
            raise self._damaged("ids.json", f"it names {len(ids)} examples, the manifest {self.examples}")
        return tuple(str(i) for i in ids)

    def lengths(self) -> NDArray[np.int64]:
        """(items,) tokens per item: of a dense store those of its last layer."""
        if self._offsets is None:
            return np.full(len(self), self.manifest.specs[-1].tokens, dtype=np.int64)
        return np.diff(self._offsets)

    def pooled(self, layer: str) -> Tensor:
        """(items, 2, D): the first token, and the mean over real tokens that are no prefix."""
        require_layers(self.layers, [layer])
        return self._whole(f"pooled/{layer}")

    def read(self, index: Index, layers: Sequence[str]) -> Activations:
        """See Store."""
        check_index(index, len(self))
        require_layers(self.layers, layers)
        dense = [layer for layer in layers if layer not in self.ragged_layers]
        found = {layer: self._stored(layer, lambda path: self._gather(path, index)) for layer in dense}
        real = None
        if self._offsets is not None and len(dense) < len(layers):
            starts, lengths = self._offsets[index], np.diff(self._offsets)[index]
            real = torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]
            for layer in (layer for layer in layers if layer in self.ragged_layers):
                found[layer] = self._stored(layer, lambda path: self._gather_ragged(path, starts, lengths))
        ordered = {layer: found[layer] for layer in layers}
        return activations(ordered, self.architecture.final_layer, real, self.ragged_layers)

    @property
    def offsets(self) -> Index | None:
        """(items + 1,) first row of every item of ragged layers; None where a row is an item in every layer."""
        return self._offsets

    @cached_property
    def ragged_layers(self) -> frozenset[str]:
        """The layers whose items differ in their number of tokens."""
        return frozenset(spec.layer for spec in self.manifest.specs if spec.tokens is None)

    def whole(self, layer: str) -> Stored:
        """Everything a layer holds: (items, T, D), or ragged (rows, D)."""
        require_layers(self.layers, [layer])
        return self._stored(layer, self._whole)

    def bytes_of(self, layers: Sequence[str]) -> int:
        """Bytes of these layers in memory."""
        require_layers(self.layers, layers)
        return sum(self._layouts[path].chunks * self._layouts[path].chunk_bytes for path in self._paths_of(layers))

    def _paths_of(self, layers: Sequence[str]) -> list[str]:
        named = (f"{group}/{layer}" for group in ("layers", "scales", "channels") for layer in layers)
        return [path for path in named if path in self._layouts]

    def hold(self, layers: Sequence[str]) -> None:
        """Load these layers into RAM, decompressed; reading them touches no file from here on."""
        require_layers(self.layers, layers)
        for path in self._paths_of(layers):
            for chunk in range(self._layouts[path].chunks):
                self._held[path, chunk] = np.array(self._chunk(path, chunk))
                with self._lock:
                    self._forget((path, chunk))

    def channels(self, layer: str) -> Tensor | None:
        """(D, 2) centre and spread of a layer's channels; None where they were not normalised."""
        if not self.manifest.form.per_channel:
            return None
        if layer not in self._channels:
            self._channels[layer] = self._whole(f"channels/{layer}")
        return self._channels[layer]

    def _stored(self, layer: str, gather: Callable[[str], Tensor]) -> Stored:
        values = gather(f"layers/{layer}")
        if not self.manifest.form.quantised:
            return values
        return Quantised(values, gather(f"scales/{layer}"), self.channels(layer))

    def verify(self) -> list[BadChunk]:
        """See the function of this name."""
        return verify(self.folder)

    def _chunk(self, path: str, chunk: int) -> NDArray[Any]:
        """One chunk as an array backed by a memory map; its checksum is verified at first touch in this process."""
        key = (path, chunk)
        if (held := self._held.get(key)) is not None:
            return held
        if (known := self._maps.get(key)) is not None:
            with suppress(KeyError):  # another thread has just closed it; ours stays open
                self._maps.move_to_end(key)
            return known
        layout = self._layouts[path]
        name = f"{path}/{layout.chunk_key(chunk)}"
        stated = self._objects[name]
        try:
            raw = np.memmap(self.folder / name, dtype=np.uint8, mode="r")
        except (OSError, ValueError):
            raise self._damaged(name, "missing or empty") from None
        if len(raw) != stated.bytes:
            raise self._damaged(name, f"it has {len(raw)} bytes, wanted {stated.bytes}")
        payload = raw[:-CHECKSUM_BYTES]
        if key not in self._checked:
            if checksum(payload) != stated.crc32c or raw[-CHECKSUM_BYTES:].tobytes() != trailer(stated.crc32c):
                raise self._damaged(name, "its checksum differs from the manifest")
            self._checked.add(key)
        try:
            found = layout.decode(payload)
        except ValueError as error:
            raise self._damaged(name, str(error)) from None
        self._keep(key, found)
        return found

    def _keep(self, key: tuple[str, int], found: NDArray[Any]) -> None:
        """Remember a chunk and let go of the oldest beyond the limits."""
        with self._lock:  # two threads may have decompressed the same chunk, whose bytes count once
            self._forget(key)
            self._maps[key] = found
            self._decoded_bytes += self._decoded(key, found)
            while len(self._maps) > _OPEN_MAPS or self._decoded_bytes > max(_DECODED_BYTES, found.nbytes):
                self._forget(next(iter(self._maps)))

    def _forget(self, key: tuple[str, int]) -> None:
        if (dropped := self._maps.pop(key, None)) is not None:
            self._decoded_bytes -= self._decoded(key, dropped)

    def _decoded(self, key: tuple[str, int], chunk: NDArray[Any]) -> int:
        """Memory that a chunk takes beyond the page cache."""
        return chunk.nbytes if self._layouts[key[0]].compression else 0

    def _whole(self, path: str) -> Tensor:
        layout = self._layouts[path]
        rows = np.concatenate([self._chunk(path, c) for c in range(layout.chunks)])[: layout.shape[0]]
        return from_numpy(rows, layout.dtype)

    def _gather(self, path: str, index: Index) -> Tensor:
        layout = self._layouts[path]
        out = self._empty(path, (len(index), *layout.shape[1:]))
        # Row by row with numpy: torch would gather on all cores, in a thread beside one that trains on all cores.
        raw = to_numpy(out)
        for row, example in enumerate(index.tolist()):
            chunk, offset = divmod(example, layout.chunk_rows)
            raw[row] = self._chunk(path, chunk)[offset]
        return out

    def _gather_ragged(self, path: str, starts: Index, lengths: Index) -> Tensor:
        layout = self._layouts[path]
        out = self._empty(path, (len(starts), int(lengths.max()), *layout.shape[1:]))
        raw = to_numpy(out)
        for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            done = 0
            while done < length:  # an example may straddle chunks
                chunk, offset = divmod(start + done, layout.chunk_rows)
                taken = min(layout.chunk_rows - offset, length - done)
                raw[row, done : done + taken] = self._chunk(path, chunk)[offset : offset + taken]
                done += taken
            raw[row, length:] = 0
        return out

    def _empty(self, path: str, shape: tuple[int, ...]) -> Tensor:
        layout = self._layouts[path]
        return from_numpy(self._buffers.empty(shape, layout.numpy_dtype), layout.dtype)

    def _check_offsets(self) -> None:
        if self._offsets is None:
            return
        steps = np.diff(self._offsets)
        if self._offsets[0] != 0 or self._offsets[-1] != self.manifest.rows or (steps <= 0).any():
            raise self._damaged("offsets", "they do not run from 0 to the number of rows")

    def _damaged(self, name: str, reason: str) -> SidebenchError:
        return SidebenchError(
            f"the activation cache {self.folder} is damaged: {name}: {reason}. "
            f"`bench cache verify {self.folder}` shows all of it, with --repair it recomputes what is bad."
        )


def verify(folder: Path) -> list[BadChunk]:
    """Read every object of a store and compare it with the manifest; extra and missing ones are bad too.

    Takes the folder, not a store: one whose damage keeps it from being opened is to be verified all the same.
    """
    _, objects = read_manifest(folder)
    bad = [_bad(k, reason) for k in sorted(objects) if (reason := _object_problem(folder, k, objects[k]))]
    known = {*objects, "manifest.json", "notes.json"}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink()):
        if (key := path.relative_to(folder).as_posix()) not in known:
            bad.append(_bad(key, "not part of this store"))
    return bad


def _object_problem(folder: Path, key: str, stated: StoredObject) -> str | None:
    target = folder / key
    if not target.is_file():
        return "missing"
    try:
        data = np.fromfile(target, dtype=np.uint8)
    except OSError as error:
        return f"unreadable: {error.strerror}"
    if len(data) != stated.bytes:
        return f"has {len(data)} bytes, wanted {stated.bytes}"
    is_chunk = "/c/" in key
    payload = data[:-CHECKSUM_BYTES] if is_chunk else data
    if checksum(payload) != stated.crc32c:
        return "its checksum differs from the manifest"
    if is_chunk and data[-CHECKSUM_BYTES:].tobytes() != trailer(stated.crc32c):
        return "its trailing checksum is wrong"
    return None


def _bad(key: str, reason: str) -> BadChunk:
    path, _, chunk = key.partition("/c/")
    return BadChunk(path.removeprefix("layers/"), chunk or key, reason)
