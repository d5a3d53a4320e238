"""GQA in LXMERT's files: what is read, which part does what, what an unknown answer does, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from joint_files import ANSWERS, write_gqa

from sidebench.bench.tasks.base import AnswerTask
from sidebench.bench.tasks.load import load_any
from sidebench.cache.errors import SidebenchError


def _load(uri: str, limit: int | None = None, said: list[str] | None = None) -> AnswerTask:
    task = load_any(uri, home=Path("/nowhere"), limit=limit, say=[].append if said is None else said.append)
    assert isinstance(task, AnswerTask)
    return task


def _change(root: Path, change: Callable[[Any], object], file: str = "train") -> None:
    path = root / "data" / "gqa" / f"{file}.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _refused(uri: str, *parts: str) -> None:
    with pytest.raises(SidebenchError) as caught:
        _load(uri)
    for part in parts:
        assert part in str(caught.value)


def _answers(task: AnswerTask, i: int) -> list[str]:
    row = slice(*task.labels.offsets[i : i + 2])
    assert set(task.labels.scores[row].tolist()) <= {1.0}
    return [task.answers[answer] for answer in task.labels.classes[row]]


def test_a_question_has_its_image_its_text_and_its_answer(tmp_path: Path) -> None:
    task = _load(write_gqa(tmp_path))
    assert (task.answers, task.num_outputs, task.score_name, task.annotations) == (ANSWERS, 5, "exact match", None)
    assert task.examples.ids[:3] == ("train-010", "train-011", "train-020")
    assert task.question_ids[:3] == ("010", "011", "020")
    assert [_answers(task, i) for i in range(4)] == [["blue"], ["no"], ["red"], ["yes"]]
    loaded = task.examples.load(5)
    assert (loaded.image.size, loaded.text) == ((48, 32), "Is this red?")
    assert task.examples.paths[5] == tmp_path / "data" / "gqa" / "images" / "3.jpg"  # type: ignore[attr-defined]


def test_testdev_tests_and_a_tenth_of_the_images_of_valid_validates(tmp_path: Path) -> None:
    task = _load(write_gqa(tmp_path, {"train": 2, "valid": 24, "testdev": 3, "submit": 1}))
    names = [f"{name.partition('-')[0]} {part}" for name, part in zip(task.examples.ids, task.parts, strict=True)]
    counts = {name: names.count(name) for name in names}
    assert counts == {"train train": 4, "valid train": 44, "valid val": 4, "testdev test": 6}
    paths = task.examples.paths  # type: ignore[attr-defined]
    images = {part: {p for p, of in zip(paths, task.parts, strict=True) if of == part} for part in set(task.parts)}
    assert len(images["val"]) == 2
    assert not images["val"] & images["train"]


def test_an_unknown_answer_is_not_trained_on_and_counts_as_wrong_elsewhere(tmp_path: Path) -> None:
    uri = write_gqa(tmp_path)
    said: list[str] = []
    before = _load(uri, said=said)
    assert said == []
    for file, count in (("train", 3), ("testdev", 2)):
        _change(tmp_path, lambda items, n=count: [items[i].update(label={"a gnu": 1.0}) for i in range(n)], file)
    task = _load(uri, said=said)
    assert said == [
        "3 training questions have an answer outside the vocabulary and are left out.",
        "2 test questions have an answer outside the vocabulary and count as wrong.",
    ]
    assert task.examples.ids == before.examples.ids[3:]
    assert [_answers(task, i) for i, part in enumerate(task.parts) if part == "test"][:2] == [[], []]
    validating = [i for i, part in enumerate(before.parts) if part == "val"]
    stem, _, question_id = before.examples.ids[validating[0]].partition("-")
    change = lambda items: [i.update(label={"a": 1}) for i in items if i["question_id"] == question_id]  # noqa: E731
    _change(tmp_path, change, stem)
    again = _load(uri, said=said)
    assert said[-2] == "1 val questions have an answer outside the vocabulary and count as wrong."
    assert again.examples.ids == task.examples.ids


def test_training_questions_without_any_known_answer_are_refused(tmp_path: Path) -> None:
    uri = write_gqa(tmp_path)
    for file in ("train", "valid"):
        _change(tmp_path, lambda items: [item.update(label={"a gnu": 1.0}) for item in items], file)
    _refused(uri, "no training question has an answer of trainval_ans2label.json")


def test_the_questions_to_submit_are_there_when_asked_for(tmp_path: Path) -> None:
    uri, said = write_gqa(tmp_path), list[str]()
    task, asked = _load(uri), _load(f"{uri}&submit=test", said=said)
    assert (len(task.examples), len(asked.examples)) == (18, 20)
    assert asked.parts == (*task.parts, "submit", "submit")
    assert asked.question_ids[18:] == ("0100", "0101")
    assert said == []
    assert sorted(_load(f"{uri}&submit=test", limit=4).parts) == ["submit", "test", "train", "val"]
    (tmp_path / "data" / "gqa" / "submit.json").unlink()
    assert len(_load(uri).examples) == 18
    _refused(f"{uri}&submit=test", "submit.json; it comes with LXMERT's files of GQA")


def _first(**fields: object) -> Callable[[Any], object]:
    return lambda items: items[1].update(fields)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_first(label={}), ["'label' is {}; wanted one answer that scores 1"]),
        (_first(label={"yes": 0.5}), ["wanted one answer that scores 1"]),
        (_first(label={"yes": 1, "no": 1}), ["wanted one answer that scores 1"]),
        (_first(label="yes"), ["'label' is \"yes\""]),
        (_first(question_id=None), ["'question_id' is null"]),
        (_first(question_id="010"), ["the id 'train-010' stands twice"]),
        (_first(img_id="../1"), ["'img_id' is \"../1\""]),
        (_first(img_id="n 1"), ["'img_id'"]),
        (_first(img_id="77"), ["there is no file", "77.jpg; it comes with images.zip of GQA's own download"]),
        (_first(sent=7), ["'sent' is 7; wanted a text"]),
    ],
)
def test_what_no_question_may_hold_is_refused(
    change: Callable[[Any], object], parts: list[str], tmp_path: Path
) -> None:
    uri = write_gqa(tmp_path)
    _change(tmp_path, change)
    _refused(uri, *parts)


def test_a_whole_number_is_a_question_id_too(tmp_path: Path) -> None:
    uri = write_gqa(tmp_path)
    _change(tmp_path, _first(question_id=12))
    assert _load(uri).question_ids[:2] == ("010", 12)


def test_missing_files_and_other_sets_are_refused(tmp_path: Path) -> None:
    uri = write_gqa(tmp_path)
    _refused(f"gqa:all?root={tmp_path}", "no GQA 'all'. Known: balanced")
    (tmp_path / "data" / "gqa" / "valid.json").unlink()
    _refused(uri, "valid.json; it comes with LXMERT's files of GQA")
