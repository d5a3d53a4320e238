"""Labelled texts and images in task order, and the hash that says which ones they are."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import SidebenchError
from ...cache.examples import Examples, Text
from .images import load_image

if TYPE_CHECKING:
    from PIL.Image import Image

# A file changed twice within the clock's grain keeps its mtime, so a hash is remembered only once the file has settled.
_SETTLED_NS = 2_000_000_000

Entry = tuple[int, int, str]  # size in bytes, mtime in ns, sha256


@dataclass(frozen=True, eq=False)
class TextExamples:
    """Texts, or pairs of texts, in memory."""

    ids: tuple[str, ...]
    targets: NDArray[np.int64]
    classes: tuple[str, ...]
    texts: tuple[Text, ...]
    modality: Literal["text"] = "text"

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int) -> Text:
        """The text itself, or both of a pair."""
        return self.texts[index]

    @cached_property
    def content_sha256(self) -> str:
        """Hash over ids, UTF-8 texts, class names and targets in order."""
        pieces = ((text,) if isinstance(text, str) else text for text in self.texts)
        digests = (" ".join(hashlib.sha256(piece.encode("utf-8")).hexdigest() for piece in both) for both in pieces)
        return content_hash(self.modality, self.ids, self.targets, self.classes, digests)


@dataclass(frozen=True, eq=False)
class ImageExamples:
    """Image files, opened one by one; `memo` is the file that remembers their hashes."""

    ids: tuple[str, ...]
    targets: NDArray[np.int64]
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    memo: Path
    modality: Literal["image"] = "image"

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int) -> "Image":
        """RGB image; a file that cannot be read is named in the error."""
        return load_image(self.paths[index])

    @cached_property
    def content_sha256(self) -> str:
        """Hash over ids, bytes of the image files, class names and targets in order."""
        return content_hash(self.modality, self.ids, self.targets, self.classes, file_hashes(self.paths, self.memo))


def example_hashes(examples: Examples, size: int) -> NDArray[np.uint8]:
    """(N, size) first bytes of each example's own sha256: of its file, or its UTF-8 text (of both, of a pair).

    Neither ids nor labels are in it, so the same example is found in another task.
    """
    if isinstance(examples, ImageExamples):
        digests = [bytes.fromhex(digest) for digest in file_hashes(examples.paths, examples.memo)]
    else:
        assert isinstance(examples, TextExamples)
        digests = [_text_digest(text) for text in examples.texts]
    return np.array([list(digest[:size]) for digest in digests], dtype=np.uint8).reshape(-1, size)


def _text_digest(text: Text) -> bytes:
    if isinstance(text, str):
        return hashlib.sha256(text.encode("utf-8")).digest()
    return hashlib.sha256(b"".join(map(_text_digest, text))).digest()


def file_hashes(paths: Iterable[Path], memo: Path) -> list[str]:
    """sha256 per file; a file whose size and mtime are as remembered in `memo` is not read again."""
    known = _remembered(memo)
    fresh: dict[str, Entry] = {}
    hashes: list[str] = []
    for path in paths:
        key = str(path.absolute())
        try:
            facts = path.stat()
            remembered = known.get(key)
            if remembered is not None and remembered[:2] == (facts.st_size, facts.st_mtime_ns):
                hashes.append(remembered[2])
                continue
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise SidebenchError(f"the file {path} cannot be read ({error.strerror}).") from error
        hashes.append(digest)
        if time.time_ns() - facts.st_mtime_ns > _SETTLED_NS:
            fresh[key] = (facts.st_size, facts.st_mtime_ns, digest)
    if fresh:
        with suppress(OSError):  # a disk that is full or read-only: the next comparison reads the images again
            remember(memo, {**known, **fresh})
    return hashes


def _remembered(memo: Path) -> dict[str, Entry]:
    """What `memo` holds; a memo that is missing or damaged only costs a reread."""
    try:
        known = json.loads(memo.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: (entry[0], entry[1], entry[2]) for key, entry in known.items() if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    if not (isinstance(entry, list) and len(entry) == 3):
        return False
    size, mtime, digest = entry
    return isinstance(size, int) and isinstance(mtime, int) and isinstance(digest, str) and len(digest) == 64


def remember(memo: Path, entries: Mapping[str, object]) -> None:
    """Write `memo` anew, at once."""
    memo.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".hashes-", dir=memo.parent)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as stream:
            json.dump(entries, stream)
        os.replace(name, memo)
    except BaseException:
        os.unlink(name)
        raise


def content_hash(
    modality: str,
    ids: tuple[str, ...],
    targets: NDArray[np.int64],
    classes: tuple[str, ...],
    digests: Iterable[str],
) -> str:
    """One JSON line per example, so that no two different tasks run together into the same bytes."""
    total = hashlib.sha256(json.dumps(["sidebench content 1", modality, classes]).encode() + b"\n")
    for name, target, digest in zip(ids, targets.tolist(), digests, strict=True):
        total.update(json.dumps([name, target, digest]).encode() + b"\n")
    return total.hexdigest()
