"""Run the frozen backbone once over every example and keep what its layers yield."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .catalog import bytes_below, find_store
from .errors import SidebenchError, disk_errors
from .fill import Progress, fill
from .lock import builder_lock
from .manifest import Manifest
from .planning import CaptureOptions, Plan, plan
from .writer import StoreWriter

__all__ = ["BuildResult", "CaptureOptions", "Plan", "Progress", "build", "plan"]

_TRIAL_EXAMPLES = 4


@dataclass(frozen=True)
class BuildResult:
    """Where the store is and what making it cost; seconds are None when it was there already."""

    status: str  # "built" | "resumed" | "exists"
    folder: Path
    manifest: Manifest
    forward_seconds: float | None = None
    write_seconds: float | None = None
    build_seconds: float | None = None
    resumed_chunks: int = 0


def build(
    planned: Plan,
    cache_dir: Path,
    *,
    notes: dict[str, Any],
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda _: None,
) -> BuildResult:
    """Build, resume or find the store of a plan.

    Raises SidebenchError when the disk is too small, somebody else builds it, or an activation cannot be stored.
    KeyboardInterrupt leaves every whole chunk on disk.
    """
    manifest = planned.manifest
    folder = cache_dir / manifest.folder_name
    with disk_errors(folder):
        found = find_store(cache_dir, manifest)
    if found is not None:
        return BuildResult("exists", found.folder, found.manifest)
    with builder_lock(folder):
        if (found := find_store(cache_dir, manifest)) is not None:  # finished by somebody else a moment ago
            return BuildResult("exists", found.folder, found.manifest)
        begun = time.perf_counter()
        _announce(planned, folder, say)
        writer = StoreWriter(folder, manifest)
        try:
            forward_seconds = fill(planned, writer, progress)
            elapsed = time.perf_counter() - begun
            # What earlier, interrupted sessions took is not known; the last one's time would understate the cost.
            whole = None if writer.resumed_chunks else elapsed
            seconds = {"forward_seconds": forward_seconds, "build_seconds": whole}
            writer.commit({**notes, **seconds, "created": _now()}, planned.examples.ids)
        finally:
            writer.close()
    status = "resumed" if writer.resumed_chunks else "built"
    elapsed = time.perf_counter() - begun
    return BuildResult(status, folder, manifest, forward_seconds, writer.write_seconds, elapsed, writer.resumed_chunks)


def _announce(planned: Plan, folder: Path, say: Callable[[str], None]) -> None:
    """Say size, space and time before anything is written, and refuse what cannot fit."""
    needed = planned.manifest.stored_bytes
    folder.parent.mkdir(parents=True, exist_ok=True)
    present = bytes_below(folder)
    free = shutil.disk_usage(folder.parent).free
    if needed - present > free:
        raise SidebenchError(
            f"this cache takes {needed:,} bytes and {folder.parent} has {free:,} free. Keep fewer layers (--layers), "
            "fewer examples (--limit), or choose another disk (--cache-dir)."
        )
    seconds = _estimate_seconds(planned)
    say(
        f"cache: {len(planned.examples):,} examples x {len(planned.manifest.layers)} layers, {needed / 2**20:,.0f} MiB "
        f"({free / 2**30:,.0f} GiB free in {folder.parent}), about {seconds:,.0f} s"
    )


def _estimate_seconds(planned: Plan) -> float:
    """Time the forward of a few examples spread over the task and scale; planning has warmed the backbone up."""
    spread = np.linspace(0, len(planned.examples) - 1, _TRIAL_EXAMPLES).astype(int).tolist()
    prepare = planned.backbone.preprocess.prepare
    begun = time.perf_counter()
    ids = planned.prepared
    batch = [ids[i] for i in spread] if ids else prepare([planned.examples.load(i) for i in spread])
    inputs, _ = planned.backbone.preprocess.collate(batch)
    inputs = {name: value.to(planned.backbone.device) for name, value in inputs.items()}
    planned.backbone.capture(inputs, planned.manifest.layers)
    return (time.perf_counter() - begun) * len(planned.examples) / len(spread)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
