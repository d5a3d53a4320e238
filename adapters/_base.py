"""What a method is: its configuration, what it reads, and how it turns a batch into tokens or a vector.

The three kinds differ in what stays in memory while training. The kind is the class, not a flag:
`CachedMethod` and `FittedMethod` read activations from a store, `PrefixMethod` reads the one that enters block k and
holds the blocks from there on, `LiveMethod` holds the whole backbone.
"""

import dataclasses
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from ..cache.architecture import Architecture
from ..cache.backbone import Backbone
from ..cache.block_weights import BackboneWeights
from ..cache.encode import Stored, tensors_of
from ..cache.errors import SidebenchError, unknown
from ..cache.preprocess import Inputs
from ..cache.suffix import ENTERING, MASK, Suffix, entering
from ._checkpoint import checkpoint_blocks

Kind = Literal["cached", "prefix", "live"]
WeightsLoader = Callable[[], BackboneWeights]
"""Loads the backbone, copies its weights and lets go of it: for initialisations, and for what `runs_blocks`."""


def option(default: Any, help: str) -> Any:
    """A field of a Config: its default and the sentence that `bench methods` prints, with the default's source."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Defaults:
    """What a family of tasks changes in a method's defaults, and who trains it so there."""

    source: str
    options: Mapping[str, Any]


Families = Mapping[str, Defaults]
"""By family, the name of a benchmark (bench.tasks.load.FAMILIES): what a Config's `families` holds."""


def defaults(source: str, **options: Any) -> Defaults:
    """The entry of a family in a Config's `families`."""
    return Defaults(source, options)


@dataclass(frozen=True)
class TrainingConfig:
    """Options of every method trained in the common loop; a method's Config overrides defaults with their source."""

    families: ClassVar[Families] = {}
    lr: float = option(1e-3, "peak learning rate")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay")
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", "the learning rate falls to zero along half a cosine or a line, or stays"
    )
    warm_up: float = option(0.1, "share of the steps in which the learning rate rises linearly")

    def __post_init__(self) -> None:
        if not 0 <= self.warm_up <= 1:
            raise SidebenchError(f"warm_up is a share of the steps, 0 to 1; found {self.warm_up:g}.")


@dataclass(frozen=True)
class LiveConfig(TrainingConfig):
    """What every method trained through the backbone offers besides, because a tuned baseline is the honest one."""

    checkpointing: bool = option(
        False, "keep only what enters each block and compute the rest again in backward: less memory, more time"
    )
    optimizer: Literal["adamw", "adamw8bit"] = option(
        "adamw", "adamw8bit keeps AdamW's state in 8 bits, by bitsandbytes (the extra sidebench[8bit])"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise SidebenchError(
                "optimizer=adamw8bit needs bitsandbytes, which is not installed: pip install 'sidebench[8bit]'."
            )


@dataclass(frozen=True)
class Batch:
    """What a method sees. mask: (B, T) bool, real tokens. Cached: activations per layer (B, T, D) in storage dtype.

    Layers may differ in tokens: `mask` is the final layer's (the last one's that was read, where that was not), and
    `mask_of` gives each its own.

    Live: `inputs` for the backbone. Prefix: both, the inputs being the suffix's. None holds targets: a method is not to
    see them.
    """

    mask: Tensor
    activations: Mapping[str, Stored] = dataclasses.field(default_factory=dict)
    inputs: Inputs = dataclasses.field(default_factory=dict)
    masks: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def mask_of(self, layer: str) -> Tensor:
        """(B, T) real tokens of `layer`."""
        return self.masks.get(layer, self.mask)

    def state(self, layer: str) -> Tensor:
        """(B, T, D) activations of `layer` in float32."""
        return self.activations[layer].float()

    def entering(self, layer: str) -> "Batch":
        """The same, with the inputs of a suffix that `layer` enters."""
        state = self.activations[layer]
        inputs = {ENTERING: state if isinstance(state, Tensor) else state.float(), MASK: self.mask_of(layer)}
        return dataclasses.replace(self, inputs=inputs)

    def tensors(self) -> list[Tensor]:
        """Everything that takes memory."""
        stored = [part for layer in self.activations.values() for part in tensors_of(layer)]
        return [self.mask, *self.masks.values(), *stored, *self.inputs.values()]

    def shapes(self) -> Any:
        """What the memory of a step on it depends on; a mask that hides nothing may be dropped by the network."""
        activations = tuple(
            (layer, tuple(tuple(tensor.shape) for tensor in tensors_of(stored)))
            for layer, stored in self.activations.items()
        )
        inputs = tuple((name, tuple(value.shape)) for name, value in self.inputs.items())
        return tuple(self.mask.shape), bool(self.mask.all()), activations, inputs

    def rows(self, rows: slice) -> "Batch":
        """These examples alone, as views in storage dtype."""
        taken = {name: activations[rows] for name, activations in self.activations.items()}
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        masks = {name: mask[rows] for name, mask in self.masks.items()}
        return dataclasses.replace(self, mask=self.mask[rows], activations=taken, inputs=inputs, masks=masks)


class Body(nn.Module):
    """A method's network: forward(Batch) -> tokens (B, T, width) where the backbone has them, or (B, width)."""

    width: int

    def forward(self, batch: Batch) -> Tensor:
        """See the class."""
        raise NotImplementedError


class Method(ABC):
    """One method with its configuration. The file's name is the method's name."""

    Config: ClassVar[type] = TrainingConfig
    kind: ClassVar[Kind]
    paper: ClassVar[str] = "no paper named"
    two_stacks: ClassVar[bool] = False
    """Whether it works on an encoder-decoder; one that does not is refused there."""
    projected: ClassVar[bool] = False
    """Whether it works where the final layer is one projected embedding per example (CLIP's), not tokens."""

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    def refusal(self, arch: Architecture) -> str | None:
        """Why this method cannot work on such a backbone, said before anything runs; None when it can."""
        return None


class CachedMethod(Method):
    """Trained from a store; the backbone is not in memory."""

    kind: ClassVar[Kind] = "cached"
    runs_blocks: ClassVar[bool] = False
    """Whether it runs frozen copies of the backbone's blocks, from `weights()`, on cached states of every token."""

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """The layers it reads. Default: the L hidden states."""
        return arch.states

    @property
    def gradient_examples(self) -> int:
        """Of how many training examples `weights()` is to bring the summed squared gradients along (`importance`).

        That back-propagates through the whole backbone once, before training, so it is 0 but for what says so aloud.
        """
        return 0

    @abstractmethod
    def build(self, arch: Architecture, widths: Mapping[str, int], weights: WeightsLoader) -> Body:
        """The side network, freshly initialised from torch's (seeded) generator. `widths`: D of each layer."""


class FittedMethod(Method):
    """Solved on one feature vector per example, all in memory at once, instead of trained in steps."""

    kind: ClassVar[Kind] = "cached"
    projected: ClassVar[bool] = True

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.score: Callable[[Tensor, Tensor], float] = _agreement  # the task's takes its place: `fit` chooses by it

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """The layers whose pooled rows it reads. Default: the one a head would read."""
        return (arch.final_layer,)

    def features(self, pooled: Mapping[str, Tensor], column: int) -> Tensor:
        """(N, D) float32 from each layer's stored rows (N, 2, D_l): the first token, and the mean over real tokens.

        Default: the rows of its layer that the task pools (`column`). Of no examples it has the right width, too.
        """
        (rows,) = pooled.values()
        return rows[:, column].float()

    def brief(self) -> "FittedMethod":
        """The same, cut down to what shows its peak memory, which is measured by solving. Default: nothing cut."""
        return self

    def kept(self, width: int) -> int:
        """How many of `width` features `brief` goes on with. Default: all."""
        return width

    @abstractmethod
    def fit(
        self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], num_outputs: int
    ) -> tuple[nn.Module, dict[str, Any]]:
        """From (features (N, D), targets (N,)) to a module features -> outputs (N, K), and what was chosen on `val`.

        Targets are class indices, or numbers in floating point (K = 1); see `task_loss`.
        """


class PrefixMethod(Method):
    """Trained from the activation that enters block k, through the blocks from there on; earlier ones are absent."""

    kind: ClassVar[Kind] = "prefix"

    @abstractmethod
    def first_block(self, arch: Architecture) -> int:
        """k: the first block that it holds."""

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """The layers it reads, the one that enters block k among them. Default: that one alone."""
        return (entering(arch, self.first_block(arch)),)

    @abstractmethod
    def build(self, suffix: Suffix) -> Body:
        """Change the suffix in place: what trains requires a gradient, all else does not."""


class LiveMethod(Method):
    """Trained through the whole backbone, which stays in memory and is back-propagated through."""

    Config: ClassVar[type] = LiveConfig
    kind: ClassVar[Kind] = "live"
    projected: ClassVar[bool] = True

    @abstractmethod
    def build(self, backbone: Backbone) -> Body:
        """Change the backbone in place: what trains requires a gradient, all else does not."""

    def network(self, backbone: Backbone) -> Body:
        """What is trained: `build`, and then what every live method offers (`LiveConfig`). Call this one."""
        body = self.build(backbone)
        if getattr(self.config, "checkpointing", False):  # a method from outside may have a Config of its own
            checkpoint_blocks(backbone)
        return body


class BackboneBody(Body):
    """The backbone's own final tokens. Its dropout stays off, as for every method."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.module = backbone.module
        self.width = backbone.arch.width
        self._backbone = backbone  # not a module: registered once, as `module`

    def forward(self, batch: Batch) -> Tensor:
        """Final tokens (B, T, D)."""
        return self._backbone.tokens(batch.inputs)

    def train(self, mode: bool = True) -> "BackboneBody":
        """Keep the backbone in eval mode, whatever the loop asks for."""
        super().train(mode)
        self.module.eval()
        return self


def task_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The task's loss of outputs (N, K): mean cross-entropy of classes (N,), mean squared error of numbers (N,)."""
    if targets.is_floating_point():
        return (outputs[:, 0] - targets).square().mean()
    return nn.functional.cross_entropy(outputs, targets)


def _agreement(outputs: Tensor, targets: Tensor) -> float:
    """Share of right classes; of numbers the negative squared error."""
    if targets.is_floating_point():
        return -float(task_loss(outputs, targets))
    return float((outputs.argmax(1) == targets).double().mean())


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def family_defaults(config_class: type, family: str | None) -> Defaults:
    """What a Config says of a family of tasks; nothing, where it says nothing."""
    families: Families = getattr(config_class, "families", {})
    return families.get(family or "", Defaults("", {}))


def configured(method_name: str, config_class: type, settings: Mapping[str, str], family: str | None = None) -> Any:
    """A Config with `settings` (KEY=VALUE as typed) over its defaults, those for the family of tasks going first.

    Raises SidebenchError for an unknown key or a value that does not fit its type.
    """
    hints = get_type_hints(config_class)
    known = {field.name: field for field in dataclasses.fields(config_class)}
    chosen = family_defaults(config_class, family).options
    for key in (*chosen, *settings):
        if key not in known:
            raise unknown(f"option of {method_name}", key, known)
    typed = {key: _parsed(f"{method_name}.{key}", text, hints[key]) for key, text in settings.items()}
    return config_class(**{**chosen, **typed})


def _parsed(name: str, text: str, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise unknown(f"value of {name}", text, get_args(hint))
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise SidebenchError(f"{name} is true or false; found {text!r}.")
        return text.lower() == "true"
    if hint not in (int, float, str):
        raise SidebenchError(
            f"{name} is of type {hint}, which cannot be set from text; int, float, str, bool, Literal can."
        )
    try:
        value = hint(text)
    except ValueError:
        raise SidebenchError(f"{name} wants {hint.__name__}; found {text!r}.") from None
    if hint in (int, float) and not 0 <= value < float("inf"):
        raise SidebenchError(f"{name} wants a finite {hint.__name__} of 0 or more; found {text!r}.")
    return value


def describe_config(config_class: type) -> dict[str, dict[str, Any]]:
    """Default and help of every option, read from the Config itself."""
    return {
        field.name: {"default": field.default, "help": field.metadata.get("help", "")}
        for field in dataclasses.fields(config_class)
    }


def describe_families(config_class: type) -> dict[str, dict[str, Any]]:
    """What each family of tasks changes in the defaults, and the source."""
    families: Families = getattr(config_class, "families", {})
    return {name: dataclasses.asdict(found) for name, found in families.items()}
