"""A frozen pretrained network: its layers by name (see architecture.py), and the forward pass that reads them."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import (
    BEFORE_LAST,
    POSITIONS,
    Architecture,
    Norm,
    blocks_in,
    find_taps,
    has_bias,
    is_bias,
    mlp_width,
    norm_eps,
    stage_taps,
)
from .errors import SidebenchError, unknown
from .joint import JointPreprocess
from .preprocess import Inputs, Preprocess


class _Done(Exception):
    """Raised inside a hook once the last wanted layer has been seen; never leaves this module."""


Sink = Callable[[str, Tensor], None]
_MORE_WORDS = 4  # in the second example that shapes are learned from


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
        stages: Sequence[str] = (),
        stacks: tuple[str, ...] | None = None,
        t5_blocks: bool = False,
        projection: str | None = None,
        head_parts: Mapping[str, str] | None = None,
        positions: str | None = None,
    ) -> None:
        """`stages`: modules that yield the maps of a CNN; `stacks`: encoder and decoder of a network with both,
        or the part that the blocks are in.

        `projection`: the module that yields one embedding (B, E) per example, which is then the layer `projected`.
        `head_parts`: parameters that a task's head begins with, by the names that they have there.
        `positions`: the module that yields what the blocks add to their keys, which is then a layer of that name.
        """
        self.module = module.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.forward_options = dict(forward_options or {})
        self._head_parts = dict(head_parts or {})
        self.config_facts = dict(config_facts or {})
        self.unloaded = frozenset(unloaded)  # parameters the checkpoint does not hold (an unused pooler)
        self.stacks = stacks or ("",)
        self.blocks_path = None if stages else blocks_in(module, self.stacks[0])
        self._taps = stage_taps(module, stages) or find_taps(module, self.stacks)
        if positions:
            self._taps = {POSITIONS: (positions, "output"), **self._taps}
        inner = as_tokens(self.final_layer, self._probe()) if projection else None
        if projection:
            self._taps["projected"] = (projection, "output")
        probe = self._probe()
        stage_grids = self._name_stages(named=bool(stages)) if stages or probe.ndim == 4 else ()
        probe = as_tokens(self.final_layer, probe)
        self.arch = Architecture(
            name=name or type(module).__name__,
            modality=preprocess.modality,
            blocks=len(self.encoder_blocks),
            width=probe.shape[-1],
            prefix_tokens=preprocess.prefix_tokens((probe if inner is None else inner).shape[1]),
            final_layer=self.final_layer,
            heads=heads,
            mlp_width=mlp_width(self.blocks),
            norm=norm,
            activation=activation,
            norm_eps=norm_eps(self.blocks),
            layer_scale=any(n.endswith("layer_scale1") for n, _ in module.named_modules()),
            causal=causal,
            stages=stage_grids,
            bottlenecks=BEFORE_LAST in self._taps,
            decoder_blocks=len(self.blocks) - len(self.encoder_blocks),
            t5_blocks=t5_blocks,
            biasless=self._is_biasless(),
            projected_from=None if inner is None else inner.shape[2],
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks in order, a decoder's behind the encoder's; empty when the network has none."""
        return [self.module.get_submodule(path) for path in self.block_paths]

    @property
    def encoder_blocks(self) -> list[nn.Module]:
        """The blocks before any decoder's: of most backbones all."""
        return list(self.module.get_submodule(self.blocks_path).children()) if self.blocks_path else []

    @property
    def bottleneck_paths(self) -> list[str]:
        """Dotted module path of every bottleneck of a convolutional network made of them, else none."""
        stages = [self.tap_path(layer) for layer in self.arch.states] if self.arch.bottlenecks else []
        return [f"{stage}.{name}" for stage in stages for name, _ in self.module.get_submodule(stage).named_children()]

    def dummy(self) -> Inputs:
        """Inputs of one example, to learn shapes from."""
        return self.preprocess.dummy(self.device)

    @property
    def head_parts(self) -> dict[str, Tensor]:
        """What the checkpoint holds of a task's head."""
        return {name: self.module.get_parameter(path) for name, path in self._head_parts.items()}

    @property
    def block_paths(self) -> list[str]:
        """Dotted module path of every block, in the order of `blocks`."""
        found: list[str] = []
        for stack in self.stacks if self.blocks_path else ():
            path = blocks_in(self.module, stack)
            assert path is not None
            found += [f"{path}.{name}" for name, _ in self.module.get_submodule(path).named_children()]
        return found

    @property
    def layers(self) -> tuple[str, ...]:
        """Named layers in forward order: `embeddings`, every block, `norm` where there is one; or every stage."""
        return tuple(self._taps)

    @property
    def final_layer(self) -> str:
        """The layer a head reads: `projected` or `norm` where there is one, else the last block."""
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
        self._watch(inputs, layers, lambda layer, value: sink(layer, as_tokens(layer, value)))

    def _watch(self, inputs: Inputs, layers: Iterable[str], sink: Sink) -> None:
        """`run` with each layer's tensor as the module yields it."""
        pending = dict.fromkeys(layers)
        hooks = []

        def take(layer: str, value: Any) -> None:
            if layer not in pending:
                return  # a module used twice: the first use is the layer
            del pending[layer]
            sink(layer, _as_tensor(layer, value))
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

    def shapes(self, layers: Iterable[str]) -> dict[str, tuple[int | None, int]]:
        """(T, D) of one example per layer; T is None where it follows the length of the text.

        Raises SidebenchError for a layer whose tokens neither follow the text nor stay as many.
        """
        wanted, dummy = list(layers), self.dummy()
        joint = self.preprocess if isinstance(self.preprocess, JointPreprocess) else None
        asked = [self.layers[0], *wanted] if joint else wanted  # which has as many tokens as the example
        found = {layer: (value.shape[1], value.shape[2]) for layer, value in self.capture(dummy, asked).items()}
        if self.arch.modality == "image":
            return dict(found)
        if joint:
            length = found[self.layers[0]][0]
            longer, other = length + _MORE_WORDS, joint.sized(length + _MORE_WORDS, self.device)
        else:
            length = max(value.shape[1] for value in dummy.values())
            longer = 2 * length
            other = {name: torch.cat([v, v], 1) if v.shape[1] == length else v for name, v in dummy.items()}
        shapes: dict[str, tuple[int | None, int]] = {}
        for layer, value in self.capture(other, wanted).items():
            tokens, width = found[layer]
            if (tokens, value.shape[1]) != (length, longer) and tokens != value.shape[1]:
                raise SidebenchError(
                    f"layer {layer} yields {tokens} tokens for a text of {length} and {value.shape[1]} for one of "
                    f"{longer}; leave it out."
                )
            shapes[layer] = (None if tokens != value.shape[1] else tokens, width)
        return shapes

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
                out = self.tokens(self.dummy()).sum()
            grads = torch.autograd.grad(out, list(named.values()), allow_unused=True)
        finally:
            for name, parameter in named.items():
                parameter.requires_grad_(before[name])
        return {name: p for (name, p), grad in zip(named.items(), grads, strict=True) if grad is not None}

    def _is_biasless(self) -> bool:
        """By names where they tell, because a backward pass takes as much memory again as the weights."""
        layers = (self.module.get_submodule(path) for path, _ in self._taps.values())
        if any(has_bias(layer) for layer in layers):
            return False
        return not (has_bias(self.module) and any(map(is_bias, self.used_parameters())))

    def _probe(self) -> Tensor:
        """The final layer of one example as its module yields it."""
        kept: list[Tensor] = []
        with torch.inference_mode():
            self._watch(self.dummy(), [self.final_layer], lambda _, value: kept.append(value))
        return kept[0]

    def _name_stages(self, *, named: bool) -> tuple[tuple[int, int], ...]:
        """The grids of the stage maps. Blocks whose maps shrink become stages: the last map of each resolution."""
        shapes: dict[str, torch.Size] = {}
        with torch.inference_mode():
            self._watch(self.dummy(), self.layers, lambda layer, value: shapes.__setitem__(layer, value.shape))
        if flat := [layer for layer in self.layers if len(shapes[layer]) != 4]:
            if not named:
                return ()
            said = ", ".join(f"{self.tap_path(layer)} yields {tuple(shapes[layer])}" for layer in flat)
            raise SidebenchError(f"a stage is a map (B, C, H, W), and {said}; name other modules.")
        grids = [(shapes[layer][2], shapes[layer][3]) for layer in self.layers if layer != BEFORE_LAST]
        if named:
            return tuple(grids)
        last = dict(zip(grids, self.layers, strict=True))
        if len(last) == 1 or grids != sorted(grids, reverse=True):
            return ()
        self._taps = {f"stages.{i}": self._taps[layer] for i, layer in enumerate(last.values())}
        self.blocks_path = None
        return tuple(last)


def _before(layer: str, take: Callable[[str, Any], None]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(layer, args[0] if args else kwargs["hidden_states"])

    return hook


def _after(layer: str, take: Callable[[str, Any], None]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        take(layer, output)

    return hook


def _as_tensor(layer: str, value: Any) -> Tensor:
    while isinstance(value, tuple | list):  # T5's blocks return a tuple whose first tensor is the state
        value = value[0]
    if not isinstance(value, Tensor):
        raise SidebenchError(f"layer {layer} yields {type(value).__name__}, not a tensor; choose another layer.")
    return value


def as_tokens(layer: str, value: Tensor) -> Tensor:
    """(B, T, D) of a layer's output: a map (B, C, H, W) row by row, of a vector (B, D) one token."""
    if value.ndim == 4:
        return value.flatten(2).mT  # (B, C, H, W) -> (B, H*W, C)
    if value.ndim == 2:
        return value[:, None]
    if value.ndim != 3:
        raise SidebenchError(f"layer {layer} yields shape {tuple(value.shape)}; wanted (B, T, D) or (B, C, H, W).")
    return value
