"""The inner loop of a build: forward a canonical batch, keep its rows as they are stored, hand them to the writer.

The next batch is prepared in a thread while this one is computed; full chunks are written by the writer's.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .encode import TORCH_DTYPES, Stored, check_finite, encode, not_finite, rows_of, to_numpy
from .errors import SidebenchError
from .feed import ahead
from .joint import Packing
from .manifest import Manifest
from .planning import Plan
from .preprocess import Prepared
from .quantise import Quantised
from .shares import Offsets, batch_size, batches_for
from .views import prepare_items
from .writer import StoreWriter

Progress = Callable[[int, int], None]
Channels = Mapping[str, Tensor]
"""Centre and spread (D, 2) of every layer's channels; empty where the form does not ask for them."""


def fill(planned: Plan, writer: StoreWriter, channels: Channels, progress: Progress) -> float:
    """Append everything that is not on disk yet; returns the seconds spent in forwards.

    Raises SidebenchError for an activation that is not finite in the storage dtype, naming layer and example.
    """
    for path, rows in (("targets", planned.examples.targets), ("offsets", planned.offsets)):
        if rows is not None:
            writer.append(path, rows.astype(np.int64))
    return compute(planned, writer, channels, progress)


def compute(planned: Plan, writer: StoreWriter, channels: Channels, progress: Progress) -> float:
    """Append the layers' and pooled rows the writer misses; returns the seconds spent in forwards.

    Canonical batches that overlap a missing chunk of a layer are computed; where only the pooled rows are missing they
    are pooled from what is on disk. `progress` counts items.
    """
    manifest, total = planned.manifest, planned.manifest.items
    forwards = batches_for(manifest, writer.missing("layers", "scales"), planned.offsets)
    pooled = batches_for(manifest, writer.missing("pooled"), planned.offsets)
    done = total - sum(_batch_stop(manifest, start) - start for start in forwards)
    seconds = 0.0
    progress(done, total)
    with closing(ahead(forwards, partial(_prepare, planned))) as batches:
        computed = set(forwards)
        for start in sorted({*forwards, *pooled}):
            if start not in computed:
                _pool_stored(manifest, planned.offsets, writer, channels, start)
                continue
            prepared = next(batches)
            begun = time.perf_counter()
            kept = _forward(planned, prepared, channels, start)
            seconds += time.perf_counter() - begun
            _store(planned, writer, kept, channels, start)
            done += len(prepared)
            progress(done, total)
    return seconds


def pool_missing(manifest: Manifest, offsets: Offsets, writer: StoreWriter) -> None:
    """Append the pooled rows the writer misses from layers that are whole on disk: needs neither backbone nor data."""
    channels = stored_channels(manifest, writer)
    for start in batches_for(manifest, writer.missing("pooled"), offsets):
        _pool_stored(manifest, offsets, writer, channels, start)


def stored_channels(manifest: Manifest, writer: StoreWriter) -> Channels:
    """The channels that are on disk."""
    if not manifest.form.per_channel:
        return {}
    return {
        spec.layer: torch.from_numpy(writer.stored_rows(f"channels/{spec.layer}", 0, spec.width))
        for spec in manifest.specs
    }


def _forward(planned: Plan, prepared: Sequence[Prepared], channels: Channels, start: int) -> dict[str, Stored]:
    """What is kept on the host of each layer of the batch that begins at item `start`, as stored.

    (B, T, D), or of a ragged layer its real tokens (rows, D).
    """
    form = planned.manifest.form
    inputs, mask = planned.backbone.preprocess.collate(prepared)
    device = planned.backbone.device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    real, every = Packing(None if mask is None else mask.to(device)), Packing(None)
    kept: dict[str, Stored] = {}

    def keep(layer: str, value: Tensor) -> None:
        # Reduce, cast and select on the device: fewer bytes cross to the host, and no full copy waits there.
        # Contiguous, as they come back from disk: a sum over tokens in another order may round otherwise, and then a
        # resumed store would differ in a pooled bit.
        tokens = every if layer in planned.fixed else real
        reduced, where = planned.reduction.keep(tokens(value), tokens.mask)
        if where is not None:
            _check_counted(planned, start, where)
        stored = encode(reduced, form, channels.get(layer))
        kept[layer] = (stored if where is None else stored[where]).to(torch.device("cpu"))

    with torch.inference_mode():
        planned.backbone.run(inputs, planned.manifest.layers, keep)
    return kept


def _check_counted(planned: Plan, start: int, where: Tensor) -> None:
    """Raise SidebenchError where `where` (B, T) keeps another number of tokens than the plan has room for."""
    assert planned.lengths is not None
    found = where.sum(1).cpu().numpy()
    counted = planned.lengths[start : start + len(found)]
    if (found != counted).any():
        row = int((found != counted).argmax())
        name = planned.examples.ids[(start + row) % len(planned.examples)]
        raise SidebenchError(
            f"example {name!r} has {found[row]} tokens, and {counted[row]} were counted before; did its file change?"
        )


def _store(planned: Plan, writer: StoreWriter, kept: Mapping[str, Stored], channels: Channels, start: int) -> None:
    """Pool and append a batch. Here and not in a thread: it takes a hundredth of the forward, on all cores."""
    manifest = planned.manifest
    stop = _batch_stop(manifest, start)
    ragged = {spec.layer for spec in manifest.specs if spec.tokens is None}
    prefix_tokens = manifest.seen.prefix_tokens
    for layer, rows in kept.items():
        lengths, first_row = None, start
        if layer in ragged:
            assert planned.lengths is not None
            assert planned.offsets is not None
            lengths, first_row = torch.from_numpy(planned.lengths[start:stop]), int(planned.offsets[start])
        with torch.inference_mode():
            pooled = _pool(rows.float(), lengths, prefix_tokens)
        # A sum over tokens is finite only if all of them are, so the small tensor tells of the large one.
        if not bool(torch.isfinite(pooled).all()) and not check_finite(rows):
            raise _not_finite(planned, layer, start, channels)
        if isinstance(rows, Quantised):
            _append(writer, f"layers/{layer}", first_row, rows.values)
            _append(writer, f"scales/{layer}", first_row, rows.scales)
        else:
            _append(writer, f"layers/{layer}", first_row, rows)
        _append(writer, f"pooled/{layer}", start, pooled.to(TORCH_DTYPES[manifest.form.pooled_dtype]))


def _pool(rows: Tensor, lengths: Tensor | None, prefix_tokens: int) -> Tensor:
    """(B, 2, D) in float32: the first token, and the mean over tokens that are no prefix, of what is STORED.

    Of the stored values and not of the forward's, so that a resume can pool again without a forward.
    """
    if lengths is None:  # (B, T, D)
        patches = rows[:, prefix_tokens:] if rows.shape[1] > prefix_tokens else rows
        # The prefix beyond the first token is in no mean; adding its zeroth part lets a NaN there show.
        hidden = rows[:, 1:prefix_tokens].sum(1) * 0
        return torch.stack([rows[:, 0], patches.mean(1) + hidden], 1)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    total = torch.zeros((len(lengths), rows.shape[1])).index_add_(0, owner, rows)
    firsts = rows[lengths.cumsum(0) - lengths]
    return torch.stack([firsts, total / lengths[:, None]], 1)


def _pool_stored(manifest: Manifest, offsets: Offsets, writer: StoreWriter, channels: Channels, start: int) -> None:
    """Pool one canonical batch from the chunks on disk: pooled chunks hold thousands of items and come late."""
    stop = _batch_stop(manifest, start)
    ragged = {spec.layer for spec in manifest.specs if spec.tokens is None}
    for path in writer.missing("pooled"):
        layer = path.removeprefix("pooled/")
        first, last, lengths = start, stop, None
        if offsets is not None and layer in ragged:
            first, last = int(offsets[start]), int(offsets[stop])
            lengths = torch.from_numpy(np.diff(offsets[start : stop + 1]))
        values = writer.stored_rows(f"layers/{layer}", first, last)
        scales = writer.stored_rows(f"scales/{layer}", first, last) if manifest.form.quantised else None
        rows = rows_of(values, scales, manifest.form, channels.get(layer))
        pooled = _pool(rows.float(), lengths, manifest.seen.prefix_tokens)
        _append(writer, path, start, pooled.to(TORCH_DTYPES[manifest.form.pooled_dtype]))


def _append(writer: StoreWriter, path: str, row: int, rows: Tensor) -> None:
    writer.seek(path, row)
    writer.append(path, to_numpy(rows.contiguous()))


def _prepare(planned: Plan, start: int) -> Sequence[Prepared]:
    """The canonical batch that begins at item `start`."""
    stop = _batch_stop(planned.manifest, start)
    if planned.prepared is not None:
        return planned.prepared[start:stop]
    seed = planned.manifest.form.seed
    return prepare_items(planned.backbone.preprocess, planned.examples, range(start, stop), seed)


def _batch_stop(manifest: Manifest, start: int) -> int:
    return min(start + batch_size(manifest), manifest.items)


def _not_finite(planned: Plan, layer: str, start: int, channels: Channels) -> SidebenchError:
    """Run the batch once more, uncast, to say which example and why."""
    inputs, mask = planned.backbone.preprocess.collate(_prepare(planned, start))
    inputs = {name: value.to(planned.backbone.device) for name, value in inputs.items()}
    whole = planned.backbone.capture(inputs, [layer])[layer]
    tokens = Packing(None if layer in planned.fixed else mask)
    value, real = planned.reduction.keep(tokens(whole), tokens.mask)
    if real is not None:
        value = value.masked_fill(~real[..., None], 0)
    form = planned.manifest.form
    bad = ~torch.isfinite(encode(value, form, channels.get(layer)).float())
    row = int(bad.flatten(1).any(1).nonzero()[0]) if bool(bad.any()) else 0
    example = planned.examples.ids[(start + row) % len(planned.examples)]
    culprits = value[row][bad[row]]
    if len(culprits) and bool(torch.isfinite(culprits).all()):
        limit = torch.finfo(TORCH_DTYPES[form.pooled_dtype]).max
        return SidebenchError(
            f"layer {layer}, example {example!r}: an activation of {float(culprits.abs().max()):.6g} does not fit into "
            f"{form.dtype} (at most {limit:.6g}). Build with --dtype bfloat16 or float32. "
            "The chunks written so far are kept."
        )
    return not_finite(layer, example)
