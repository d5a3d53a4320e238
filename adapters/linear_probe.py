"""Linear probe: logistic regression (of numbers: ridge regression) on the frozen network's pooled output.
Alain & Bengio, Understanding intermediate layers using linear classifier probes, ICLR 2017 workshop, arXiv 1610.01644;
solved by L-BFGS with the L2 weight swept on validation as in CLIP (Radford et al., ICML 2021, arXiv 2103.00020, A.3).

The bar any side network has to clear, so it is made as good as it gets: features standardised, solved to convergence in
float64, the L2 weight chosen on validation. Cached: one vector per example. Trained: D K + K.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture
from ._base import FittedMethod, option, task_loss

_FULL_HISTORY = 110  # L-BFGS iterations


@dataclass(frozen=True)
class Config:
    """Options of the probe. It has no learning rate."""

    smallest_l2: float = option(1e-6, "weakest L2 weight tried, on the mean loss (CLIP sweeps 1e-6 to 1e6)")
    largest_l2: float = option(1e2, "strongest L2 weight tried")
    candidates: int = option(17, "number of L2 weights tried, equally spaced in the logarithm")
    max_iterations: int = option(
        1000, "L-BFGS iterations per L2 weight at most; the record says if one did not converge"
    )


class LinearProbe(FittedMethod):
    """Logistic regression on standardised pooled features, L2 weight chosen on validation."""

    Config: ClassVar[type] = Config
    two_stacks = True
    paper = "linear classifier probes, arXiv 1610.01644; L-BFGS sweep as in CLIP, arXiv 2103.00020"

    def refusal(self, arch: Architecture) -> str | None:
        """Any backbone will do; the weights to try must span a range on a logarithmic scale."""
        if not 0 < self.config.smallest_l2 <= self.config.largest_l2:
            return (
                f"the L2 weights tried must be positive and in order; found smallest_l2={self.config.smallest_l2:g}, "
                f"largest_l2={self.config.largest_l2:g}"
            )
        if self.config.candidates < 1 or self.config.max_iterations < 1:
            return "candidates and max_iterations must be 1 or more"
        return None

    def brief(self) -> "LinearProbe":
        """See FittedMethod. The weakest L2 weight alone, until L-BFGS holds all the history it keeps (100 steps).

        With many classes that history is most of the memory; a run that converges before takes less.
        """
        iterations = min(self.config.max_iterations, _FULL_HISTORY)
        weakest = self.config.smallest_l2
        return LinearProbe(replace(self.config, largest_l2=weakest, candidates=1, max_iterations=iterations))

    def fit(
        self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], num_outputs: int
    ) -> tuple[nn.Module, dict[str, Any]]:
        """See FittedMethod. From the strongest L2 weight to the weakest, each started where the last one ended."""
        features, targets = train
        probe = Probe(features.double(), num_outputs)
        best: tuple[tuple[float, float], float, dict[str, Tensor]] | None = None
        unconverged = []
        for l2 in self._grid():
            if not solve(probe, features.double(), targets, l2, self.config.max_iterations):
                unconverged.append(l2)
            with torch.no_grad():
                logits = probe(val[0])
                found = (self.score(logits, val[1]), -float(task_loss(logits, val[1])))
            # A small validation part has many ties in its score; its loss breaks them.
            if best is None or found > best[0]:
                best = (found, l2, {k: v.clone() for k, v in probe.state_dict().items()})
        assert best is not None
        probe.load_state_dict(best[2])
        return probe, {"l2": best[1], "val_score": best[0][0], "unconverged_l2": unconverged}

    def _grid(self) -> list[float]:
        low, high = (
            torch.tensor([self.config.smallest_l2, self.config.largest_l2], dtype=torch.float64).log10().tolist()
        )
        return torch.logspace(high, low, self.config.candidates, dtype=torch.float64).tolist()


class Probe(nn.Module):
    """Standardise, then one linear map, in float64. Mean and deviation come from the training features."""

    def __init__(self, features: Tensor, num_outputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        deviation = features.std(0, unbiased=False)
        self.register_buffer("deviation", torch.where(deviation > 0, deviation, torch.ones_like(deviation)))
        self.linear = nn.Linear(features.shape[1], num_outputs, dtype=features.dtype, device=features.device)
        nn.init.zeros_(self.linear.weight)  # convex: the start does not matter, so it is the same for every seed
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        mean, deviation = self.get_buffer("mean"), self.get_buffer("deviation")
        return self.linear((features.to(mean.dtype) - mean) / deviation)


def solve(probe: Probe, features: Tensor, targets: Tensor, l2: float, max_iterations: int) -> bool:
    """Minimise the task's loss + l2/2 |W|² over `probe`; returns whether the gradient vanished."""
    optimizer = torch.optim.LBFGS(
        probe.parameters(),
        max_iter=max_iterations,
        tolerance_grad=1e-7,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task_loss(probe(features), targets) + l2 / 2 * probe.linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()  # the line search may have looked elsewhere last
    largest = max(float(p.grad.abs().max()) for p in probe.parameters() if p.grad is not None)
    return largest < 1e-5
