"""LoRA: Low-Rank Adaptation of Large Language Models.
Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen. ICLR 2022, arXiv 2106.09685.

W x becomes W x + (alpha / rank) B A x on the query and value projections; A random, B zero, so training starts at the
pretrained function. The layers themselves are peft's. Nothing is cached: the gradient crosses the whole backbone.
Trained: 2 projections x L blocks x 2 x D x rank (square projections).
Ours, on a convolutional network of bottlenecks: the same on every 1 x 1 convolution in them, the projections of their
identities among them; C_in to C_out channels train rank (C_in + C_out). The larger convolutions stay as they are.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..cache.architecture import Architecture
from ..cache.backbone import Backbone
from ._base import Body, Families, LiveConfig, LiveMethod, defaults, option
from ._live import lacks_blocks, low_rank_body


@dataclass(frozen=True)
class Config(LiveConfig):
    """LoRA's options."""

    families: ClassVar[Families] = {
        "glue": defaults(
            "LST's LoRA baseline for T5-base (it trains the biases along); alpha is ours: its was not read",
            lr=3e-4,
            rank=32,
            alpha=32.0,
        ),
        "vtab": defaults("V-PETL Bench's recipe for CIFAR (it sets both per data set)", lr=5e-3, weight_decay=5e-3),
    }
    lr: float = option(3e-3, "peak learning rate (ours, for short runs: best of 3e-4, 1e-3, 3e-3 on MiniLM x tweets)")
    rank: int = option(8, "rank of the update")
    alpha: float = option(8.0, "the update is scaled by alpha / rank (peft's default 8)")


class LoRA(LiveMethod):
    """Low-rank updates on the query and value projections."""

    Config: ClassVar[type] = Config
    two_stacks = True
    paper = "LoRA, ICLR 2022, arXiv 2106.09685"

    def refusal(self, arch: Architecture) -> str | None:
        """It needs attention blocks or bottlenecks, and a rank."""
        if self.config.rank < 1:
            return f"rank {self.config.rank} is no rank; 1 or more"
        return None if arch.bottlenecks else lacks_blocks(arch)

    def build(self, backbone: Backbone) -> Body:
        """See LiveMethod."""
        return low_rank_body(backbone, self.config.rank, self.config.alpha)
