"""Mend a committed store: recompute what is damaged, write it only where it is what the manifest states."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .errors import SidebenchError, disk_errors
from .fidelity import examine
from .fill import Channels, Progress, fill, pool_missing, stored_channels
from .layout import GROUP_METADATA, checksum
from .lock import builder_lock
from .manifest import MANIFEST, Manifest, StoredObject, differences, read_manifest
from .planning import Plan
from .shares import Chunks
from .writer import NOTES, StoreWriter, flush_folders, ids_json, replace_file
from .zarr_store import BadChunk, ZarrStore, verify

_REFUSED = (
    "recomputed here it is other bytes than the manifest states (another machine, device or library version rounds "
    "differently), so nothing was written; remove the cache and build it again"
)


@dataclass(frozen=True)
class Repair:
    """What is still bad, and how many objects were mended or removed."""

    bad: list[BadChunk]
    repaired: int


def repair(
    folder: Path, replan: Callable[[Manifest], Plan], *, progress: Progress = lambda done, total: None
) -> Repair:
    """Mend every bad object of a committed store; what is mended is byte-identical to what was built.

    `replan` is called when the backbone or the data are needed. Raises SidebenchError when its plan differs from the
    store, naming the facts. A chunk that comes out otherwise than the manifest states is not written and stays bad.
    """
    manifest, objects = read_manifest(folder)
    with builder_lock(folder), disk_errors(folder):
        removed = _remove_extra(folder, objects)
        bad = _bad_objects(objects, verify(folder))
        for key in bad:
            _clear(folder / key)
        refused = _write_metadata(folder, manifest, objects, bad)
        chunks = _by_array(manifest, bad)
        if "ids.json" in bad or any(not path.startswith("pooled/") for path in chunks):
            planned = replan(manifest)
            _require_equal(manifest, planned.manifest, folder)
            if "ids.json" in bad:
                refused += _put(folder, "ids.json", ids_json(planned.examples.ids), objects)
            refused += _recompute(folder, planned, objects, chunks, progress)
        elif chunks:
            refused += _pool_again(folder, manifest, objects, chunks)
        flush_folders(folder)
        left = verify(folder)
    repaired = removed + len(bad) - len(_bad_objects(objects, left))
    differing = {_id_of(key) for key in refused}
    return Repair([replace(b, reason=_REFUSED) if (b.layer, b.chunk) in differing else b for b in left], repaired)


def _recompute(
    folder: Path, planned: Plan, objects: Mapping[str, StoredObject], chunks: Chunks, progress: Progress
) -> list[str]:
    """Write bad chunks from the backbone and the data; returns those that came out differently."""
    writer = StoreWriter(folder, planned.manifest, only=chunks, wanted=objects)
    try:
        fill(planned, writer, _channels(planned, writer), progress)
        writer.finish()
    finally:
        writer.close()
    return writer.refused


def _channels(planned: Plan, writer: StoreWriter) -> Channels:
    """The channels that the store was built with, computed again where they are damaged."""
    if missing := writer.missing("channels"):
        found = examine(planned).channels
        for path in missing:
            writer.append(path, found[path.removeprefix("channels/")].numpy())
        writer.finish()
        if writer.refused:
            raise SidebenchError(
                f"the channels of {planned.manifest.folder_name} are damaged and come out otherwise here; remove "
                "the cache and build it again."
            )
    return stored_channels(planned.manifest, writer)


def _pool_again(folder: Path, manifest: Manifest, objects: Mapping[str, StoredObject], chunks: Chunks) -> list[str]:
    """Write bad pooled chunks from the layers on disk; returns those that came out differently."""
    offsets = np.concatenate([[0], np.cumsum(ZarrStore(folder).lengths())]) if manifest.ragged else None
    writer = StoreWriter(folder, manifest, only=chunks, wanted=objects)
    try:
        pool_missing(manifest, offsets, writer)
        writer.finish()
    finally:
        writer.close()
    return writer.refused


def _remove_extra(folder: Path, objects: Mapping[str, StoredObject]) -> int:
    """Remove every file and link that is no part of the store; returns how many."""
    known = {*objects, MANIFEST, NOTES}
    extra = [p for p in folder.rglob("*") if p.is_file() or p.is_symlink()]
    extra = [p for p in extra if p.relative_to(folder).as_posix() not in known]
    for path in extra:
        path.unlink()
        with suppress(OSError):  # a folder that is not empty
            for parent in path.relative_to(folder).parents[:-1]:
                (folder / parent).rmdir()
    return len(extra)


def _bad_objects(objects: Mapping[str, StoredObject], found: Sequence[BadChunk]) -> list[str]:
    """The keys of the store's own objects among what `verify` found."""
    bad = {(b.layer, b.chunk) for b in found}
    return [key for key in sorted(objects) if _id_of(key) in bad]


def _id_of(key: str) -> tuple[str, str]:
    """How a BadChunk names this object."""
    path, _, chunk = key.partition("/c/")
    return path.removeprefix("layers/"), chunk or key


def _clear(target: Path) -> None:
    """Make way where a folder lies in a file's place."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)


def _by_array(manifest: Manifest, keys: Sequence[str]) -> Chunks:
    """The chunks among `keys`."""
    wanted = set(keys)
    found = {
        path: [chunk for chunk in range(layout.chunks) if f"{path}/{layout.chunk_key(chunk)}" in wanted]
        for path, layout in manifest.arrays().items()
    }
    return {path: chunks for path, chunks in found.items() if chunks}


def _write_metadata(
    folder: Path, manifest: Manifest, objects: Mapping[str, StoredObject], bad: Sequence[str]
) -> list[str]:
    """Write every bad zarr.json; returns those that this version spells differently."""
    arrays = manifest.arrays()
    refused: list[str] = []
    for key in bad:
        if key.endswith("zarr.json"):
            layout = arrays.get(key.removesuffix("/zarr.json"))
            refused += _put(folder, key, (GROUP_METADATA if layout is None else layout.metadata()).encode(), objects)
    return refused


def _put(folder: Path, key: str, payload: bytes, objects: Mapping[str, StoredObject]) -> list[str]:
    """Write a small object where it is what the manifest states; returns its key otherwise."""
    if objects[key] != StoredObject(len(payload), checksum(payload)):
        return [key]
    (folder / key).parent.mkdir(parents=True, exist_ok=True)
    replace_file(folder / key, payload)
    return []


def _require_equal(stored: Manifest, now: Manifest, folder: Path) -> None:
    """Raise SidebenchError naming the facts in which what is at hand differs from what the store was built from."""
    lines = differences(stored, now)
    if stored.digest != now.digest:
        said = "; ".join(lines) or "layers: their shapes differ"
        raise SidebenchError(
            f"{folder.name} cannot be repaired from the backbone and the task its {NOTES} names: they are not what it "
            f"was built from: {said}. Put these back, or remove the cache and build it again."
        )
