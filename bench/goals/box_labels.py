"""What a run on expressions reads besides activations: boxes, which tokens name them, and the checkpoint's heads."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...cache.backbone import Backbone
from ...cache.errors import SidebenchError
from ...cache.joint import texts_of
from ...cache.preprocess import TextPreprocess
from ..tasks.base import BoxTask
from .box_head import TOKENS
from .overlap import centred


def box_labels(task: BoxTask, backbone: Backbone | None) -> dict[str, NDArray[Any]]:
    """The arrays of goals.boxes.Boxes.

    Raises SidebenchError for a backbone whose tokens nobody can place in a text, and for a text of which no token is
    left that names its box.
    """
    texts = getattr(getattr(backbone, "preprocess", None), "texts", None)
    if backbone is None or not isinstance(texts, TextPreprocess):
        raise SidebenchError(f"{task.uri} wants a backbone with a tokenizer, whose tokens can be placed in a text.")
    said = texts_of(task.examples)
    encoded = texts.tokenizer(said, truncation=True, max_length=texts.max_length, return_offsets_mapping=True)
    longest = max(map(len, encoded["offset_mapping"]))
    if longest > TOKENS:
        raise SidebenchError(f"{task.uri} has a text of {longest} tokens; type --max-length {TOKENS}.")
    offsets, named = [0], []
    for i, bounds in enumerate(encoded["offset_mapping"]):
        first, last = task.spans.offsets[i : i + 2]
        tokens = _overlapping(bounds, task.spans.bounds[first:last])
        if not tokens:
            raise SidebenchError(
                f"expression {task.examples.ids[i]!r}: of its first {len(bounds)} tokens none names its box; "
                "type a larger --max-length."
            )
        named += tokens
        offsets.append(len(named))
    boxes = centred(torch.from_numpy(task.boxes), torch.from_numpy(task.sizes).double()).numpy()
    heads = {f"head.{name}": tensor.detach().cpu().numpy() for name, tensor in backbone.head_parts.items()}
    return {
        "boxes": boxes,
        "text_tokens": np.array([len(bounds) for bounds in encoded["offset_mapping"]], dtype=np.int64),
        "named_of": np.array(offsets, dtype=np.int64),
        "named": np.array(named, dtype=np.int64),
        **heads,
    }


def _overlapping(bounds: list[tuple[int, int]], spans: NDArray[np.int64]) -> list[int]:
    """The tokens that share a character with a span; special tokens have no character."""
    return [
        token
        for token, (start, end) in enumerate(bounds)
        if any(start < last and first < end for first, last in spans.tolist())
    ]
