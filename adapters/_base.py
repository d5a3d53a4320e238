"""What a method is: its configuration, what it reads, and how it turns a batch into tokens or a vector.

The three kinds differ in what stays in memory while training. The kind is the class, not a flag:
`CachedMethod` and `FittedMethod` read activations from a store, `LiveMethod` holds the whole backbone.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from ..cache.backbone import Architecture, Backbone
from ..cache.block_weights import BackboneWeights
from ..cache.encode import Stored
from ..cache.errors import SidebenchError, unknown
from ..cache.preprocess import Inputs

Kind = Literal["cached", "prefix", "live"]
WeightsLoader = Callable[[], BackboneWeights]
"""Loads the backbone, copies its weights and lets go of it: for initialisations only."""


def option(default: Any, help: str) -> Any:
    """A field of a Config: its default and the sentence that `bench methods` prints, with the default's source."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainingConfig:
    """Options of every method trained in the common loop; a method's Config overrides defaults with their source."""

    lr: float = option(1e-3, "peak learning rate")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay")


@dataclass(frozen=True)
class Batch:
    """What a method sees. mask: (B, T) bool, real tokens. Cached: activations per layer (B, T, D) in storage dtype.

    Live: `inputs` for the backbone. Neither holds targets: a method cannot see them.
    """

    mask: Tensor
    activations: Mapping[str, Stored] = dataclasses.field(default_factory=dict)
    inputs: Inputs = dataclasses.field(default_factory=dict)

    def state(self, layer: str) -> Tensor:
        """(B, T, D) activations of `layer` in float32."""
        return self.activations[layer].float()

    def rows(self, rows: slice) -> "Batch":
        """These examples alone, as views in storage dtype."""
        taken = {name: activations[rows] for name, activations in self.activations.items()}
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        return dataclasses.replace(self, mask=self.mask[rows], activations=taken, inputs=inputs)


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

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    def refusal(self, arch: Architecture) -> str | None:
        """Why this method cannot work on such a backbone, said before anything runs; None when it can."""
        return None


class CachedMethod(Method):
    """Trained from a store; the backbone is not in memory."""

    kind: ClassVar[Kind] = "cached"

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """The layers it reads. Default: the L hidden states."""
        return arch.states

    @abstractmethod
    def build(self, arch: Architecture, widths: Mapping[str, int], weights: WeightsLoader) -> Body:
        """The side network, freshly initialised from torch's (seeded) generator. `widths`: D of each layer."""


class FittedMethod(Method):
    """Solved to convergence on one feature vector per example instead of trained in steps."""

    kind: ClassVar[Kind] = "cached"

    @abstractmethod
    def fit(
        self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], num_outputs: int
    ) -> tuple[nn.Module, dict[str, Any]]:
        """From (features (N, D), targets (N,)) to a module features -> logits (N, K), and what was chosen on `val`."""


class LiveMethod(Method):
    """Trained through the whole backbone, which stays in memory and is back-propagated through."""

    kind: ClassVar[Kind] = "live"

    @abstractmethod
    def build(self, backbone: Backbone) -> Body:
        """Change the backbone in place: what trains requires a gradient, all else does not."""


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


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def configured(method_name: str, config_class: type, settings: Mapping[str, str]) -> Any:
    """A Config with `settings` (KEY=VALUE as typed) over its defaults.

    Raises SidebenchError for an unknown key or a value that does not fit its type.
    """
    hints = get_type_hints(config_class)
    known = {field.name: field for field in dataclasses.fields(config_class)}
    values = {}
    for key, text in settings.items():
        if key not in known:
            raise unknown(f"option of {method_name}", key, known)
        values[key] = _parsed(f"{method_name}.{key}", text, hints[key])
    return config_class(**values)


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
