"""A whole store as one HDF5 file: every array, its manifest and notes as attributes, written chunk by chunk."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from .catalog import read_notes
from .errors import SidebenchError
from .layout import CHECKSUM_BYTES, ArrayLayout, checksum, trailer
from .manifest import MANIFEST, Manifest, StoredObject, read_manifest
from .writer import flush

MANIFEST_ATTRIBUTE = "sidebench_manifest"
NOTES_ATTRIBUTE = "sidebench_notes"
DTYPE_ATTRIBUTE = "sidebench_dtype"  # HDF5 has no bfloat16 that h5py reads: its bits are stored as uint16
IDS_JSON = "ids_json"  # the store's own bytes; `ids` is for people, and HDF5 strings cannot hold every id
_SLACK_BYTES = 2**20

Progress = Callable[[int, int], None]


def export_store(folder: Path, to: Path, *, force: bool = False, progress: Progress = lambda done, total: None) -> int:
    """Write the store `folder` to the HDF5 file `to`; returns its size in bytes.

    Raises SidebenchError when the file is there already (unless `force`), the disk is too small, or the store is
    damaged. The file appears whole or not at all: a killed h5py write leaves one that nobody can read.
    """
    manifest, objects = read_manifest(folder)
    _check_target(to, force)
    text = (folder / MANIFEST).read_text("utf-8")
    ids = _checked(folder, "ids.json", objects["ids.json"])
    needed = manifest.stored_bytes + 2 * len(ids) + len(text) + _SLACK_BYTES
    if needed > (free := shutil.disk_usage(to.absolute().parent).free):
        raise SidebenchError(
            f"the export takes {needed:,} bytes and {to.absolute().parent} has {free:,} free; choose another disk."
        )
    temporary = to.with_name(to.name + ".partial")
    try:
        with h5py.File(temporary, "w") as file:
            _write(file, folder, manifest, objects, progress)
            _write_ids(file, ids)
            file.attrs[MANIFEST_ATTRIBUTE] = text
            file.attrs[NOTES_ATTRIBUTE] = json.dumps(read_notes(folder))
        flush(temporary)
        os.replace(temporary, to)
    except (OSError, RuntimeError) as error:
        raise SidebenchError(f"writing {to} failed: {error}. Nothing of it is left; choose another place.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return to.stat().st_size


def _check_target(to: Path, force: bool) -> None:
    if not to.absolute().parent.is_dir():
        raise SidebenchError(f"there is no folder {to.absolute().parent} for {to.name}; make it first.")
    if to.is_dir():
        raise SidebenchError(f"{to} is a folder; name a file, e.g. {to / 'features.h5'}.")
    if to.exists() and not force:
        raise SidebenchError(f"{to} is there already; --force replaces it.")


def _write(file: Any, folder: Path, manifest: Manifest, objects: dict[str, StoredObject], progress: Progress) -> None:
    total, done = manifest.stored_bytes, 0
    for path, layout in manifest.arrays().items():
        dataset = file.create_dataset(path, layout.shape, layout.numpy_dtype)
        dataset.attrs[DTYPE_ATTRIBUTE] = layout.dtype
        for start, rows in _chunks(folder, path, layout, objects):
            dataset[start : start + len(rows)] = rows
            done += layout.chunk_bytes
            progress(manifest.examples * done // total, manifest.examples)


def _chunks(
    folder: Path, path: str, layout: ArrayLayout, objects: dict[str, StoredObject]
) -> Iterator[tuple[int, NDArray[Any]]]:
    """The rows of an array chunk by chunk, each checked against the manifest."""
    for chunk in range(layout.chunks):
        key = f"{path}/{layout.chunk_key(chunk)}"
        payload = np.frombuffer(_checked(folder, key, objects[key]), dtype=np.uint8)
        start = chunk * layout.chunk_rows
        try:
            yield start, layout.decode(payload)[: layout.shape[0] - start]
        except ValueError as error:
            raise _damaged(folder, key, str(error)) from None


def _checked(folder: Path, key: str, stated: StoredObject) -> bytes:
    """The payload of one object of the store."""
    try:
        data = (folder / key).read_bytes()
    except OSError as error:
        raise _damaged(folder, key, error.strerror or "unreadable") from None
    payload = data[:-CHECKSUM_BYTES] if "/c/" in key else data
    if len(data) != stated.bytes or checksum(payload) != stated.crc32c:
        raise _damaged(folder, key, "its length or checksum differs from the manifest")
    if payload is not data and data[-CHECKSUM_BYTES:] != trailer(stated.crc32c):
        raise _damaged(folder, key, "its trailing checksum is wrong")
    return payload


def _damaged(folder: Path, key: str, reason: str) -> SidebenchError:
    return SidebenchError(
        f"the activation cache {folder} is damaged: {key}: {reason}; nothing was exported. See all of it with "
        f"`bench cache verify {folder}`."
    )


def _write_ids(file: Any, ids: bytes) -> None:
    file.create_dataset(IDS_JSON, data=np.frombuffer(ids, dtype=np.uint8))
    # HDF5 strings hold neither a NUL nor half a surrogate pair: here they are spelled out.
    names = [str(n).replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode() for n in json.loads(ids)]
    file.create_dataset("ids", data=names, dtype=h5py.string_dtype())
