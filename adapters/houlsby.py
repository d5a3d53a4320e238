"""Parameter-Efficient Transfer Learning for NLP: the adapter.
Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly. ICML 2019, arXiv 1902.00751.

Two bottlenecks per block: h + up(act(down(h))) on what attention, and on what the MLP, is about to add to the residual
stream (behind the layer scale where the backbone has one: ours). `up` starts at zero, so training starts at the
pretrained function. The paper trains the norms along; these adapters leave them frozen, as the adapters library does.
Nothing is cached: the gradient crosses the whole backbone. Trained: 2 L (2 D b + b + D), b = D / reduction.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..cache.architecture import Architecture
from ..cache.backbone import Backbone
from ..cache.block_weights import block_modules
from ._base import Body, Families, LiveConfig, LiveMethod, defaults, option
from ._live import AdaptedBody, Bottleneck, lacks_blocks


@dataclass(frozen=True)
class Config(LiveConfig):
    """Options of Houlsby's adapters."""

    families: ClassVar[Families] = {
        "glue": defaults("LST's baseline of such adapters for T5-base (it trains the norms along)", lr=3e-4)
    }
    lr: float = option(1e-3, "peak learning rate (ours, not tuned; --lr auto chooses one)")
    reduction: int = option(16, "r: a bottleneck is D / r wide (the adapters library's default, with swish)")


class Houlsby(LiveMethod):
    """Bottleneck adapters after attention and after the MLP of every block."""

    Config: ClassVar[type] = Config
    paper = "Adapters, ICML 2019, arXiv 1902.00751"

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
            parts = block_modules(block)
            for branch in (parts.after_attention, parts.after_mlp):
                adapter = Bottleneck(width, width // self.config.reduction, nn.SiLU())
                adapter.extend(branch)
                adapters.append(adapter)
        return AdaptedBody(backbone, adapters)
