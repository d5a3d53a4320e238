"""Full fine-tuning: every weight trains. The upper end of cost, and for most methods the accuracy to reach.

As in BERT (Devlin et al., NAACL 2019, arXiv 1810.04805, sec. 4) and ViT (Dosovitskiy et al., ICLR 2021).
Trained: every parameter the final tokens depend on; a pooler or mask token that nothing reads is left out.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..cache.backbone import Backbone
from ._base import BackboneBody, Body, Families, LiveConfig, LiveMethod, defaults, option

_VPT = defaults(
    "VPT's code: the smallest of its rates 1e-4, 5e-4, 1e-3, 5e-3 (to take that one is ours); 5 of 100 epochs warm up",
    lr=1e-4,
    warm_up=0.05,
)


@dataclass(frozen=True)
class Config(LiveConfig):
    """Options of full fine-tuning."""

    families: ClassVar[Families] = {"vtab": _VPT, "fgvc": _VPT}
    lr: float = option(5e-5, "peak learning rate (the largest of BERT's fine-tuning grid, arXiv 1810.04805 app. A.3)")
    weight_decay: float = option(0.01, "AdamW's weight decay (BERT, arXiv 1810.04805 app. A.2)")


class FullFineTuning(LiveMethod):
    """Train every weight of the backbone."""

    Config: ClassVar[type] = Config
    two_stacks = True
    paper = "full fine-tuning, as in BERT, NAACL 2019, arXiv 1810.04805"

    def build(self, backbone: Backbone) -> Body:
        """See LiveMethod."""
        for parameter in backbone.used_parameters().values():
            parameter.requires_grad_(True)
        return BackboneBody(backbone)
