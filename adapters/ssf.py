"""SSF: Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning.
Lian, Zhou, Feng, Wang. NeurIPS 2022, arXiv 2210.08823.

What every operation yields is scaled and shifted per channel, x g + b: norms, query, key, value, attention's output,
both MLP projections, the patch embedding, the final norm; a text's embedding is left alone (ours). g starts around 1
and b around 0 with a spread of 0.02, so training starts near the pretrained function, not at it.
Nothing is cached: the gradient crosses the whole backbone. Trained: 22 L D + 4 D at the usual MLP width 4 D, with
patches and a final norm; that is 2 (7 D + MLP width) per block and 2 D for either.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture
from ..cache.backbone import Backbone
from ..cache.block_weights import BlockModules, block_modules
from ._base import BackboneBody, Body, LiveConfig, LiveMethod, option
from ._live import lacks_blocks


@dataclass(frozen=True)
class Config(LiveConfig):
    """SSF's options."""

    lr: float = option(1e-3, "peak learning rate (ours, not tuned; --lr auto chooses one)")
    spread: float = option(0.02, "standard deviation of scales around 1 and shifts around 0 at the start (the paper's)")


class SSF(LiveMethod):
    """Scale and shift the output of every operation, per channel."""

    Config: ClassVar[type] = Config
    paper = "SSF, NeurIPS 2022, arXiv 2210.08823"

    def refusal(self, arch: Architecture) -> str | None:
        """It needs attention blocks."""
        return lacks_blocks(arch)

    def build(self, backbone: Backbone) -> Body:
        """See LiveMethod. Raises SidebenchError for blocks that are not one attention and one MLP."""
        return ScaledBody(backbone, self.config.spread)


class ScaledBody(BackboneBody):
    """The backbone with scales and shifts at work in it."""

    def __init__(self, backbone: Backbone, spread: float) -> None:
        super().__init__(backbone)

        def scaled(module: nn.Module, channels: int, axis: int = -1) -> ScaleShift:
            scale = ScaleShift(channels, axis, spread)
            module.register_forward_hook(partial(_scaled, scale))
            return scale

        self.patches = nn.ModuleList(scaled(conv, conv.out_channels, axis=1) for conv in _used_convolutions(backbone))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: scaled(module, channels) for name, module, channels in _operations(block_modules(b))})
            for b in backbone.blocks
        )
        self.norm: nn.Module | None = None
        if backbone.final_layer == "norm":
            self.norm = scaled(backbone.module.get_submodule(backbone.tap_path("norm")), self.width)


class ScaleShift(nn.Module):
    """x g + b along one axis."""

    def __init__(self, channels: int, axis: int, spread: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + spread * torch.randn(channels))
        self.bias = nn.Parameter(spread * torch.randn(channels))
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return x * self.weight.view(shape) + self.bias.view(shape)


def _scaled(scale: ScaleShift, _: nn.Module, __: Any, out: Tensor) -> Tensor:
    return scale(out)


def _operations(parts: BlockModules) -> list[tuple[str, nn.Module, int]]:
    """(name, module, channels) of all that a block computes with weights."""
    linears = {"query": parts.query, "key": parts.key, "value": parts.value, "out": parts.out}
    linears |= {f"mlp{index}": linear for index, linear in enumerate((*parts.mlp_in, parts.mlp_out))}
    norms = {"norm1": parts.norm1, "norm2": parts.norm2}
    width = parts.out.out_features
    return [
        *((name, linear, linear.out_features) for name, linear in linears.items()),
        *((name, norm, width) for name, norm in norms.items()),
    ]


def _used_convolutions(backbone: Backbone) -> list[nn.Conv2d]:
    """The patch embedding, where the backbone has one and its output depends on it."""
    used = {id(parameter) for parameter in backbone.used_parameters().values()}
    return [m for m in backbone.module.modules() if isinstance(m, nn.Conv2d) and id(m.weight) in used]
