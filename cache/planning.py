"""Determine every fact of a store before the first forward: layers, shapes, hashes, digest."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .backbone import Backbone
from .errors import SidebenchError
from .examples import Examples
from .form import Form, make_form
from .joint import JointPreprocess
from .layout import LARGEST_COMPRESSED
from .load import weights_sha256
from .manifest import ActivationSpec, Manifest
from .preprocess import Prepared
from .reduction import Reduction, reduction_of
from .shares import batch_size
from .views import prepare_items, refuse_views


@dataclass(frozen=True)
class CaptureOptions:
    """What is kept. `layers` are globs; None keeps `embeddings`, every block and `norm`. For the rest see Form."""

    layers: tuple[str, ...] | None = None
    dtype: str = "float16"
    batch_size: int = 64
    tokens: str = "all"
    per_channel: bool = False
    compression: str | None = None
    views: int = 0
    seed: int = 0

    def form(self) -> Form:
        """The form they ask for. Raises SidebenchError for one that is unknown or has no effect."""
        return make_form(
            tokens=self.tokens,
            dtype=self.dtype,
            per_channel=self.per_channel,
            compression=self.compression,
            views=self.views,
            seed=self.seed,
        )


def options_of(manifest: Manifest) -> CaptureOptions:
    """The options that make a store of these facts."""
    form = asdict(manifest.form)
    return CaptureOptions(manifest.layers, batch_size=batch_size(manifest), **{**form, "seed": form["seed"] or 0})


@dataclass(frozen=True)
class Plan:
    """A build that is fully determined but not begun."""

    backbone: Backbone
    examples: Examples
    manifest: Manifest
    reduction: Reduction
    fixed: frozenset[str]  # layers of a text that have the same number of tokens whatever its length
    lengths: NDArray[np.int64] | None  # kept tokens of every item of a ragged store
    prepared: Sequence[Prepared] | None  # token ids of every item of a text task; images are prepared batch by batch

    @cached_property
    def offsets(self) -> NDArray[np.int64] | None:
        """(items + 1,) first row of every item of a ragged store; None where a row is an item."""
        return None if self.lengths is None else np.concatenate([[0], np.cumsum(self.lengths)])


def plan(backbone: Backbone, examples: Examples, options: CaptureOptions, *, limit: int | None = None) -> Plan:
    """Determine every fact of the store, the digest included.

    Raises SidebenchError when modalities differ, a layer pattern matches nothing or the dtype is unknown.
    """
    if examples.modality != backbone.arch.modality:
        raise SidebenchError(
            f"{backbone.arch.name} reads {backbone.arch.modality}, the task holds {examples.modality}; "
            "choose a backbone and a task of one kind (bench backbones, bench tasks)."
        )
    form = options.form()
    refuse_views(examples.modality, form.views)
    reduction = reduction_of(form.tokens, backbone.arch, form.seed)
    if options.batch_size < 1:
        raise SidebenchError(f"a batch of {options.batch_size} examples holds nothing; give --batch-size 1 or more.")
    layers = backbone.resolve(options.layers) if options.layers else backbone.layers
    prepared = lengths = tokens = None
    if isinstance(backbone.preprocess, JointPreprocess):
        tokens = backbone.preprocess.token_counts(examples)
    elif examples.modality == "text":
        prepared = prepare_items(backbone.preprocess, examples, range(len(examples) * (1 + form.views)), form.seed)
        tokens = np.array([len(ids) for ids in prepared], dtype=np.int64)
    if tokens is not None:
        if (tokens == 0).any():
            name = examples.ids[int(tokens.argmin()) % len(examples)]
            raise SidebenchError(f"the text of example {name!r} holds no token; give it a word or take it out.")
        lengths = reduction.lengths(tokens)
    shapes = backbone.shapes(layers)
    specs = tuple(ActivationSpec(layer, *reduction.shape(*shapes[layer])) for layer in layers)
    fixed = frozenset(layer for layer, (tokens_of_it, _) in shapes.items() if tokens_of_it is not None)
    if all(spec.tokens is not None for spec in specs):
        lengths = None
    kept = limit if limit == len(examples) else None  # a limit beyond the data dropped nothing and is no fact
    manifest = Manifest(
        architecture=backbone.arch,
        backbone={
            "weights_sha256": weights_sha256(backbone.module, skip=backbone.unloaded),
            "config": backbone.config_facts,
        },
        preprocessing=backbone.preprocess.facts(),
        dataset={"sha256": examples.content_sha256, "examples": len(examples), "limit": kept},
        forward={"precision": "float32", "attention": _attention(backbone), "batch_size": options.batch_size},
        form=form,
        specs=specs,
        rows=int(lengths.sum()) if lengths is not None else len(examples) * (1 + form.views),
    )
    _check_compressible(manifest)
    return Plan(backbone, examples, manifest, reduction, fixed, lengths, prepared)


def _check_compressible(manifest: Manifest) -> None:
    for path, layout in manifest.arrays().items():
        if layout.compression and layout.chunk_bytes > LARGEST_COMPRESSED:
            raise SidebenchError(
                f"--compression takes chunks of 2 GiB, and {layout.chunk_rows} rows of {path} are "
                f"{layout.chunk_bytes:,} bytes; leave it out, or keep fewer tokens (--tokens)."
            )


def _attention(backbone: Backbone) -> str:
    return str(getattr(getattr(backbone.module, "config", None), "_attn_implementation", "as the module computes it"))
