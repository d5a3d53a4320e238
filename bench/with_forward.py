"""A side method with the frozen backbone's forward beside it, as papers measure theirs: nothing is cached.

Only for predictions of memory: what a cache takes away is the difference to the method as it is.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..adapters._base import Batch, Body, CachedMethod, LiveMethod
from ..cache.architecture import Architecture
from ..cache.backbone import Backbone
from ..cache.block_weights import BackboneWeights, read_weights
from ..cache.form import Form
from ..cache.store import activations
from .choice import refusal


class WithForward(LiveMethod):
    """A cached method whose states the backbone computes in every step, without a graph."""

    two_stacks = True  # as far as the method says so: see `refusal`

    def __init__(self, method: CachedMethod) -> None:
        super().__init__(method.config)
        self.method = method

    def refusal(self, arch: Architecture) -> str | None:
        """The method's."""
        return refusal(self.method, arch, Form())

    def build(self, backbone: Backbone) -> Body:
        """See LiveMethod."""
        return ForwardedBody(self.method, backbone)


class ForwardedBody(Body):
    """The frozen backbone and the side network."""

    def __init__(self, method: CachedMethod, backbone: Backbone) -> None:
        super().__init__()
        self.module = backbone.module
        self._backbone = backbone
        self._layers = method.layers(backbone.arch)
        shapes = backbone.shapes(self._layers)
        self._ragged = {layer for layer, (tokens, _) in shapes.items() if tokens is None}
        widths = {layer: width for layer, (_, width) in shapes.items()}
        self.side = method.build(backbone.arch, widths, self._weights)
        self.width = self.side.width
        if levels := getattr(self.side, "levels", None):  # what MDETR's losses read
            self.levels = lambda batch: levels(self._forwarded(batch))

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        return self.side(self._forwarded(batch))

    def train(self, mode: bool = True) -> "ForwardedBody":
        """Keep the backbone in eval mode."""
        super().train(mode)
        self.module.eval()
        return self

    def _forwarded(self, batch: Batch) -> Batch:
        states: dict[str, Tensor] = {}
        with torch.no_grad():
            self._backbone.run(batch.inputs, self._layers, states.__setitem__)
        real = batch.inputs.get("attention_mask")
        read = activations(
            {layer: states[layer] for layer in self._layers},
            self._backbone.final_layer,
            None if real is None else real.bool(),
            self._ragged,
        )
        return Batch(read.mask, read.layers, masks=read.masks)

    def _weights(self) -> BackboneWeights:
        weights = read_weights(self._backbone)
        return replace(weights, importance=weights)
