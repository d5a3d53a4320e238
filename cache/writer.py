"""Writes a store chunk by chunk from a background thread; what is whole on disk survives any death of the process."""

import json
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import disk_errors
from .layout import CHECKSUM_BYTES, GROUP_METADATA, checksum, trailer
from .manifest import MANIFEST, Manifest, StoredObject, write_manifest
from .shares import Chunks

NOTES = "notes.json"
_TEMPORARY = ".partial"


class StoreWriter:
    """Appends rows to arrays of a store, then commits. Use under `builder_lock`; call `close` in any case.

    A chunk is encoded once, written under a temporary name, flushed to disk and renamed; the manifest comes last. Rows
    that fall into chunks already whole on disk are dropped, which is all that resuming is.

    With `only` it writes exactly those chunks into a store that somebody else has laid out and commits: a worker its
    share, a repair the bad ones. With `wanted` a chunk whose bytes are not the stated ones is `refused`, not written.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        only: Chunks | None = None,
        wanted: Mapping[str, StoredObject] | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.write_seconds = 0.0
        self.refused: list[str] = []
        self._wanted = wanted
        self._layouts = manifest.arrays()
        self._objects: dict[str, StoredObject] = {}
        self._position = dict.fromkeys(self._layouts, 0)
        self._buffers: dict[str, NDArray[Any]] = {}
        self._queue: queue.Queue[tuple[str, int, NDArray[Any]] | None] = queue.Queue(maxsize=2 * len(manifest.specs))
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        if only is None:
            with disk_errors(folder):
                self._lay_out()
            self._missing = {path: set(range(layout.chunks)) for path, layout in self._layouts.items()}
            self.resumed_chunks = self.look_again()
        else:
            self._missing = {path: set(only.get(path, ())) for path in self._layouts}
            self.resumed_chunks = 0

    def missing(self, *groups: str) -> Chunks:
        """Chunks still to be written of the arrays in these groups ("layers", "pooled", …)."""
        return {p: sorted(chunks) for p, chunks in self._missing.items() if chunks and p.partition("/")[0] in groups}

    def look_again(self) -> int:
        """Take what somebody else has made whole on disk off the missing chunks; returns how many that were."""
        found = 0
        for path, missing in self._missing.items():
            whole = {chunk for chunk in sorted(missing) if self._is_whole(path, chunk)}
            missing -= whole
            found += len(whole)
        return found

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
            if chunk in self._missing[path]:
                self._fill(path, chunk, offset, rows[:taken])
            self._position[path] = position + taken
            rows = rows[taken:]

    def stored_rows(self, path: str, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of array `path`; they must lie in whole chunks on disk."""
        layout = self._layouts[path]
        rows = np.empty((stop - start, *layout.shape[1:]), dtype=layout.numpy_dtype)
        for begin in range(start // layout.chunk_rows * layout.chunk_rows, stop, layout.chunk_rows):
            file = self.folder / path / layout.chunk_key(begin // layout.chunk_rows)
            chunk = layout.decode(np.memmap(file, dtype=np.uint8, mode="r")[:-CHECKSUM_BYTES])
            low, high = max(start, begin), min(stop, begin + layout.chunk_rows)
            rows[low - start : high - start] = chunk[low - begin : high - begin]
        return rows

    def commit(self, notes: dict[str, Any], ids: tuple[str, ...]) -> None:
        """Flush everything, then write the manifest: from here on the store can be opened."""
        with disk_errors(self.folder):
            self._put_object("ids.json", ids_json(ids))
        self.finish()
        if short := [path for path, missing in self._missing.items() if missing]:
            raise AssertionError(f"commit before {short[0]} is complete")
        with disk_errors(self.folder):
            for leftover in self.folder.rglob(f"*{_TEMPORARY}"):
                leftover.unlink()
            replace_file(self.folder / NOTES, (json.dumps(notes, indent=1) + "\n").encode())
            flush_folders(self.folder)
            replace_file(self.folder / MANIFEST, write_manifest(self.manifest, self._objects).encode())
            flush(self.folder)

    def close(self) -> None:
        """Stop the writing thread; whole chunks handed over before are still written. Never raises."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _lay_out(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for group in self.manifest.groups():
            self._put_object(f"{group}/zarr.json".lstrip("/"), GROUP_METADATA.encode())
        for path, layout in self._layouts.items():
            self._put_object(f"{path}/zarr.json", layout.metadata().encode())

    def _put_object(self, path: str, payload: bytes) -> None:
        target = self.folder / path
        if not target.is_file() or target.read_bytes() != payload:
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, payload)
        self._objects[path] = StoredObject(len(payload), checksum(payload))

    def _is_whole(self, path: str, chunk: int) -> bool:
        """Whether a chunk on disk has the right length and checksum; anything else there is removed."""
        layout = self._layouts[path]
        key = f"{path}/{layout.chunk_key(chunk)}"
        target = self.folder / key
        if not target.exists():
            return False
        size = target.stat().st_size
        plausible = size == layout.object_bytes if layout.object_bytes else size > CHECKSUM_BYTES
        data = np.fromfile(target, dtype=np.uint8) if plausible else None
        if data is not None and trailer(crc := checksum(data[:-CHECKSUM_BYTES])) == data[-CHECKSUM_BYTES:].tobytes():
            self._objects[key] = StoredObject(size, crc)
            return True
        target.unlink()
        return False

    def _fill(self, path: str, chunk: int, offset: int, rows: NDArray[Any]) -> None:
        layout = self._layouts[path]
        if path not in self._buffers:
            self._buffers[path] = layout.empty_chunk()
        buffer = self._buffers[path]
        buffer[offset : offset + len(rows)] = rows
        end = min((chunk + 1) * layout.chunk_rows, layout.shape[0])
        if chunk * layout.chunk_rows + offset + len(rows) == end:
            del self._buffers[path]
            self._missing[path].discard(chunk)
            self._hand_over(path, chunk, buffer)

    def _hand_over(self, path: str, chunk: int, buffer: NDArray[Any]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_chunks, name="sidebench-writer", daemon=True)
            self._thread.start()
        self._queue.put((path, chunk, buffer))
        if self._failure is not None:
            self.finish()

    def finish(self) -> None:
        """Wait until all chunks handed over are on disk. Raises what the writing thread met."""
        self.close()
        if self._failure is not None:
            with disk_errors(self.folder):
                raise self._failure

    def _write_chunks(self) -> None:
        from time import perf_counter

        while (item := self._queue.get()) is not None:
            if self._failure is not None:
                continue  # keep emptying the queue so that the other side never blocks
            started = perf_counter()
            try:
                self._write_chunk(*item)
            except Exception as error:  # a dead thread would leave the other side waiting for ever
                self._failure = error
            self.write_seconds += perf_counter() - started

    def _write_chunk(self, path: str, chunk: int, buffer: NDArray[Any]) -> None:
        layout = self._layouts[path]
        key, payload = f"{path}/{layout.chunk_key(chunk)}", layout.encode(buffer)
        made = StoredObject(len(payload) + CHECKSUM_BYTES, checksum(payload))
        if self._wanted is not None and self._wanted[key] != made:
            self.refused.append(key)
            return
        target = self.folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, payload, trailer(made.crc32c))
        self._objects[key] = made


def ids_json(ids: Sequence[str]) -> bytes:
    """The bytes of ids.json."""
    return json.dumps(list(ids), ensure_ascii=True, indent=0).encode()


def replace_file(target: Path, *parts: Any) -> None:
    """Write a file so that it is either absent or whole, also after a power cut."""
    temporary = target.with_name(target.name + _TEMPORARY)
    with open(temporary, "wb", buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[file.write(view) or 0 :]
        os.fsync(file.fileno())
    os.replace(temporary, target)


def flush(folder: Path) -> None:
    """Make the names in a folder (or the bytes of a file) survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_folders(folder: Path) -> None:
    """Make the names of a store's files survive a power cut."""
    for path in folder.rglob("*"):
        if path.is_dir():
            flush(path)
    flush(folder)
