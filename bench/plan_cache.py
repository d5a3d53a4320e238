"""The cache part of a plan: its bytes from the layout alone, and its gain from a quick measurement of this machine."""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters._base import Method
from ..cache.backbone import Backbone
from ..cache.errors import SidebenchError
from ..cache.examples import Examples
from ..cache.form import Form
from ..cache.joint import JointPreprocess
from ..cache.manifest import ActivationSpec, Manifest
from ..cache.planning import CaptureOptions
from ..cache.reduction import reduction_of
from ..cache.writer import StoreWriter
from ..cache.zarr_store import ZarrStore
from .choice import layers_read
from .prepare import Say
from .step import Step, example_inputs, layer_shapes, text_tokens
from .tasks.base import Pooling

_SAMPLE_BYTES = 64 * 10**6  # enough that opening files does not count
_TIMINGS = ("write_bytes_per_second", "read_bytes_per_second", "build_seconds", "break_even_passes")
_NO_WEIGHTS = "an architecture without weights is not run; give hf: or sample:"
_FORWARD_EXAMPLES = 8
_FORWARDS, _EPOCHS = 3, 3  # the fastest counts: the first is cold


@dataclass(frozen=True)
class Data:
    """What the task says, or what stands in for it."""

    num_outputs: int
    num_examples: int | None = None
    num_train: int | None = None
    pooling: Pooling = "mean"
    examples: Examples | None = None
    lengths: tuple[int, ...] = field(default=(), repr=False)  # tokens per text, where a tokenizer is there
    token_types: bool = False  # see Step

    def with_lengths(self, backbone: Backbone | None) -> "Data":
        """The same with the lengths of the texts, if there are texts and a tokenizer."""
        if backbone is None or self.examples is None or self.examples.modality == "image":
            return self
        if isinstance(backbone.preprocess, JointPreprocess):
            return replace(self, lengths=tuple(backbone.preprocess.token_counts(self.examples).tolist()))
        prepared = backbone.preprocess.prepare([self.examples.load(i) for i in range(len(self.examples))])
        pairs = isinstance(prepared[0], Tensor) and prepared[0].ndim == 2
        return replace(self, lengths=tuple(len(ids) for ids in prepared), token_types=pairs)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest text, where they are known."""
        return max(self.lengths, default=None)


@dataclass(frozen=True)
class CacheFacts:
    """What decides the cache: the options, the methods that read it, the backbone (fake), the step and the data."""

    capture: CaptureOptions
    methods: Sequence[Method]
    backbone: Backbone
    step: Step
    data: Data

    def layers(self) -> tuple[str, ...]:
        """Those asked for; else those the methods read; without one that reads any, all that `cache build` keeps."""
        if self.capture.layers:
            return self.backbone.resolve(self.capture.layers)
        wanted = layers_read(self.methods, self.backbone.arch)
        return self.backbone.resolve(wanted) if wanted else self.backbone.layers

    def manifest(self, examples: int, rows: int | None = None) -> Manifest:
        """A store of so many examples, texts as long as the longest unless `rows` says how many tokens there are."""
        form, arch = self.step.form, self.backbone.arch
        reduction = reduction_of(form.tokens, arch, form.seed)
        length = text_tokens(self.backbone, self.step)
        shapes = layer_shapes(self.backbone, self.layers())
        specs = [ActivationSpec(layer, *reduction.shape(*shape)) for layer, shape in shapes.items()]
        items = examples * (1 + form.views)
        if length is not None and any(spec.tokens is None for spec in specs):
            kept = reduction.lengths(np.array([length]))
            assert kept is not None
            rows = items * int(kept[0]) if rows is None else rows
        else:
            rows = items
        return Manifest(arch, {}, {}, {"examples": examples}, {}, form, tuple(specs), rows)

    def rows(self) -> int | None:
        """Tokens that all texts together keep; None for images, or where nobody could count them."""
        form = self.step.form
        kept = reduction_of(form.tokens, self.backbone.arch, form.seed).lengths(np.array(self.data.lengths, dtype=int))
        return None if kept is None or not self.data.lengths else int(kept.sum()) * (1 + form.views)


def cache_facts(
    about: CacheFacts, real: Backbone | None, cache_dir: Path, say: Say, why: str = _NO_WEIGHTS
) -> dict[str, Any]:
    """Bytes of the cache and, where the backbone has weights, what this machine measures; see `bench plan --json`.

    real: the backbone with its weights; None for no measurement, and then `why` there is none.
    """
    unavailable: dict[str, str] = {}
    facts: dict[str, Any] = {
        "layers": list(about.layers()),
        "form": {"tokens": about.step.form.tokens, "dtype": about.step.form.dtype, "views": about.step.form.views},
        "examples": about.data.num_examples,
        "ragged": about.manifest(1).ragged,
        "bytes_per_example": bytes_per_example(about),
        "bytes": None,
        "forward_seconds_per_example": None,
        "write_bytes_per_second": None,
        "read_bytes_per_second": None,
        "build_seconds": None,
        "break_even_passes": None,
        "unavailable": unavailable,
    }
    if about.data.num_examples is None:
        unavailable["bytes"] = "no --task and no --num-examples says how many examples there are"
    elif facts["ragged"] and not about.data.lengths:
        unavailable["bytes"] = (
            "without a tokenizer and texts their lengths are unknown; bytes_per_example is that of the longest, so at "
            f"most {about.manifest(about.data.num_examples).stored_bytes:,}"
        )
    else:
        facts["bytes"] = about.manifest(about.data.num_examples, about.rows()).stored_bytes
    if real is None:
        unavailable |= dict.fromkeys(("forward_seconds_per_example", *_TIMINGS), why)
        return facts
    say("measuring the forward pass and a small store on this machine")
    facts |= _measured(about, real, cache_dir, facts["bytes_per_example"], unavailable)
    return facts


def bytes_per_example(about: CacheFacts) -> int:
    """What one more example adds to the store: its layers, scales and pooled rows; of a text, of the longest."""

    def total(examples: int) -> int:
        layouts = about.manifest(examples).arrays().values()
        return sum(layout.shape[0] * layout.row_bytes for layout in layouts)

    return total(2) - total(1)


def _measured(
    about: CacheFacts, real: Backbone, cache_dir: Path, example_bytes: int, unavailable: dict[str, str]
) -> dict[str, Any]:
    found: dict[str, Any] = {"forward_seconds_per_example": forward_seconds(real, about)}
    try:
        written, read = store_speed(about, cache_dir)
    except (OSError, SidebenchError) as error:
        reason = f"a small store could not be written to {cache_dir}: {error}"
        unavailable |= dict.fromkeys(_TIMINGS, reason)
        return found
    found |= {"write_bytes_per_second": written, "read_bytes_per_second": read}
    items = 1 + about.step.form.views  # all are computed and written, one of an example is read in a pass
    live, cached = found["forward_seconds_per_example"], example_bytes / items / read
    building = items * live + example_bytes / written
    if about.data.num_examples is None:
        unavailable["build_seconds"] = unavailable["bytes"]
    else:
        found["build_seconds"] = about.data.num_examples * building
    if cached >= live:
        unavailable["break_even_passes"] = (
            f"never: reading an example takes {cached * 1e3:.2f} ms here and computing it {live * 1e3:.2f} ms; keep "
            "fewer layers or tokens, or train live"
        )
    else:
        found["break_even_passes"] = break_even(building, live, cached)
    return found


def break_even(build_seconds: float, live_seconds: float, cached_seconds: float) -> float:
    """Passes over the data after which building has paid: t_build / (t_live - t_cached), all per example."""
    return build_seconds / (live_seconds - cached_seconds)


def forward_seconds(real: Backbone, about: CacheFacts) -> float:
    """Seconds per example of the frozen forward on a few dummy examples of full size, the fastest of three."""
    inputs = {
        name: torch.ones((_FORWARD_EXAMPLES, *one.shape[1:]), dtype=one.dtype, device=one.device)
        for name, one in example_inputs(real, text_tokens(real, about.step)).items()
    }
    layers, fastest = about.layers(), math.inf
    for _ in range(_FORWARDS):
        begun = time.perf_counter()
        real.capture(inputs, layers)  # copies to the host, so the device has finished
        fastest = min(fastest, time.perf_counter() - begun)
    return fastest / _FORWARD_EXAMPLES


def store_speed(about: CacheFacts, cache_dir: Path) -> tuple[float, float]:
    """(written, read) bytes per second of a small store with rows of this shape, in float16 and beside the real caches.

    Written and flushed to disk once; read whole in shuffled batches, the fastest of three: from the page cache, as a
    store that fits into memory is.
    """
    form = about.step.form
    about = replace(about, step=replace(about.step, form=Form(tokens=form.tokens, seed=form.seed)))
    count = max(_SAMPLE_BYTES // max(bytes_per_example(about), 1), 1)
    count = min(count, 100_000)
    manifest = about.manifest(count)
    layer_bytes = sum(layout.shape[0] * layout.row_bytes for layout in manifest.arrays().values())
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="speed-", dir=cache_dir) as folder:
        path = Path(folder) / manifest.folder_name
        begun = time.perf_counter()
        _write(path, manifest)
        written = layer_bytes / (time.perf_counter() - begun)
        return written, _read_speed(ZarrStore(path), count, about.step.batch_size)


def _write(path: Path, manifest: Manifest) -> None:
    writer = StoreWriter(path, manifest)
    try:
        for name, layout in manifest.arrays().items():
            rows = np.zeros(layout.shape, dtype=layout.numpy_dtype)
            if name == "offsets":
                rows[:] = np.linspace(0, manifest.rows, len(rows)).astype(np.int64)
            writer.append(name, rows)
        writer.commit({}, tuple(str(i) for i in range(manifest.examples)))
    finally:
        writer.close()


def _read_speed(store: ZarrStore, count: int, batch_size: int) -> float:
    order, fastest = np.random.default_rng(0).permutation(count), math.inf
    batches = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    size = 0
    for _ in range(_EPOCHS):
        begun = time.perf_counter()
        size = 0
        for batch in batches:
            found = store.read(batch, store.layers).layers.values()
            size += sum(math.prod(value.shape) * 2 for value in found)  # float16
        fastest = min(fastest, time.perf_counter() - begun)
    return size / fastest
