"""Boxes and how much they overlap: IoU and GIoU (Rezatofighi et al. CVPR 2019, arXiv 1902.09630)."""

import torch
from torch import Tensor

_AREA = 1e-12  # of an image whose sides are 1; smaller is nothing to divide by


def corners(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) of centre, width and height as left, top, right and bottom."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def centred(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (..., 4) of left, top, width and height in pixels as centre, width and height in fractions.

    sizes: (..., 2) width and height of the image.
    """
    first, size = boxes.split(2, dim=-1)
    return torch.cat([first + size / 2, size], dim=-1) / torch.cat([sizes, sizes], dim=-1)


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU (...) of boxes (..., 4) as corners; a and b broadcast. What scales an axis changes neither.

    A box without extent, or turned inside out, has no area: both are 0 where there is none at all.
    """
    shared = _area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    either = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - shared
    around = _area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    iou = shared / either.clamp_min(_AREA)
    return iou, iou - (around - either) / around.clamp_min(_AREA)


def _area(first: Tensor, last: Tensor) -> Tensor:
    width, height = (last - first).clamp_min(0).unbind(-1)
    return width * height
