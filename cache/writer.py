"""Writes a store chunk by chunk from a background thread; what is whole on disk survives any death of the process."""

import json
import os
import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import disk_errors
from .layout import CHECKSUM_BYTES, GROUP_METADATA, checksum, trailer
from .manifest import MANIFEST, Manifest, StoredObject, write_manifest

NOTES = "notes.json"
_TEMPORARY = ".partial"


class StoreWriter:
    """Appends rows to every array of a store, then commits. Use under `builder_lock`; call `close` in any case.

    A chunk is encoded once, written under a temporary name, flushed to disk and renamed; the manifest comes last. Rows
    that fall into chunks already whole on disk are dropped, which is all that resuming is.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.write_seconds = 0.0
        self._layouts = manifest.arrays()
        self._objects: dict[str, StoredObject] = {}
        self._position = dict.fromkeys(self._layouts, 0)
        self._buffers: dict[str, NDArray[Any]] = {}
        self._queue: queue.Queue[tuple[str, NDArray[Any]] | None] = queue.Queue(maxsize=2 * len(manifest.specs))
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        with disk_errors(folder):
            self._lay_out()
        self._whole = {path: self._whole_chunks(path) for path in self._layouts}
        self.resumed_chunks = sum(len(chunks) for chunks in self._whole.values())

    def first_missing_row(self, path: str) -> int:
        """The first row of array `path` that is not on disk in a whole chunk."""
        layout, whole = self._layouts[path], self._whole[path]
        chunk = next((c for c in range(layout.chunks) if c not in whole), layout.chunks)
        return min(chunk * layout.chunk_rows, layout.shape[0])

    def seek(self, path: str, row: int) -> None:
        """Say that the next rows appended to `path` start at `row`."""
        self._position[path] = row

    def append(self, path: str, rows: NDArray[Any]) -> None:
        """Add rows (n, …) in storage dtype to array `path`. Raises what the writing thread met."""
        layout = self._layouts[path]
        while len(rows):
            position = self._position[path]
            chunk, offset = divmod(position, layout.chunk_rows)
            taken = min(layout.chunk_rows - offset, len(rows))
            if chunk not in self._whole[path]:
                self._fill(path, chunk, offset, rows[:taken])
            self._position[path] = position + taken
            rows = rows[taken:]

    def stored_rows(self, path: str, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of array `path`; they must lie in whole chunks on disk."""
        layout = self._layouts[path]
        rows = np.empty((stop - start, *layout.shape[1:]), dtype=layout.numpy_dtype)
        for begin in range(start // layout.chunk_rows * layout.chunk_rows, stop, layout.chunk_rows):
            file = self.folder / path / layout.chunk_key(begin // layout.chunk_rows)
            chunk = np.memmap(file, dtype=layout.numpy_dtype, mode="r", shape=layout.chunk_shape)
            low, high = max(start, begin), min(stop, begin + layout.chunk_rows)
            rows[low - start : high - start] = chunk[low - begin : high - begin]
        return rows

    def commit(self, notes: dict[str, Any], ids: tuple[str, ...]) -> None:
        """Flush everything, then write the manifest: from here on the store can be opened."""
        with disk_errors(self.folder):
            self._put_object("ids.json", json.dumps(list(ids), ensure_ascii=True, indent=0).encode())
        self._drain()
        short = [path for path, layout in self._layouts.items() if len(self._whole[path]) != layout.chunks]
        if short:
            raise AssertionError(f"commit before {short[0]} is complete")
        with disk_errors(self.folder):
            for leftover in self.folder.rglob(f"*{_TEMPORARY}"):
                leftover.unlink()
            _replace(self.folder / NOTES, (json.dumps(notes, indent=1, sort_keys=True) + "\n").encode())
            _flush_folders(self.folder)
            _replace(self.folder / MANIFEST, write_manifest(self.manifest, self._objects).encode())
            _flush(self.folder)

    def close(self) -> None:
        """Stop the writing thread; whole chunks handed over before are still written. Never raises."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _lay_out(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._put_object("zarr.json", GROUP_METADATA.encode())
        for group in ("layers", "pooled"):
            self._put_object(f"{group}/zarr.json", GROUP_METADATA.encode())
        for path, layout in self._layouts.items():
            self._put_object(f"{path}/zarr.json", layout.metadata().encode())

    def _put_object(self, path: str, payload: bytes) -> None:
        target = self.folder / path
        if not target.is_file() or target.read_bytes() != payload:
            target.parent.mkdir(parents=True, exist_ok=True)
            _replace(target, payload)
        self._objects[path] = StoredObject(len(payload), checksum(payload))

    def _whole_chunks(self, path: str) -> set[int]:
        """Chunks on disk with the right length and checksum; anything else there is removed."""
        layout, found = self._layouts[path], set()
        for chunk in range(layout.chunks):
            key = f"{path}/{layout.chunk_key(chunk)}"
            target = self.folder / key
            if not target.exists():
                continue
            data = np.fromfile(target, dtype=np.uint8) if target.stat().st_size == layout.object_bytes else None
            if (
                data is not None
                and trailer(crc := checksum(data[:-CHECKSUM_BYTES])) == data[-CHECKSUM_BYTES:].tobytes()
            ):
                self._objects[key] = StoredObject(layout.object_bytes, crc)
                found.add(chunk)
            else:
                target.unlink()
        return found

    def _fill(self, path: str, chunk: int, offset: int, rows: NDArray[Any]) -> None:
        layout = self._layouts[path]
        if path not in self._buffers:
            self._buffers[path] = layout.empty_chunk()
        buffer = self._buffers[path]
        buffer[offset : offset + len(rows)] = rows
        end = min((chunk + 1) * layout.chunk_rows, layout.shape[0])
        if chunk * layout.chunk_rows + offset + len(rows) == end:
            del self._buffers[path]
            self._whole[path].add(chunk)
            self._hand_over(f"{path}/{layout.chunk_key(chunk)}", buffer)

    def _hand_over(self, key: str, buffer: NDArray[Any]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_chunks, name="sidebench-writer", daemon=True)
            self._thread.start()
        self._queue.put((key, buffer))
        if self._failure is not None:
            self._drain()

    def _drain(self) -> None:
        self.close()
        if self._failure is not None:
            with disk_errors(self.folder):
                raise self._failure

    def _write_chunks(self) -> None:
        from time import perf_counter

        while (item := self._queue.get()) is not None:
            if self._failure is not None:
                continue  # keep emptying the queue so that the other side never blocks
            key, buffer = item
            started = perf_counter()
            try:
                crc = checksum(buffer)
                target = self.folder / key
                target.parent.mkdir(parents=True, exist_ok=True)
                _replace(target, buffer.reshape(-1).view(np.uint8).data, trailer(crc))
                self._objects[key] = StoredObject(buffer.nbytes + CHECKSUM_BYTES, crc)
            except Exception as error:  # a dead thread would leave the other side waiting for ever
                self._failure = error
            self.write_seconds += perf_counter() - started


def _replace(target: Path, *parts: Any) -> None:
    """Write a file so that it is either absent or whole, also after a power cut."""
    temporary = target.with_name(target.name + _TEMPORARY)
    with open(temporary, "wb", buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[file.write(view) or 0 :]
        os.fsync(file.fileno())
    os.replace(temporary, target)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_folders(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            _flush(path)
    _flush(folder)
