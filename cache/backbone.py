"""A frozen pretrained network: its layers under one set of names, and the forward pass that reads them.

Names are the same for every family: `embeddings` (what enters the first block), `blocks.0` … `blocks.L-1`, `norm` (the
final normalisation, where the family has one over all tokens). Any other dotted module path works too.
"""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import SidebenchError, unknown
from .examples import Modality
from .preprocess import Inputs, Preprocess

Norm = Literal["pre", "post"]

# Where the final normalisation over ALL tokens lives. CLIP's vision tower is left out on purpose: its post_layernorm
# sees the class token alone, so the last block is the last layer there.
_FINAL_NORMS = ("layernorm", "norm", "final_layer_norm", "final_layernorm", "ln_f", "encoder.final_layer_norm")


@dataclass(frozen=True)
class Architecture:
    """What a method may know of a backbone without holding it; stored in every manifest."""

    name: str
    modality: Modality
    blocks: int
    width: int
    prefix_tokens: int  # leading tokens that are no patches: class token, registers
    final_layer: str  # the layer whose tokens the backbone would hand to a head
    heads: int | None = None
    mlp_width: int | None = None
    norm: Norm | None = None  # where a block normalises; None: not a block this code can copy
    activation: str | None = None
    norm_eps: float = 1e-6
    layer_scale: bool = False
    causal: bool = False  # a token attends to those before it only, so the last real token sums a text up

    @property
    def states(self) -> tuple[str, ...]:
        """The L = blocks + 1 hidden states of the papers: what enters block 0, then each block's output."""
        return ("embeddings", *(f"blocks.{i}" for i in range(self.blocks)))


class _Done(Exception):
    """Raised inside a hook once the last wanted layer has been seen; never leaves this module."""


Sink = Callable[[str, Tensor], None]


class Backbone:
    """The frozen network, in eval mode, with named layers. `inputs` come from `preprocess`."""

    def __init__(
        self,
        module: nn.Module,
        preprocess: Preprocess,
        *,
        name: str | None = None,
        forward_options: Mapping[str, Any] | None = None,
        norm: Norm | None = None,
        heads: int | None = None,
        activation: str | None = None,
        causal: bool = False,
        config_facts: Mapping[str, Any] | None = None,
        unloaded: Iterable[str] = (),
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.forward_options = dict(forward_options or {})
        self.config_facts = dict(config_facts or {})
        self.unloaded = frozenset(unloaded)  # parameters the checkpoint does not hold (an unused pooler)
        self.blocks_path = find_blocks(module)
        self._taps = self._find_taps()
        probe = self._probe()
        self.arch = Architecture(
            name=name or type(module).__name__,
            modality=preprocess.modality,
            blocks=len(self.blocks),
            width=probe.shape[-1],
            prefix_tokens=preprocess.prefix_tokens(probe.shape[1]),
            final_layer=self.final_layer,
            heads=heads,
            mlp_width=_mlp_width(self.blocks),
            norm=norm,
            activation=activation,
            norm_eps=_norm_eps(self.blocks),
            layer_scale=any(n.endswith("layer_scale1") for n, _ in module.named_modules()),
            causal=causal,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks in order; empty when the network has none."""
        return list(self.module.get_submodule(self.blocks_path).children()) if self.blocks_path else []

    @property
    def layers(self) -> tuple[str, ...]:
        """Named layers in forward order: `embeddings`, every block, `norm` where there is one."""
        return tuple(self._taps)

    @property
    def final_layer(self) -> str:
        """The layer a head reads: `norm` where there is one, else the last block."""
        if not self._taps:
            raise SidebenchError(
                f"{type(self.module).__name__} has no blocks to name: no ModuleList or Sequential inside it holds "
                "children of one class. Put its repeated part into one."
            )
        return list(self._taps)[-1]

    def tap_path(self, layer: str) -> str:
        """Dotted module path of a named layer."""
        return self._taps[layer][0]

    def resolve(self, patterns: Iterable[str]) -> tuple[str, ...]:
        """Expand globs over the layer names (or, failing that, dotted module paths), in forward order.

        Raises SidebenchError for a pattern that matches nothing.
        """
        paths = [path for path, _ in self.module.named_modules() if path]
        wanted: set[str] = set()
        for pattern in patterns:
            found = fnmatch.filter(self.layers, pattern) or fnmatch.filter(paths, pattern)
            if not found:
                error = unknown("layer", pattern, self.layers)
                raise SidebenchError(f"{error} Any dotted module path of {type(self.module).__name__} works too.")
            wanted.update(found)
        return tuple(name for name in dict.fromkeys((*self.layers, *paths)) if name in wanted)

    def run(self, inputs: Inputs, layers: Iterable[str], sink: Sink) -> None:
        """Forward `inputs`, hand each wanted layer to `sink(layer, (B, T, D))` as it appears, stop after the last.

        Gradients flow when they are enabled; the caller decides. A convolutional map (B, C, H, W) becomes
        (B, H*W, C) and a vector (B, D) becomes (B, 1, D).
        """
        pending = dict.fromkeys(layers)
        hooks = []

        def take(layer: str, value: Any) -> None:
            if layer not in pending:
                return  # a module used twice: the first use is the layer
            del pending[layer]
            sink(layer, _as_tokens(layer, value))
            if not pending:
                raise _Done

        for layer in list(pending):
            path, side = self._taps.get(layer, (layer, "output"))
            module = self.module.get_submodule(path)
            if side == "input":
                hooks.append(module.register_forward_pre_hook(_before(layer, take), with_kwargs=True))
            else:
                hooks.append(module.register_forward_hook(_after(layer, take)))
        try:
            self.module(**inputs, **self.forward_options)
        except _Done:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if pending:
            raise SidebenchError(
                f"the forward pass of {type(self.module).__name__} never reaches {', '.join(pending)}; "
                f"leave it out of --layers. Known: {', '.join(self.layers)}."
            )

    def capture(self, inputs: Inputs, layers: Iterable[str]) -> dict[str, Tensor]:
        """Activations (B, T, D) of `layers`, no gradients, each copied to the host as it appears.

        So no two layers of a batch need to wait on the device.
        """
        kept: dict[str, Tensor] = {}
        with torch.inference_mode():
            self.run(inputs, layers, lambda layer, value: kept.__setitem__(layer, value.to("cpu", copy=True)))
        return kept

    def tokens(self, inputs: Inputs) -> Tensor:
        """The final layer (B, T, D), with gradients where they are enabled: what a live method trains through."""
        kept: list[Tensor] = []
        self.run(inputs, [self.final_layer], lambda _, value: kept.append(value))
        return kept[0]

    def used_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the final tokens depend on: not a pooler or mask token that nothing reads."""
        named = dict(self.module.named_parameters())
        before = {name: parameter.requires_grad for name, parameter in named.items()}
        self.module.requires_grad_(True)
        try:
            with torch.enable_grad():
                out = self.tokens(self.preprocess.dummy(self.device)).sum()
            grads = torch.autograd.grad(out, list(named.values()), allow_unused=True)
        finally:
            for name, parameter in named.items():
                parameter.requires_grad_(before[name])
        return {name: p for (name, p), grad in zip(named.items(), grads, strict=True) if grad is not None}

    def _find_taps(self) -> dict[str, tuple[str, str]]:
        if not self.blocks_path:
            return {}
        taps = {"embeddings": (f"{self.blocks_path}.0", "input")}
        for index in range(len(self.blocks)):
            taps[f"blocks.{index}"] = (f"{self.blocks_path}.{index}", "output")
        names = dict(self.module.named_modules())
        for path in _FINAL_NORMS:
            if path in names:
                taps["norm"] = (path, "output")
                break
        return taps

    def _probe(self) -> Tensor:
        found = self.capture(self.preprocess.dummy(self.device), [self.final_layer])
        return found[self.final_layer]


def find_blocks(module: nn.Module) -> str | None:
    """Path of the longest list of children of one class: the transformer's (or the stages') blocks."""
    best: tuple[int, str] | None = None
    for path, child in module.named_modules():
        if not path or not isinstance(child, nn.ModuleList | nn.Sequential):
            continue
        if len({type(c) for c in child}) == 1 and (best is None or len(child) > best[0]):
            best = (len(child), path)
    return best[1] if best else None


def _before(layer: str, take: Callable[[str, Any], None]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(layer, args[0] if args else kwargs["hidden_states"])

    return hook


def _after(layer: str, take: Callable[[str, Any], None]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        take(layer, output)

    return hook


def _as_tokens(layer: str, value: Any) -> Tensor:
    while isinstance(value, tuple | list):  # T5's blocks return a tuple whose first tensor is the state
        value = value[0]
    if not isinstance(value, Tensor):
        raise SidebenchError(f"layer {layer} yields {type(value).__name__}, not a tensor; choose another layer.")
    if value.ndim == 4:
        return value.flatten(2).mT  # (B, C, H, W) -> (B, H*W, C)
    if value.ndim == 2:
        return value[:, None]
    if value.ndim != 3:
        raise SidebenchError(f"layer {layer} yields shape {tuple(value.shape)}; wanted (B, T, D) or (B, C, H, W).")
    return value


def _mlp_width(blocks: list[nn.Module]) -> int | None:
    widths = [m.out_features for m in blocks[0].modules() if isinstance(m, nn.Linear)] if blocks else []
    return max(widths, default=None)


def _norm_eps(blocks: list[nn.Module]) -> float:
    return next((m.eps for b in blocks for m in b.modules() if isinstance(m, nn.LayerNorm)), 1e-6)
