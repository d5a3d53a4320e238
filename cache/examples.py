"""What the cache needs to know of a task: how many examples, their ids and targets, and how to load one."""

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Modality = Literal["text", "image"]
Text = str | tuple[str, str]
"""A text, or two that belong together (a premise and a hypothesis); a task has one or the other."""


class Examples(Protocol):
    """Labelled raw examples in a fixed order; `sidebench.bench.tasks` implements it."""

    @property
    def modality(self) -> Modality:
        """What `load` yields: a `Text` for text, an RGB `PIL.Image.Image` for image."""
        ...

    @property
    def ids(self) -> tuple[str, ...]:
        """One unique id per example, in task order."""
        ...

    @property
    def targets(self) -> NDArray[np.int64]:
        """(N,) class index per example."""
        ...

    @property
    def content_sha256(self) -> str:
        """Hash over ids, raw contents and targets in order: the same on every machine, whatever the folder."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> object:
        """Raw example `index`. Raises SidebenchError naming the file and row when it cannot be read."""
        ...
