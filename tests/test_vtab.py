"""VTAB-1k's published lists: what is read and refused, the width of the head, and a comparison from the files on."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from PIL import Image
from vision_fixtures import compare_here, write_image, write_list, write_vtab

from sidebench.bench.learner import CachedSource, LiveSource
from sidebench.bench.record import read_predictions
from sidebench.bench.tasks.base import Task
from sidebench.bench.tasks.load import known_tasks, load_task
from sidebench.bench.tasks.split import split
from sidebench.bench.tasks.vtab import VTAB, vtab_task
from sidebench.cache.errors import SidebenchError
from sidebench.cache.load import load_backbone
from sidebench.cache.zarr_store import ZarrStore


def _load(uri: str, said: list[str] | None = None, limit: int | None = None) -> Task:
    return load_task(uri, home=Path("/nowhere"), limit=limit, say=[].append if said is None else said.append)


def _refused(uri: str, *parts: str) -> None:
    with pytest.raises(SidebenchError) as caught:
        _load(uri)
    for part in parts:
        assert part in str(caught.value)


def test_there_are_nineteen_tasks_in_groups_of_seven_four_and_eight_with_the_published_classes() -> None:
    assert Counter(task.group for task in VTAB.values()) == {"natural": 7, "specialised": 4, "structured": 8}
    published = "102 100 47 102 37 10 397 2 10 45 5 8 6 6 4 16 16 18 9"
    assert [task.num_classes for task in VTAB.values()] == [int(count) for count in published.split()]
    assert "smallnorb_ele" in next(task.summary for task in known_tasks() if task.scheme == "vtab")


@pytest.mark.parametrize(
    ("typed", "folder"),
    [("cifar100", "cifar"), ("Flowers102", "oxford_flowers102"), ("pets", "oxford_iiit_pet"), ("kitti-dist", "kitti")],
)
def test_usual_names_are_those_of_the_published_folders(typed: str, folder: str) -> None:
    assert vtab_task(typed).folder == folder


def test_an_unknown_task_gets_a_suggestion(tmp_path: Path) -> None:
    _refused(f"vtab:euroset?root={tmp_path}", "no VTAB task 'euroset'", "Did you mean 'eurosat'?")
    _refused("vtab:eurosat", "type vtab:eurosat?root=FOLDER")


def test_the_lists_are_the_parts_and_the_union_is_no_part(tmp_path: Path) -> None:
    task = _load(write_vtab(tmp_path, "eurosat", (20, 10, 12)))
    parts = split(task, 0)
    assert parts.sizes() == {"train": 20, "val": 10, "test": 12}
    assert task.examples.ids[0] == "images/train800/000000.jpg"
    assert task.examples.ids[int(parts.test[0])] == "images/test/000000.jpg"
    assert [int(task.examples.targets[i]) for i in parts.val[:3]] == [1, 8, 5]  # (7 i + 1) % 10
    assert task.examples.load(0).size == (16, 10)


def test_the_head_is_as_wide_as_published_though_classes_lack_examples_and_numbers_sort_as_numbers(
    tmp_path: Path,
) -> None:
    task = _load(write_vtab(tmp_path, "oxford_iiit_pet", (5, 3, 4)))
    assert task.num_outputs == 37
    assert task.classes == tuple(str(i) for i in range(37))
    parts = split(task, 0)
    trained = set(task.examples.targets[parts.train].tolist())
    assert set(task.examples.targets[parts.test].tolist()) - trained  # scored all the same, as published
    assert task.examples.targets[parts.train].tolist() == [0, 7, 14, 21, 28]
    assert _load(write_vtab(tmp_path, "oxford_iiit_pet", (40, 3, 4)), limit=40).num_outputs == 37


@pytest.mark.parametrize("root", ["", "vtab-1k"])
def test_the_root_is_vtab_1k_or_holds_it(root: str, tmp_path: Path) -> None:
    write_vtab(tmp_path)
    assert len(_load(f"vtab:eurosat?root={tmp_path / root}").examples) == 40


def test_a_folder_of_another_usual_name_is_found(tmp_path: Path) -> None:
    write_vtab(tmp_path, "cifar")
    (tmp_path / "vtab-1k" / "cifar").rename(tmp_path / "vtab-1k" / "cifar100")
    assert _load(f"vtab:cifar?root={tmp_path}").num_outputs == 100


def test_shorter_lists_than_the_published_ones_are_said(tmp_path: Path) -> None:
    said: list[str] = []
    _load(write_vtab(tmp_path, "eurosat", (20, 10, 12)), said)
    assert [line.rpartition("/")[2] for line in said] == [
        "train800.txt lists 20 images; the published list has 800.",
        "val200.txt lists 10 images; the published list has 200.",
    ]


@pytest.mark.parametrize("name", ["train800.txt", "val200.txt", "train800val200.txt", "test.txt"])
def test_a_missing_list_is_named_with_its_source(name: str, tmp_path: Path) -> None:
    uri = write_vtab(tmp_path)
    path = tmp_path / "vtab-1k" / "eurosat" / name
    path.unlink()
    _refused(uri, f"there is no file {path}", "it comes with vtab-1k.tar of NOAH or SSF")


def test_a_missing_folder_or_image_is_named_with_its_source(tmp_path: Path) -> None:
    _refused(f"vtab:dtd?root={tmp_path}", f"there is no folder {tmp_path / 'dtd'}", "vtab-1k.tar of NOAH or SSF")
    uri = write_vtab(tmp_path)
    path = tmp_path / "vtab-1k" / "eurosat" / "images" / "test" / "000003.jpg"
    path.unlink()
    _refused(uri, f"there is no image {path}", "vtab-1k.tar of NOAH or SSF")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("images/test/000000.jpg 10", ["test.txt line 1 has the label 10", "labels are 0 to 9"]),
        ("images/test/000000.jpg -1", ["line 1 is 'images/test/000000.jpg -1'"]),
        ("images/test/000000.jpg", ["wanted a path, a space and a label"]),
        ("images/test/000000.jpg " + "9" * 5000, ["wanted a path, a space and a label"]),
        ("images/test/000000.jpg ３", ["wanted a path, a space and a label"]),
        ("../cifar/images/test/000000.jpg 1", ["'../cifar/images/test/000000.jpg' lies outside"]),
        ("/etc/hostname 1", ["'/etc/hostname' lies outside"]),
        ("images/\0.jpg 1", ["there is no image"]),
        ("images/train800/000000.jpg 0", ["'images/train800/000000.jpg' is listed for train and for test"]),
        ("images/test/000001.jpg 1\nimages/test/000001.jpg 2", ["line 2 lists 'images/test/000001.jpg' again"]),
        ("", ["test.txt lists no images"]),
    ],
)
def test_what_no_list_may_hold_is_refused(line: str, parts: list[str], tmp_path: Path) -> None:
    uri = write_vtab(tmp_path)
    (tmp_path / "vtab-1k" / "eurosat" / "test.txt").write_text(line + "\n", "utf-8")
    _refused(uri, *parts)


def test_a_label_is_what_follows_the_last_space(tmp_path: Path) -> None:
    uri = write_vtab(tmp_path)
    folder = tmp_path / "vtab-1k" / "eurosat"
    write_image(folder / "images" / "a b 7.jpg", 4)
    write_list(folder / "test.txt", [("images/a b 7.jpg", 4)])
    task = _load(uri)
    assert (task.examples.ids[-1], int(task.examples.targets[-1])) == ("images/a b 7.jpg", 4)


def test_images_may_lie_behind_a_link(tmp_path: Path) -> None:
    uri = write_vtab(tmp_path)
    images = tmp_path / "vtab-1k" / "eurosat" / "images"
    images.rename(tmp_path / "elsewhere")
    images.symlink_to(tmp_path / "elsewhere")
    assert len(_load(uri).examples) == 40


def test_the_list_to_retrain_on_must_be_the_other_two_together(tmp_path: Path) -> None:
    uri = write_vtab(tmp_path, "eurosat", (4, 2, 3))
    folder = tmp_path / "vtab-1k" / "eurosat"
    together = [line.rsplit(" ", 1) for name in ("train800", "val200") for line in _lines(folder / f"{name}.txt")]
    pairs = [(name, int(label)) for name, label in together]
    write_list(folder / "train800val200.txt", pairs)  # the same files
    _load(uri)
    for wrong in (pairs[:-1], [*pairs[:-1], (pairs[-1][0], 9)]):
        write_list(folder / "train800val200.txt", wrong)
        _refused(uri, "train800val200.txt is not train800.txt and val200.txt together")
    copies = [(f"images/copy/{i}.jpg", label) for i, (_, label) in enumerate(pairs)]
    write_list(folder / "train800val200.txt", copies[::-1])  # files of its own: only the labels can tell
    _load(uri)
    write_list(folder / "train800val200.txt", [*copies[:-1], (copies[-1][0], 9)])
    _refused(uri, "train800val200.txt is not train800.txt and val200.txt together")


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


# How images become squares


@pytest.mark.parametrize(("family", "tower"), [("vit", ""), ("dinov2", ""), ("clip", "tower=vision&")])
@pytest.mark.parametrize("size", [None, 24])
@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_images_are_squashed_or_cropped_as_a_protocol_has_it(
    family: str, tower: str, size: int | None, resize: str, models: Path
) -> None:
    """Against Pillow: to the square's sides; or the shortest edge to 256/224 of the side, and the centre."""
    uri = f"hf:{models / family}?{tower}resize={resize}"
    backbone = load_backbone(uri, home=models, device=torch.device("cpu"), image_size=size)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3)).astype(np.uint8))
    (pixels,) = backbone.preprocess.prepare([image])
    processor = backbone.preprocess.processor  # type: ignore[attr-defined]
    side = size or toys.IMAGE_SIZE
    if resize == "squash":
        wanted = image.resize((side, side), processor.resample)
    else:
        edge = round(side * 256 / 224)
        larger = image.resize((int(90 * edge / 40), edge), processor.resample)
        left, top = (larger.width - side) // 2, (larger.height - side) // 2
        wanted = larger.crop((left, top, left + side, top + side))
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    by_hand = (np.asarray(wanted) / 255 - mean) / std
    assert np.abs(pixels.permute(1, 2, 0).numpy() - by_hand).max() < 1e-5
    assert pixels.shape == (3, side, side)


def test_another_way_to_the_square_is_another_cache(models: Path) -> None:
    facts = []
    for words in ("", "?resize=squash", "?resize=crop"):
        backbone = load_backbone(f"hf:{models / 'dinov2'}{words}", home=models, device=torch.device("cpu"))
        facts.append(json.dumps(backbone.preprocess.facts(), sort_keys=True))
    assert len(set(facts)) == 3


@pytest.mark.parametrize(
    ("words", "part"), [("vit?resize=pad", "no resize 'pad'"), ("bert?resize=crop", "reads texts, and ?resize=crop")]
)
def test_a_resize_that_is_none_is_refused(words: str, part: str, models: Path) -> None:
    with pytest.raises(SidebenchError) as caught:
        load_backbone(f"hf:{models}/{words}", home=models, device=torch.device("cpu"))
    assert part in str(caught.value)


def test_cached_and_live_methods_see_the_same_squashed_images(models: Path, tmp_path: Path) -> None:
    task = _load(write_vtab(tmp_path))
    found = {}
    for words in ("", "?resize=squash"):
        backbone = load_backbone(f"hf:{models / 'dinov2'}{words}", home=models, device=torch.device("cpu"))
        store = ZarrStore(toys.build_store(backbone, task.examples, tmp_path / "caches").folder)
        cached = CachedSource(store, (backbone.final_layer,), torch.device("cpu"), store.lengths())
        index = np.array([3, 20, 35])
        (stored,), (computed,) = cached.batches([index]), LiveSource(backbone, task.examples).batches([index])
        with torch.no_grad():
            found[words] = backbone.tokens(dict(computed.inputs))
        torch.testing.assert_close(stored.state(backbone.final_layer), found[words])
    assert not torch.allclose(found[""], found["?resize=squash"], atol=1e-3)


# A comparison


def test_a_task_is_compared_from_its_lists_to_the_report(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = compare_here(tmp_path, models, monkeypatch, write_vtab(tmp_path, "oxford_iiit_pet"), "--json", "--quiet")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["examples"] == {"train": 20, "val": 10, "test": 10}
    assert [row["method"] for row in found["table"]] == ["linear_probe", "unipt"]
    for path in map(Path, found["records"]):
        logits, targets = read_predictions(path.with_suffix(".npz"))
        assert logits.shape == (10, 37)
        assert targets.tolist() == [(7 * i + 2) % 37 for i in range(10)]
