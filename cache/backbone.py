"""A frozen pretrained network: its layers under one set of names, and the forward pass that reads them.

Names are the same for every family: `embeddings` (what enters the first block), `blocks.0` … `blocks.L-1`, `norm` (the
final normalisation, where the family has one over all tokens). Any other dotted module path works too.
"""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
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
_STACK_NORMS = ("final_layer_norm", "layer_norm", "norm")  # inside the encoder or the decoder of an encoder-decoder


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
    decoder_blocks: int = 0  # of an encoder-decoder, whose `blocks` are the encoder's
    t5_blocks: bool = False  # of an encoder-decoder: the blocks of both stacks are those of the first T5
    stages: tuple[tuple[int, int], ...] = ()  # (H, W) of each map `stages.0` … of a convolutional network

    @property
    def states(self) -> tuple[str, ...]:
        """The L = blocks + 1 hidden states of the papers: what enters block 0, then each block's output.

        Of a convolutional network its stage maps, of an encoder-decoder those of the encoder.
        """
        return tuple(self.grids) or ("embeddings", *(f"blocks.{i}" for i in range(self.blocks)))

    @property
    def decoder_states(self) -> tuple[str, ...]:
        """The same of the decoder, where there is one."""
        inside = ("embeddings", *(f"blocks.{i}" for i in range(self.decoder_blocks)))
        return tuple(f"decoder.{state}" for state in inside) if self.decoder_blocks else ()

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        """(H, W) by layer: the T = H W tokens of a stage map, row by row. Empty where tokens lie in no grid."""
        return {f"stages.{i}": grid for i, grid in enumerate(self.stages)}


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
        stages: Sequence[str] = (),
        stacks: tuple[str, str] | None = None,
        t5_blocks: bool = False,
    ) -> None:
        """`stages`: modules that yield the maps of a CNN; `stacks`: encoder and decoder of a network with both."""
        self.module = module.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.forward_options = dict(forward_options or {})
        self.config_facts = dict(config_facts or {})
        self.unloaded = frozenset(unloaded)  # parameters the checkpoint does not hold (an unused pooler)
        self.stacks = stacks or ("",)
        self.blocks_path = None if stages else _blocks_in(module, self.stacks[0])
        self._taps = {f"stages.{i}": (path, "output") for i, path in enumerate(stages)} or self._find_taps()
        probe = self._probe()
        stage_grids = self._name_stages(named=bool(stages)) if stages or probe.ndim == 4 else ()
        probe = _as_tokens(self.final_layer, probe)
        self.arch = Architecture(
            name=name or type(module).__name__,
            modality=preprocess.modality,
            blocks=len(self.encoder_blocks),
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
            stages=stage_grids,
            decoder_blocks=len(self.blocks) - len(self.encoder_blocks),
            t5_blocks=t5_blocks,
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

    def dummy(self) -> Inputs:
        """Inputs of one example, to learn shapes from."""
        return self.preprocess.dummy(self.device)

    @property
    def block_paths(self) -> list[str]:
        """Dotted module path of every block, in the order of `blocks`."""
        found: list[str] = []
        for stack in self.stacks if self.blocks_path else ():
            path = _blocks_in(self.module, stack)
            assert path is not None
            found += [f"{path}.{name}" for name, _ in self.module.get_submodule(path).named_children()]
        return found

    @property
    def layers(self) -> tuple[str, ...]:
        """Named layers in forward order: `embeddings`, every block, `norm` where there is one; or every stage."""
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
        self._watch(inputs, layers, lambda layer, value: sink(layer, _as_tokens(layer, value)))

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
        found = {layer: (value.shape[1], value.shape[2]) for layer, value in self.capture(dummy, wanted).items()}
        if self.arch.modality == "image":
            return dict(found)
        length = max(value.shape[1] for value in dummy.values())
        twice = {name: torch.cat([v, v], 1) if v.shape[1] == length else v for name, v in dummy.items()}
        shapes: dict[str, tuple[int | None, int]] = {}
        for layer, value in self.capture(twice, wanted).items():
            tokens, width = found[layer]
            if (tokens, value.shape[1]) != (length, 2 * length) and tokens != value.shape[1]:
                raise SidebenchError(
                    f"layer {layer} yields {tokens} tokens for a text of {length} and {value.shape[1]} for one of "
                    f"{2 * length}; leave it out."
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

    def _find_taps(self) -> dict[str, tuple[str, str]]:
        if not self.blocks_path:
            return {}
        if len(self.stacks) == 1:
            return self._stack_taps("", _FINAL_NORMS)
        encoder, decoder = (self._stack_taps(stack, _STACK_NORMS) for stack in self.stacks)
        if "norm" in encoder:
            encoder["encoder_norm"] = encoder.pop("norm")
        last = {"norm": decoder.pop("norm")} if "norm" in decoder else {}
        return {**encoder, **{f"decoder.{name}": tap for name, tap in decoder.items()}, **last}

    def _stack_taps(self, stack: str, norms: Sequence[str]) -> dict[str, tuple[str, str]]:
        blocks = _blocks_in(self.module, stack)
        assert blocks is not None
        taps = {"embeddings": (f"{blocks}.0", "input")}
        for name, _ in self.module.get_submodule(blocks).named_children():
            taps[f"blocks.{name}"] = (f"{blocks}.{name}", "output")
        names = dict(self.module.named_modules())
        paths = (f"{stack}.{norm}" if stack else norm for norm in norms)
        if found := next((path for path in paths if path in names), None):
            taps["norm"] = (found, "output")
        return taps

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
        grids = [(shapes[layer][2], shapes[layer][3]) for layer in self.layers]
        if named:
            return tuple(grids)
        last = dict(zip(grids, self.layers, strict=True))
        if len(last) == 1 or grids != sorted(grids, reverse=True):
            return ()
        self._taps = {f"stages.{i}": self._taps[layer] for i, layer in enumerate(last.values())}
        self.blocks_path = None
        return tuple(last)


def _blocks_in(module: nn.Module, stack: str) -> str | None:
    """Path of the blocks of a part of the network ("": of all of it)."""
    found = find_blocks(module.get_submodule(stack))
    return f"{stack}.{found}" if stack and found else found


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


def _as_tensor(layer: str, value: Any) -> Tensor:
    while isinstance(value, tuple | list):  # T5's blocks return a tuple whose first tensor is the state
        value = value[0]
    if not isinstance(value, Tensor):
        raise SidebenchError(f"layer {layer} yields {type(value).__name__}, not a tensor; choose another layer.")
    return value


def _as_tokens(layer: str, value: Tensor) -> Tensor:
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
