"""How the tests configure, build and feed a method: every method, every choice it offers, on every tiny backbone."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from sidebench.adapters._base import Batch, Body, CachedMethod, FittedMethod, LiveMethod, Method, PrefixMethod, trained
from sidebench.adapters._registry import find_method, known_methods
from sidebench.cache.backbone import Backbone
from sidebench.cache.block_weights import BackboneWeights, read_weights
from sidebench.cache.pooling import masked_mean
from sidebench.cache.store import LiveStore
from sidebench.cache.suffix import entering, restarted

FAMILIES = ("bert", "vit", "dinov2", "clip_vision", "clip_text")
TEXT_FAMILIES = ("bert", "clip_text")
FREE = {"lst": (("keep", "1"),)}  # options that change the network and take any text


@dataclass(frozen=True)
class Case:
    """A method with at most one option away from its default."""

    name: str
    settings: tuple[tuple[str, str], ...] = ()

    def method(self) -> Method:
        return find_method(self.name).configured(dict(self.settings))

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.settings)])


def every_case(kind: type[Method] = Method) -> list[Case]:
    """Each known method of a kind, and one more case per value of its options that are a choice."""
    return [case for name in known_methods() if issubclass(find_method(name).cls, kind) for case in _choices(name)]


def _choices(name: str) -> Iterator[Case]:
    yield Case(name)
    config_class = find_method(name).cls.Config
    hints = get_type_hints(config_class)
    for field in fields(config_class):
        if field.name in ("checkpointing", "optimizer", "schedule"):
            continue  # of all methods alike: tests/test_live_options.py, tests/test_families.py
        hint = hints[field.name]
        values = get_args(hint) if get_origin(hint) is Literal else ("true", "false") if hint is bool else ()
        for value in values:
            if value != str(field.default).lower():
                yield Case(name, ((field.name, value),))
    for setting in FREE.get(name, ()):
        yield Case(name, (setting,))


class Run:
    """A method built on a backbone of its own, with a linear head that stands still."""

    def __init__(self, method: Method, backbone: Backbone, *, seed: int = 0, classes: int = 2) -> None:
        self.method = method
        self.backbone = copy.deepcopy(backbone)
        torch.manual_seed(seed)
        self.body = build(method, self.backbone)
        generator = torch.Generator().manual_seed(seed)
        self.head = torch.randn(classes, self.body.width, generator=generator)
        # Weights as small as BERT begins with do not stand steps of half their size.
        lr = 3e-3 if getattr(method.config, "form", None) == "mlp" else 1e-2
        self.optimizer = torch.optim.AdamW(trained(self.body).values(), lr=lr)

    def batch(self, prepared: Sequence[Tensor]) -> Batch:
        return batch_of(self.method, self.backbone, prepared)

    def loss(self, batch: Batch, targets: Tensor) -> Tensor:
        out = self.body(batch)
        vector = masked_mean(out, batch.mask) if out.ndim == 3 else out
        return nn.functional.cross_entropy(vector @ self.head.T, targets)

    def step(self, batch: Batch, targets: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(batch, targets)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def build(method: Method, backbone: Backbone) -> Body:
    """The method's network as the benchmark would build it; a live one changes `backbone`, a prefix one a copy."""
    if isinstance(method, CachedMethod):
        widths = {layer: width for layer, (_, width) in backbone.shapes(method.layers(backbone.arch)).items()}
        return method.build(backbone.arch, widths, lambda: weights_of(backbone))
    if isinstance(method, PrefixMethod):
        return method.build(restarted(copy.deepcopy(backbone), method.first_block(backbone.arch)))
    assert isinstance(method, LiveMethod)
    return method.network(backbone)


def weights_of(backbone: Backbone) -> BackboneWeights:
    """With magnitudes in place of squared gradients."""
    weights = read_weights(backbone)
    return replace(weights, importance=weights)


def batch_of(method: Method, backbone: Backbone, prepared: Sequence[Tensor]) -> Batch:
    """What the method sees of some prepared examples."""
    if isinstance(method, CachedMethod | PrefixMethod):
        read = LiveStore(backbone, prepared).read(np.arange(len(prepared)), method.layers(backbone.arch))
        if isinstance(method, PrefixMethod):
            return Batch(read.mask, read.layers, {}, read.masks).entering(
                entering(backbone.arch, method.first_block(backbone.arch))
            )
        return Batch(read.mask, read.layers, {}, read.masks)
    inputs, mask = backbone.preprocess.collate(prepared)
    if mask is None:
        tokens = backbone.preprocess.image_size // backbone.preprocess.patch_size  # type: ignore[attr-defined]
        mask = torch.ones(len(prepared), tokens**2 + backbone.arch.prefix_tokens, dtype=torch.bool)
    return Batch(mask, {}, inputs)


def fitted_cases() -> list[Case]:
    return every_case(FittedMethod)


def trained_cases() -> list[Case]:
    """Every case that trains in the common loop."""
    on_the_last = [Case(f"{name}@last1") for name in ("lora", "bitfit", "vpt")]  # one per way of getting in
    return [*every_case(CachedMethod), *every_case(PrefixMethod), *on_the_last, *every_case(LiveMethod)]


class Exact(Batch):
    """A batch whose activations are read in float64, so that formulas can be compared beyond float32."""

    def state(self, layer: str) -> Tensor:
        return self.activations[layer].double()


def random_states(names: Sequence[str], widths: Any, lengths: Sequence[int], *, seed: int = 0) -> Exact:
    """Random activations, zero beyond each example's length."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    shape = (len(lengths), max(lengths))
    states = {
        name: torch.randn((*shape, widths[name]), generator=generator, dtype=torch.float64) * mask[..., None]
        for name in names
    }
    return Exact(mask, states, {})
