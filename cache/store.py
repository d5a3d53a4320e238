"""The contract of a store: activations by example index and layer, whatever keeps them."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .architecture import Architecture
from .backbone import Backbone
from .encode import Stored
from .errors import SidebenchError, unknown
from .joint import Packing
from .preprocess import Prepared

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Activations:
    """A batch: per layer (B, T, D) as stored, padded with zeros on the right; mask (B, T) of real tokens.

    The mask is the final layer's, or where that was not read the last one's; `masks` holds those of layers with other
    tokens.
    """

    layers: Mapping[str, Stored]
    mask: Tensor
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def mask_of(self, layer: str) -> Tensor:
        """(B, T) real tokens of a layer."""
        return self.masks.get(layer, self.mask)

    def to(self, device: torch.device) -> "Activations":
        """The same batch on another device."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self.layers.items()}
        once = {id(mask): mask.to(device, non_blocking=True) for mask in (self.mask, *self.masks.values())}
        return Activations(moved, once[id(self.mask)], {name: once[id(mask)] for name, mask in self.masks.items()})


def activations(
    layers: Mapping[str, Stored], final_layer: str, real: Tensor | None = None, ragged: Container[str] = ()
) -> Activations:
    """A batch with its masks: `real` (B, T) for the `ragged` layers, every token for the others."""
    every: dict[int, Tensor] = {}  # one mask for all layers of a length
    masks: dict[str, Tensor] = {}
    for layer, value in layers.items():
        if real is not None and layer in ragged:
            masks[layer] = real
            continue
        examples, tokens = value.shape[:2]
        if tokens not in every:
            every[tokens] = torch.ones((examples, tokens), dtype=torch.bool)
        masks[layer] = every[tokens]
    mask = masks[final_layer if final_layer in masks else list(masks)[-1]]
    return Activations(layers, mask, {layer: other for layer, other in masks.items() if other is not mask})


class Store(ABC):
    """Read-only activations of N items. `StoreContract` in the tests holds for every subclass.

    An item is an example, or beyond these a view of one (see cache.views).
    """

    architecture: Architecture
    layers: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int:
        """Number of items N."""

    @abstractmethod
    def read(self, index: Index, layers: Sequence[str]) -> Activations:
        """Activations of the items `index` (B,), in that order, repeats allowed.

        Raises SidebenchError for a layer the store does not hold or a chunk whose checksum is wrong, IndexError for an
        index outside 0 … N-1.
        """


class LiveStore(Store):
    """Activations computed on the spot by the frozen backbone: what a cache must equal and beat."""

    def __init__(self, backbone: Backbone, prepared: Sequence[Prepared], layers: tuple[str, ...] | None = None) -> None:
        self.architecture = backbone.arch
        self.layers = layers or backbone.layers
        self._backbone = backbone
        self._prepared = prepared
        self._ragged = {layer for layer, (tokens, _) in backbone.shapes(self.layers).items() if tokens is None}
        self._one_forward = threading.Lock()  # the hooks of two forwards of one module would catch each other's layers

    def __len__(self) -> int:
        return len(self._prepared)

    def read(self, index: Index, layers: Sequence[str]) -> Activations:
        """See Store; padding is zeroed and holes are closed, as in a store that never kept it."""
        check_index(index, len(self))
        require_layers(self.layers, layers)
        inputs, mask = self._backbone.preprocess.collate([self._prepared[i] for i in index])
        inputs = {name: value.to(self._backbone.device) for name, value in inputs.items()}
        with self._one_forward:
            captured = self._backbone.capture(inputs, layers)
        kept, real = {name: captured[name].clone() for name in layers}, Packing(mask)
        if real.mask is not None:
            for name in self._ragged & kept.keys():
                kept[name] = real(kept[name]) * real.mask[..., None]
        return activations(kept, self.architecture.final_layer, real.mask, self._ragged)


def check_index(index: Index, items: int) -> None:
    """Raise IndexError unless every index lies in 0 … items-1 (negative ones are no shorthand here)."""
    if len(index) == 0:
        raise IndexError("an empty batch was asked for")
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= items:
        raise IndexError(f"item {low if low < 0 else high} is outside 0 … {items - 1}")


def require_layers(held: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise SidebenchError for a layer that is not held, or when none is wanted."""
    if not wanted:
        raise SidebenchError("no layer was asked for.")
    for layer in wanted:
        if layer not in held:
            raise unknown("layer in this store", layer, held)
