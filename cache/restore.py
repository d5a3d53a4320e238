"""Back from an exported HDF5 file to the very store it was made from: same facts, same digest, same chunk objects."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from .bring_in import Altered, bring_in
from .build import BuildResult
from .errors import SidebenchError
from .export import DTYPE_ATTRIBUTE, IDS_JSON, MANIFEST_ATTRIBUTE, NOTES_ATTRIBUTE, Progress
from .hdf5 import check_plain, datasets, reading
from .layout import ArrayLayout, checksum
from .manifest import Manifest, StoredObject, parse_manifest
from .writer import StoreWriter


def is_export(file: Any, path: Path) -> bool:
    """Whether an open file was written by `bench cache export`."""
    with reading(path):
        return MANIFEST_ATTRIBUTE in file.attrs


def exported_manifest(file: Any, path: Path) -> tuple[Manifest, dict[str, StoredObject]]:
    """The manifest in an exported file: untrusted, as any manifest is."""
    with reading(path):
        text = file.attrs[MANIFEST_ATTRIBUTE]
    return parse_manifest(f"the manifest in {path}", lambda: str(text))


def restore(file: Any, path: Path, cache_dir: Path, *, progress: Progress = lambda done, total: None) -> BuildResult:
    """Write the store that an exported file holds.

    Every chunk is compared with the manifest before it is stored, so a file that was altered or damaged since is
    refused, naming the array. Raises SidebenchError for it, and when the disk is too small.
    """
    begun = time.perf_counter()
    manifest, objects = exported_manifest(file, path)
    found = datasets(file, path)
    arrays = manifest.arrays()
    for name, layout in arrays.items():
        _check_array(found, name, layout, path)
    ids = _ids(found, manifest, objects, path)

    def copy(writer: StoreWriter) -> None:
        done = 0
        for name, layout in arrays.items():
            _copy(found[name], name, layout, objects, writer, path)
            done += layout.stored_bytes
            progress(manifest.examples * done // manifest.stored_bytes, manifest.examples)

    notes = {**_notes(file), "imported_from": path.name}
    return bring_in(manifest, cache_dir, copy, notes=notes, ids=ids, begun=begun)


def _check_array(found: dict[str, Any], name: str, layout: ArrayLayout, path: Path) -> None:
    if name not in found:
        raise SidebenchError(f"{path}: its manifest names {name}, which is not in the file; export it again.")
    dataset = found[name]
    check_plain(dataset, name, path)
    with reading(path):
        held = (tuple(dataset.shape), dataset.dtype, dataset.attrs.get(DTYPE_ATTRIBUTE))
    if held != (layout.shape, layout.numpy_dtype, layout.dtype):
        raise SidebenchError(
            f"{path}: {name} is {held[0]} of {held[1]} ({str(held[2])[:40]}), its manifest implies {layout.shape} of "
            f"{layout.numpy_dtype} ({layout.dtype}); export it again."
        )


def _copy(
    dataset: Any, name: str, layout: ArrayLayout, objects: dict[str, StoredObject], writer: StoreWriter, path: Path
) -> None:
    for chunk in range(layout.chunks):
        start = chunk * layout.chunk_rows
        stop = min(start + layout.chunk_rows, layout.shape[0])
        whole = layout.empty_chunk()
        with reading(path):
            whole[: stop - start] = dataset[start:stop]
        if checksum(layout.encode(whole)) != objects[f"{name}/{layout.chunk_key(chunk)}"].crc32c:
            raise Altered(
                f"{path}: {name}, rows {start} to {stop}, are not what was exported; copy the file again, or export "
                "it again."
            )
        writer.append(name, whole[: stop - start])


def _ids(found: dict[str, Any], manifest: Manifest, objects: dict[str, StoredObject], path: Path) -> tuple[str, ...]:
    stated = objects["ids.json"]
    dataset = found.get(IDS_JSON)
    if dataset is not None:
        check_plain(dataset, IDS_JSON, path)
    if dataset is None or dataset.shape != (stated.bytes,) or dataset.dtype != np.uint8:
        raise SidebenchError(f"{path}: {IDS_JSON} is missing or not as its manifest says; export it again.")
    with reading(path):
        payload = dataset[:].tobytes()
        ids = json.loads(payload) if checksum(payload) == stated.crc32c else None
    if not isinstance(ids, list) or len(ids) != manifest.examples or not all(isinstance(n, str) for n in ids):
        raise SidebenchError(f"{path}: its ids are not what was exported; copy the file again, or export it again.")
    return tuple(ids)


def _notes(file: Any) -> dict[str, Any]:
    """Decoration only, so damage is no error."""
    try:
        notes = json.loads(str(file.attrs.get(NOTES_ATTRIBUTE, "{}")))
    except (OSError, RuntimeError, ValueError, RecursionError):
        return {}
    return notes if isinstance(notes, dict) else {}
