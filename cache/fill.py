"""The inner loop of a build: forward a canonical batch, keep its rows in storage dtype, hand them to the writer.

Two cores, so three things overlap: the next batch is prepared, this one is computed, the last one is pooled and stored.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import SidebenchError
from .feed import ahead
from .manifest import Manifest
from .planning import TORCH_DTYPES, Plan
from .shares import Offsets, batch_size, batches_for
from .writer import StoreWriter

Progress = Callable[[int, int], None]


def fill(planned: Plan, writer: StoreWriter, progress: Progress) -> float:
    """Append everything that is not on disk yet; returns the seconds spent in forwards.

    Raises SidebenchError for an activation that is not finite in the storage dtype, naming layer and example.
    """
    for path, rows in (("targets", planned.examples.targets), ("offsets", planned.offsets)):
        if rows is not None:
            writer.append(path, rows.astype(np.int64))
    return compute(planned, writer, progress)


def compute(planned: Plan, writer: StoreWriter, progress: Progress) -> float:
    """Append the layers' and pooled rows the writer misses; returns the seconds spent in forwards.

    Canonical batches that overlap a missing chunk of a layer are computed; where only the pooled rows are missing they
    are pooled from what is on disk.
    """
    manifest, total = planned.manifest, len(planned.examples)
    forwards = batches_for(manifest, writer.missing("layers"), planned.offsets)
    pooled = batches_for(manifest, writer.missing("pooled"), planned.offsets)
    done = total - sum(_batch_stop(planned, start) - start for start in forwards)
    seconds = 0.0
    progress(done, total)
    with (
        closing(ahead(forwards, partial(_prepare, planned))) as batches,
        ThreadPoolExecutor(1, "sidebench-store") as pool,
    ):
        storing: Future[str | None] | None = None
        stored_from = 0
        computed = set(forwards)
        for start in sorted({*forwards, *pooled}):
            store: Callable[[], str | None] = partial(_pool_stored, manifest, planned.offsets, writer, start)
            if start in computed:
                prepared = next(batches)
                begun = time.perf_counter()
                kept = _forward(planned, prepared)
                seconds += time.perf_counter() - begun
                done += len(prepared)
                store = partial(_store, planned, writer, kept, start)
            if storing is not None:  # at most one batch waits
                _settle(planned, storing.result(), stored_from)
            storing, stored_from = pool.submit(store), start
            if start in computed:
                progress(done, total)
        if storing is not None:
            _settle(planned, storing.result(), stored_from)
    return seconds


def pool_missing(manifest: Manifest, offsets: Offsets, writer: StoreWriter) -> None:
    """Append the pooled rows the writer misses from layers that are whole on disk: needs neither backbone nor data."""
    for start in batches_for(manifest, writer.missing("pooled"), offsets):
        _pool_stored(manifest, offsets, writer, start)


def _forward(planned: Plan, prepared: Sequence[Tensor]) -> dict[str, Tensor]:
    """What is kept of each layer on the host: (B, T, D), or for text its real tokens (rows, D), in storage dtype."""
    dtype = TORCH_DTYPES[planned.manifest.dtype]
    inputs, mask = planned.backbone.preprocess.collate(prepared)
    device = planned.backbone.device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    where = None if mask is None else mask.to(device)

    def keep(value: Tensor) -> Tensor:
        # Cast and select on the device: half the bytes cross to the host, and no full copy waits there.
        # Contiguous, as they come back from disk: a sum over tokens in another order may round otherwise, and then a
        # resumed store would differ in a pooled bit.
        stored = value.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return (stored if where is None else stored[where]).to("cpu")

    return planned.backbone.capture(inputs, planned.manifest.layers, keep)


def _store(planned: Plan, writer: StoreWriter, kept: Mapping[str, Tensor], start: int) -> str | None:
    """Append a batch; returns the layer that cannot be stored because a value is not finite, or None."""
    stop = _batch_stop(planned, start)
    lengths = None if planned.lengths is None else torch.from_numpy(planned.lengths[start:stop])
    first_row = start if planned.offsets is None else int(planned.offsets[start])
    with torch.inference_mode():
        for layer, rows in kept.items():
            pooled = _pool(rows, lengths, planned.backbone.arch.prefix_tokens)
            # A sum over tokens is finite only if all of them are, so the small tensor tells of the large one.
            if not bool(torch.isfinite(pooled).all()) and not bool(torch.isfinite(rows).all()):
                return layer
            _append(writer, f"layers/{layer}", first_row, rows)
            _append(writer, f"pooled/{layer}", start, pooled.to(rows.dtype))
    return None


def _settle(planned: Plan, refused_layer: str | None, start: int) -> None:
    """Raise for a batch that could not be stored: in this thread, since finding the example takes a forward."""
    if refused_layer is not None:
        raise _not_finite(planned, refused_layer, start)


def _pool(rows: Tensor, lengths: Tensor | None, prefix_tokens: int) -> Tensor:
    """(B, 2, D) in float32: the first token, and the mean over tokens that are no prefix, of what is STORED.

    Of the stored values and not of the forward's, so that a resume can pool again without a forward.
    """
    if lengths is None:
        tokens = rows.float()  # (B, T, D)
        patches = tokens[:, prefix_tokens:] if tokens.shape[1] > prefix_tokens else tokens
        # The prefix beyond the first token is in no mean; adding its zeroth part lets a NaN there show.
        hidden = tokens[:, 1:prefix_tokens].sum(1) * 0
        return torch.stack([tokens[:, 0], patches.mean(1) + hidden], 1)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    total = torch.zeros((len(lengths), rows.shape[1])).index_add_(0, owner, rows.float())
    firsts = rows[lengths.cumsum(0) - lengths].float()
    return torch.stack([firsts, total / lengths[:, None]], 1)


def _pool_stored(manifest: Manifest, offsets: Offsets, writer: StoreWriter, start: int) -> None:
    """Pool one canonical batch from the chunks on disk: pooled chunks hold thousands of examples and come late."""
    dtype = TORCH_DTYPES[manifest.dtype]
    stop = min(start + batch_size(manifest), manifest.examples)
    first, last = (start, stop) if offsets is None else (int(offsets[start]), int(offsets[stop]))
    lengths = None if offsets is None else torch.from_numpy(np.diff(offsets[start : stop + 1]))
    for path in writer.missing("pooled"):
        layer = path.removeprefix("pooled/")
        rows = torch.from_numpy(writer.stored_rows(f"layers/{layer}", first, last)).view(dtype)
        pooled = _pool(rows, lengths, manifest.architecture.prefix_tokens)
        _append(writer, path, start, pooled.to(dtype))


def _append(writer: StoreWriter, path: str, row: int, rows: Tensor) -> None:
    writer.seek(path, row)
    writer.append(path, _as_numpy(rows))


def _prepare(planned: Plan, start: int) -> Sequence[Tensor]:
    """The canonical batch that begins at example `start`."""
    stop = _batch_stop(planned, start)
    if planned.prepared is not None:
        return planned.prepared[start:stop]
    return planned.backbone.preprocess.prepare([planned.examples.load(i) for i in range(start, stop)])


def _batch_stop(planned: Plan, start: int) -> int:
    return min(start + batch_size(planned.manifest), len(planned.examples))


def _not_finite(planned: Plan, layer: str, start: int) -> SidebenchError:
    """Run the batch once more, uncast, to say which example and why."""
    prepared = _prepare(planned, start)
    inputs, mask = planned.backbone.preprocess.collate(prepared)
    inputs = {name: value.to(planned.backbone.device) for name, value in inputs.items()}
    value = planned.backbone.capture(inputs, [layer])[layer]
    if mask is not None:
        value = value.masked_fill(~mask[..., None], 0)
    dtype = TORCH_DTYPES[planned.manifest.dtype]
    bad = ~torch.isfinite(value.to(dtype))
    row = int(bad.flatten(1).any(1).nonzero()[0])
    where = f"layer {layer}, example {planned.examples.ids[start + row]!r}"
    culprits = value[row][bad[row]]
    if bool(torch.isfinite(culprits).all()):
        return SidebenchError(
            f"{where}: an activation of {float(culprits.abs().max()):.6g} does not fit into {planned.manifest.dtype} "
            f"(at most {torch.finfo(dtype).max:.6g}). Build with --dtype bfloat16 or float32. "
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
