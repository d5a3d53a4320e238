"""LoRA: Low-Rank Adaptation of Large Language Models.
Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen. ICLR 2022, arXiv 2106.09685.

W x becomes W x + (alpha / rank) B A x on the query and value projections; A random, B zero, so training starts at the
pretrained function. The layers themselves are peft's. Nothing is cached: the gradient crosses the whole backbone.
Trained: 2 projections x L blocks x 2 x D x rank (square projections).
"""

from dataclasses import dataclass
from typing import ClassVar

from ..cache.backbone import Architecture, Backbone
from ..cache.block_weights import attention_projections
from ._base import BackboneBody, Body, LiveMethod, TrainingConfig, option


@dataclass(frozen=True)
class Config(TrainingConfig):
    """LoRA's options."""

    # LST's LoRA baseline on GLUE takes 3e-4 over many more steps, V-PETL's on VTAB-1k 5e-3.
    lr: float = option(3e-3, "peak learning rate (ours, for short runs: best of 3e-4, 1e-3, 3e-3 on MiniLM x tweets)")
    rank: int = option(8, "rank of the update")
    alpha: float = option(8.0, "the update is scaled by alpha / rank (peft's default 8)")


class LoRA(LiveMethod):
    """Low-rank updates on the query and value projections."""

    Config: ClassVar[type] = Config
    paper = "LoRA, ICLR 2022, arXiv 2106.09685"

    def refusal(self, arch: Architecture) -> str | None:
        """It needs blocks, and a rank."""
        if self.config.rank < 1:
            return f"rank {self.config.rank} is no rank; 1 or more"
        return None if arch.blocks else "it needs a backbone with attention blocks"

    def build(self, backbone: Backbone) -> Body:
        """See LiveMethod."""
        from peft import LoraConfig, inject_adapter_in_model

        targets = [
            f"{backbone.blocks_path}.{index}.{path}"
            for index, block in enumerate(backbone.blocks)
            for path in attention_projections(block, ("query", "value"))
        ]
        inject_adapter_in_model(
            LoraConfig(r=self.config.rank, lora_alpha=self.config.alpha, target_modules=targets, lora_dropout=0.0),
            backbone.module,
        )
        for name, parameter in backbone.module.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return BackboneBody(backbone)
