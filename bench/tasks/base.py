"""What every task has: examples, classes or numbers, splits, the pooling of tokens and the score."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...cache.examples import Examples
from ...cache.pair import STREAMS
from .score import ACCURACY, EXACT_MATCH, PRECISION_AT_1, RSUM

Pooling = Literal["mean", "cls", "none"]  # none: the head pools by itself
PairLoss = Literal["contrastive", "triplet"]


@dataclass(frozen=True)
class Split:
    """Sorted example indices of the three parts; disjoint."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]

    def sizes(self) -> dict[str, int]:
        """Number of examples per part, as the JSON of the command line prints it."""
        return {"train": len(self.train), "val": len(self.val), "test": len(self.test)}


@dataclass(frozen=True)
class Task:
    """Single-label classification, or regression of one number; pooling, loss and score are the same for all methods.

    Targets are class indices. The classes of a regression are its distinct numbers, and `values` says each one's.
    """

    uri: str
    examples: Examples
    classes: tuple[str, ...]
    parts: tuple[str, ...] | None  # the split column: "train" | "val" | "test" per example; None: split it ourselves
    pooling: Pooling = "mean"
    score_name: str = ACCURACY
    values: tuple[float, ...] | None = None
    has_own_classes: bool = False  # as published, rather than found in the examples: some may not occur in train

    @property
    def num_outputs(self) -> int:
        """How wide the head is: one output per class, or one number."""
        return len(self.classes) if self.values is None else 1

    @property
    def streams(self) -> Mapping[str, Examples]:
        """What the backbone reads."""
        return {"": self.examples}


@dataclass(frozen=True)
class PairTask:
    """Captions and what they describe, to be found by each other: retrieval both ways.

    An item is an image, or a video of several frames; every caption describes one, of which it is the target.
    """

    uri: str
    visual: Examples  # images, or the frames of videos, in order of the item they belong to
    text: Examples  # captions; targets: (captions,) index of the item that each describes
    item_ids: tuple[str, ...]
    item_parts: tuple[str, ...] | None  # "train" | "val" | "test" per item; None: split them ourselves
    frames: NDArray[np.int64] | None = None  # (items + 1,) first frame of each item; None: an item is one image
    score_name: str = RSUM
    folds: int = 1  # the test part is searched in so many parts of equal size (COCO-1K: 5)
    pooling: Literal["mean", "cls", "gpo"] = "mean"
    width: int = 256  # of the space in which both are compared
    loss: PairLoss = "contrastive"

    @property
    def streams(self) -> Mapping[str, Examples]:
        """What each of the two backbones reads."""
        return dict(zip(STREAMS, (self.visual, self.text), strict=True))

    @property
    def num_outputs(self) -> int:
        """How wide a direction is."""
        return self.width


@dataclass(frozen=True)
class Answers:
    """Sparse soft labels: of example i the answers classes[offsets[i]:offsets[i + 1]] count, each by its score."""

    offsets: NDArray[np.int64]  # (N + 1,)
    classes: NDArray[np.int64]  # (M,) index into the vocabulary, each once per example
    scores: NDArray[np.float32]  # (M,) from 0 to 1; an answer that is not listed scores 0

    def of(self, index: NDArray[np.int64]) -> "Answers":
        """Those of these examples, in their order."""
        counts = (self.offsets[1:] - self.offsets[:-1])[index]
        offsets = np.concatenate([[0], counts.cumsum()])
        entries = np.arange(offsets[-1]) + np.repeat(self.offsets[index] - offsets[:-1], counts)
        return Answers(offsets, self.classes[entries], self.scores[entries])


@dataclass(frozen=True)
class AnswerTask:
    """Questions about images, each with answers that are more or less right. `examples.targets` is 0 … N - 1.

    A question of the part "submit" has no labels: it is only answered, for an official server to score.
    """

    uri: str
    examples: Examples
    answers: tuple[str, ...]  # the published vocabulary, in the order of the head
    labels: Answers
    question_ids: tuple[int | str, ...]  # (N,) as the official files have them, and as a submission wants them
    parts: tuple[str, ...]  # (N,) "train" | "val" | "test" | "submit"
    score_name: str = EXACT_MATCH
    annotations: Path | None = None  # what ten people answered in the test part, where that file is there
    keys: tuple[str, str] = ("question_id", "answer")  # of a question in a submission

    @property
    def streams(self) -> Mapping[str, Examples]:
        """What the backbone reads."""
        return {"": self.examples}

    @property
    def num_outputs(self) -> int:
        """How wide the head is: one output per answer."""
        return len(self.answers)


@dataclass(frozen=True)
class Spans:
    """Pieces of texts: of example i the rows bounds[offsets[i]:offsets[i + 1]], first and past-the-last character."""

    offsets: NDArray[np.int64]  # (N + 1,)
    bounds: NDArray[np.int64]  # (M, 2)


@dataclass(frozen=True)
class BoxTask:
    """Expressions, each for one thing in an image, to be found there. `examples.targets` is 0 … N - 1."""

    uri: str
    examples: Examples
    boxes: NDArray[np.float64]  # (N, 4) left, top, width, height in pixels of the image as stored
    sizes: NDArray[np.int64]  # (N, 2) width and height of the image
    spans: Spans  # what of the text names the thing
    parts: tuple[str, ...]  # (N,) "train" | "val" | "test" | "unused" (an official part that this task leaves alone)
    score_name: str = PRECISION_AT_1

    @property
    def streams(self) -> Mapping[str, Examples]:
        """What the backbone reads."""
        return {"": self.examples}


AnyTask = Task | PairTask | AnswerTask | BoxTask
