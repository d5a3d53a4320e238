"""What retrieval sets have in common: items with their captions, the checks on them, and the limited subsample."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ...cache.errors import SidebenchError
from .files import is_unicode, text_lines
from .json_fields import read_json
from .lists import existing
from .rows import Rows, limited


class Item(NamedTuple):
    """An image or a video and what is said of it."""

    id: str
    file: Path
    part: str | None  # "train", "val" or "test"; None: the set does not say
    captions: Mapping[str, str]  # by id, in order


def numbered(item: str, texts: Sequence[str]) -> dict[str, str]:
    """Captions of an item by the ids "item#0", "item#1", …"""
    return {f"{item}#{number}": text for number, text in enumerate(texts)}


def checked(items: Sequence[Item], uri: str) -> None:
    """Refuse what cannot be searched: no or one item, an item or a caption twice, an item without a caption."""
    if len(items) < 2:
        raise SidebenchError(f"{uri} holds {len(items)} items; retrieval needs at least two.")
    parts: dict[str, str | None] = {}
    captions: set[str] = set()
    for item in items:
        if item.id in parts:
            twice = "stands twice" if parts[item.id] == item.part else f"is in {parts[item.id]} and in {item.part}"
            raise SidebenchError(f"{uri}: {item.id!r} {twice}; wanted every item once, in one part.")
        parts[item.id] = item.part
        if not item.captions:
            raise SidebenchError(f"{uri}: {item.id!r} has no caption; every item needs one.")
        for name, text in item.captions.items():
            if name in captions:
                raise SidebenchError(f"{uri}: the caption id {name!r} stands twice; ids must differ.")
            if not text.strip() or not is_unicode(text):
                raise SidebenchError(f"{uri}: the caption {name!r} is {text[:40]!r}; wanted some text.")
            captions.add(name)


def limited_items(items: Sequence[Item], limit: int, uri: str) -> list[Item]:
    """`limit` items fixed by their ids, in proportion of parts and at least one of each; captions go with them."""
    parts = None if items[0].part is None else tuple(item.part or "" for item in items)
    if parts is not None and limit < len(set(parts)):
        raise SidebenchError(f"limit {limit} is less than the {len(set(parts))} parts of {uri}; type a larger --limit.")
    ids, files = tuple(item.id for item in items), tuple(item.file for item in items)
    kept = set(limited(Rows("image", ids, ids, files, parts), limit, uri, by_label=False).ids)
    return [item for item in items if item.id in kept]


def listed_lines(path: Path, source: str) -> list[str]:
    """Lines of a published list without white space at their ends; blank ones only after the last are left out."""
    lines = [text.strip() for _, text in text_lines(existing(path, source))]
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise SidebenchError(f"{path} line {lines.index('') + 1} is empty; get the file anew, it comes with {source}.")
    if not lines:
        raise SidebenchError(f"{path} is empty; get it anew, it comes with {source}.")
    return lines


def json_object(path: Path, source: str) -> dict[str, object]:
    """A published JSON file that holds an object."""
    found = read_json(path, source)
    if not isinstance(found, dict):
        raise SidebenchError(f"{path} holds a {type(found).__name__}; wanted an object. It comes with {source}.")
    return found


def folder_with(root: Path, names: Sequence[str], inside: str, source: str) -> Path:
    """The first of the folders `root` / name that holds `inside`; without one, the error says where it comes from."""
    for folder in (root / name for name in names):
        if (folder / inside).exists():
            return folder
    raise SidebenchError(f"there is no {root / names[0] / inside}; ?root=FOLDER holds it, and it comes with {source}.")
