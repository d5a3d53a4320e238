"""Determine every fact of a store before the first forward: layers, shapes, hashes, digest."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .backbone import Backbone
from .errors import SidebenchError, unknown
from .examples import Examples
from .load import weights_sha256
from .manifest import ActivationSpec, Manifest
from .shares import batch_size

TORCH_DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class CaptureOptions:
    """What is kept. `layers` are globs; None keeps `embeddings`, every block and `norm`."""

    layers: tuple[str, ...] | None = None
    dtype: str = "float16"
    batch_size: int = 64


def options_of(manifest: Manifest) -> CaptureOptions:
    """The options that make a store of these facts."""
    return CaptureOptions(manifest.layers, manifest.dtype, batch_size(manifest))


@dataclass(frozen=True)
class Plan:
    """A build that is fully determined but not begun."""

    backbone: Backbone
    examples: Examples
    manifest: Manifest
    lengths: NDArray[np.int64] | None  # tokens per text
    prepared: list[Tensor] | None  # token ids of every text; images are prepared batch by batch

    @cached_property
    def offsets(self) -> NDArray[np.int64] | None:
        """(N+1,) first row of every text; None for images, where a row is an example."""
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
    if options.dtype not in TORCH_DTYPES:
        raise unknown("storage dtype", options.dtype, TORCH_DTYPES)
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
        tokens="all",
        dtype=options.dtype,
        specs=specs,
        rows=int(lengths.sum()) if lengths is not None else len(examples),
    )
    return Plan(backbone, examples, manifest, lengths, prepared)


def _check_text_layers(shapes: Mapping[str, torch.Size]) -> None:
    tokens = max(shape[1] for shape in shapes.values())
    for layer, shape in shapes.items():
        if shape[1] != tokens:
            raise SidebenchError(f"layer {layer} yields {shape[1]} tokens for a text of {tokens}; leave it out.")


def _attention(backbone: Backbone) -> str:
    return str(getattr(getattr(backbone.module, "config", None), "_attn_implementation", "as the module computes it"))
