"""Run the frozen backbone once over every example and keep what its layers yield."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from .catalog import bytes_below, find_store
from .errors import SidebenchError, disk_errors, unknown
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
        raise unknown("storage dtype", options.dtype, _TORCH_DTYPES)
    if options.batch_size < 1:
        raise SidebenchError(f"a batch of {options.batch_size} examples holds nothing; give --batch-size 1 or more.")
    layers = backbone.resolve(options.layers) if options.layers else backbone.layers
    prepared = lengths = None
    if examples.modality == "text":
        prepared = backbone.preprocess.prepare([examples.load(i) for i in range(len(examples))])
        lengths = np.array([len(ids) for ids in prepared], dtype=np.int64)
        if (lengths == 0).any():
            name = examples.ids[int(lengths.argmin())]
            raise SidebenchError(f"the text of example {name!r} holds no token; give it a word or take it out.")
    shapes = {name: t.shape for name, t in backbone.capture(backbone.preprocess.dummy(backbone.device), layers).items()}
    if lengths is not None:
        _check_text_layers(shapes)
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
    size = int(manifest.forward["batch_size"])
    missing = [writer.first_missing_row(f"layers/{layer}") for layer in manifest.layers]
    first = min(_example_of(row, offsets) for row in missing) // size * size
    pooled_first = min(writer.first_missing_row(f"pooled/{layer}") for layer in manifest.layers) // size * size
    for layer in manifest.layers:
        writer.seek(f"layers/{layer}", first if offsets is None else int(offsets[first]))
        writer.seek(f"pooled/{layer}", min(pooled_first, first))
    for start in range(pooled_first, first, size):
        _pool_stored(planned, writer, start, min(start + size, first))
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
    stored = value.to(_TORCH_DTYPES[planned.manifest.dtype]).contiguous()
    if mask is None:
        mask = torch.ones(value.shape[:2], dtype=torch.bool)
        kept = stored
    else:
        kept = stored[mask]  # (rows, D)
        stored = stored.masked_fill(~mask[..., None], 0)
    if not bool(torch.isfinite(kept).all()):
        raise _not_finite(planned, layer, value, stored, start)
    writer.append(f"layers/{layer}", _as_numpy(kept))
    _append_pooled(planned, writer, layer, stored, mask)


def _append_pooled(planned: Plan, writer: StoreWriter, layer: str, stored: Tensor, mask: Tensor) -> None:
    """Pool what is stored (B, T, D), not what the forward gave: so a resume can pool again without a forward."""
    tokens = stored.float()
    pooled = [tokens[:, 0], masked_mean(tokens, pooling_mask(mask, planned.backbone.arch.prefix_tokens))]
    writer.append(f"pooled/{layer}", _as_numpy(torch.stack(pooled, 1).to(stored.dtype)))


def _pool_stored(planned: Plan, writer: StoreWriter, start: int, stop: int) -> None:
    """Pool one canonical batch from the chunks on disk: pooled chunks hold thousands of examples and come late."""
    dtype = _TORCH_DTYPES[planned.manifest.dtype]
    lengths = planned.lengths
    for spec in planned.manifest.specs:
        path = f"layers/{spec.layer}"
        if lengths is None:
            stored = torch.from_numpy(writer.stored_rows(path, start, stop)).view(dtype)
            mask = torch.ones(stored.shape[:2], dtype=torch.bool)
        else:
            before, inside = int(lengths[:start].sum()), lengths[start:stop]
            mask = torch.arange(int(inside.max())) < torch.from_numpy(inside)[:, None]
            stored = torch.zeros((*mask.shape, spec.width), dtype=dtype)
            rows = writer.stored_rows(path, before, before + int(inside.sum()))
            stored[mask] = torch.from_numpy(rows).view(dtype)
        _append_pooled(planned, writer, spec.layer, stored, mask)


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


def _example_of(row: int, offsets: NDArray[np.int64] | None) -> int:
    """The example that a row of a layer belongs to."""
    if offsets is None:
        return row
    return int(np.searchsorted(offsets, row, side="right")) - 1 if row < offsets[-1] else len(offsets) - 1


def _check_text_layers(shapes: Mapping[str, torch.Size]) -> None:
    tokens = max(shape[1] for shape in shapes.values())
    for layer, shape in shapes.items():
        if shape[1] != tokens:
            raise SidebenchError(f"layer {layer} yields {shape[1]} tokens for a text of {tokens}; leave it out.")


def _not_finite(planned: Plan, layer: str, value: Tensor, stored: Tensor, start: int) -> SidebenchError:
    bad = ~torch.isfinite(stored)  # padding is zero here
    row = int(bad.flatten(1).any(1).nonzero()[0])
    where = f"layer {layer}, example {planned.examples.ids[start + row]!r}"
    culprits = value[row][bad[row]]
    if bool(torch.isfinite(culprits).all()):
        return SidebenchError(
            f"{where}: an activation of {float(culprits.abs().max()):.6g} does not fit into {planned.manifest.dtype} "
            f"(at most {torch.finfo(stored.dtype).max:.6g}). Build with --dtype bfloat16 or float32. "
            "The chunks written so far are kept."
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
