"""The sample of pairs: scenes of real digits and their captions, the same on every machine, no digit in two parts."""

import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sidebench.bench.tasks import digit_scenes
from sidebench.bench.tasks.base import PairTask
from sidebench.bench.tasks.pairs import load_pairs
from sidebench.cache import samples
from sidebench.cache.home import home as samples_home

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CORNERS = {"top left": (4, 4), "top right": (4, 36), "bottom left": (36, 4), "bottom right": (36, 36)}  # row, column


def _digits(root: Path) -> Path:
    """Ten images per class; that of digit d and number n is all of 10 d + n + 1."""
    for digit in range(10):
        (root / str(digit)).mkdir(parents=True)
        for n in range(10):
            Image.new("L", (28, 28), 10 * digit + n + 1).save(root / str(digit) / f"{n}.png")
    (root / "source.json").write_text('{"sample": "mnist-5k"}')
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    _digits(home / "samples" / "mnist-5k")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "fetch", lambda name, home, say: home / "samples" / name)
        digit_scenes.digit_scenes(home, [].append)
    return home


@pytest.fixture
def task(home: Path, monkeypatch: pytest.MonkeyPatch) -> PairTask:
    monkeypatch.setattr(samples, "fetch", lambda name, home, say: home / "samples" / name)
    return load_pairs("sample:digit-scenes", home=home, say=[].append)


def _seen(task: PairTask, item: int) -> list[int]:
    """The grey of every corner's digit, from the pixels."""
    pixels = np.asarray(task.visual.load(item))[..., 0]
    found = []
    for row, column in CORNERS.values():
        cell = pixels[row : row + 28, column : column + 28]
        assert cell.min() == cell.max()
        found.append(int(cell[0, 0]))
    assert (pixels > 0).sum() == 4 * 28 * 28
    return found


def _read(caption: str) -> list[str]:
    """The digits that a caption names, top left to bottom right, by a reader of its own."""
    words = [word for word in caption.replace(",", " ").split() if word in WORDS]
    return [words[0], words[2], words[1], words[3]] if "column" in caption else words


def test_captions_say_what_the_pixels_show(task: PairTask) -> None:
    for j in range(0, len(task.text), 37):
        greys = _seen(task, int(task.text.targets[j]))
        assert _read(str(task.text.load(j))) == [WORDS[(grey - 1) // 10] for grey in greys]


def test_every_scene_has_two_captions_in_different_wordings_which_no_other_scene_has(task: PairTask) -> None:
    assert np.bincount(task.text.targets).tolist() == [2] * 1_500
    texts = [str(task.text.load(j)) for j in range(3_000)]
    assert len(set(texts)) == 3_000
    codes = [tuple(_read(text)) for text in texts]
    assert codes[::2] == codes[1::2]
    assert len(set(codes)) == 1_500


def test_an_image_of_a_digit_is_in_one_part_only(task: PairTask) -> None:
    assert task.item_parts is not None
    assert [task.item_parts.count(part) for part in ("train", "val", "test")] == [1_000, 200, 300]
    parts: dict[int, set[str]] = defaultdict(set)
    for item, part in enumerate(task.item_parts):
        for grey in _seen(task, item):
            parts[grey].add(part)
    assert all(len(found) == 1 for found in parts.values())
    assert sorted(parts) == list(range(1, 101))  # and none is left unused


def test_it_is_made_once_and_anew_when_it_was_made_otherwise(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "fetch", lambda name, home, say: home / "samples" / name)
    folder = home / "samples" / "digit-scenes"
    said: list[str] = []
    before = (folder / "pairs.jsonl").read_bytes()
    digit_scenes.digit_scenes(home, said.append)
    assert said == []
    (folder / "source.json").write_text(json.dumps({"version": 0}))
    (folder / "images" / "stale.png").touch()
    assert digit_scenes.digit_scenes(home, said.append).read_bytes() == before
    assert said == ["making digit-scenes"]
    assert not (folder / "images" / "stale.png").exists()
    assert not [name for name in os.listdir(home / "samples") if name.startswith(".")]


@pytest.mark.samples
def test_the_real_scenes_are_the_same_everywhere() -> None:
    task = load_pairs("sample:digit-scenes", home=samples_home(), say=[].append)
    assert task.visual.content_sha256 == "9d522d665527f4147a79fb3d8da57b7be55cbc39409bf5269e3863eec803aa6b"
    assert task.text.content_sha256 == "be8af319f4f2399a41f20476c0b049b0508001dc4b6e26b0c1a02db76c62f65e"
