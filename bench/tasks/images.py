"""Read one image file: refused by its header when too large, named when it cannot be read."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...cache.errors import SidebenchError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Only formats Pillow decodes itself: others (EPS) would start an outside program on a stranger's file.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MAX_PIXELS = 64_000_000


def load_image(path: Path) -> "Image":
    """RGB image of a file, as stored (an EXIF rotation is not applied, as in the usual class-folder loaders)."""
    with _opened(path) as image:
        if image.mode == "F" or image.mode.startswith("I"):
            # Pillow would clip these to white without a word.
            raise SidebenchError(f"the image {path} has pixels of mode {image.mode}; convert it to 8 bits.")
        return image.convert("RGB")


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of the image as stored, from the file's header alone."""
    with _opened(path) as image:
        width, height = image.size
        return width, height


@contextmanager
def _opened(path: Path) -> "Iterator[Image]":
    """The image, not yet decoded. Whatever Pillow says against it, now or in decoding it, becomes a sentence."""
    from PIL import Image

    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > _MAX_PIXELS:
                raise SidebenchError(
                    f"the image {path} has {width} x {height} pixels; wanted at most {_MAX_PIXELS:,}. Scale it down."
                )
            yield image
    except Image.DecompressionBombError as error:
        raise SidebenchError(
            f"the image {path} is too large ({error}); wanted at most {_MAX_PIXELS:,} pixels."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:
        raise SidebenchError(f"the image {path} cannot be read ({error}); replace it or remove it.") from error
