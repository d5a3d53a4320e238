"""Rows of an image task from published lists: an image's path and its label, one list per part."""

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from ...cache.errors import SidebenchError
from .files import text_lines
from .rows import Rows

Listed = dict[str, str]
"""Path as listed -> label, in the order of the list."""


def read_list(path: Path, num_classes: int, source: str, say: Callable[[str], None]) -> Listed:
    """Lines "path label", cut at the last space, labels from 0. `source`: where the file comes from, for errors.

    The same line twice counts once, which is said: official lists hold some.
    """
    found: Listed = {}
    lines = 0
    for number, text in text_lines(existing(path, source)):
        line = text.strip()
        if not line:
            continue
        where = f"{path} line {number}"
        name, _, label = line.rpartition(" ")
        if not name or not label.isascii() or not label.isdigit() or len(label) > 9:
            raise SidebenchError(
                f'{where} is {line[:60]!r}; wanted a path, a space and a label, as in "images/1.jpg 3".'
            )
        if int(label) >= num_classes:
            raise SidebenchError(f"{where} has the label {int(label)}; this task's labels are 0 to {num_classes - 1}.")
        if found.setdefault(name, str(int(label))) != str(int(label)):
            raise SidebenchError(f"{where} lists {name!r} again, with another label; an image has one.")
        lines += 1
    if not found:
        raise SidebenchError(f"{path} lists no images.")
    if lines > len(found):
        say(f"{path}: {lines - len(found)} lines repeat others and are left out.")
    return found


def existing(path: Path, source: str) -> Path:
    """The file itself. Raises SidebenchError that says where it comes from."""
    if not path.is_file():
        raise SidebenchError(f"there is no file {path}; it comes with {source}.")
    return path


def listed_rows(parts: Mapping[str, Listed], folder: Path, source: str, classes: tuple[str, ...] | None = None) -> Rows:
    """Rows of the listed images below `folder`, whose ids are the listed paths; `classes`: the task's own, if any."""
    first: dict[str, str] = {}
    for part, listed in parts.items():
        for name in listed:
            if first.setdefault(name, part) != part:
                raise SidebenchError(f"{name!r} is listed for {first[name]} and for {part}; parts must not overlap.")
    return Rows(
        "image",
        tuple(first),
        tuple(label for listed in parts.values() for label in listed.values()),
        tuple(listed_image(folder, name, source) for name in first),
        tuple(first.values()),
        classes,
    )


def listed_image(folder: Path, name: str, source: str) -> Path:
    """The image as listed. By its words: a folder of images may well be a link to another disk."""
    listed = PurePosixPath(name)
    if listed.is_absolute() or ".." in listed.parts:
        raise SidebenchError(f"the listed image {name!r} lies outside {folder}; wanted a path below it.")
    path = (folder / listed).absolute()
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name that no disk can hold
        found = False
    if not found:
        raise SidebenchError(f"there is no image {path}, which the lists name; it comes with {source}.")
    return path
