"""Head2Toe: Utilizing Intermediate Representations for Better Transfer Learning.
Evci, Dumoulin, Larochelle, Mozer. ICML 2022, arXiv 2201.03529.

A linear head on features of every depth, of which it keeps the few that it needs: one head on all of them, with a group
lasso over features, scores each by its row of weights; a fresh one without the lasso is trained on the best.

    stage 1: minimise  loss(X W + b) + lambda sum_i |W_i|;   score_i = |W_i|²
    stage 2: minimise  loss(X_kept V + c)  on the share F of features with the largest scores; F is chosen on validation

The reference pools every activation inside the blocks (attention and MLP outputs included) to about 512 or 8,192
numbers. Ours are what every store keeps beside its activations: the first token (the class token, where there is one)
and the mean of each of the L hidden states, each of these 2 L vectors divided by its length. So X fits into memory and
each step takes all of it, where the reference takes batches of 128; both problems are convex and start at zero, so
nothing is drawn and every seed gives the same head.

Cached: two vectors per hidden state. Trained, with M = F sum_l 2 D_l features kept:
    M K + K     (stage 1's sum_l 2 D_l K + K weights are thrown away)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture
from ._base import FittedMethod, option, task_loss


@dataclass(frozen=True)
class Config:
    """Options of Head2Toe. Its learning rate is not called lr: --lr is about the loop that it is not trained in."""

    lasso: float = option(1e-5, "lambda: weight of the group lasso in stage 1 (the reference's README)")
    learning_rate: float = option(
        0.1, "Adam's, decayed to zero along half a cosine (the reference tries 0.01 to 0.1; its README has 0.01)"
    )
    steps: int = option(
        500, "Adam's steps on all examples, in either stage (the README has 500 or 5,000; 500 of 0.1 go as far)"
    )
    smallest_fraction: float = option(0.01, "smallest share F of features tried (the smaller in the README)")
    largest_fraction: float = option(0.2, "largest share F of features tried (the larger in the README)")
    candidates: int = option(4, "number of shares tried, equally spaced in the logarithm (ours)")


class Head2Toe(FittedMethod):
    """Group-lasso selection among the pooled features of all hidden states, then a linear head on those kept."""

    Config: ClassVar[type] = Config
    paper = "Head2Toe, ICML 2022, arXiv 2201.03529"

    def refusal(self, arch: Architecture) -> str | None:
        """Any backbone will do; the options must make sense."""
        config = self.config
        if not 0 < config.smallest_fraction <= config.largest_fraction <= 1:
            return (
                "the shares tried must be above 0, at most 1 and in order; found "
                f"smallest_fraction={config.smallest_fraction:g}, largest_fraction={config.largest_fraction:g}"
            )
        if config.candidates < 1 or config.steps < 1 or config.learning_rate <= 0:
            return "candidates and steps must be 1 or more, and learning_rate above 0"
        return None

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """The L hidden states."""
        return arch.states

    def features(self, pooled: Mapping[str, Tensor], column: int) -> Tensor:
        """See FittedMethod: both rows of every state, each of length 1, side by side; the task's `column` is in it."""
        return torch.cat([nn.functional.normalize(rows.float(), dim=2).flatten(1) for rows in pooled.values()], dim=1)

    def brief(self) -> "Head2Toe":
        """See FittedMethod. The largest share alone, until Adam has its state."""
        return Head2Toe(replace(self.config, candidates=1, steps=min(self.config.steps, 3)))

    def kept(self, width: int) -> int:
        """See FittedMethod."""
        return count(self.config.largest_fraction, width)

    def fit(
        self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], num_outputs: int
    ) -> tuple[nn.Module, dict[str, Any]]:
        """See FittedMethod. From the largest share to the smallest, so that no head waits while the largest trains."""
        features, targets = train
        ranked = self._ranked(features, targets, num_outputs)
        best: tuple[tuple[float, float], float, Head] | None = None
        for fraction in self._grid():
            head = Head(ranked[: count(fraction, len(ranked))], num_outputs, features.dtype)
            self._descend(head.linear, features[:, head.kept], targets)
            with torch.no_grad():
                outputs = head(val[0])
                found = (self.score(outputs, val[1]), -float(task_loss(outputs, val[1])))
            # A small validation part has many ties in its score; its loss breaks them.
            if best is None or found > best[0]:
                best = (found, fraction, head)
        assert best is not None
        found, fraction, head = best
        return head, {"fraction": fraction, "features_kept": len(head.kept), "val_score": found[0]}

    def _ranked(self, features: Tensor, targets: Tensor, num_outputs: int) -> Tensor:
        """Stage 1: all features from the largest score to the smallest, the earlier of equals first."""
        linear = from_zero(features.shape[1], num_outputs, features.dtype, features.device)
        self._descend(linear, features, targets, self.config.lasso)
        return linear.weight.detach().square().sum(0).argsort(descending=True, stable=True)

    def _descend(self, linear: nn.Linear, features: Tensor, targets: Tensor, lasso: float = 0.0) -> None:
        # One parameter at a time: PyTorch's CUDA default updates all at once and takes more memory.
        optimizer = torch.optim.Adam(linear.parameters(), self.config.learning_rate, foreach=False)
        for step in range(self.config.steps):
            decay = 0.5 * (1 + math.cos(math.pi * step / self.config.steps))
            optimizer.param_groups[0]["lr"] = self.config.learning_rate * decay
            optimizer.zero_grad()
            loss = task_loss(linear(features), targets)
            if lasso:
                loss = loss + lasso * linear.weight.norm(dim=0).sum()  # a feature's weights are a column here
            loss.backward()
            optimizer.step()

    def _grid(self) -> list[float]:
        largest, ratio = self.config.largest_fraction, self.config.smallest_fraction / self.config.largest_fraction
        return [largest * ratio ** (i / max(self.config.candidates - 1, 1)) for i in range(self.config.candidates)]


class Head(nn.Module):
    """A linear map (N, D) -> (N, K) of some of the features."""

    def __init__(self, kept: Tensor, num_outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("kept", kept.sort().values)
        self.kept: Tensor
        self.linear = from_zero(len(kept), num_outputs, dtype, kept.device)

    def forward(self, features: Tensor) -> Tensor:
        """Outputs (N, K)."""
        return self.linear(features[:, self.kept])


def from_zero(width: int, num_outputs: int, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """A linear map that starts at zero."""
    linear = nn.Linear(width, num_outputs, dtype=dtype, device=device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def count(fraction: float, width: int) -> int:
    """How many of `width` features a share of them is: one at least."""
    return max(round(fraction * width), 1)
