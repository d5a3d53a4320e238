"""Examples of an image and a text that one network reads together: how they become tensors, and what tokens they yield.

The tokens of a batch may have holes: a text that is padded, and the image's tokens behind the padding. A store keeps
the real tokens alone, so whoever reads one sees them in their order with the padding behind them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .examples import Examples, ImageText, Modality
from .preprocess import Inputs, Prepared, Preprocess


@runtime_checkable
class JointExamples(Protocol):
    """What a task of images with texts says besides `Examples`, without decoding an image."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Every example's text."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels of the image of example `index`, from the file's header alone."""
        ...


@runtime_checkable
class JointPreprocess(Preprocess, Protocol):
    """Of a backbone that reads images with texts. A prepared example is a dict of tensors.

    Ragged layers are those whose tokens follow the example: `collate` masks theirs. A network that prefix methods are
    to restart from a cached activation takes the same mask (B, T) as its input `attention_mask`, and yields what enters
    its first block in one submodule.
    """

    longest: int
    """Tokens of the longest example, as far as the backbone alone can say."""

    def token_counts(self, examples: Examples) -> NDArray[np.int64]:
        """(N,) real tokens of the ragged layers of each example, without decoding an image."""
        ...

    def sized(self, tokens: int, device: torch.device) -> Inputs:
        """A batch of one example, like `dummy`, whose ragged layers have so many tokens."""
        ...


def texts_of(examples: Examples) -> list[str]:
    """The texts in order; examples that cannot tell them apart from the images are loaded."""
    if isinstance(examples, JointExamples):
        return list(examples.texts)
    return [cast(ImageText, examples.load(i)).text for i in range(len(examples))]


def image_sizes_of(examples: Examples) -> list[tuple[int, int]]:
    """(width, height) of the images in order; examples that do not know them unread are loaded."""
    if isinstance(examples, JointExamples):
        return [examples.size(i) for i in range(len(examples))]
    return [cast(ImageText, examples.load(i)).image.size for i in range(len(examples))]


class TextThenImage:
    """The text's tokens, padded to the longest of the batch, and behind them a grid of so many tokens of the image."""

    modality: Modality = "image-text"

    def __init__(
        self,
        texts: Any,
        pixels: Callable[[Any], Tensor],
        image_facts: dict[str, Any],
        image_size: tuple[int, int],
        visual_tokens: int,
    ) -> None:
        """`pixels` makes (3, H, W) of an RGB image, with (H, W) = `image_size`; `image_facts` says all about it.

        `texts`: a TextPreprocess, or what stands in for one.
        """
        self._texts, self._pixels, self._image_facts = texts, pixels, image_facts
        self.image_size = image_size
        self.visual_tokens = visual_tokens
        self.max_length: int = texts.max_length  # of the text
        self.longest = self.max_length + visual_tokens

    def facts(self) -> dict[str, Any]:
        """See Preprocess."""
        sizes = {"image_size": list(self.image_size), "visual_tokens": self.visual_tokens}
        return {**self._texts.facts(), "kind": self.modality, **sizes, "image": self._image_facts}

    def prepare(self, raw: Sequence[ImageText]) -> list[Prepared]:
        """See Preprocess: `input_ids` (T,) and `pixel_values` (3, H, W) of each."""
        ids = self._texts.prepare([both.text for both in raw])
        images = [self._pixels(both.image) for both in raw]
        return [{"input_ids": text, "pixel_values": image} for text, image in zip(ids, images, strict=True)]

    def collate(self, prepared: Sequence[dict[str, Tensor]]) -> tuple[Inputs, Tensor | None]:
        """See Preprocess."""
        texts, mask = self._texts.collate([both["input_ids"] for both in prepared])
        assert mask is not None
        mask = torch.cat([mask, mask.new_ones(len(prepared), self.visual_tokens)], 1)  # (B, T)
        images = self.stacked([both["pixel_values"] for both in prepared])
        return {"input_ids": texts["input_ids"], **images, "attention_mask": mask.long()}, mask

    def stacked(self, pixels: Sequence[Tensor]) -> Inputs:
        """The images of a batch as inputs: `pixel_values` (B, 3, H, W)."""
        return {"pixel_values": torch.stack(list(pixels))}

    def token_counts(self, examples: Examples) -> NDArray[np.int64]:
        """See JointPreprocess."""
        ids = self._texts.prepare(texts_of(examples))
        return np.array([len(text) + self.visual_tokens for text in ids], dtype=np.int64)

    def dummy(self, device: torch.device) -> Inputs:
        """See Preprocess."""
        return self.sized(4 + self.visual_tokens, device)

    def sized(self, tokens: int, device: torch.device) -> Inputs:
        """See JointPreprocess."""
        ids = torch.ones((1, tokens - self.visual_tokens), dtype=torch.long, device=device)
        pixels = torch.zeros((1, 3, *self.image_size), device=device)
        mask = torch.ones((1, tokens), dtype=torch.long, device=device)
        return {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}

    def prefix_tokens(self, tokens: int) -> int:
        """Zero: a mean runs over the text and the image."""
        return 0

    def special_ids(self) -> frozenset[int]:
        """See Preprocess."""
        special: frozenset[int] = self._texts.special_ids()
        return special


class Packing:
    """Brings the real tokens of a batch to the left, in their order, and cuts what is then padding everywhere.

    `mask`: (B, T') of the packed tokens, None where every token is real. A batch without holes stays as it is.
    """

    def __init__(self, mask: Tensor | None) -> None:
        self.mask = mask
        self._order: Tensor | None = None
        if mask is not None and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            longest = int(mask.sum(1).max())
            order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
            self._order = order[:, :longest]
            self.mask = mask.gather(1, self._order)

    def __call__(self, value: Tensor) -> Tensor:
        """(B, T, D) -> (B, T', D)."""
        if self._order is None:
            return value
        return value.gather(1, self._order[..., None].expand(-1, -1, value.shape[2]))
