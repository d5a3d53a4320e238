"""Write a store whose activations come from a file and not from a forward: either all of it, or nothing stays."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .build import BuildResult
from .errors import SidebenchError
from .lock import builder_lock
from .manifest import MANIFEST, Manifest
from .writer import StoreWriter


class Altered(SidebenchError):
    """The file holds something else than it should."""


def bring_in(
    manifest: Manifest,
    cache_dir: Path,
    copy: Callable[[StoreWriter], None],
    *,
    notes: dict[str, Any],
    ids: Sequence[str],
    begun: float,
) -> BuildResult:
    """Have `copy` append every array of the store of these facts and commit it; `begun` is when the import started.

    When `copy` raises Altered the unfinished store is removed: no other file will go on from there. Raises
    SidebenchError when the disk is too small or somebody else writes this store.
    """
    folder = cache_dir / manifest.folder_name
    with builder_lock(folder):
        if (folder / MANIFEST).exists():
            return BuildResult("exists", folder, manifest)
        _require_space(manifest, folder)
        writer = StoreWriter(folder, manifest)
        try:
            copy(writer)
            writer.commit(notes, tuple(ids))
        except Altered:
            writer.close()
            shutil.rmtree(folder)
            raise
        finally:
            writer.close()
    return BuildResult("imported", folder, manifest, None, writer.write_seconds, time.perf_counter() - begun)


def _require_space(manifest: Manifest, folder: Path) -> None:
    free = shutil.disk_usage(folder.parent).free
    if manifest.stored_bytes > free:
        raise SidebenchError(
            f"this cache takes {manifest.stored_bytes:,} bytes and {folder.parent} has {free:,} free; "
            "choose another disk with --cache-dir."
        )
