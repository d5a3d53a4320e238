"""LoRA: Low-Rank Adaptation of Large Language Models.
Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen. ICLR 2022, arXiv 2106.09685.

W x becomes W x + (alpha / rank) B A x on the query and value projections; A random, B zero, so training starts at the
pretrained function. The layers themselves are peft's. Nothing is cached: the gradient crosses the whole backbone.
Trained: 2 projections x L blocks x 2 x D x rank (square projections).
"""

from dataclasses import dataclass
from typing import ClassVar

from ..cache.backbone import Architecture, Backbone
from ._base import Body, LiveConfig, LiveMethod, option
from ._live import lacks_blocks, low_rank_body


@dataclass(frozen=True)
class Config(LiveConfig):
    """LoRA's options."""

    # LST's LoRA baseline on GLUE takes 3e-4 over many more steps, V-PETL's on VTAB-1k 5e-3.
    lr: float = option(3e-3, "peak learning rate (ours, for short runs: best of 3e-4, 1e-3, 3e-3 on MiniLM x tweets)")
    rank: int = option(8, "rank of the update")
    alpha: float = option(8.0, "the update is scaled by alpha / rank (peft's default 8)")


class LoRA(LiveMethod):
    """Low-rank updates on the query and value projections."""

    Config: ClassVar[type] = Config
    two_stacks = True
    paper = "LoRA, ICLR 2022, arXiv 2106.09685"

    def refusal(self, arch: Architecture) -> str | None:
        """It needs blocks, and a rank."""
        if self.config.rank < 1:
            return f"rank {self.config.rank} is no rank; 1 or more"
        return lacks_blocks(arch)

    def build(self, backbone: Backbone) -> Body:
        """See LiveMethod."""
        return low_rank_body(backbone, self.config.rank, self.config.alpha)
