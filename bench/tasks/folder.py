"""Rows of an image task from class folders, with or without train, val and test above them."""

from collections.abc import Iterator
from pathlib import Path

from ...cache.errors import SidebenchError
from .images import SUFFIXES
from .rows import PART_WORDS, Rows


def read_folder(root: Path) -> Rows:
    """Rows of `root`/CLASS/…/image or `root`/PART/CLASS/…/image, sorted by path; ids are the paths below `root`."""
    if not root.is_dir():
        raise SidebenchError(f"there is no folder {root}" + (" (it is a file)." if root.exists() else "."))
    ids, labels, paths, parts = [], [], [], []
    part_folders = _part_folders(root)
    for top in part_folders or [root]:
        for folder in _folders(top):
            images = list(_images(folder))
            if not images:
                raise SidebenchError(
                    f"{folder} holds no images ({', '.join(SUFFIXES)}); add some or remove the folder."
                )
            for path in images:
                ids.append(_id(root, path))
                labels.append(folder.name)
                paths.append(path.absolute())
                parts.append(PART_WORDS.get(top.name.casefold(), ""))
    if not ids:
        raise SidebenchError(f"{root} holds no class folders with images; wanted {root / 'CLASS' / 'image.jpg'}.")
    return Rows("image", tuple(ids), tuple(labels), tuple(paths), tuple(parts) if part_folders else None)


def _part_folders(root: Path) -> list[Path]:
    """Folders called train, val or test that hold class folders; a CLASS may be called train, and holds images."""
    folders = _folders(root)
    parts = [folder for folder in folders if folder.name.casefold() in PART_WORDS and _folders(folder)]
    if parts and len(parts) < len(folders):
        others = ", ".join(sorted({folder.name for folder in folders} - {folder.name for folder in parts}))
        raise SidebenchError(
            f"{root} holds {', '.join(part.name for part in parts)} and also {others}; "
            "wanted either class folders only, or train, val and test with class folders in each."
        )
    return parts


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(piece.startswith(".") for piece in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            yield path


def _id(root: Path, path: Path) -> str:
    name = path.relative_to(root).as_posix()
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SidebenchError(f"the file name {name!r} is not UTF-8; rename the file.") from error
    return name
