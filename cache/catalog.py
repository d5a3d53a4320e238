"""The stores of a cache folder: find one by its facts or digest, list them, remove one."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SidebenchError, disk_errors, unknown
from .lock import builder_lock
from .manifest import MANIFEST, Manifest, differences, missing_layers, read_manifest
from .zarr_store import ZarrStore

_NOTES_KEYS = ("backbone", "task", "created")


@dataclass(frozen=True)
class Entry:
    """One folder of the catalog; `manifest` is None when it is not complete (or not readable: `problem`)."""

    folder: Path
    manifest: Manifest | None
    notes: dict[str, Any]
    bytes: int
    problem: str | None = None


def entries(cache_dir: Path) -> list[Entry]:
    """Every store below `cache_dir`, complete or not, by name."""
    folders = sorted(p for p in cache_dir.glob("*.zarr") if p.is_dir()) if cache_dir.is_dir() else []
    return [entry(folder) for folder in folders]


def entry(folder: Path) -> Entry:
    """Describe one store without opening its arrays."""
    size = bytes_below(folder)
    notes = read_notes(folder)
    try:
        manifest, _ = read_manifest(folder)
    except SidebenchError as error:
        return Entry(folder, None, notes, size, None if not (folder / MANIFEST).exists() else str(error))
    return Entry(folder, manifest, notes, size)


def bytes_below(folder: Path) -> int:
    """Bytes of all files of a store, also while somebody is writing or removing it."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # a temporary file that was renamed since it was listed
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def read_notes(folder: Path) -> dict[str, Any]:
    """What is known of a build beside its facts: URIs, dates, durations. Decoration only, so damage is no error."""
    try:
        notes = json.loads((folder / "notes.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def find_store(cache_dir: Path, wanted: Manifest) -> ZarrStore | None:
    """A complete store with equal facts that covers the wanted layers: the exact one first."""
    candidates = [cache_dir / wanted.folder_name, *(e.folder for e in entries(cache_dir) if e.manifest)]
    for folder in candidates:
        if not (folder / MANIFEST).exists():
            continue
        manifest, _ = read_manifest(folder)
        if not differences(wanted, manifest) and not missing_layers(wanted.layers, manifest):
            return ZarrStore(folder)
    return None


def nearest_mismatch(cache_dir: Path, wanted: Manifest) -> str:
    """Why no store serves: the closest one and the facts in which it differs, for the error message."""
    best: tuple[int, str] | None = None
    for found in entries(cache_dir):
        if found.manifest is None:
            continue
        lines = differences(wanted, found.manifest)
        lacking = missing_layers(wanted.layers, found.manifest)
        if lacking:
            lines.append(f"layers: wanted {', '.join(lacking)} as well, found {', '.join(found.manifest.layers)}")
        if best is None or len(lines) < best[0]:
            best = (len(lines), f"the nearest is {found.folder.name}, which differs in {'; '.join(lines)}")
    return best[1] if best else f"{cache_dir} holds no complete cache"


def imported_store(cache_dir: Path, name: str, dataset_sha256: str, task: str) -> tuple[Path, Manifest]:
    """The store of the imported features `name` on the data of a task.

    Raises SidebenchError when there is none, naming what was imported, or when there are several.
    """
    named = [(e.folder, e.manifest, e.notes) for e in entries(cache_dir) if e.manifest and _imported(e.manifest)]
    ours = [(folder, manifest, notes) for folder, manifest, notes in named if _imported(manifest) == name]
    if not ours:
        raise unknown(f"imported features in {cache_dir}", name, {str(_imported(m)) for _, m, _ in named})
    found = [(folder, manifest) for folder, manifest, _ in ours if manifest.dataset["sha256"] == dataset_sha256]
    if len(found) > 1:
        raise SidebenchError(
            f"{len(found)} caches hold features called {name!r} of {task}: "
            f"{', '.join(folder.name for folder, _ in found)}; remove all but one with `bench cache rm`."
        )
    if not found:
        tasks = ", ".join(f"{n.get('task')} ({m.examples} examples)" for _, m, n in ours)
        raise SidebenchError(
            f"the features {name!r} were imported for {tasks}, not for the data that {task} holds now; import them "
            f"with --task {task}, and the same --limit."
        )
    return found[0]


def _imported(manifest: Manifest) -> str | None:
    name = manifest.backbone.get("imported")
    return name if isinstance(name, str) else None


def locate(name: str, cache_dir: Path) -> Path:
    """The folder of a store given by path, or by any prefix of its digest that names one store only.

    Raises SidebenchError when none or several match.
    """
    if ("/" in name or name.endswith(".zarr")) and Path(name).is_dir():
        return Path(name)
    known = {e.folder.name.removesuffix(".zarr"): e.folder for e in entries(cache_dir)}
    matches = [known[short] for short in known if name and (short.startswith(name) or name.startswith(short))]
    if len(matches) > 1:
        raise SidebenchError(f"{name!r} matches {len(matches)} caches: {', '.join(p.name for p in matches)}.")
    if not matches:
        raise unknown(f"cache in {cache_dir}", name, known)
    return matches[0]


def remove(folder: Path) -> None:
    """Delete a store. Refuses a folder that does not look like one of ours, or that is being built.

    The manifest goes first, so a removal that is cut short leaves an incomplete store, never a damaged one.
    """
    ours = folder.suffix == ".zarr" and (folder / "zarr.json").is_file() and (folder / "layers").is_dir()
    if not ours or folder.is_symlink():
        raise SidebenchError(f"{folder} does not look like an activation cache; nothing was removed.")
    with builder_lock(folder), disk_errors(folder):
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
