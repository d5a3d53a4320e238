"""What the cache needs to know of a task: how many examples, their ids and targets, and how to load one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Modality = Literal["text", "image", "image-text"]
Text = str | tuple[str, str]
"""A text, or two that belong together (a premise and a hypothesis); a task has one or the other."""


@dataclass(frozen=True)
class ImageText:
    """An image and what is said of it: a question, or an expression for something in it."""

    image: "Image"  # RGB
    text: str


class Examples(Protocol):
    """Labelled raw examples in a fixed order; `sidebench.bench.tasks` implements it."""

    @property
    def modality(self) -> Modality:
        """What `load` yields: a `Text`, an RGB `PIL.Image.Image`, or for "image-text" an `ImageText`."""
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
