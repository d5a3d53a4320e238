"""Single-label classification, or regression of one number: a linear head on pooled tokens."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...cache.store import Index
from ..learner import Learner, Source
from ..tasks.base import Pooling
from ..tasks.score import ACCURACY, score_named
from ..training import Settings, Supervised, predict
from .base import Tested, Towers


@dataclass(frozen=True)
class Classes(Supervised):
    """See Goal. num_outputs: one per class, or 1 for a number."""

    num_outputs: int
    pooling: Pooling = "mean"
    score_name: str = ACCURACY

    def learner(self, towers: Towers) -> nn.Module:
        """See Goal."""
        (tower,) = towers.values()
        return Learner(tower.body, self.num_outputs, self.pooling, tower.prefix_tokens)

    def blank_targets(self, examples: int) -> Tensor:
        """See Goal: one output is a number's, several are classes'."""
        return torch.zeros(examples, dtype=torch.float32 if self.num_outputs == 1 else torch.int64)

    def test(self, learner: nn.Module, source: Source, targets: Tensor, index: Index, settings: Settings) -> Tested:
        """See Goal. Kept: logits (N, K) and targets (N,)."""
        logits = predict(learner, source, index, settings).cpu().numpy()  # which waits for the device
        wanted = targets.cpu().numpy()[index]
        return tested_classes(self.score_name, logits, wanted, index)


def tested_classes(score_name: str, logits: NDArray[np.float32], targets: NDArray[Any], index: Index) -> Tested:
    """What is kept of logits (N, K) on the examples of `index` with targets (N,)."""
    figures = score_named(score_name).measured(logits, targets)
    return Tested(sum(figures.values()) / len(figures), figures, index, {"logits": logits, "targets": targets})
