"""The training step that is predicted, and what a method is given in it: shapes alone, without data."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from ..adapters._base import Batch, CachedMethod, FittedMethod, LiveMethod, PrefixMethod
from ..cache.backbone import Backbone
from ..cache.configs import fake_mode
from ..cache.encode import encode
from ..cache.form import Form
from ..cache.joint import JointPreprocess
from ..cache.preprocess import Inputs
from ..cache.reduction import reduction_of
from ..cache.store import activations
from ..cache.suffix import entering
from .goals.base import Goal
from .goals.classes import Classes
from .tasks.base import Pooling


@dataclass(frozen=True)
class Step:
    """The training step to predict."""

    batch_size: int
    num_outputs: int = 100
    precision: str = "fp32"  # "fp32" | "bf16"
    semantics: str = "cuda"  # "cuda" | "cpu"
    attention: str = "auto"  # under CUDA semantics; see CudaSemantics
    form: Form = field(default_factory=Form)  # in which activations are cached
    max_length: int | None = None  # tokens of the longest example with a text; None: the backbone's preprocessing says
    pooling: Pooling = "mean"
    token_types: bool = False  # pairs of texts, whose backbone is told which is which
    goal: Goal | None = None  # what the step is for; None: `num_outputs` and `pooling` say it

    @property
    def aim(self) -> Goal:
        """What the step is for."""
        return self.goal or Classes(self.num_outputs, self.pooling)


def kept_shapes(
    method: CachedMethod | FittedMethod | PrefixMethod, backbone: Backbone, step: Step
) -> dict[str, tuple[int, int]]:
    """(T, D) of one example per layer that the method reads, as it is kept."""
    seen = reduction_of(step.form.tokens, backbone.arch, step.form.seed).seen
    found = layer_shapes(backbone, method.layers(seen))  # at once: a forward pass on fake tensors takes seconds, too
    return {layer: kept_shape(backbone, found[layer], step) for layer in method.layers(seen)}


def kept_shape(backbone: Backbone, shape: tuple[int | None, int], step: Step) -> tuple[int, int]:
    """(T, D) of one example of a layer of this shape, as it is kept; a text has the longest's tokens."""
    reduction = reduction_of(step.form.tokens, backbone.arch, step.form.seed)
    length = text_tokens(backbone, step)
    kept, kept_width = reduction.shape(*shape)
    if kept is None:
        lengths = reduction.lengths(np.array([length]))
        assert lengths is not None
        kept = int(lengths[0])
    return kept, kept_width


def layer_shapes(backbone: Backbone, layers: Sequence[str]) -> dict[str, tuple[int | None, int]]:
    """(T, D) of one example per layer; T is None where it is the text's. `backbone` may be a fake one."""
    with fake_mode(backbone) or nullcontext():
        return backbone.shapes(layers)


def batch_for(method: CachedMethod | PrefixMethod | LiveMethod, backbone: Backbone, step: Step) -> Batch:
    """What the method would be given."""
    if isinstance(method, CachedMethod | PrefixMethod):
        final, shapes = backbone.final_layer, kept_shapes(method, backbone, step)
        lead = final if final in shapes else list(shapes)[-1]
        batch = cached_batch(shapes, step.batch_size, step.form, lead)
        if isinstance(method, PrefixMethod):
            batch = batch.entering(entering(backbone.arch, method.first_block(backbone.arch)))
        return batch
    return _live_batch(backbone, step.batch_size, text_tokens(backbone, step), step.token_types)


def cached_batch(shapes: Mapping[str, tuple[int, int]], batch_size: int, form: Form, lead: str) -> Batch:
    """A batch as `CachedSource` yields it from a store of this form, with the mask of the layer `lead`.

    shapes: (T, D) per layer.
    """
    states = {}
    for layer, shape in shapes.items():
        channels = torch.zeros(shape[-1], 2) if form.per_channel else None
        states[layer] = encode(torch.zeros(batch_size, *shape), form, channels)
    read = activations(states, lead)
    return Batch(read.mask, read.layers, masks=read.masks)


def _live_batch(backbone: Backbone, batch_size: int, length: int | None, token_types: bool) -> Batch:
    """A batch as `LiveSource` yields it. A fake mask has no values, so transformers cannot leave it out."""
    one = example_inputs(backbone, length)
    inputs = {name: torch.zeros((batch_size, *value.shape[1:]), dtype=value.dtype) for name, value in one.items()}
    if token_types:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    tokens = layer_shapes(backbone, [backbone.final_layer])[backbone.final_layer][0] or length
    assert tokens is not None
    return Batch(torch.ones((batch_size, tokens), dtype=torch.bool), inputs=inputs)


def example_inputs(backbone: Backbone, length: int | None) -> Inputs:
    """Inputs of one example of so many tokens (None: of an image), such as `Preprocess.dummy` yields."""
    if length is not None and isinstance(backbone.preprocess, JointPreprocess):
        return backbone.preprocess.sized(length, backbone.device)
    dummy = backbone.preprocess.dummy(backbone.device)
    longest = max(one.shape[1] for one in dummy.values())
    if length is None:
        return dummy
    return {
        name: one[:, :1].expand(-1, length, *one.shape[2:]) if one.shape[1] == longest else one
        for name, one in dummy.items()
    }


def text_tokens(backbone: Backbone, step: Step) -> int | None:
    """Tokens of the longest example of the batch; None for images, which are all alike."""
    if backbone.arch.modality == "image":
        return None
    if isinstance(backbone.preprocess, JointPreprocess):
        return step.max_length or backbone.preprocess.longest
    return step.max_length or int(getattr(backbone.preprocess, "max_length", 0)) or 128
