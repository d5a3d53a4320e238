"""Partial fine-tuning: the last k blocks and the final norm train, as they are.
Yosinski, Clune, Bengio, Lipson. How transferable are features in deep neural networks?, NeurIPS 2014, arXiv 1411.1792;
"Partial-k" in VPT (Jia et al., ECCV 2022, arXiv 2203.12119, sec. 4.1).

Cached: the activation that enters block L-k; only the last k blocks are in memory. Starts at the pretrained function.
Trained: every weight of these blocks and the final norm that the final tokens depend on: k x 7.088 M + 1,536 at ViT-B.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..cache.architecture import Architecture
from ..cache.suffix import Suffix
from ._base import BackboneBody, Body, PrefixMethod, TrainingConfig, option


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Options of partial fine-tuning."""

    lr: float = option(5e-5, "peak learning rate (as full fine-tuning here: BERT's grid, arXiv 1810.04805 app. A.3)")
    weight_decay: float = option(0.01, "AdamW's weight decay (BERT, arXiv 1810.04805 app. A.2)")
    blocks: int = option(1, "k: how many blocks train, counted from the end (Partial-1 is VPT's baseline)")


class Partial(PrefixMethod):
    """Train the last blocks of the backbone."""

    Config: ClassVar[type] = Config
    projected = True
    paper = "partial fine-tuning, NeurIPS 2014, arXiv 1411.1792; Partial-1 as in VPT, arXiv 2203.12119"

    def first_block(self, arch: Architecture) -> int:
        """See PrefixMethod."""
        return arch.blocks - int(self.config.blocks)

    def refusal(self, arch: Architecture) -> str | None:
        """It needs as many blocks as it is to train."""
        if not 0 < self.config.blocks <= arch.blocks:
            return f"partial.blocks={self.config.blocks}, and {arch.name} has {arch.blocks} blocks"
        return None

    def build(self, suffix: Suffix) -> Body:
        """See PrefixMethod."""
        for parameter in suffix.used_parameters().values():
            parameter.requires_grad_(True)
        return BackboneBody(suffix)
