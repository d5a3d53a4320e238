"""Activations to and from the numbers they are stored as."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import SidebenchError
from .form import Form
from .quantise import Quantised, quantise

TORCH_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "int64": torch.int64,
}
_BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}  # what numpy does not know

Stored = Tensor | Quantised
"""Activations (…, D) in storage dtype."""


def encode(value: Tensor, form: Form, channels: Tensor | None = None) -> Stored:
    """Cast or quantise (…, D); a new contiguous tensor on the same device."""
    if form.quantised:
        return quantise(value, form.dtype, None if channels is None else channels.to(value.device))
    return value.to(TORCH_DTYPES[form.dtype], copy=True, memory_format=torch.contiguous_format)


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """The same memory as a numpy array; what numpy does not know as its bits."""
    return tensor.view(_BITS.get(tensor.dtype, tensor.dtype)).numpy()


def from_numpy(array: NDArray[Any], dtype: str) -> Tensor:
    """The same memory as a tensor of a storage dtype."""
    return torch.from_numpy(array).view(TORCH_DTYPES[dtype])


def tensors_of(stored: Stored) -> list[Tensor]:
    """Everything that takes memory."""
    return list(stored.tensors()) if isinstance(stored, Quantised) else [stored]


def check_finite(stored: Stored) -> bool:
    """Whether every activation is finite."""
    if isinstance(stored, Quantised):
        return bool(torch.isfinite(stored.scales).all())
    return bool(torch.isfinite(stored).all())


def not_finite(layer: str, example: str) -> SidebenchError:
    """What to say of an example of which a layer yields NaN or infinity."""
    return SidebenchError(
        f"layer {layer}, example {example!r}: the backbone yields NaN or infinity. Look at this example and at the "
        "weights; nothing that is not finite is ever stored. The chunks written so far are kept."
    )


def rows_of(values: NDArray[Any], scales: NDArray[Any] | None, form: Form, channels: Tensor | None) -> Stored:
    """What was stored as these arrays."""
    tensor = from_numpy(np.ascontiguousarray(values), form.dtype)
    return tensor if scales is None else Quantised(tensor, torch.from_numpy(np.ascontiguousarray(scales)), channels)
