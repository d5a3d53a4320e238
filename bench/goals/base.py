"""What every goal has: the learner with the task's head, the loss, the score, and what is kept of the test part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor, nn

from ...adapters._base import Body
from ...cache.backbone import Backbone
from ...cache.store import Index
from ..learner import Source
from ..training import Objective, Settings


@dataclass(frozen=True)
class Tower:
    """A method's body on one stream of the task, and how many leading tokens of that stream are no patches.

    backbone: the one that the body runs; None where it reads a cache alone.
    """

    body: Body
    prefix_tokens: int
    backbone: Backbone | None = None


Towers = Mapping[str, Tower]
"""By stream; "" is the only one of a task that has but one."""


@dataclass(frozen=True)
class Tested:
    """A run's test part.

    figures: all that was measured, by name; score: what methods are compared by. rows: (N,) which of the examples of
    `names` were tested; arrays: what is kept of them, (N, …) each. Of a score that is a mean over examples the array
    `contributions` (N,) is what each of them adds: their mean is the score.
    """

    score: float
    figures: Mapping[str, float]
    rows: Index
    arrays: Mapping[str, NDArray[Any]]
    submission: Sequence[Mapping[str, Any]] | None = None  # what an official server takes, where one was asked for


class Goal(Objective, Protocol):
    """What a run is trained and tested for; the same for every method."""

    def learner(self, towers: Towers) -> nn.Module:
        """The bodies with the task's heads, which are freshly initialised; its `head` is what belongs to the task."""
        ...

    def blank_targets(self, examples: int) -> Tensor:
        """Targets (N,) of the right type, for a step of which only the memory is looked at."""
        ...

    def test(self, learner: nn.Module, source: Source, targets: Tensor, index: Index, settings: Settings) -> Tested:
        """What the trained learner makes of the examples of `index`."""
        ...
