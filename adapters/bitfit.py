"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models.
Ben Zaken, Ravfogel, Goldberg. ACL 2022, arXiv 2106.10199.

Only the biases train: of projections, MLPs, norms and the patch embedding. Starts at the pretrained function.
Nothing is cached: the gradient crosses the whole backbone. Trained: every bias the final tokens depend on.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..cache.architecture import Architecture, is_bias
from ..cache.backbone import Backbone
from ..cache.errors import SidebenchError
from ._base import BackboneBody, Body, Families, LiveConfig, LiveMethod, defaults, option


@dataclass(frozen=True)
class Config(LiveConfig):
    """BitFit's options."""

    families: ClassVar[Families] = {"glue": defaults("LST's BitFit baseline for T5-base", lr=3e-4)}
    lr: float = option(3e-3, "peak learning rate (ours, for short runs: best of 3e-4, 1e-3, 3e-3 on MiniLM x tweets)")


class BitFit(LiveMethod):
    """Train the backbone's biases."""

    Config: ClassVar[type] = Config
    two_stacks = True
    paper = "BitFit, ACL 2022, arXiv 2106.10199"

    def refusal(self, arch: Architecture) -> str | None:
        """It needs biases, and T5 has none."""
        return f"the output of {arch.name} depends on no bias, so there is nothing to train" if arch.biasless else None

    def build(self, backbone: Backbone) -> Body:
        """See LiveMethod. Raises SidebenchError where the last blocks have no bias and earlier ones do."""
        biases = [p for name, p in backbone.used_parameters().items() if is_bias(name)]
        if not biases:
            raise SidebenchError(f"bitfit has nothing to train: what it holds of {backbone.arch.name} has no bias.")
        for bias in biases:
            bias.requires_grad_(True)
        return BackboneBody(backbone)
