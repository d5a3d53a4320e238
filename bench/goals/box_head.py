"""The heads that find what an expression names, as MDETR has them (Kamath et al. ICCV 2021, arXiv 2104.12763).

Names are those of its checkpoints. With D = 256: class 65,792 + box 132,612 + two projections 32,896 = 231,300.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .overlap import corners

TOKENS = 255  # the classes: which token of the text a box is named by; one more for no object
_PROJECTED = 64


@dataclass(frozen=True)
class Found:
    """What the heads say on L levels of the decoder; the last is the prediction, the others are trained along."""

    logits: Tensor  # (L, B, Q, 256) of each text token, and last of no object
    boxes: Tensor  # (L, B, Q, 4) centre, width and height in fractions of the image
    queries: Tensor  # (L, B, Q, 64) unit vectors, close to those of the tokens that name the box
    tokens: Tensor  # (B, T, 64) unit vectors

    def scored(self) -> tuple[Tensor, Tensor]:
        """Scores (B, Q), the probability that there is an object, and boxes (B, Q, 4) as corners in fractions.

        In float64: close to 1 two that are sure would be a tie.
        """
        return 1 - self.logits[-1].double().softmax(-1)[..., -1], corners(self.boxes[-1].double())


class BoxHead(nn.Module):
    """Class, box and the two projections of the contrastive alignment, from width D.

    learning_rate_share: of the method's, at which they learn (see training.make_optimizer).
    """

    def __init__(self, width: int, learning_rate_share: float = 1.0) -> None:
        super().__init__()
        self.learning_rate_share = learning_rate_share
        self.class_embed = nn.Linear(width, TOKENS + 1)
        self.bbox_embed = _Perceptron(width)
        self.contrastive_align_projection_image = nn.Linear(width, _PROJECTED)
        self.contrastive_align_projection_text = nn.Linear(width, _PROJECTED)

    def forward(self, decoded: Tensor, text: Tensor) -> Found:
        """decoded: (L, B, Q, D) levels of the decoder; text: (B, T, D) the text's tokens as the encoder yields them."""
        return Found(
            self.class_embed(decoded),
            self.bbox_embed(decoded).sigmoid(),
            functional.normalize(self.contrastive_align_projection_image(decoded), dim=-1),
            functional.normalize(self.contrastive_align_projection_text(text), dim=-1),
        )


class _Perceptron(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)])

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(torch.relu(second(torch.relu(first(x)))))
