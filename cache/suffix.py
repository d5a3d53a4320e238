"""The last blocks of a backbone, restarted from a cached activation: what a prefix method trains through.

The model's own forward runs, so masks and positions stay right; what comes before block k is passed over and its
weights are let go. At the same batch shape the outcome equals the whole forward's, bit for bit on a CPU.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .architecture import BEFORE_LAST, Architecture
from .backbone import Backbone, Sink, as_tokens
from .errors import SidebenchError
from .preprocess import Inputs

ENTERING, MASK = "entering", "mask"
"""Keys of a suffix's inputs: the activation (B, T, D) that enters its first block, and the real tokens (B, T)."""


def entering_layer(first: int) -> str:
    """The layer whose activation enters block `first`."""
    return f"blocks.{first - 1}" if first else "embeddings"


def entering(arch: Architecture, first: int) -> str:
    """The same of a convolutional network too, of which the last bottleneck alone can be restarted."""
    return BEFORE_LAST if arch.stages else entering_layer(first)


def restarted(whole: Backbone, first: int) -> "Suffix":
    """What a prefix method trains through, of whatever backbone; the one given is used up."""
    return LastBottleneck(whole) if whole.arch.stages else Suffix(whole, first)


class Suffix(Backbone):
    """Blocks `first` … L-1 of a backbone and what follows them; the backbone given is used up.

    `arch` and the layers' names stay those of the whole network, `blocks` are the kept ones, and `tokens` takes
    {ENTERING, MASK}. Raises SidebenchError when the forward does not come out as that of the whole network: one with
    connections around its blocks, say.
    """

    def __init__(self, whole: Backbone, first: int) -> None:
        if not 0 <= first < len(whole.blocks):
            raise SidebenchError(
                f"{whole.arch.name} has blocks 0 to {len(whole.blocks) - 1}; there is no block {first}."
            )
        vars(self).update(vars(whole))
        self.first = first
        self._state: Tensor | None = None
        entering, final = entering_layer(first), self.final_layer
        fake = isinstance(next(self.module.parameters()), FakeTensor)
        with torch.no_grad():
            shown = _shown(whole, [entering, final])
            self._example = shown[entering]
            self._shape = self._entering_shape(whole)
            self._skip(whole)
            _move_position_bias(self._all_blocks(), first)
            self._all_blocks()[first].register_forward_pre_hook(self._enter, with_kwargs=True)
            _release(self.module, set(self.used_parameters()))
            if not fake and not torch.equal(self.tokens(self.dummy()), shown[final]):
                raise SidebenchError(
                    f"{whole.arch.name} cannot be restarted at block {first}: its forward from there comes out "
                    "differently, so something besides the blocks' input crosses from the earlier ones."
                )

    @property
    def block_paths(self) -> list[str]:
        """Dotted module path of every kept block, in the order of `blocks`."""
        return super().block_paths[self.first :]

    def dummy(self) -> Inputs:
        """An entering activation of one example."""
        state = self._example.to(self.device)
        return {ENTERING: state, MASK: torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)}

    def run(self, inputs: Inputs, layers: Iterable[str], sink: Sink) -> None:
        """See Backbone; `inputs` are {ENTERING, MASK}, and layers before the first block are out of reach."""
        state = inputs[ENTERING].float()
        # A convolutional map (B, C, H, W) is kept as (B, H W, C).
        self._state = state if len(self._shape) == 3 else state.mT.unflatten(2, self._shape[2:])
        try:
            super().run(self._placeholders(inputs), layers, sink)
        finally:
            self._state = None

    def _all_blocks(self) -> list[nn.Module]:
        return [self.module.get_submodule(path) for path in super().block_paths]

    def _entering_shape(self, whole: Backbone) -> torch.Size:
        """Shape of what enters the first kept block, of one example, as that block sees it."""
        shapes: list[torch.Size] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            shapes.append((args[0] if args else kwargs["hidden_states"]).shape)

        hook = self._all_blocks()[self.first].register_forward_pre_hook(note, with_kwargs=True)
        _shown(whole, [entering_layer(self.first + 1)])
        hook.remove()
        return shapes[0]

    def _skip(self, whole: Backbone) -> None:
        """Let everything before the first kept block that yields a state hand on the entering one."""
        outputs = _outputs(whole, entering_layer(len(self._all_blocks())))
        before = _outputs(whole, "embeddings")
        outermost = [path for path in before if not any(path.startswith(f"{other}.") for other in before)]
        early = [path for path in outermost if before[path] == self._shape]
        for path in (*early, *(f"{self.blocks_path}.{index}" for index in range(self.first))):
            self.module.get_submodule(path).forward = self._passing(outputs[path])

    def _passing(self, output: torch.Size | int) -> Callable[..., Any]:
        def forward(*_: Any, **__: Any) -> Any:
            return self._entered() if isinstance(output, torch.Size) else (self._entered(), *[None] * (output - 1))

        return forward

    def _entered(self) -> Tensor:
        if self._state is None:
            raise SidebenchError("the restarted blocks were run without an entering activation.")
        return self._state

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._entered(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._entered()}

    def _placeholders(self, inputs: Inputs) -> Inputs:
        """Inputs of the whole network, of the right shape and without content: nothing that looks at them is left."""
        state = inputs[ENTERING]
        found = {}
        for name, one in self.preprocess.dummy(state.device).items():
            if name == "attention_mask":
                found[name] = inputs[MASK].to(one.dtype)
            elif self.arch.modality == "text":
                found[name] = one[:1, :1].expand(state.shape[:2])
            else:
                found[name] = one.expand(len(state), *one.shape[1:])
        return found


class LastBottleneck(Suffix):
    """The last bottleneck of a convolutional network made of them; `tokens` takes {ENTERING, MASK} as of a Suffix.

    `widths` has the channels of every map of the whole network. Raises SidebenchError where its output is not the
    network's last map.
    """

    def __init__(self, whole: Backbone) -> None:
        if not whole.arch.bottlenecks:
            raise SidebenchError(f"{whole.arch.name} has no bottlenecks whose last one could be restarted.")
        vars(self).update(vars(whole))
        self.first = 0
        self._grid = whole.arch.stages[-1]
        with torch.no_grad():
            shown = _shown(whole, whole.layers)
        self.widths = {layer: value.shape[-1] for layer, value in shown.items()}
        self._example = shown[BEFORE_LAST]
        stage = whole.module.get_submodule(whole.tap_path(self.final_layer))
        self.module = whole.module = list(stage.children())[-1]  # the rest is let go
        with torch.no_grad():
            fake = isinstance(self._example, FakeTensor)
            if not fake and not torch.equal(self.tokens(self.dummy()), shown[self.final_layer]):
                raise SidebenchError(
                    f"{whole.arch.name} cannot be restarted at its last bottleneck, which does not yield its last map."
                )

    def run(self, inputs: Inputs, layers: Iterable[str], sink: Sink) -> None:
        """See Backbone; `inputs` are {ENTERING, MASK}, and the last map alone is within reach."""
        if set(layers) != {self.final_layer}:
            raise SidebenchError(f"of {self.arch.name}'s last bottleneck alone {self.final_layer} can be read.")
        # Contiguous as in the whole network, so that the same kernels run.
        out = self.module(inputs[ENTERING].float().mT.unflatten(2, self._grid).contiguous())
        sink(self.final_layer, as_tokens(self.final_layer, out))


def _outputs(whole: Backbone, layer: str) -> dict[str, torch.Size | int]:
    """Of every module that has run to its end when `layer` appears: its output's shape, or how long a tuple it is."""
    found: dict[str, torch.Size | int] = {}

    def noting(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor | tuple):
                found[path] = output.shape if isinstance(output, Tensor) else len(output)

        return hook

    hooks = [module.register_forward_hook(noting(path)) for path, module in whole.module.named_modules() if path]
    try:
        _shown(whole, [layer])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _shown(whole: Backbone, layers: Iterable[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    whole.run(
        whole.preprocess.dummy(whole.device), layers, lambda layer, value: found.__setitem__(layer, value.clone())
    )
    return found


def _move_position_bias(blocks: list[nn.Module], first: int) -> None:
    """T5's block 0 computes the relative position bias that all blocks share; now the first kept one has to."""
    for path, module in blocks[0].named_modules():
        if first and getattr(module, "has_relative_attention_bias", False):
            heir = blocks[first].get_submodule(path)
            heir.relative_attention_bias = module.relative_attention_bias
            heir.has_relative_attention_bias = True  # type: ignore[assignment]
            del module.relative_attention_bias


def _release(module: nn.Module, used: set[str]) -> None:
    """Let go of the weights that the final tokens no longer depend on."""
    kept = {id(parameter) for name, parameter in module.named_parameters() if name in used}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in kept:
                part._parameters[name] = nn.Parameter(parameter.new_empty(0), requires_grad=False)
