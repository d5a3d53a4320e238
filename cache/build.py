"""Run the frozen backbone once over every example and keep what its layers yield."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .catalog import bytes_below, find_store
from .errors import SidebenchError, disk_errors
from .fidelity import examine, stated
from .fill import Channels, Progress, fill, stored_channels
from .lock import builder_lock
from .manifest import Manifest, read_manifest
from .planning import CaptureOptions, Plan, plan
from .shares import Chunks, batch_size, batches_for, share_out
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

    @property
    def bytes(self) -> int:
        """Bytes of all chunk objects as they lie on disk."""
        if self.manifest.form.compression is None:
            return self.manifest.stored_bytes
        return sum(o.bytes for path, o in read_manifest(self.folder)[1].items() if "/c/" in path)


class Workers(Protocol):
    """Other processes that write shares of a store's chunks."""

    @property
    def count(self) -> int:
        """How many may run at once."""
        ...

    def run(self, shares: Sequence[Chunks], lock: int, computed: Callable[[int], None]) -> tuple[float, float]:
        """Have each share written by one worker; returns the seconds of forwards and of writing, summed over them.

        `computed` is told how many examples are through. Every worker inherits the handle `lock`, so that nobody else
        builds while one is alive. Raises SidebenchError with a worker's sentence; none is alive after that.
        """
        ...


def build(
    planned: Plan,
    cache_dir: Path,
    *,
    notes: dict[str, Any],
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda _: None,
    workers: Workers | None = None,
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
    with builder_lock(folder) as lock:
        if (found := find_store(cache_dir, manifest)) is not None:  # finished by somebody else a moment ago
            return BuildResult("exists", found.folder, found.manifest)
        begun = time.perf_counter()
        _announce(planned, folder, say)
        writer = StoreWriter(folder, manifest)
        try:
            forward_seconds = 0.0
            channels, errors = _examined(planned, writer, say)
            if workers is not None and workers.count > 1:
                forward_seconds = _spread(planned, writer, workers, lock, progress)
            forward_seconds += fill(planned, writer, channels, progress)
            elapsed = time.perf_counter() - begun
            # What earlier, interrupted sessions took is not known; the last one's time would understate the cost.
            whole = None if writer.resumed_chunks else elapsed
            measured = {"forward_seconds": forward_seconds, "build_seconds": whole, "relative_errors": errors}
            writer.commit({**notes, **measured, "created": _now()}, planned.examples.ids)
        finally:
            writer.close()
    status = "resumed" if writer.resumed_chunks else "built"
    elapsed = time.perf_counter() - begun
    return BuildResult(status, folder, manifest, forward_seconds, writer.write_seconds, elapsed, writer.resumed_chunks)


def _examined(planned: Plan, writer: StoreWriter, say: Callable[[str], None]) -> tuple[Channels, dict[str, float]]:
    """The channels, on disk before any row is stored, and what the form loses, said aloud."""
    if not planned.manifest.form.lossy:
        return {}, {}
    found = examine(planned)
    say(stated(found.relative_errors))
    for layer, channels in found.channels.items():
        writer.append(f"channels/{layer}", channels.numpy())
    if found.channels:
        writer.finish()  # workers, a resume and a repair read them from there
    return stored_channels(planned.manifest, writer), dict(found.relative_errors)


def _spread(planned: Plan, writer: StoreWriter, workers: Workers, lock: int, progress: Progress) -> float:
    """Have the missing chunks of the layers written by workers; returns the seconds of their forwards.

    Pooled rows are left to `fill`: their chunks hold thousands of examples, so they would have too many owners.
    """
    missing = writer.missing("layers", "scales")
    shares = share_out(planned.manifest, missing, planned.offsets, workers.count)
    if len(shares) < 2:
        return 0.0  # one chunk per layer has one owner anyway: this process
    total, size = planned.manifest.items, batch_size(planned.manifest)
    batches = batches_for(planned.manifest, missing, planned.offsets)
    present = total - sum(min(start + size, total) - start for start in batches)
    progress(present, total)
    # A batch at the border of two shares is computed twice, so the sum may pass the total.
    forward_seconds, write_seconds = workers.run(
        shares, lock, lambda computed: progress(min(present + computed, total), total)
    )
    writer.write_seconds += write_seconds
    writer.look_again()
    return forward_seconds


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
        f"cache: {_counted(planned.manifest)} x {len(planned.manifest.layers)} layers, {needed / 2**20:,.0f} MiB"
        f"{' before compression' if planned.manifest.form.compression else ''} "
        f"({free / 2**30:,.0f} GiB free in {folder.parent}), about {seconds:,.0f} s"
    )


def _counted(manifest: Manifest) -> str:
    views = manifest.form.views
    return f"{manifest.examples:,} examples" + (f", each plain and in {views} views," if views else "")


def _estimate_seconds(planned: Plan) -> float:
    """Time the forward of a few examples spread over the task and scale; the second time, when all is warm."""
    spread = np.linspace(0, len(planned.examples) - 1, _TRIAL_EXAMPLES).astype(int).tolist()
    prepare = planned.backbone.preprocess.prepare
    ids, elapsed = planned.prepared, 0.0
    for _ in range(2):
        begun = time.perf_counter()
        batch = [ids[i] for i in spread] if ids else prepare([planned.examples.load(i) for i in spread])
        inputs, _mask = planned.backbone.preprocess.collate(batch)
        inputs = {name: value.to(planned.backbone.device) for name, value in inputs.items()}
        planned.backbone.capture(inputs, planned.manifest.layers)
        elapsed = time.perf_counter() - begun
    return elapsed * planned.manifest.items / len(spread)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
