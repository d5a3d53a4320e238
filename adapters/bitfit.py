"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models.
Ben Zaken, Ravfogel, Goldberg. ACL 2022, arXiv 2106.10199.

Only the biases train: of projections, MLPs, norms and the patch embedding. Starts at the pretrained function.
Nothing is cached: the gradient crosses the whole backbone. Trained: every bias the final tokens depend on.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..cache.backbone import Backbone
from ..cache.errors import SidebenchError
from ._base import BackboneBody, Body, LiveConfig, LiveMethod, option


@dataclass(frozen=True)
class Config(LiveConfig):
    """BitFit's options."""

    # LST's BitFit baseline on GLUE takes 3e-4 over many more steps.
    lr: float = option(3e-3, "peak learning rate (ours, for short runs: best of 3e-4, 1e-3, 3e-3 on MiniLM x tweets)")


class BitFit(LiveMethod):
    """Train the backbone's biases."""

    Config: ClassVar[type] = Config
    two_stacks = True
    paper = "BitFit, ACL 2022, arXiv 2106.10199"

    def build(self, backbone: Backbone) -> Body:
        """See LiveMethod. Raises SidebenchError for a backbone without biases (T5 has none)."""
        biases = [p for name, p in backbone.used_parameters().items() if name.rsplit(".", 1)[-1] == "bias"]
        if not biases:
            raise SidebenchError(f"bitfit has nothing to train: the output of {backbone.arch.name} depends on no bias.")
        for bias in biases:
            bias.requires_grad_(True)
        return BackboneBody(backbone)
