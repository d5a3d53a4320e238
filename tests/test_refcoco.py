"""RefCOCO, RefCOCO+ and RefCOCOg in MDETR's annotations: what is read, which part does what, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from joint_files import write_picture, write_refcoco

from sidebench.bench.tasks.base import BoxTask
from sidebench.bench.tasks.load import load_any
from sidebench.bench.tasks.refcoco import REFCOCO
from sidebench.cache.errors import SidebenchError


def _load(uri: str, limit: int | None = None, said: list[str] | None = None) -> BoxTask:
    task = load_any(uri, home=Path("/nowhere"), limit=limit, say=[].append if said is None else said.append)
    assert isinstance(task, BoxTask)
    return task


def _change(root: Path, change: Callable[[dict[str, Any]], None], file: str = "refcoco_testB") -> None:
    path = root / "mdetr_annotations" / f"finetune_{file}.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def _by_part(task: BoxTask) -> dict[str, set[str]]:
    """The files that the examples of a part are of; ids begin with them."""
    found: dict[str, set[str]] = {}
    for name, part in zip(task.examples.ids, task.parts, strict=True):
        found.setdefault(part, set()).add(name.partition("-")[0])
    return found


def test_an_expression_has_its_box_its_size_and_its_characters(tmp_path: Path) -> None:
    uri = write_refcoco(tmp_path)

    def second_span(document: dict[str, Any]) -> None:
        document["annotations"][1]["tokens_positive"] = [[0, 3], [4, 9]]

    _change(tmp_path, second_span, "refcoco_train")
    task = _load(uri)
    assert task.examples.ids[:2] == ("train-0", "train-1")
    assert task.boxes[:2].tolist() == [[1.5, 2.0, 20.25, 28.5], [24.0, 2.0, 20.25, 28.5]]
    assert (task.boxes.dtype, task.sizes.dtype, task.boxes.shape) == ("float64", "int64", (18, 4))
    assert task.sizes.tolist() == [[48, 32]] * 18
    assert task.spans.offsets[:4].tolist() == [0, 1, 3, 4]
    loaded = task.examples.load(1)
    assert (loaded.image.size, loaded.text) == ((48, 32), "the right half")
    first, second = task.spans.bounds[1:3].tolist()
    assert (loaded.text[slice(*first)], loaded.text[slice(*second)]) == ("the", "right")
    assert task.examples.size(17) == (48, 32)
    assert task.examples.targets.tolist() == list(range(18))
    assert task.score_name == "P@1"


@pytest.mark.parametrize("name", REFCOCO)
def test_the_path_names_the_part_that_tests_and_val_validates(name: str, tmp_path: Path) -> None:
    write_refcoco(tmp_path, name)
    for test in REFCOCO[name][2:]:
        found = _by_part(_load(f"{name}:{test.lower()}?root={tmp_path}"))
        unused = set(REFCOCO[name]) - {"train", "val", test}
        expected = {"train": {"train"}, "val": {"val"}, "test": {test}, "unused": unused}
        assert found == {part: files for part, files in expected.items() if files}


def test_where_val_tests_images_of_train_validate(tmp_path: Path) -> None:
    write_refcoco(tmp_path)
    task = _load(f"refcoco:val?root={tmp_path}")
    assert _by_part(task) == {"train": {"train"}, "val": {"train"}, "test": {"val"}, "unused": {"testA", "testB"}}
    paths = task.examples.paths  # type: ignore[attr-defined]
    validating = {path for path, part in zip(paths, task.parts, strict=True) if part == "val"}
    training = {path for path, part in zip(paths, task.parts, strict=True) if part == "train"}
    assert (len(validating), len(training), validating & training) == (1, 2, set())
    shared = next(iter(validating)).name
    _change(tmp_path, lambda document: document["images"][0].update(file_name=shared), "refcoco_val")
    assert _load(f"refcoco:val?root={tmp_path}").parts == task.parts
    write_refcoco(tmp_path, images={"train": 1, "val": 1, "testA": 1, "testB": 1})
    with pytest.raises(SidebenchError, match="the training part has one image only"):
        _load(f"refcoco:val?root={tmp_path}")


def test_one_store_serves_every_test_part(tmp_path: Path) -> None:
    write_refcoco(tmp_path)
    hashes = {_load(f"refcoco:{test}?root={tmp_path}").examples.content_sha256 for test in ("val", "testA", "testB")}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["annotations"][0].update(bbox=[1.5, 2.0, 20.25, 28.0]),
        lambda document: document["annotations"][0].update(tokens_positive=[[0, 3]]),
        lambda document: document["images"][0].update(width=49),
    ],
)
def test_the_content_hash_sees_boxes_spans_and_sizes(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    uri = write_refcoco(tmp_path)
    before = _load(uri).examples.content_sha256
    _change(tmp_path, change)
    assert _load(uri).examples.content_sha256 != before


def test_annotations_and_images_may_lie_where_other_tasks_have_them(tmp_path: Path) -> None:
    uri = write_refcoco(tmp_path)
    (tmp_path / "mscoco").mkdir()
    (tmp_path / "train2014").rename(tmp_path / "mscoco" / "train2014")
    for path in (tmp_path / "mdetr_annotations").iterdir():
        path.rename(tmp_path / path.name)
    (tmp_path / "mdetr_annotations").rmdir()
    assert _load(uri).examples.load(0)


def test_a_limit_keeps_every_part(tmp_path: Path) -> None:
    uri = write_refcoco(tmp_path)
    task = _load(uri, limit=6)
    assert sorted(task.parts) == ["test", "test", "train", "train", "unused", "val"]
    whole = _load(uri)
    for i, name in enumerate(task.examples.ids):
        there = whole.examples.ids.index(name)
        assert (task.boxes[i] == whole.boxes[there]).all()
        start, end = whole.spans.offsets[there : there + 2]
        assert task.spans.bounds[task.spans.offsets[i]].tolist() == whole.spans.bounds[start:end][0].tolist()


def test_a_box_may_leave_its_image_by_a_pixel_and_stays_as_published(tmp_path: Path) -> None:
    uri = write_refcoco(tmp_path)
    _change(tmp_path, lambda document: document["annotations"][0].update(bbox=[-0.5, 2, 49.25, 31.0]))
    task = _load(uri)
    assert task.boxes[task.examples.ids.index("testB-0")].tolist() == [-0.5, 2, 49.25, 31]


def test_an_image_of_training_in_another_part_is_said(tmp_path: Path) -> None:
    uri, said = write_refcoco(tmp_path), list[str]()
    _load(uri, said=said)
    assert said == []
    _change(tmp_path, lambda document: document["images"][0].update(file_name="COCO_train2014_000000000001.jpg"))
    _load(uri, said=said)
    assert said == ["1 images of the test part also occur in training; its score is too good for that."]


def _image(**fields: object) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["images"][1].update(fields)


def _annotation(**fields: object) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["annotations"][1].update(fields)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda document: document.pop("images"), ["images is null; wanted a list of objects"]),
        (lambda document: document.update(annotations=[]), ["annotations is an empty list"]),
        (lambda document: document["images"].append(3), ["images[4] is 3; wanted an object"]),
        (lambda document: document["images"][1].pop("caption"), ["images[1] has no 'caption'; wanted a text"]),
        (_image(caption=" "), ["images[1]: 'caption' is \" \""]),
        (_image(file_name="../x.jpg"), ["'file_name' is \"../x.jpg\"", "plain file name"]),
        (_image(file_name="/etc/x.jpg"), ["plain file name"]),
        (
            _image(file_name="COCO_train2014_9.jpg"),
            ["there is no file", "COCO_train2014_9.jpg", "COCO's train2014.zip"],
        ),
        (_image(width=0), ["'width' is 0; wanted a whole number from 1 on"]),
        (_image(height=2**40), ["'height' is 1099511627776; wanted at most 1048576 pixels"]),
        (_image(id="1"), ["'id' is \"1\""]),
        (_image(id=0), ["images[1]: the image entry 0 stands twice"]),
        (_image(id=77), ["images[1]: the image entry 77 has no annotation"]),
        (lambda document: document["images"].pop(), ["annotations[3] is of the image entry 3, which is not there"]),
        (_annotation(image_id=0), ["annotations[1] is the second of the image entry 0"]),
        (_annotation(bbox=[1, 2, 3]), ["'bbox' is [1, 2, 3]; wanted a list of 4 numbers"]),
        (_annotation(bbox=[1, 2, 0, 3]), ["'bbox' is [1, 2, 0, 3]", "inside the image of 48 x 32"]),
        (_annotation(bbox=[1, 2, 3, -1]), ["inside the image"]),
        (_annotation(bbox=[-1.5, 2, 3, 3]), ["inside the image"]),
        (_annotation(bbox=[40, 2, 9.5, 3]), ["inside the image"]),
        (_annotation(bbox=[4, 30, 9, 3.5]), ["inside the image"]),
        (_annotation(tokens_positive=[]), ["'tokens_positive' is []", "of the 14 characters"]),
        (_annotation(tokens_positive=[[3, 3]]), ["tokens_positive"]),
        (_annotation(tokens_positive=[[-1, 3]]), ["tokens_positive"]),
        (_annotation(tokens_positive=[[0, 15]]), ["tokens_positive"]),
        (_annotation(tokens_positive=[[False, 3]]), ["tokens_positive"]),
        (_annotation(tokens_positive=[0, 3]), ["tokens_positive"]),
    ],
)
def test_what_no_annotations_may_hold_is_refused(
    change: Callable[[dict[str, Any]], None], parts: list[str], tmp_path: Path
) -> None:
    uri = write_refcoco(tmp_path)
    _change(tmp_path, change)
    with pytest.raises(SidebenchError) as caught:
        _load(uri)
    for part in parts:
        assert part in str(caught.value)


def test_missing_and_foreign_files_and_unknown_parts_are_refused(tmp_path: Path) -> None:
    write_refcoco(tmp_path, "refcoco+")
    with pytest.raises(SidebenchError, match=r"finetune_refcoco_train\.json; it comes with mdetr_annotations\.tar\.gz"):
        _load(f"refcoco:testA?root={tmp_path}")
    with pytest.raises(SidebenchError, match=r"no test part of refcoco\+ 'test'\. .*Known: testA, testB, val"):
        _load(f"refcoco+:test?root={tmp_path}")
    (tmp_path / "mdetr_annotations" / "finetune_refcoco+_val.json").write_text("[]")
    with pytest.raises(SidebenchError, match=r'val\.json is no object with "images" and "annotations"'):
        _load(f"refcoco+:testA?root={tmp_path}")


def test_an_image_of_another_size_than_annotated_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    task = _load(write_refcoco(tmp_path))
    write_picture(tmp_path / "train2014" / "COCO_train2014_000000000001.jpg", size=(32, 48))
    with pytest.raises(SidebenchError, match="its annotations are for one of 48 x 32"):
        task.examples.load(0)
