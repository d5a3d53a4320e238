"""Images with a text each, as examples: what VQA v2, GQA and the RefCOCO sets have in common."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import SidebenchError
from ...cache.examples import ImageText
from .contents import content_hash, file_hashes
from .images import image_size, load_image
from .lists import existing
from .rows import id_order, shares


@dataclass(frozen=True, eq=False)
class ImageTextExamples:
    """Texts in memory and image files, opened one by one; several examples may share a file.

    `sizes`: (N, 2) width and height that the annotations state, where they do; a file that disagrees is refused when it
    is opened, since boxes in its pixels would lie elsewhere. `labels_sha256` is the hash over the task's labels.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    paths: tuple[Path, ...]
    memo: Path  # the file that remembers the images' hashes
    labels_sha256: str
    sizes: NDArray[np.int64] | None = None
    modality: Literal["image-text"] = "image-text"
    _opened: dict[Path, tuple[int, int]] = field(default_factory=dict, repr=False)  # sizes of files that are known

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """(N,) index of each example itself, under which the task has its labels."""
        return np.arange(len(self.ids), dtype=np.int64)

    def load(self, index: int) -> ImageText:
        """RGB image and text; a file that cannot be read is named in the error."""
        image = load_image(self.paths[index])
        self._check_size(index, image.size)
        return ImageText(image, self.texts[index])

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of the image, from the file's header alone."""
        path = self.paths[index]
        if path not in self._opened:
            self._opened[path] = image_size(path)
        return self._check_size(index, self._opened[path])

    @cached_property
    def content_sha256(self) -> str:
        """Hash over ids, UTF-8 texts, bytes of the image files and labels in order; each file is read once."""
        files = tuple(dict.fromkeys(self.paths))
        digest_of = dict(zip(files, file_hashes(files, self.memo), strict=True))
        both = zip(self.paths, self.texts, strict=True)
        digests = (f"{digest_of[path]} {sha256(text.encode()).hexdigest()}" for path, text in both)
        return content_hash(self.modality, self.ids, self.targets, (self.labels_sha256,), digests)

    def _check_size(self, index: int, found: tuple[int, int]) -> tuple[int, int]:
        if self.sizes is not None and tuple(self.sizes[index].tolist()) != found:
            stated = " x ".join(map(str, self.sizes[index].tolist()))
            raise SidebenchError(
                f"the image {self.paths[index]} has {found[0]} x {found[1]} pixels, but its annotations are for one of "
                f"{stated}; get the image as published, at its own size."
            )
        return found


def carved(images: Iterable[str], salt: str) -> frozenset[str]:
    """A tenth of the images (rounded half up, at least one), drawn by their names alone: they validate."""
    unique = sorted(set(images), key=lambda name: id_order(salt, name))
    return frozenset(unique[: max(1, (len(unique) + 5) // 10)])


def kept(ids: Sequence[str], parts: Sequence[str], limit: int | None, uri: str) -> list[int]:
    """Which examples `--limit` leaves, in order: drawn by their ids, of each part in proportion and at least one."""
    if limit is None or limit >= len(ids):
        return list(range(len(ids)))
    members: dict[str, list[int]] = {}
    for i, part in enumerate(parts):
        members.setdefault(part, []).append(i)
    if limit < len(members):
        raise SidebenchError(f"limit {limit} is less than the {len(members)} parts of {uri}; type a larger --limit.")
    cells = [members[part] for part in sorted(members)]
    chosen: list[int] = []
    for cell, share in zip(cells, shares(limit, [len(cell) for cell in cells]), strict=True):
        chosen += sorted(cell, key=lambda i: id_order("limit", ids[i]))[:share]
    return sorted(chosen)


def image_files(names: Sequence[str], path_of: Callable[[str], Path], source: str) -> tuple[Path, ...]:
    """The file of each image, which must be there; one may be named often. `source`: where it comes from."""
    found = {name: existing(path_of(name), source).absolute() for name in dict.fromkeys(names)}
    return tuple(found[name] for name in names)


def unique_ids(ids: Iterable[str], uri: str) -> tuple[str, ...]:
    """The ids themselves. Raises SidebenchError where one stands twice."""
    seen: set[str] = set()
    ordered = tuple(ids)
    for name in ordered:
        if name in seen:
            raise SidebenchError(f"{uri}: the id {name!r} stands twice; ids must differ.")
        seen.add(name)
    return ordered


def said_overlap(parts: Sequence[str], images: Sequence[str], say: Callable[[str], None]) -> None:
    """Say where a part shares images with training: the official parts do not, and such a score is too good."""
    of_part: dict[str, set[str]] = {}
    for part, image in zip(parts, images, strict=True):
        of_part.setdefault(part, set()).add(image)
    trained = of_part.get("train", set())
    for part in ("val", "test"):
        if shared := len(of_part.get(part, set()) & trained):
            say(f"{shared} images of the {part} part also occur in training; its score is too good for that.")
