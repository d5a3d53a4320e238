"""One's own captioned images: the rows of csv and jsonl, which make items, and what is refused."""

import json
from pathlib import Path

import pytest
from retrieval_files import write_image, write_lines

from sidebench.bench.tasks.base import PairTask
from sidebench.bench.tasks.pairs import PAIR_SCHEMES, is_pairs, load_pairs
from sidebench.cache.errors import SidebenchError

ROWS = [
    {"image": "a.jpg", "text": "a cat, asleep", "split": "train"},
    {"image": "sub/b.jpg", "text": "a dog", "split": "test"},
    {"image": "./a.jpg", "text": 'it "sleeps"', "split": "train"},
    {"image": "c.jpg", "text": "ein Vogel über dem Haus", "split": "validation"},
]


def _load(path: Path, options: str = "") -> PairTask:
    return load_pairs(f"pairs:{path}{options}", home=path.parent / "home", say=[].append)


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    for seed, name in enumerate(("a.jpg", "sub/b.jpg", "c.jpg")):
        write_image(path.parent / name, seed)
    if path.suffix == ".jsonl":
        return write_lines(path, [json.dumps(row) for row in rows])
    quoted = [",".join('"' + str(value).replace('"', '""') + '"' for value in row.values()) for row in rows]
    return write_lines(path, [",".join(rows[0]), *quoted])


def _refused(path: Path, *parts: str, options: str = "") -> None:
    with pytest.raises(SidebenchError) as caught:
        _load(path, options)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl", "PAIRS.JSONL"])
def test_rows_that_name_one_image_are_captions_of_one_item(tmp_path: Path, name: str) -> None:
    task = _load(_write(tmp_path / name.replace("PAIRS.JSONL", "p.jsonl"), [dict(row) for row in ROWS]))
    assert task.item_ids == task.visual.ids == ("a.jpg", "sub/b.jpg", "c.jpg")
    assert task.item_parts == ("train", "test", "val")
    assert task.text.ids == ("a.jpg#0", "a.jpg#1", "sub/b.jpg#0", "c.jpg#0")
    assert [task.text.load(i) for i in range(4)] == ["a cat, asleep", 'it "sleeps"', "a dog", "ein Vogel über dem Haus"]
    assert task.text.targets.tolist() == [0, 0, 1, 2]
    assert (task.frames, task.folds, task.score_name) == (None, 1, "Rsum")


def test_columns_are_renamed_and_ids_are_those_of_captions(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"file": row["image"], "said": row["text"], "key": i} for i, row in enumerate(ROWS)
    ]
    task = _load(_write(tmp_path / "p.csv", rows), "?image=file&text=said&id=key")
    assert task.item_parts is None
    assert task.text.ids == ("0", "2", "1", "3")
    _refused(tmp_path / "p.csv", "has no 'image'", "?image=COLUMN")


def test_the_content_is_the_same_wherever_the_file_lies_and_in_either_form(tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    first, second = _load(_write(tmp_path / "one" / "p.csv", rows)), _load(_write(tmp_path / "two" / "p.jsonl", rows))
    assert first.visual.content_sha256 == second.visual.content_sha256
    assert first.text.content_sha256 == second.text.content_sha256
    rows[0]["text"] = "a cat, awake"
    assert _load(_write(tmp_path / "two" / "p.jsonl", rows)).text.content_sha256 != second.text.content_sha256


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": "a.jpg", "split": "test"}, "puts 'a.jpg' into test, a line before into train"),
        ({"image": "../a.jpg"}, "lies outside"),
        ({"image": "d.jpg"}, "there is no image"),
        ({"image": "a\0.jpg"}, "is no path of an image"),
        ({"image": None}, "'image' is null"),
        ({"text": "  "}, "'text' is empty"),
        ({"text": ["a"]}, "'text' is [\"a\"]"),
        ({"text": "\ud800"}, "half a character"),
        ({"split": "dev"}, "the split is 'dev'"),
        ({"id": "x"}, "do not all have 'id'"),
    ],
)
def test_rows_that_cannot_be_are_refused_with_their_line(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    rows = [dict(row) for row in ROWS]
    rows[2] = {**rows[2], **change}
    _refused(_write(tmp_path / "p.jsonl", rows), "p.jsonl line 3", reason)


def test_ids_that_stand_twice_are_refused(tmp_path: Path) -> None:
    for twice in ((0, 2), (0, 1)):  # of one image, of two
        rows = [{**row, "id": "same" if i in twice else str(i)} for i, row in enumerate(ROWS)]
        _refused(_write(tmp_path / "p.jsonl", rows), "'same' stands twice")


def test_a_file_that_is_none_of_pairs_is_refused(tmp_path: Path) -> None:
    _refused(tmp_path / "p.txt", "ends in .csv or .jsonl")
    _refused(tmp_path / "p.csv", "there is no file")
    _refused(_write(tmp_path / "one.jsonl", [dict(ROWS[0])]), "holds 1 items")
    _refused(write_lines(tmp_path / "none.jsonl", []), "holds 0 items")
    _refused(_write(tmp_path / "p.jsonl", [dict(row) for row in ROWS]), "split", options="?spilt=x")


def test_every_scheme_says_its_form() -> None:
    assert all(known.form.startswith(f"{scheme}:") for scheme, known in PAIR_SCHEMES.items())
    assert all(is_pairs(known.form) for known in PAIR_SCHEMES.values())
    assert is_pairs("sample:digit-scenes")
    assert not is_pairs("sample:digits")
