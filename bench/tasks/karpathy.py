"""Flickr30K and COCO with Karpathy's splits (CVPR 2015, arXiv 1412.2306) from the files that VSE∞ and its kin share.

`precomp/PART_ids.txt` lists images, `precomp/PART_caps.txt` has five captions of each, one a line, and
`id_mapping.json` says which file an id is. Older ids files repeat an image's id for each of its captions. Both sets are
tested on all their test images, for which COCO has the part `testall`; COCO-1K cuts these 5,000 in order into five
folds of 1,000. As in the reference, COCO validates on the first 5,000 captions (1,000 images) of its part `dev`, and
the other images of that part are not used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...cache.errors import SidebenchError, unknown
from .items import Item, folder_with, json_object, listed_lines, numbered
from .lists import listed_image

_SOURCE = "the caption and id files of VSE++ or VSE∞ (Karpathy's split; their READMEs link to the download)"
_EACH = 5  # captions of an image


@dataclass(frozen=True)
class KarpathySet:
    """Where a set lies, and what its published lists hold."""

    folder: str
    images: str  # folder of the image files
    published_by: str
    parts: Mapping[str, tuple[str, int]]  # part -> (name in the files, images)
    folds: Mapping[str, int]  # form, such as "5k" -> in how many folds the test part is searched
    validate_on: int | None = None  # only so many images validate


F30K = KarpathySet(
    "f30k",
    "flickr30k-images",
    "Flickr30k's images, which its authors send on request",
    {"train": ("train", 29_000), "val": ("dev", 1_014), "test": ("test", 1_000)},
    {"retrieval": 1},
)
COCO = KarpathySet(
    "coco",
    "images",
    "train2014.zip and val2014.zip of cocodataset.org",
    {"train": ("train", 113_287), "val": ("dev", 5_000), "test": ("testall", 5_000)},
    {"5k": 1, "1k": 5},
    validate_on=1_000,
)


def folds_of(known: KarpathySet, form: str) -> int:
    """In how many folds a form such as `5k` searches the test part. Raises SidebenchError for another form."""
    if form not in known.folds:
        raise unknown(f"form of {known.folder}", form, known.folds)
    return known.folds[form]


def read_karpathy(known: KarpathySet, root: Path, say: Callable[[str], None]) -> list[Item]:
    """Items of a set below `root`, which is its folder or holds it; ids are the numbers in the lists."""
    folder = folder_with(root, (".", known.folder), "precomp", _SOURCE)
    files = json_object(folder / "id_mapping.json", _SOURCE)
    items = []
    for part, (name, published) in known.parts.items():
        listed = _captions(folder / "precomp", name)
        if len(listed) != published:
            say(f"{folder / 'precomp'}: {name} has {len(listed)} images; the published part has {published}.")
        if part == "val" and known.validate_on is not None and len(listed) > known.validate_on:
            say(f"the first {known.validate_on:,} of {len(listed):,} images of {name} validate, as in the reference.")
            listed = dict(list(listed.items())[: known.validate_on])
        for number, texts in listed.items():
            file = files.get(number)
            if not isinstance(file, str):
                raise SidebenchError(f"{folder / 'id_mapping.json'} names no file for the image {number} of {name}.")
            image = listed_image(folder / known.images, file, known.published_by)
            items.append(Item(number, image, part, numbered(number, texts)))
    return items


def _captions(folder: Path, name: str) -> dict[str, list[str]]:
    """Five captions of every image of a part by its id, in order of the lists."""
    ids_path, texts_path = folder / f"{name}_ids.txt", folder / f"{name}_caps.txt"
    texts = listed_lines(texts_path, _SOURCE)
    ids = [_number(ids_path, i, line) for i, line in enumerate(listed_lines(ids_path, _SOURCE), start=1)]
    if len(ids) == len(texts):  # an id per caption
        for i, number in enumerate(ids):
            if number != ids[i - i % _EACH]:
                raise SidebenchError(
                    f"{ids_path} line {i + 1} is {number}, after {i % _EACH} times {ids[i - 1]}; wanted every image's "
                    f"id {_EACH} times in a row, or once."
                )
        ids = ids[::_EACH]
    if len(texts) != _EACH * len(ids):
        raise SidebenchError(
            f"{texts_path} has {len(texts)} captions and {ids_path} {len(ids)} ids; wanted {_EACH} captions of each."
        )
    found: dict[str, list[str]] = {}
    for i, number in enumerate(ids):
        if number in found:
            raise SidebenchError(f"{ids_path} lists the image {number} twice; wanted every image once.")
        found[number] = texts[_EACH * i : _EACH * (i + 1)]
    return found


def _number(path: Path, line: int, text: str) -> str:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise SidebenchError(f"{path} line {line} is {text[:40]!r}; wanted the number of an image.")
    return str(int(text))
