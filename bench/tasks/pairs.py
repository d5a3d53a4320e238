"""From a retrieval task's URI to captions and images, or videos: published sets, one's own files, a sample."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ...cache.errors import SidebenchError, unknown
from ...cache.examples import Examples
from ...cache.uri import Uri, parse_uri
from . import digit_scenes
from .base import PairLoss, PairTask
from .contents import ImageExamples, TextExamples
from .files import csv_lines, image_path, jsonl_lines, value_of
from .items import Item, checked, limited_items
from .karpathy import COCO, F30K, folds_of, read_karpathy
from .msrvtt import read_msrvtt
from .msvd import read_msvd
from .rows import part_of
from .videos import frames_of

Say = Callable[[str], None]
_COLUMNS = ("image", "text", "split", "id")


@dataclass(frozen=True)
class PairScheme:
    """A form of retrieval task: what can be typed."""

    form: str
    summary: str
    options: tuple[str, ...] = ("root",)


PAIR_SCHEMES: Mapping[str, PairScheme] = {
    "pairs": PairScheme(
        "pairs:FILE.csv|FILE.jsonl[?image=COL&text=COL&split=COL&id=COL]",
        "your own captioned images: rows of image path and caption; several rows may name one image",
        _COLUMNS,
    ),
    "f30k": PairScheme("f30k:retrieval?root=FOLDER", "Flickr30K, Karpathy's split: images and captions"),
    "coco-retrieval": PairScheme(
        "coco-retrieval:5k|1k?root=FOLDER", "COCO, Karpathy's split, tested on 5,000 images at once or in five folds"
    ),
    "msrvtt": PairScheme(
        "msrvtt:9k|7k?root=FOLDER", "MSR-VTT, tested on 1k-A: videos of at most 12 frames and captions"
    ),
    "msvd": PairScheme("msvd:retrieval?root=FOLDER", "MSVD: videos of at most 12 frames, some forty captions of each"),
}
_VIDEO_SCHEMES = ("msrvtt", "msvd")
PAIR_SAMPLES: Mapping[str, str] = {digit_scenes.NAME: digit_scenes.SUMMARY}
_HEAD_OPTIONS = ("pool", "width", "loss")
_OPTIONS = {
    "sample": _HEAD_OPTIONS,
    **{name: (*scheme.options, *_HEAD_OPTIONS) for name, scheme in PAIR_SCHEMES.items()},
}
_LARGEST_WIDTH = 65_536


def is_pairs(uri: str) -> bool:
    """Whether a task's URI names a retrieval task, known before it is read."""
    scheme, _, path = uri.partition(":")
    return scheme in PAIR_SCHEMES or (scheme == "sample" and path.partition("?")[0] in PAIR_SAMPLES)


def load_pairs(uri: str, *, home: Path, limit: int | None = None, say: Say) -> PairTask:
    """The retrieval task a URI names; `limit` keeps that many items, with their captions.

    `home` holds samples and remembered hashes; `say` is told what takes long and what is not as published.
    """
    parsed = parse_uri(uri, kind="task", known=_OPTIONS)
    try:
        items = _read(parsed, home, say)
    except OSError as error:
        raise SidebenchError(f"{uri} cannot be read ({error}).") from error
    checked(items, uri)
    if limit is not None:
        items = limited_items(items, limit, uri)
    folds = folds_of(COCO, parsed.path) if parsed.scheme == "coco-retrieval" else 1
    items = _foldable(items, folds, uri, say)
    parts = None if items[0].part is None else tuple(item.part or "" for item in items)
    ids = tuple(item.id for item in items)
    task = PairTask(uri, _images(items, home), _captions(items), ids, parts, folds=folds)
    if parsed.scheme in _VIDEO_SCHEMES:
        frames = frames_of(ids, [item.file for item in items], home, say)
        task = replace(task, visual=frames, frames=frames.offsets)
    return replace(task, **_head(parsed))


def _head(uri: Uri) -> dict[str, Any]:
    """How tokens are pooled, how wide the common space is, and the loss, where the URI says so."""
    found: dict[str, Any] = {}
    for option, field, known in (("pool", "pooling", ("mean", "cls", "gpo")), ("loss", "loss", get_args(PairLoss))):
        if (typed := uri.options.get(option)) is not None:
            if typed not in known:
                raise unknown(option, typed, known)
            found[field] = typed
    if (typed := uri.options.get("width")) is not None:
        if not (typed.isascii() and typed.isdigit() and 0 < int(typed[:6]) <= _LARGEST_WIDTH):
            raise SidebenchError(f"?width={typed[:20]} in {uri.text} is no width; wanted 1 to {_LARGEST_WIDTH}.")
        found["width"] = int(typed)
    return found


def _read(uri: Uri, home: Path, say: Say) -> list[Item]:
    if uri.scheme == "pairs":
        return read_pairs(Path(uri.path).expanduser(), uri.options)
    if uri.scheme == "f30k":
        folds_of(F30K, uri.path)
        return read_karpathy(F30K, _root(uri), say)
    if uri.scheme == "coco-retrieval":
        folds_of(COCO, uri.path)
        return read_karpathy(COCO, _root(uri), say)
    if uri.scheme == "msrvtt":
        return read_msrvtt(uri.path, _root(uri), say)
    if uri.scheme == "msvd":
        if uri.path != "retrieval":
            raise unknown("form of MSVD", uri.path, ["retrieval"])
        return read_msvd(_root(uri), say)
    if uri.path not in PAIR_SAMPLES:
        raise unknown("sample of pairs", uri.path, PAIR_SAMPLES)
    return read_pairs(digit_scenes.digit_scenes(home, say), {})


def _root(uri: Uri) -> Path:
    if "root" not in uri.options:
        raise SidebenchError(f"{uri.text} does not say where the files lie; type {uri.scheme}:{uri.path}?root=FOLDER.")
    return Path(uri.options["root"]).expanduser()


def read_pairs(path: Path, columns: Mapping[str, str]) -> list[Item]:
    """Items of a csv or jsonl file of image paths and captions; an item's id is its path below the file's folder.

    `split` and `id` (of the caption) are optional, and `columns` renames (option -> column).
    """
    readers = {".csv": csv_lines, ".jsonl": jsonl_lines}
    if path.suffix.lower() not in readers:
        raise SidebenchError(f"{path} is no file of pairs; wanted a name that ends in .csv or .jsonl.")
    folder = path.resolve().parent
    found: dict[Path, Item] = {}
    captions: dict[Path, dict[str, str]] = {}
    optional: set[str] | None = None
    for where, fields in readers[path.suffix.lower()](path):
        there = {option for option in ("split", "id") if option in columns or option in fields}
        optional = there if optional is None else optional
        if there != optional:
            raise SidebenchError(f"{where} and the lines before it do not all have {min(there ^ optional)!r}.")
        file = image_path(where, folder, value_of(where, fields, "image", columns))
        part = part_of(value_of(where, fields, "split", columns), where) if "split" in there else None
        name, texts = file.relative_to(folder).as_posix(), captions.setdefault(file, {})
        first = found.setdefault(file, Item(name, file, part, texts))
        if part != first.part:
            raise SidebenchError(f"{where} puts {name!r} into {part}, a line before into {first.part}; choose one.")
        caption = value_of(where, fields, "id", columns) if "id" in there else f"{name}#{len(texts)}"
        if caption in texts:
            raise SidebenchError(f"{where}: the id {caption!r} stands twice; ids must differ.")
        texts[caption] = value_of(where, fields, "text", columns)
    return list(found.values())


def _foldable(items: list[Item], folds: int, uri: str, say: Say) -> list[Item]:
    """Without the last test items where folds could not be of equal size; the published set loses none."""
    if folds == 1:
        return items
    tested = [item for item in items if item.part == "test"]
    over = len(tested) % folds
    if len(tested) < folds:
        raise SidebenchError(f"{uri} has {len(tested)} test items for {folds} folds; type a larger --limit.")
    if over:
        say(f"{uri}: {over} of {len(tested)} test items are left out, so that {folds} folds have equal sizes.")
    left_out = {item.id for item in tested[len(tested) - over :]}
    return [item for item in items if item.id not in left_out]


def _images(items: Sequence[Item], home: Path) -> Examples:
    ids, files = tuple(item.id for item in items), tuple(item.file for item in items)
    return ImageExamples(ids, np.arange(len(items), dtype=np.int64), (), files, home / "hashes.json")


def _captions(items: Sequence[Item]) -> TextExamples:
    ids = tuple(name for item in items for name in item.captions)
    of = np.repeat(np.arange(len(items), dtype=np.int64), [len(item.captions) for item in items])
    return TextExamples(ids, of, (), tuple(text for item in items for text in item.captions.values()))
