"""VQA v2 in LXMERT's files: what is read, which part does what, what is refused, and what ten people answered."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from joint_files import ANSWERS, write_json, write_vocabulary, write_vqa

from sidebench.bench.tasks.answers import LONGEST_ANSWER
from sidebench.bench.tasks.base import AnswerTask
from sidebench.bench.tasks.load import load_any
from sidebench.bench.tasks.vqa import read_annotations
from sidebench.cache.errors import SidebenchError


def _load(uri: str, limit: int | None = None, said: list[str] | None = None) -> AnswerTask:
    task = load_any(uri, home=Path("/nowhere"), limit=limit, say=[].append if said is None else said.append)
    assert isinstance(task, AnswerTask)
    return task


def _change(root: Path, change: Callable[[Any], object], file: str = "train") -> None:
    """Lets `change` change what a file holds."""
    path = root / "data" / "vqa" / f"{file}.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _refused(uri: str, *parts: str) -> None:
    with pytest.raises(SidebenchError) as caught:
        _load(uri)
    for part in parts:
        assert part in str(caught.value)


def _label(task: AnswerTask, i: int) -> dict[str, float]:
    """The answers of an example and what each scores."""
    row = slice(*task.labels.offsets[i : i + 2])
    classes, scores = task.labels.classes[row].tolist(), task.labels.scores[row].tolist()
    return {task.answers[answer]: round(score, 6) for answer, score in zip(classes, scores, strict=True)}


def test_a_question_has_its_image_its_text_and_its_soft_labels(tmp_path: Path) -> None:
    uri = write_vqa(tmp_path)
    _change(tmp_path, lambda items: items[3].update(label={}))
    task = _load(uri)
    assert (task.answers, task.num_outputs, task.score_name) == (ANSWERS, 5, "soft accuracy")
    assert task.examples.ids[:3] == ("train-1000", "train-1001", "train-2000")
    assert task.question_ids[:3] == (1000, 1001, 2000)
    assert [_label(task, i) for i in range(4)] == [{"blue": 1}, {"yes": 0.3, "no": 0.9}, {"red": 1}, {}]
    assert task.labels.offsets.tolist()[:5] == [0, 1, 3, 4, 4]
    assert [column.dtype for column in vars(task.labels).values()] == ["int64", "int64", "float32"]
    loaded = task.examples.load(1)
    assert (loaded.image.size, loaded.image.mode, loaded.text) == ((48, 32), "RGB", "Is this red?")
    paths = task.examples.paths  # type: ignore[attr-defined]
    assert paths[0] is paths[1]
    assert paths[0] == tmp_path / "data" / "mscoco" / "train2014" / "COCO_train2014_000000000001.jpg"
    assert task.examples.targets.tolist() == list(range(18))


def test_minival_tests_and_a_tenth_of_the_images_of_nominival_validates(tmp_path: Path) -> None:
    task = _load(write_vqa(tmp_path, {"train": 2, "nominival": 24, "minival": 3, "test": 1}))
    names = [f"{name.partition('-')[0]} {part}" for name, part in zip(task.examples.ids, task.parts, strict=True)]
    counts = {name: names.count(name) for name in names}
    assert counts == {"train train": 4, "nominival train": 44, "nominival val": 4, "minival test": 6}
    paths = task.examples.paths  # type: ignore[attr-defined]
    images = {part: {p for p, of in zip(paths, task.parts, strict=True) if of == part} for part in set(task.parts)}
    assert len(images["val"]) == 2
    assert not images["val"] & images["train"]


def test_what_validates_is_fixed_by_the_images_alone(tmp_path: Path) -> None:
    """Neither the order of a file nor --limit moves a question into another part."""
    uri = write_vqa(tmp_path, {"train": 2, "nominival": 24, "minival": 3, "test": 1})
    task = _load(uri)
    part_of = dict(zip(task.examples.ids, task.parts, strict=True))
    few = _load(uri, limit=20)
    assert {name: part_of[name] for name in few.examples.ids} == dict(zip(few.examples.ids, few.parts, strict=True))
    assert [few.parts.count(part) for part in ("train", "val", "test")] == [
        15,
        2,
        3,
    ]  # one each, the rest in proportion
    _change(tmp_path, lambda items: items.reverse(), "nominival")
    again = _load(uri)
    assert dict(zip(again.examples.ids, again.parts, strict=True)) == part_of
    assert set(_load(uri, limit=20).examples.ids) == set(few.examples.ids)
    whole = {name: _label(task, i) for i, name in enumerate(task.examples.ids)}
    assert [_label(few, i) for i in range(20)] == [whole[name] for name in few.examples.ids]


def test_the_questions_to_submit_are_there_when_asked_for_and_have_no_labels(tmp_path: Path) -> None:
    uri = write_vqa(tmp_path)
    task, asked = _load(uri), _load(f"{uri}&submit=test")
    assert (len(task.examples), len(asked.examples)) == (18, 20)
    assert asked.parts[:18] == task.parts
    assert asked.parts[18:] == ("submit", "submit")
    assert asked.question_ids[18:] == (10_000, 10_001)
    assert (_label(asked, 18), _label(asked, 19)) == ({}, {})
    assert asked.examples.load(18).text == "What colour is this?"
    _change(tmp_path, lambda items: items[0].update(label={"not in the vocabulary": 1}), "test")
    _load(f"{uri}&submit=test")
    with pytest.raises(SidebenchError, match="no part to submit 'dev'"):
        _load(f"{uri}&submit=dev")


def test_without_submission_its_file_and_images_need_not_be_there(tmp_path: Path) -> None:
    uri = write_vqa(tmp_path)
    (tmp_path / "data" / "vqa" / "test.json").unlink()
    (tmp_path / "data" / "mscoco" / "test2015" / "COCO_test2015_000000000010.jpg").unlink()
    assert len(_load(uri).examples) == 18
    _refused(f"{uri}&submit=test", "there is no file", "test.json", "LXMERT's files of VQA v2")


def test_the_root_may_be_the_folder_data(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    assert len(_load(f"vqa2:v2?root={tmp_path / 'data'}").examples) == 18


def test_with_a_limit_only_the_images_it_keeps_need_be_there(tmp_path: Path) -> None:
    uri = write_vqa(tmp_path)
    kept = {path.name for path in _load(uri, limit=3).examples.paths}  # type: ignore[attr-defined]
    for path in (tmp_path / "data" / "mscoco").rglob("*.jpg"):
        if path.name not in kept:
            path.unlink()
    assert _load(uri, limit=3).parts == ("train", "val", "test")
    _refused(uri, "there is no file", ".jpg; it comes with COCO's train2014.zip, val2014.zip and test2015.zip")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("train", lambda items: items[0].update(label={"blue": 0.9})),
        ("train", lambda items: items[0].update(label={"red": 1})),
        ("train", lambda items: items[0].update(label={"blue": 1, "red": 0.3})),
        ("train", lambda items: items[0].update(sent="What color is this?")),
        ("trainval_label2ans", lambda answers: answers.append("green")),
    ],
)
def test_the_content_hash_sees_labels_texts_and_the_vocabulary(
    file: str, change: Callable[[Any], object], tmp_path: Path
) -> None:
    uri = write_vqa(tmp_path)
    before = _load(uri).examples.content_sha256
    _change(tmp_path, change, file)
    if file == "trainval_label2ans":
        _change(tmp_path, lambda index: index.update(green=5), "trainval_ans2label")
    assert _load(uri).examples.content_sha256 != before


def _first(**fields: object) -> Callable[[Any], object]:
    return lambda items: items[1].update(fields)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda items: items.clear(), ["train.json: questions is an empty list"]),
        (lambda items: items.insert(0, []), ["train.json questions[0] is []; wanted an object"]),
        (lambda items: items[1].pop("label"), ["questions[1] has no 'label'"]),
        (lambda items: items[1].pop("sent"), ["questions[1] has no 'sent'; wanted a text"]),
        (_first(sent=""), ["'sent' is \"\""]),
        (_first(question_id="1001"), ["'question_id' is \"1001\"; wanted a whole number"]),
        (_first(question_id=1000), ["the id 'train-1000' stands twice"]),
        (_first(img_id="COCO_train2014_1"), ["'img_id' is \"COCO_train2014_1\"", "an image's name of the form COCO_"]),
        (_first(img_id="../COCO_val2014_000000000001"), ["an image's name"]),
        (_first(img_id="COCO_train2014_000000000077"), ["there is no file", "COCO_train2014_000000000077.jpg"]),
        (_first(label=["yes"]), ["'label' is [\"yes\"]", 'such as {"yes": 1}']),
        (_first(label={"yes": True}), ["'label' is {\"yes\": true}"]),
        (_first(label={"yes": 1.5}), ["scores from 0 to 1"]),
        (_first(label={"yes": -0.1}), ["scores from 0 to 1"]),
        (_first(label={"yes": float("nan")}), ["scores from 0 to 1"]),
        (_first(label={"yes": "1"}), ["scores from 0 to 1"]),
        (_first(label={"yes": 1, "maybe": 0.3}), ["answers of trainval_ans2label.json, which 'maybe' is not"]),
    ],
)
def test_what_no_question_may_hold_is_refused(
    change: Callable[[Any], object], parts: list[str], tmp_path: Path
) -> None:
    uri = write_vqa(tmp_path)
    _change(tmp_path, change)
    _refused(uri, *parts)


@pytest.mark.parametrize(
    ("label2ans", "ans2label", "part"),
    [
        ({}, {}, "is no list of answers"),
        ([], {}, "is no list of answers"),
        (["yes", 2], {"yes": 0}, "is no list of answers"),
        (["yes", "no", "yes"], {"yes": 0, "no": 1}, "lists the answer 'yes' twice"),
        (["yes", "no"], {"yes": 1, "no": 0}, "does not give every answer of trainval_label2ans.json its place"),
        (["yes", "no"], {"yes": 0}, "does not give every answer"),
        (["yes", "no"], {"yes": False, "no": True}, "does not give every answer"),
        (["yes", "no"], ["yes", "no"], "does not give every answer"),
    ],
)
def test_a_vocabulary_that_does_not_agree_with_itself_is_refused(
    label2ans: object, ans2label: object, part: str, tmp_path: Path
) -> None:
    uri = write_vqa(tmp_path)
    write_json(tmp_path / "data" / "vqa" / "trainval_label2ans.json", label2ans)
    write_json(tmp_path / "data" / "vqa" / "trainval_ans2label.json", ans2label)
    _refused(uri, part)


@pytest.mark.parametrize("file", ["train", "nominival", "minival", "trainval_ans2label", "trainval_label2ans"])
def test_a_missing_file_is_named_with_its_source(file: str, tmp_path: Path) -> None:
    uri = write_vqa(tmp_path)
    (tmp_path / "data" / "vqa" / f"{file}.json").unlink()
    _refused(uri, f"there is no file {tmp_path / 'data' / 'vqa' / file}.json", "lxmert_data/vqa")


def test_another_version_is_refused(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    _refused(f"vqa2:v1?root={tmp_path}", "no VQA 'v1'. Did you mean 'v2'?")


# What ten people answered


def test_the_official_annotations_are_found_or_said_to_be_missing(tmp_path: Path) -> None:
    uri, said = write_vqa(tmp_path), list[str]()
    task = _load(uri, said=said)
    assert task.annotations == tmp_path / "data" / "vqa" / "v2_mscoco_val2014_annotations.json"
    assert said == []
    task.annotations.unlink()
    assert _load(uri, said=said).annotations is None
    assert len(said) == 1
    assert "v2_Annotations_Val_mscoco.zip of visualqa.org" in said[0]


def test_ten_answers_are_read_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    task = _load(write_vqa(tmp_path))
    tested = [i for i, part in enumerate(task.parts) if part == "test"]
    asked = [int(task.question_ids[i]) for i in reversed(tested)]
    assert task.annotations is not None
    found = read_annotations(task.annotations, asked)
    assert [len(ten) for ten in found] == [10] * 4
    for i, ten in zip(reversed(tested), found, strict=True):
        matching = np.array([[given == answer for given in ten] for answer in task.answers]).sum(1)
        expected = {task.answers[k]: {1: 0.3, 3: 0.9, 10: 1}[n] for k, n in enumerate(matching.tolist()) if n}
        assert _label(task, i) == expected


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda document: document.clear(), "annotations is null; wanted a list of objects"),
        (lambda document: document["annotations"].pop(), "has no question 9001; it comes with v2_Annotations_Val"),
        (lambda document: document["annotations"][0].update(question_id="8000"), "annotations[0]: 'question_id' is"),
        (lambda document: document["annotations"][0].update(answers=None), "'answers' is null; wanted 10 objects"),
        (lambda document: document["annotations"][0]["answers"].pop(), "wanted 10 objects"),
        (lambda document: document["annotations"][0]["answers"][3].update(answer=1), "wanted 10 objects"),
        (lambda document: document["annotations"][0]["answers"].append("yes"), "wanted 10 objects"),
    ],
)
def test_annotations_of_another_form_are_refused(change: Callable[[Any], object], part: str, tmp_path: Path) -> None:
    write_vqa(tmp_path)
    _change(tmp_path, change, "v2_mscoco_val2014_annotations")
    path = tmp_path / "data" / "vqa" / "v2_mscoco_val2014_annotations.json"
    with pytest.raises(SidebenchError) as caught:
        read_annotations(path, [8000, 8001, 9000, 9001])
    assert part in str(caught.value)


def test_an_answer_as_long_as_a_book_is_refused(tmp_path: Path) -> None:
    uri = write_vqa(tmp_path)
    write_vocabulary(tmp_path / "data" / "vqa", [*ANSWERS, "a" * (LONGEST_ANSWER + 1)])
    _refused(uri, "trainval_label2ans.json has an answer of 1,001 characters")


def test_so_is_one_that_a_person_gave(tmp_path: Path) -> None:
    task = _load(write_vqa(tmp_path))
    assert task.annotations is not None
    document = json.loads(task.annotations.read_text())
    document["annotations"][0]["answers"][3]["answer"] = "a" * (LONGEST_ANSWER + 1)
    task.annotations.write_text(json.dumps(document))
    asked = [one["question_id"] for one in document["annotations"]]
    with pytest.raises(SidebenchError, match="answers of at most 1000 characters"):
        read_annotations(task.annotations, asked)
