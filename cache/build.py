"""Run the frozen backbone once over every example and keep what its layers yield."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .backbone import Backbone
from .catalog import find_store
from .errors import SidebenchError
from .examples import Examples
from .load import weights_sha256
from .lock import builder_lock
from .manifest import ActivationSpec, Manifest
from .pooling import masked_mean, pooling_mask
from .writer import StoreWriter

Progress = Callable[[int, int], None]
_TORCH_DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}
_TRIAL_EXAMPLES = 8


@dataclass(frozen=True)
class CaptureOptions:
    """What is kept. `layers` are globs; None keeps `embeddings`, every block and `norm`."""

    layers: tuple[str, ...] | None = None
    dtype: str = "float16"
    batch_size: int = 64


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


@dataclass(frozen=True)
class Plan:
    """A build that is fully determined but not begun."""

    backbone: Backbone
    examples: Examples
    manifest: Manifest
    lengths: NDArray[np.int64] | None  # tokens per text
    prepared: list[Tensor] | None  # token ids of every text; images are prepared batch by batch


def plan(backbone: Backbone, examples: Examples, options: CaptureOptions, *, limit: int | None = None) -> Plan:
    """Determine every fact of the store, the digest included.

    Raises SidebenchError when modalities differ, a layer pattern matches nothing or the dtype is unknown.
    """
    if examples.modality != backbone.arch.modality:
        raise SidebenchError(
            f"{backbone.arch.name} reads {backbone.arch.modality}, the task holds {examples.modality}; "
            "choose a backbone and a task of one kind (bench backbones, bench tasks)."
        )
    if options.dtype not in _TORCH_DTYPES:
        from .errors import unknown

        raise unknown("storage dtype", options.dtype, _TORCH_DTYPES)
    layers = backbone.resolve(options.layers) if options.layers else backbone.layers
    prepared = lengths = None
    if examples.modality == "text":
        prepared = backbone.preprocess.prepare([examples.load(i) for i in range(len(examples))])
        lengths = np.array([len(ids) for ids in prepared], dtype=np.int64)
    shapes = {name: t.shape for name, t in backbone.capture(backbone.preprocess.dummy(backbone.device), layers).items()}
    specs = tuple(
        ActivationSpec(layer, None if lengths is not None else int(shapes[layer][1]), int(shapes[layer][2]))
        for layer in layers
    )
    manifest = Manifest(
        architecture=backbone.arch,
        backbone={
            "weights_sha256": weights_sha256(backbone.module, skip=backbone.unloaded),
            "config": backbone.config_facts,
        },
        preprocessing=backbone.preprocess.facts(),
        dataset={"sha256": examples.content_sha256, "examples": len(examples), "limit": limit},
        forward={"precision": "float32", "attention": _attention(backbone), "batch_size": options.batch_size},
        tokens="all",
        dtype=options.dtype,
        specs=specs,
        rows=int(lengths.sum()) if lengths is not None else len(examples),
    )
    return Plan(backbone, examples, manifest, lengths, prepared)


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
    found = find_store(cache_dir, manifest)
    if found is not None:
        return BuildResult("exists", found.folder, found.manifest)
    folder = cache_dir / manifest.folder_name
    with builder_lock(folder):
        begun = time.perf_counter()
        _announce(planned, folder, say)
        writer = StoreWriter(folder, manifest)
        try:
            forward_seconds = _fill(planned, writer, progress)
            seconds = {"forward_seconds": forward_seconds, "build_seconds": time.perf_counter() - begun}
            writer.commit({**notes, **seconds, "created": _now()}, planned.examples.ids)
        finally:
            writer.close()
    status = "resumed" if writer.resumed_chunks else "built"
    elapsed = time.perf_counter() - begun
    return BuildResult(status, folder, manifest, forward_seconds, writer.write_seconds, elapsed, writer.resumed_chunks)


def _fill(planned: Plan, writer: StoreWriter, progress: Progress) -> float:
    manifest, examples = planned.manifest, planned.examples
    offsets = None if planned.lengths is None else np.concatenate([[0], np.cumsum(planned.lengths)])
    for path, rows in (("targets", examples.targets), ("offsets", offsets)):
        if rows is not None:
            writer.append(path, rows.astype(np.int64))
    paths = [f"{kind}/{layer}" for layer in manifest.layers for kind in ("layers", "pooled")]
    size = int(manifest.forward["batch_size"])
    first = min(_example_of(path, writer.first_missing_row(path), offsets) for path in paths) // size * size
    for path in paths:
        writer.seek(path, int(offsets[first]) if offsets is not None and path.startswith("layers/") else first)
    seconds = 0.0
    progress(min(first, len(examples)), len(examples))
    for start, prepared in _prepared_batches(planned, first, size):
        begun = time.perf_counter()
        inputs, mask = planned.backbone.preprocess.collate(prepared)
        inputs = {name: value.to(planned.backbone.device) for name, value in inputs.items()}
        captured = planned.backbone.capture(inputs, manifest.layers)
        seconds += time.perf_counter() - begun
        for layer, value in captured.items():
            _append(planned, writer, layer, value, mask, start)
        progress(start + len(prepared), len(examples))
    return seconds


def _append(planned: Plan, writer: StoreWriter, layer: str, value: Tensor, mask: Tensor | None, start: int) -> None:
    real = torch.ones(value.shape[:2], dtype=torch.bool) if mask is None else mask
    stored = value.to(_TORCH_DTYPES[planned.manifest.dtype])
    kept = stored[real] if mask is not None else stored  # (rows, D) or (B, T, D)
    if not bool(torch.isfinite(kept).all()):
        raise _not_finite(planned, layer, value, real, start)
    writer.append(f"layers/{layer}", _as_numpy(kept))
    pooled = torch.stack([value[:, 0], masked_mean(value, pooling_mask(real, planned.backbone.arch.prefix_tokens))], 1)
    writer.append(f"pooled/{layer}", _as_numpy(pooled.to(stored.dtype)))


def _prepared_batches(planned: Plan, first: int, size: int) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Canonical batches from example `first` on; the next one is prepared while the caller works on this one."""
    starts = range(first, len(planned.examples), size)

    def prepare(start: int) -> Sequence[Tensor]:
        indices = range(start, min(start + size, len(planned.examples)))
        if planned.prepared is not None:
            return planned.prepared[indices.start : indices.stop]
        return planned.backbone.preprocess.prepare([planned.examples.load(i) for i in indices])

    with ThreadPoolExecutor(1, "sidebench-prepare") as pool:
        ahead = pool.submit(prepare, starts[0]) if starts else None
        for start, following in pairwise([*starts, None]):
            assert ahead is not None
            assert start is not None
            batch = ahead.result()
            ahead = pool.submit(prepare, following) if following is not None else None
            yield start, batch


def _announce(planned: Plan, folder: Path, say: Callable[[str], None]) -> None:
    """Say size, space and time before anything is written, and refuse what cannot fit."""
    needed = planned.manifest.stored_bytes
    folder.parent.mkdir(parents=True, exist_ok=True)
    present = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
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
    """Time a forward of a few examples, once warm, and scale by the number of tokens."""
    spread = np.linspace(0, len(planned.examples) - 1, _TRIAL_EXAMPLES).astype(int).tolist()
    ids = planned.prepared
    elapsed = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        batch = (
            [ids[i] for i in spread]
            if ids
            else planned.backbone.preprocess.prepare([planned.examples.load(i) for i in spread])
        )
        inputs, _mask = planned.backbone.preprocess.collate(batch)
        inputs = {name: value.to(planned.backbone.device) for name, value in inputs.items()}
        planned.backbone.capture(inputs, planned.manifest.layers)
        elapsed = time.perf_counter() - begun
    return elapsed * len(planned.examples) / len(spread)


def _example_of(path: str, row: int, offsets: NDArray[np.int64] | None) -> int:
    """The example that a row of an array belongs to."""
    if offsets is None or path.startswith("pooled/"):
        return row
    return int(np.searchsorted(offsets, row, side="right")) - 1 if row < offsets[-1] else len(offsets) - 1


def _not_finite(planned: Plan, layer: str, value: Tensor, real: Tensor, start: int) -> SidebenchError:
    of_example = (value.abs().nan_to_num(torch.inf, posinf=torch.inf) * real[..., None]).flatten(1)
    limit = torch.finfo(_TORCH_DTYPES[planned.manifest.dtype]).max
    row = int((of_example.amax(1) > limit).nonzero()[0])
    name = planned.examples.ids[start + row]
    where = f"layer {layer}, example {name!r}"
    if bool(torch.isfinite(value[row][real[row]]).all()):
        largest = float(of_example[row].max())
        return SidebenchError(
            f"{where}: an activation of {largest:.4g} does not fit into {planned.manifest.dtype} "
            f"(at most {limit:.4g}). Build with --dtype bfloat16 or float32. The chunks written so far are kept."
        )
    return SidebenchError(
        f"{where}: the backbone yields NaN or infinity. Look at this example and at the weights; nothing that is not "
        "finite is ever stored. The chunks written so far are kept."
    )


def _as_numpy(tensor: Tensor) -> NDArray[Any]:
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.contiguous().numpy()


def _attention(backbone: Backbone) -> str:
    return str(getattr(getattr(backbone.module, "config", None), "_attn_implementation", "as the module computes it"))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
