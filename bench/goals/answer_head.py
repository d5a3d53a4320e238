"""The head and the loss of questions that have one answer out of a vocabulary, as LXMERT has them (arXiv 1908.07490).

CLIP-ViL (arXiv 2107.06383) keeps both, and UniPT keeps CLIP-ViL's: first token, frozen pooler without its tanh, then
what is trained: Linear(D, 2 D), GELU, LayerNorm, Linear(2 D, K), with D = 768 and K = 3129 5,993,529 parameters.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...cache.store import Index
from ..tasks.base import Answers


class AnswerHead(nn.Module):
    """Logits of K answers from a joint sequence of width D.

    pooler: weight (D, D) and bias (D,) as pre-trained; None of a backbone that has none. They are kept as buffers, so
    no optimiser and no count of parameters sees them. Trained weights begin as BERT's do.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, width: int, answers: int, pooler: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        for name, frozen in zip(("weight", "bias"), pooler or (None, None), strict=True):
            self.register_buffer(name, None if frozen is None else frozen.detach().clone())
        self.layers = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width, eps=1e-12), nn.Linear(2 * width, answers)
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, K) of tokens (B, T, D), the first of which stands for all, or of a vector (B, D)."""
        first = tokens if tokens.ndim == 2 else tokens[:, 0]
        return self.layers(first if self.weight is None else functional.linear(first, self.weight, self.bias))


def soft_targets(labels: Answers, index: Index, answers: int) -> Tensor:
    """(B, K) float32: what each answer scores for the examples of `index` (B,)."""
    first, counts = labels.offsets[index], labels.offsets[index + 1] - labels.offsets[index]
    row = np.repeat(np.arange(len(index)), counts)
    entry = np.arange(counts.sum()) + np.repeat(first - (counts.cumsum() - counts), counts)
    wanted = torch.zeros(len(index), answers)
    wanted[torch.from_numpy(row), torch.from_numpy(labels.classes[entry])] = torch.from_numpy(labels.scores[entry])
    return wanted


def answer_loss(logits: Tensor, wanted: Tensor, scale: float | None = None) -> Tensor:
    """Binary cross-entropy of logits (B, K) with soft targets (B, K), summed over answers, averaged over questions.

    That is LXMERT's: the mean over both, times K. scale: in the place of K; the released UniPT script takes 500.
    """
    mean = functional.binary_cross_entropy_with_logits(logits, wanted)
    return mean * (logits.shape[1] if scale is None else scale)
