"""AdapterFusion: Non-Destructive Task Composition for Transfer Learning: its single adapter.
Pfeiffer, Kamath, Rücklé, Cho, Gurevych. EACL 2021, arXiv 2005.00247.

One bottleneck per block, h + up(relu(down(h))), after the MLP: on what it is about to add to the residual stream, or on
the block's output behind it. `up` starts at zero, so training starts at the pretrained function. (The adapters library
also has a form between the two, for blocks that normalise afterwards; it is not here.)
Nothing is cached: the gradient crosses the whole backbone. Trained: L (2 D b + b + D), b = D / reduction.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from ..cache.architecture import Architecture
from ..cache.backbone import Backbone
from ..cache.block_weights import block_modules
from ._base import Body, LiveConfig, LiveMethod, option
from ._live import AdaptedBody, Bottleneck, lacks_blocks


@dataclass(frozen=True)
class Config(LiveConfig):
    """Options of Pfeiffer's adapters."""

    lr: float = option(1e-3, "peak learning rate (ours, not tuned; --lr auto chooses one)")
    reduction: int = option(16, "r: a bottleneck is D / r wide (the adapters library's default, with ReLU)")
    residual: Literal["before", "after"] = option(
        "before", "whether the adapter sits before the MLP's residual sum or behind the whole block (default: ours)"
    )


class Pfeiffer(LiveMethod):
    """One bottleneck adapter after the MLP of every block."""

    Config: ClassVar[type] = Config
    paper = "AdapterFusion, EACL 2021, arXiv 2005.00247"

    def refusal(self, arch: Architecture) -> str | None:
        """It needs attention blocks, and a bottleneck of one or more."""
        width = arch.state_width
        if not 1 <= self.config.reduction <= width:
            return f"a bottleneck of {width} / {self.config.reduction} is none; reduction is 1 to {width}"
        return lacks_blocks(arch)

    def build(self, backbone: Backbone) -> Body:
        """See LiveMethod. Raises SidebenchError for blocks that are not one attention and one MLP."""
        width = backbone.arch.state_width
        adapters: list[nn.Module] = []
        for block in backbone.blocks:
            adapter = Bottleneck(width, width // self.config.reduction, nn.ReLU())
            adapter.extend(block_modules(block).after_mlp if self.config.residual == "before" else block)
            adapters.append(adapter)
        return AdaptedBody(backbone, adapters)
