"""Pairs of real images and words: four handwritten digits in a square, and two captions that say which and where.

Sets of captioned photographs are large or need a form, so this small one is put together from the sample mnist-5k. The
handwriting is real, the captions are written by rule. No two scenes hold the same digits in the same places, so every
caption describes one scene; and an image of a digit occurs in one part only, so no stroke of a test scene was trained
on. Nothing is drawn by a random generator, whose numbers may change with its version: everything follows from hashes.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...cache import samples
from .images import load_image
from .rows import id_order

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "digit-scenes"
SUMMARY = "1,500 squares of four handwritten digits (of mnist-5k), each with two captions that say which and where"
_DIGITS = "mnist-5k"
_SCENES = {"train": 1_000, "val": 200, "test": 300}
_TENTHS = {"train": 7, "val": 1, "test": 2}  # of every class's images
_CELL, _GAP = 28, 4  # pixels
_VERSION = 1  # of the rules below: a folder that was made by others is made anew
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_WORDINGS = (  # top left, top right, bottom left, bottom right
    "a {} next to a {} above a {} next to a {}",
    "{} and {} in the top row, {} and {} in the bottom row",
    "top left {}, top right {}, bottom left {}, bottom right {}",
    "handwritten digits: {} {} over {} {}",
    "the upper half shows {} and {}, the lower half {} and {}",
    "the left column reads {0} then {2}, the right column {1} then {3}",
)


def digit_scenes(home: Path, say: Callable[[str], None]) -> Path:
    """The file of pairs below `home`, made on first use; the same bytes on every machine."""
    root, source = home / "samples", samples.fetch(_DIGITS, home, say)
    told = _source(source)
    if _made_by(root / NAME) == told:
        return root / NAME / "pairs.jsonl"
    say(f"making {NAME}")
    with tempfile.TemporaryDirectory(prefix=".making-", dir=root) as work:
        made = Path(work) / NAME
        (made / "images").mkdir(parents=True)
        _write(source, made)
        (made / "source.json").write_text(told, encoding="utf-8")
        if (root / NAME).exists():
            os.replace(root / NAME, Path(work) / "outdated")
        try:
            os.replace(made, root / NAME)
        except OSError:
            if _made_by(root / NAME) != told:  # else another process was faster
                raise
    return root / NAME / "pairs.jsonl"


def _source(digits: Path) -> str:
    """What the folder of scenes says of its origin, from what that of the digits says."""
    of = json.loads((digits / "source.json").read_text(encoding="utf-8"))
    return json.dumps({"sample": NAME, "version": _VERSION, "of": of}, indent=2) + "\n"


def _made_by(folder: Path) -> str | None:
    try:
        return (folder / "source.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _write(digits: Path, folder: Path) -> None:
    codes = sorted((f"{code:04d}" for code in range(10_000)), key=lambda code: id_order(NAME, code))
    lines = []
    start = 0
    for part, count in _SCENES.items():
        drawn = {digit: _endless(_images(digits / str(digit), part)) for digit in range(10)}
        for number, code in enumerate(codes[start : start + count]):
            name = f"images/{part}-{number:04d}.png"
            scene = _scene([load_image(next(drawn[int(digit)])).convert("L") for digit in code])
            # Uncompressed: the content hash covers these bytes, and Pillow may be built with another zlib.
            scene.save(folder / name, format="PNG", compress_level=0)
            lines += [json.dumps({"image": name, "text": text, "split": part}) for text in _captions(code, number)]
        start += count
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _images(folder: Path, part: str) -> list[Path]:
    """A class's images that belong to a part."""
    files = sorted(folder.glob("*.png"), key=lambda path: id_order(NAME, path.name))
    before = sum(tenths for other, tenths in _TENTHS.items() if list(_TENTHS).index(other) < list(_TENTHS).index(part))
    return files[len(files) * before // 10 : len(files) * (before + _TENTHS[part]) // 10]


def _endless(files: list[Path]) -> Iterator[Path]:
    while True:
        yield from files


def _scene(four: "list[Image]") -> "Image":
    from PIL import Image

    side = 2 * _CELL + 3 * _GAP
    scene = Image.new("L", (side, side))
    for place, digit in enumerate(four):
        row, column = divmod(place, 2)
        scene.paste(digit, (_GAP + column * (_CELL + _GAP), _GAP + row * (_CELL + _GAP)))
    return scene


def _captions(code: str, number: int) -> list[str]:
    """Two, in different wordings, which go round so that every two of them meet."""
    first = number % len(_WORDINGS)
    second = (first + 1 + number // len(_WORDINGS) % (len(_WORDINGS) - 1)) % len(_WORDINGS)
    words = [_WORDS[int(digit)] for digit in code]
    return [_WORDINGS[first].format(*words), _WORDINGS[second].format(*words)]
