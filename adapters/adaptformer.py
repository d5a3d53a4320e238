"""AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition.
Chen, Ge, Tong, Wang, Song, Wang, Luo. NeurIPS 2022, arXiv 2205.13535.

A bottleneck beside the MLP: x + MLP(LN x) becomes x + MLP(LN x) + s up(relu(down(x))). It has no norm of its own, so it
reads the residual stream itself; in a block that normalises after the sum (BERT: ours) that is what the MLP reads too.
`down` starts as Kaiming's, `up` at zero: training starts at the pretrained function. A layer scale does not touch it.
Nothing is cached: the gradient crosses the whole backbone. Trained: L (2 D b + b + D).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..cache.architecture import Architecture
from ..cache.backbone import Backbone
from ..cache.block_weights import BlockModules, block_modules
from ._base import Body, Families, LiveConfig, LiveMethod, defaults, option
from ._live import AdaptedBody, Bottleneck, lacks_blocks


@dataclass(frozen=True)
class Config(LiveConfig):
    """AdaptFormer's options."""

    families: ClassVar[Families] = {"vtab": defaults("the width that benchmarks on VTAB-1k give it", bottleneck=8)}
    lr: float = option(1e-3, "peak learning rate (ours, not tuned; --lr auto chooses one)")
    bottleneck: int = option(64, "b: width of the bottleneck (the paper's)")
    scale: float = option(0.1, "s: factor on what is added (the paper's)")


class AdaptFormer(LiveMethod):
    """A scaled bottleneck adapter in parallel to the MLP of every block."""

    Config: ClassVar[type] = Config
    paper = "AdaptFormer, NeurIPS 2022, arXiv 2205.13535"

    def refusal(self, arch: Architecture) -> str | None:
        """It needs attention blocks that say where they normalise."""
        if self.config.bottleneck < 1 or self.config.scale == 0:
            return f"a bottleneck of {self.config.bottleneck} times {self.config.scale:g} adds nothing"
        if not arch.norm:
            return "it needs a backbone of which it is known whether a block normalises before or after the sum"
        return lacks_blocks(arch)

    def build(self, backbone: Backbone) -> Body:
        """See LiveMethod. Raises SidebenchError for blocks that are not one attention and one MLP."""
        adapters: list[nn.Module] = []
        for block in backbone.blocks:
            adapter = Parallel(backbone.arch.state_width, self.config.bottleneck, self.config.scale)
            adapter.join(block_modules(block), pre_norm=backbone.arch.norm == "pre")
            adapters.append(adapter)
        return AdaptedBody(backbone, adapters)


class Parallel(Bottleneck):
    """Takes what enters the MLP's branch and adds to what leaves it."""

    def __init__(self, width: int, hidden: int, scale: float) -> None:
        super().__init__(width, hidden, nn.ReLU())
        self.scale = scale
        self._entered: Tensor | None = None  # within one block's forward

    def join(self, parts: BlockModules, *, pre_norm: bool) -> None:
        """Hook into a block."""
        first = parts.norm2 if pre_norm else parts.mlp_in[0]
        first.register_forward_pre_hook(self._take)
        parts.after_mlp.register_forward_hook(self._add)

    def _take(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._entered = args[0]

    def _add(self, _: nn.Module, __: Any, out: Tensor) -> Tensor:
        x, self._entered = self._entered, None
        assert x is not None
        return out + self.scale * self(x)
