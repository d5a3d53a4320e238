"""Augmented views of a task's N examples: item i + N v is view v of example i, the same whoever draws it.

View 0 is the plain example. A text view leaves out some of its tokens; an image view is cropped, mirrored and its
colours shifted.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import SidebenchError
from .examples import Examples, Modality
from .preprocess import Prepared, Preprocess

TOKEN_DROPOUT = 0.1  # share of a text's words (not of its special tokens) that a view leaves out
CROP_AREA = (0.35, 1.0)  # share of the image that a view shows
CROP_RATIO = (3 / 4, 4 / 3)
COLOUR = 0.3  # brightness, contrast and saturation change by at most this share
DESCRIPTION = {
    "text": f"each token dropped with probability {TOKEN_DROPOUT:g}",
    "image": (
        f"a crop of {CROP_AREA[0]:.0%} to {CROP_AREA[1]:.0%} of the area, mirrored half the time, brightness, contrast "
        f"and saturation changed by up to {COLOUR:.0%}"
    ),
}


def refuse_views(modality: Modality, views: int) -> None:
    """Raise SidebenchError where views are asked for of examples that have none."""
    if views and modality not in DESCRIPTION:
        raise SidebenchError(
            f"--views {views}: no augmentation is defined for an image with a text, whose words may name a side or a "
            "colour of it; leave --views out."
        )


def prepare_items(
    preprocess: Preprocess, examples: Examples, items: Sequence[int], seed: int | None
) -> Sequence[Prepared]:
    """Prepared inputs of these items, in order; `seed` draws the views. Raises SidebenchError as `examples.load`."""
    views = [divmod(int(item), len(examples)) for item in items]  # (view, example)
    refuse_views(examples.modality, max((view for view, _ in views), default=0))
    raw = [examples.load(example) for _, example in views]
    draws = [None if view == 0 else _draw(seed or 0, view, example) for view, example in views]
    if examples.modality == "image":
        raw = [picture if draw is None else image_view(picture, draw) for picture, draw in zip(raw, draws, strict=True)]
        return preprocess.prepare(raw)
    special = preprocess.special_ids()
    prepared = preprocess.prepare(raw)
    return [
        text_view(ids, special, draw) if draw is not None and isinstance(ids, Tensor) else ids
        for ids, draw in zip(prepared, draws, strict=True)
    ]


def text_view(ids: Tensor, special: frozenset[int], draw: np.random.Generator) -> Tensor:
    """Token ids (T,), or (T, 2) with types, without those dropped; special tokens stay, and at least one word does."""
    words = np.array([int(i) not in special for i in (ids if ids.ndim == 1 else ids[:, 0])])
    dropped = words & (draw.random(len(ids)) < TOKEN_DROPOUT)
    if words.any() and (dropped == words).all():
        dropped[draw.choice(np.flatnonzero(words))] = False
    return ids[torch.from_numpy(~dropped)]


def image_view(picture: Any, draw: np.random.Generator) -> Any:
    """A crop of random area and shape in the picture's own size, mirrored half the time, with shifted colours."""
    from PIL import Image, ImageEnhance, ImageOps

    width, height = picture.size
    area, ratio = draw.uniform(*CROP_AREA), np.exp(draw.uniform(*np.log(CROP_RATIO)))
    side = (width * height * area) ** 0.5
    wide = max(min(round(side * ratio**0.5), width), 1)
    high = max(min(round(side / ratio**0.5), height), 1)
    left, top = int(draw.integers(width - wide + 1)), int(draw.integers(height - high + 1))
    box = (left, top, left + wide, top + high)
    view = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if draw.random() < 0.5:
        view = ImageOps.mirror(view)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        view = enhance(view).enhance(draw.uniform(1 - COLOUR, 1 + COLOUR))
    return view


def _draw(seed: int, view: int, example: int) -> np.random.Generator:
    """Its own generator for each view, so that no order of drawing matters."""
    return np.random.Generator(np.random.PCG64([seed, view, example]))
