"""RefCOCO, RefCOCO+ (Yu et al., ECCV 2016, arXiv 1608.00272) and RefCOCOg (Mao et al., CVPR 2016, arXiv 1511.02283).

Read from the annotations of MDETR (arXiv 2104.12763), where every image entry holds one expression, and one annotation
its box. The parts are UNC's (RefCOCO, RefCOCO+: val, testA, testB) and UMD's (RefCOCOg: val, test).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...cache.errors import SidebenchError, unknown
from ...cache.uri import Uri
from .base import BoxTask, Spans
from .image_text import ImageTextExamples, carved, image_files, kept, said_overlap, unique_ids
from .json_fields import Item, items_of, read_json

REFCOCO: Mapping[str, tuple[str, ...]] = {
    "refcoco": ("train", "val", "testA", "testB"),
    "refcoco+": ("train", "val", "testA", "testB"),
    "refcocog": ("train", "val", "test"),
}
"""The files of each set, which are its official parts."""

_FOLDER = "mdetr_annotations"
_SOURCE = "mdetr_annotations.tar.gz of MDETR"
_IMAGES = "COCO's train2014.zip"
_FILE_NAME = re.compile(r"[A-Za-z0-9_]{1,80}\.jpg")
_MOST_PIXELS = 1 << 20  # per side
_TOLERANCE = 1.0  # pixels by which a box may leave its image: COCO's are drawn by hand and rounded


class Expression(NamedTuple):
    """An image entry and its annotation; spans are of characters of `text`."""

    id: str
    file: str
    image: str
    size: tuple[int, int]
    text: str
    box: tuple[float, ...]
    spans: tuple[tuple[int, int], ...]


def load_refcoco(uri: Uri, root: Path, *, home: Path, limit: int | None, say: Callable[[str], None]) -> BoxTask:
    """A set below `root`, which holds mdetr_annotations and COCO's train2014; the path names the part that tests.

    The official val validates; where it is the test, a tenth of train's images does. The examples are those of all
    official parts whichever tests, so one store serves every choice. Raises SidebenchError for any field that is not
    as published.
    """
    files = REFCOCO[uri.scheme]
    test = {name.casefold(): name for name in files[1:]}.get(uri.path.casefold())
    if test is None:
        raise unknown(f"test part of {uri.scheme}", uri.path, files[1:])
    folder = root / _FOLDER if (root / _FOLDER).is_dir() else root
    read = [_read(folder / f"finetune_{uri.scheme}_{name}.json", name) for name in files]
    expressions = [expression for file in read for expression in file]
    parts = _parts(expressions, test)
    said_overlap(parts, [expression.image for expression in expressions], say)
    unique_ids([expression.id for expression in expressions], uri.text)
    index = kept([expression.id for expression in expressions], parts, limit, uri.text)
    return _task(uri.text, [expressions[i] for i in index], [parts[i] for i in index], _images(root), home)


def _images(root: Path) -> Path:
    """The folder of COCO's training images: below `root`, or where VQA v2 has them."""
    beside = root / "mscoco" / "train2014"
    return beside if beside.is_dir() else root / "train2014"


def _parts(expressions: Sequence[Expression], test: str) -> list[str]:
    part_of = {"train": "train", "val": "val", test: "test"}
    parts = [part_of.get(e.file, "unused") for e in expressions]
    if "val" in parts:
        return parts
    validates = carved((e.image for e in expressions if e.file == "train"), "refcoco validation")
    parts = ["val" if e.image in validates and p == "train" else p for e, p in zip(expressions, parts, strict=True)]
    if "train" not in parts:
        raise SidebenchError("the training part has one image only; of it, nothing can be left to validate.")
    return parts


def _task(uri: str, chosen: Sequence[Expression], parts: Sequence[str], images: Path, home: Path) -> BoxTask:
    boxes = np.array([e.box for e in chosen], dtype=np.float64)
    sizes = np.array([e.size for e in chosen], dtype=np.int64)
    spans = Spans(
        np.array([0, *accumulate(len(e.spans) for e in chosen)], dtype=np.int64),
        np.array([span for e in chosen for span in e.spans], dtype=np.int64),
    )
    labels = sha256()
    for column in (boxes.astype("<f8"), sizes.astype("<i8"), spans.offsets.astype("<i8"), spans.bounds.astype("<i8")):
        labels.update(column.tobytes())
    examples = ImageTextExamples(
        tuple(e.id for e in chosen),
        tuple(e.text for e in chosen),
        image_files([e.image for e in chosen], lambda name: images / name, _IMAGES),
        home / "hashes.json",
        labels.hexdigest(),
        sizes,
    )
    return BoxTask(uri, examples, boxes, sizes, spans, tuple(parts))


def _read(path: Path, file: str) -> list[Expression]:
    """The expressions of a file, in the order of its image entries."""
    document = read_json(path, _SOURCE)
    if not isinstance(document, dict):
        raise SidebenchError(f'{path} is no object with "images" and "annotations"; it comes with {_SOURCE}.')
    annotated: dict[int, Item] = {}
    for item in items_of(path, "annotations", document.get("annotations")):
        entry = item.whole("image_id")
        if annotated.setdefault(entry, item) is not item:
            raise SidebenchError(f"{item.where} is the second of the image entry {entry}; an expression has one box.")
    return list(_expressions(path, file, document.get("images"), annotated))


def _expressions(path: Path, file: str, entries: object, annotated: dict[int, Item]) -> Iterator[Expression]:
    known = set(annotated)
    for item in items_of(path, "images", entries):
        entry = item.whole("id")
        if entry not in annotated:
            what = "stands twice" if entry in known else "has no annotation"
            raise SidebenchError(f"{item.where}: the image entry {entry} {what}; an expression has one box.")
        yield _expression(item, annotated.pop(entry), f"{file}-{entry}", file)
    if annotated:
        item = next(iter(annotated.values()))
        raise SidebenchError(f"{item.where} is of the image entry {item.fields['image_id']}, which is not there.")


def _expression(item: Item, annotation: Item, name: str, file: str) -> Expression:
    image = item.text("file_name")
    if not _FILE_NAME.fullmatch(image):
        raise item.refused("file_name", "a plain file name such as COCO_train2014_000000581857.jpg")
    size = (item.whole("width", 1), item.whole("height", 1))
    if max(size) > _MOST_PIXELS:
        raise item.refused("width" if size[0] > _MOST_PIXELS else "height", f"at most {_MOST_PIXELS} pixels")
    text = item.text("caption")
    return Expression(name, file, image, size, text, _box(annotation, size), _spans(annotation, len(text)))


def _box(item: Item, size: tuple[int, int]) -> tuple[float, ...]:
    left, top, width, height = box = item.numbers("bbox", 4)
    inside = left + width <= size[0] + _TOLERANCE and top + height <= size[1] + _TOLERANCE
    if min(width, height) <= 0 or min(left, top) < -_TOLERANCE or not inside:
        raise item.refused("bbox", f"[left, top, width, height] in pixels, inside the image of {size[0]} x {size[1]}")
    return box


def _spans(item: Item, characters: int) -> tuple[tuple[int, int], ...]:
    found = item.fields.get("tokens_positive")
    spans = found if isinstance(found, list) else []
    if not spans or not all(_is_span(span, characters) for span in spans):
        raise item.refused(
            "tokens_positive", f"pairs [first, past the last] of the {characters} characters of the expression"
        )
    return tuple((first, end) for first, end in spans)


def _is_span(span: object, characters: int) -> bool:
    if not isinstance(span, list) or len(span) != 2 or any(type(end) is not int for end in span):
        return False
    return bool(0 <= span[0] < span[1] <= characters)
