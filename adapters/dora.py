"""DoRA: Weight-Decomposed Low-Rank Adaptation.
Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen. ICML 2024, arXiv 2402.09353.

LoRA with the length of every row of the weight apart: W becomes m (W + (alpha / rank) B A) / |W + (alpha / rank) B A|,
where the row lengths m start at |W| and train, and the denominator is held constant in backward. On query and value
projections, as LoRA here; the layers are peft's. B starts at zero, so training starts at the pretrained function.
Nothing is cached: the gradient crosses the whole backbone. Trained: 2 L (2 D rank + D) (square projections).
"""

from dataclasses import dataclass
from typing import ClassVar

from ..cache.architecture import Architecture
from ..cache.backbone import Backbone
from ._base import Body, LiveConfig, LiveMethod, option
from ._live import lacks_blocks, low_rank_body


@dataclass(frozen=True)
class Config(LiveConfig):
    """DoRA's options."""

    lr: float = option(3e-3, "peak learning rate (ours: as for LoRA here, not tuned for DoRA)")
    rank: int = option(8, "rank of the update (as LoRA here)")
    alpha: float = option(8.0, "the update is scaled by alpha / rank (peft's default 8)")


class DoRA(LiveMethod):
    """Low-rank updates of direction, and lengths, of the query and value projections."""

    Config: ClassVar[type] = Config
    two_stacks = True
    paper = "DoRA, ICML 2024, arXiv 2402.09353"

    def refusal(self, arch: Architecture) -> str | None:
        """It needs blocks, and a rank."""
        if self.config.rank < 1:
            return f"rank {self.config.rank} is no rank; 1 or more"
        return lacks_blocks(arch)

    def build(self, backbone: Backbone) -> Body:
        """See LiveMethod."""
        return low_rank_body(backbone, self.config.rank, self.config.alpha, dora=True)
