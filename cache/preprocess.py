"""From raw examples to the tensors a backbone takes: tokenizers for text, image processors for images."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import SidebenchError, unknown
from .examples import Modality, Text

RESIZES = ("squash", "crop")
Inputs = dict[str, Tensor]
"""Keyword arguments of the backbone's forward."""
Prepared = Tensor | dict[str, Tensor]
"""An example as a backbone's preprocessing leaves it: one tensor, or of an image with a text several."""


class Preprocess(Protocol):
    """Turns raw examples into prepared ones (one by one), and prepared ones into a batch."""

    modality: Modality

    def facts(self) -> dict[str, Any]:
        """Everything that changes the result, as plain JSON: part of the cache's digest."""
        ...

    def prepare(self, raw: Sequence[Any]) -> Sequence[Prepared]:
        """One tensor per example: (T,) token ids; (T, 2) ids and types of a pair's tokens; or (3, H, W) pixels.

        Of an image with a text a dict of tensors (see joint.py).
        """
        ...

    def collate(self, prepared: Sequence[Any]) -> tuple[Inputs, Tensor | None]:
        """A batch, and the (B, T) bool mask of its real tokens (None: every token is real)."""
        ...

    def dummy(self, device: torch.device) -> Inputs:
        """A batch of one example, to learn shapes from."""
        ...

    def prefix_tokens(self, tokens: int) -> int:
        """How many of `tokens` lead the sequence without being a patch."""
        ...

    def special_ids(self) -> frozenset[int]:
        """Token ids that are no words and that an augmentation leaves alone."""
        ...


class TextPreprocess:
    """Token ids through a transformers tokenizer, cut at `max_length`, padded on the right to the longest."""

    modality: Modality = "text"

    def __init__(self, tokenizer: Any, max_length: int, token_types: bool = False) -> None:
        """`token_types`: the backbone is told which of a pair's texts a token is of."""
        special = int(tokenizer.num_special_tokens_to_add())
        if max_length <= special:
            raise SidebenchError(
                f"--max-length {max_length} leaves no room for a word: this tokenizer adds {special} tokens of its own."
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.token_types = token_types
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self._sha256 = _tokenizer_sha256(tokenizer)

    def facts(self) -> dict[str, Any]:
        """See Preprocess."""
        return {"kind": "text", "tokenizer_sha256": self._sha256, "max_length": self.max_length}

    def prepare(self, raw: Sequence[Text]) -> list[Tensor]:
        """See Preprocess. Of a pair that is too long the longer text is cut first."""
        if raw and isinstance(raw[0], tuple):
            return self._prepare_pairs([text for text in raw if isinstance(text, tuple)])
        encoded = self.tokenizer(list(raw), truncation=True, max_length=self.max_length)["input_ids"]
        return [torch.tensor(ids, dtype=torch.long) for ids in encoded]

    def _prepare_pairs(self, raw: Sequence[tuple[str, str]]) -> list[Tensor]:
        special = int(self.tokenizer.num_special_tokens_to_add(pair=True))
        if self.max_length < special + 2:
            raise SidebenchError(
                f"--max-length {self.max_length} leaves no room for a word of each text of a pair: this tokenizer adds "
                f"{special} tokens of its own."
            )
        first, second = ([pair[side] for pair in raw] for side in (0, 1))
        # Asked for in so many words, so that the tokenizer's own habit is no further fact of the cache.
        encoded = self.tokenizer(
            first, second, truncation=True, max_length=self.max_length, return_token_type_ids=self.token_types
        )
        if not self.token_types:
            return [torch.tensor(ids, dtype=torch.long) for ids in encoded["input_ids"]]
        both = zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)
        return [torch.tensor([ids, types], dtype=torch.long).T.contiguous() for ids, types in both]

    def collate(self, prepared: Sequence[Tensor]) -> tuple[Inputs, Tensor | None]:
        """See Preprocess."""
        longest = max(len(ids) for ids in prepared)
        ids = torch.full((len(prepared), longest), self.pad_id)
        mask = torch.zeros((len(prepared), longest), dtype=torch.bool)
        types = torch.zeros_like(ids)
        for row, example in enumerate(prepared):
            ids[row, : len(example)] = example if example.ndim == 1 else example[:, 0]
            mask[row, : len(example)] = True
            if example.ndim == 2:
                types[row, : len(example)] = example[:, 1]
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        return inputs if prepared[0].ndim == 1 else {**inputs, "token_type_ids": types}, mask

    def dummy(self, device: torch.device) -> Inputs:
        """See Preprocess."""
        ids = torch.ones((1, 4), dtype=torch.long, device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def prefix_tokens(self, tokens: int) -> int:
        """Zero: a text's mean runs over all its tokens, as sentence embeddings do."""
        return 0

    def special_ids(self) -> frozenset[int]:
        """See Preprocess."""
        return frozenset(int(i) for i in self.tokenizer.all_special_ids)


class FirstStep:
    """Texts of an encoder-decoder that decodes one step: from its start token, which is the same for every example."""

    modality: Modality = "text"

    def __init__(self, texts: Any, start: int) -> None:
        self.texts = texts
        self.max_length: int = texts.max_length
        self.start = start

    def facts(self) -> dict[str, Any]:
        """See Preprocess."""
        return {**self.texts.facts(), "decoder_start": self.start}

    def prepare(self, raw: Sequence[Text]) -> list[Tensor]:
        """See Preprocess."""
        prepared: list[Tensor] = self.texts.prepare(raw)
        return prepared

    def collate(self, prepared: Sequence[Tensor]) -> tuple[Inputs, Tensor | None]:
        """See Preprocess."""
        inputs, mask = self.texts.collate(prepared)
        return self._started(inputs), mask

    def dummy(self, device: torch.device) -> Inputs:
        """See Preprocess."""
        return self._started(self.texts.dummy(device))

    def prefix_tokens(self, tokens: int) -> int:
        """See Preprocess."""
        return 0

    def special_ids(self) -> frozenset[int]:
        """See Preprocess."""
        special: frozenset[int] = self.texts.special_ids()
        return special

    def _started(self, inputs: Inputs) -> Inputs:
        return {**inputs, "decoder_input_ids": torch.full_like(inputs["input_ids"][:, :1], self.start)}


class ImagePreprocess:
    """Pixels through a transformers image processor (or any callable with `to_dict`), all of one size."""

    modality: Modality = "image"

    def __init__(self, processor: Any, image_size: int, patch_size: int | None, input_name: str = "pixel_values"):
        if image_size < 1:
            raise SidebenchError(f"--image-size {image_size} is no size; leave it out for the backbone's own.")
        if patch_size and image_size % patch_size:
            lower = max(image_size // patch_size, 1) * patch_size
            raise SidebenchError(
                f"--image-size {image_size} is no multiple of this backbone's stride or patch size {patch_size}; "
                f"use {lower} or {lower + patch_size}."
            )
        self.processor = processor
        self.image_size = image_size
        self.patch_size = patch_size
        self.input_name = input_name

    def facts(self) -> dict[str, Any]:
        """See Preprocess."""
        described = self.processor.to_dict() if hasattr(self.processor, "to_dict") else {}
        kept = {k: v for k, v in described.items() if not k.startswith("_") and not k.endswith(("_type", "_class"))}
        return {"kind": "image", "image_size": self.image_size, "processor": json.loads(json.dumps(kept, default=str))}

    def prepare(self, raw: Sequence[Any]) -> list[Tensor]:
        """See Preprocess."""
        pixels = self.processor(images=list(raw), return_tensors="pt")["pixel_values"]
        return list(pixels.float().unbind(0))

    def collate(self, prepared: Sequence[Tensor]) -> tuple[Inputs, Tensor | None]:
        """See Preprocess."""
        return {self.input_name: torch.stack(list(prepared))}, None

    def dummy(self, device: torch.device) -> Inputs:
        """See Preprocess."""
        return {self.input_name: torch.zeros((1, 3, self.image_size, self.image_size), device=device)}

    def prefix_tokens(self, tokens: int) -> int:
        """The tokens beyond the grid of patches: class token and registers. Zero for a convolutional map."""
        if not self.patch_size:
            return 0
        return max(tokens - (self.image_size // self.patch_size) ** 2, 0)

    def special_ids(self) -> frozenset[int]:
        """See Preprocess: an image has none."""
        return frozenset()


class PlainImageProcessor:
    """Resize to a square, scale to 0-1, normalise: with ImageNet's mean and deviation unless told otherwise."""

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        self.image_size = image_size
        self.mean = tuple(mean)
        self.std = tuple(std)

    def to_dict(self) -> dict[str, Any]:
        """The facts of this processing."""
        return {"resize": "bicubic", "mean": list(self.mean), "std": list(self.std)}

    def __call__(self, images: Sequence[Any], return_tensors: str = "pt") -> dict[str, Tensor]:
        """Pixels (B, 3, S, S) of RGB images."""
        import numpy as np
        from PIL import Image

        size = (self.image_size, self.image_size)
        rows = [np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255 for image in images]
        pixels = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return {"pixel_values": (pixels - mean) / std}


def bytes_of(prepared: Prepared) -> int:
    """What a prepared example takes in memory."""
    return sum(part.nbytes for part in (prepared.values() if isinstance(prepared, dict) else [prepared]))


def resized(processor: Any, image_size: int | None, resize: str | None = None) -> tuple[Any, int]:
    """The processor for a square of `image_size` pixels (None: its own), keeping its resize-to-crop ratio.

    `resize` is another way to that square: "squash" (to its sides, as VTAB-1k's recipes do), or "crop" (the shortest
    edge to 256/224 of it and its centre, as FGVC's do in testing).
    Returns the processor and the side length. Raises SidebenchError when its form is not known.
    """
    if resize not in (None, *RESIZES):
        raise unknown("resize", resize, RESIZES)
    crop = _side(getattr(processor, "crop_size", None)) if getattr(processor, "do_center_crop", False) else None
    size = _side(getattr(processor, "size", None))
    own = crop or size
    if own is None:
        raise SidebenchError(f"cannot tell the image size of {type(processor).__name__}; found size={processor.size}.")
    side = own if image_size is None else image_size
    if side == own and resize is None:
        return processor, own
    options, square = processor.to_dict(), {"height": side, "width": side}
    if resize == "crop" or (crop and resize is None):
        ratio = 256 / 224 if resize else (size or own) / own
        options |= {"crop_size": square, "size": {"shortest_edge": round(side * ratio)}}
    else:
        options["size"] = square
    if resize is not None:
        options |= {"do_resize": True, "do_center_crop": resize == "crop"}
    return type(processor).from_dict(options), side


def _side(size: Any) -> int | None:
    if size is None:
        return None
    get = size.get if hasattr(size, "get") else lambda key: getattr(size, key, None)
    side = get("height") or get("shortest_edge")
    return int(side) if side else None


def _tokenizer_sha256(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described: Any = sorted(tokenizer.get_vocab().items())
    else:
        described = json.loads(backend.to_str())
        # Truncation and padding are state of the last call, not of the tokenizer; ours are facts of their own.
        described.pop("truncation", None)
        described.pop("padding", None)

    text = json.dumps(described, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
