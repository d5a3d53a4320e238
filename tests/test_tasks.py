"""Tasks from files, folders and samples: what is read, what is refused and in which words."""

import csv
import json
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sidebench.bench.tasks import contents
from sidebench.bench.tasks.base import Task
from sidebench.bench.tasks.load import known_tasks, load_task
from sidebench.bench.tasks.rows import Rows, limited
from sidebench.cache.errors import SidebenchError
from sidebench.cache.home import home
from sidebench.cache.uri import parse_uri

ROWS = [("a fine film", "good"), ("dull", "bad"), ("a joy", "good"), ("a mess", "bad")]


def _load(uri: str, folder: Path, limit: int | None = None) -> Task:
    return load_task(uri, home=folder / "home", limit=limit, say=lambda _: None)


def _write_csv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> str:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return f"csv:{path}"


def _write_jsonl(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{path}"


def _image(path: Path, grey: int = 0, size: tuple[int, int] = (4, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)
    os.utime(path, (1_000_000_000, 1_000_000_000))  # long settled, so that its hash may be remembered
    return path


def _class_folders(root: Path, parts: tuple[str, ...] = ("",)) -> str:
    for p, part in enumerate(parts):
        for c, name in enumerate(("cat", "dog")):
            for i in range(2):
                _image(root / part / name / f"{i}.png", 50 * p + 20 * c + i)
    return f"folder:{root}"


# What is read


def test_csv_and_jsonl_of_the_same_rows_are_the_same_task(tmp_path: Path) -> None:
    a = _load(_write_csv(tmp_path / "a.csv", ROWS), tmp_path)
    b = _load(_write_jsonl(tmp_path / "b.jsonl", [{"text": text, "label": label} for text, label in ROWS]), tmp_path)
    assert a.classes == ("bad", "good")
    assert a.examples.targets.tolist() == [1, 0, 1, 0]
    assert a.examples.ids == ("0", "1", "2", "3")
    assert [a.examples.load(i) for i in range(4)] == [text for text, _ in ROWS]
    assert a.examples.content_sha256 == b.examples.content_sha256
    assert a.parts is None
    assert a.pooling == "mean"


def test_a_quoted_field_with_line_breaks_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('\ufefftext,label\r\n"one,\r\n""two""",x\r\n\r\nthree,y\r\n'.encode())
    task = _load(f"csv:{path}", tmp_path)
    assert [task.examples.load(i) for i in range(2)] == ['one,\r\n"two"', "three"]


def test_other_columns_are_named_in_the_uri(tmp_path: Path) -> None:
    header = ("key", "review text", "stars&", "fold")
    rows = [("a", "x", "1", "train"), ("b", "y", "2", "Validation"), ("c", "z", "2", "test")]
    uri = _write_csv(tmp_path / "a.csv", rows, header)
    task = _load(uri + "?text=review text&label=stars%26&split=fold&id=key&pool=cls", tmp_path)
    assert task.examples.ids == ("a", "b", "c")
    assert task.parts == ("train", "val", "test")
    assert task.pooling == "cls"


def test_whole_number_labels_sort_as_numbers_and_others_as_text(tmp_path: Path) -> None:
    numbers = _write_jsonl(tmp_path / "n.jsonl", [{"text": "x", "label": label} for label in (10, 9, -1, 2)])
    texts = _write_csv(tmp_path / "t.csv", [("x", label) for label in ("10", "9", "b")])
    assert _load(numbers, tmp_path).classes == ("-1", "2", "9", "10")
    assert _load(texts, tmp_path).classes == ("10", "9", "b")


def test_class_folders_are_read_in_path_order(tmp_path: Path) -> None:
    (tmp_path / "set" / "cat" / ".hidden.png").parent.mkdir(parents=True)
    (tmp_path / "set" / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / "set" / "cat" / "notes.txt").write_text("no image")
    task = _load(_class_folders(tmp_path / "set"), tmp_path)
    assert task.examples.ids == ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")
    assert task.examples.targets.tolist() == [0, 0, 1, 1]
    assert task.parts is None
    loaded = task.examples.load(3)
    assert isinstance(loaded, Image.Image)
    assert (loaded.mode, loaded.getpixel((0, 0))) == ("RGB", (21, 21, 21))


def test_train_valid_and_test_folders_become_parts(tmp_path: Path) -> None:
    task = _load(_class_folders(tmp_path / "set", ("train", "valid", "test")), tmp_path)
    assert Counter(task.parts) == {"train": 4, "val": 4, "test": 4}
    assert task.classes == ("cat", "dog")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "car"):
        _image(tmp_path / "set" / name / "0.png")
    task = _load(f"folder:{tmp_path / 'set'}", tmp_path)
    assert task.classes == ("car", "train")
    assert task.parts is None


def test_csv_images_are_found_beside_the_file(tmp_path: Path) -> None:
    _image(tmp_path / "pictures" / "a.png", 7)
    _image(tmp_path / "pictures" / "b.png", 8)
    rows = [("pictures/a.png", "x"), ("pictures/b.png", "y")]
    task = _load(_write_csv(tmp_path / "a.csv", rows, ("image", "label")), tmp_path)
    assert task.examples.modality == "image"
    assert task.examples.load(1).getpixel((0, 0)) == (8, 8, 8)  # type: ignore[attr-defined]


# The content hash


def test_the_content_hash_sees_text_label_id_and_order(tmp_path: Path) -> None:
    def hash_of(rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> str:
        return _load(_write_csv(tmp_path / "a.csv", rows, header), tmp_path).examples.content_sha256

    hashes = {
        hash_of(ROWS),
        hash_of(ROWS[::-1]),
        hash_of([("other", "good"), *ROWS[1:]]),
        hash_of([("a fine film", "bad"), *ROWS[1:]]),
        hash_of([(text, label.replace("good", "great")) for text, label in ROWS]),
        hash_of([(text, label, f"id{i}") for i, (text, label) in enumerate(ROWS)], ("text", "label", "id")),
    }
    assert len(hashes) == 6
    assert hash_of(ROWS) in hashes


def test_the_content_hash_of_images_is_the_same_in_another_folder(tmp_path: Path) -> None:
    a = _load(_class_folders(tmp_path / "a"), tmp_path)
    b = _load(_class_folders(tmp_path / "b"), tmp_path)
    assert a.examples.content_sha256 == b.examples.content_sha256
    _image(tmp_path / "b" / "cat" / "0.png", 200)
    assert _load(f"folder:{tmp_path / 'b'}", tmp_path).examples.content_sha256 != a.examples.content_sha256


def test_a_second_hash_of_unchanged_images_reads_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = _class_folders(tmp_path / "set")
    first = _load(uri, tmp_path).examples.content_sha256
    monkeypatch.setattr(contents.hashlib, "file_digest", lambda *_: pytest.fail("an image was read again"))
    assert _load(uri, tmp_path).examples.content_sha256 == first


def test_a_changed_image_is_read_again_and_a_fresh_one_is_not_remembered(tmp_path: Path) -> None:
    path, memo = _image(tmp_path / "a.png", 1), tmp_path / "hashes.json"
    before = contents.file_hashes([path], memo)
    _image(path, 2)
    os.utime(path)  # now, so it may change once more within the clock's grain
    after = contents.file_hashes([path], memo)
    assert after != before
    assert json.loads(memo.read_text())[str(path)][2] == before[0]


@pytest.mark.parametrize(
    "damage", [b"", b"\xff", b"[1, 2]", b'{"PATH": 3}', b'{"PATH": [1, 2, "short"]}', b"[" * 100_000]
)
def test_a_damaged_memo_of_hashes_only_costs_a_reread(tmp_path: Path, damage: bytes) -> None:
    path, memo = _image(tmp_path / "a.png"), tmp_path / "hashes.json"
    want = contents.file_hashes([path], memo)
    memo.write_bytes(damage.replace(b"PATH", str(path).encode()))
    assert contents.file_hashes([path], memo) == want
    assert json.loads(memo.read_text())[str(path)][2] == want[0]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.png", "hashes.json"]


def test_a_memo_that_cannot_be_written_only_costs_a_reread(tmp_path: Path) -> None:
    path = _image(tmp_path / "a.png")
    (tmp_path / "file").touch()
    want = contents.file_hashes([path], tmp_path / "hashes.json")
    assert contents.file_hashes([path], tmp_path / "file" / "hashes.json") == want


def test_a_remembered_hash_that_is_none_is_not_believed(tmp_path: Path) -> None:
    path, memo = _image(tmp_path / "a.png"), tmp_path / "hashes.json"
    want = contents.file_hashes([path], memo)
    for digest in ("short", 7, None):
        memo.write_text(json.dumps({str(path): [path.stat().st_size, path.stat().st_mtime_ns, digest]}))
        assert contents.file_hashes([path], memo) == want


def test_the_content_hash_is_lazy(tmp_path: Path) -> None:
    _load(_class_folders(tmp_path / "set"), tmp_path)
    assert not (tmp_path / "home" / "hashes.json").exists()


# The limit


def _rows_of(labels: list[str], parts: list[str] | None = None) -> Rows:
    names = tuple(map(str, range(len(labels))))
    return Rows("text", names, tuple(labels), names, tuple(parts) if parts else None)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.integers(1, 80))
def test_a_limit_keeps_every_class_the_order_and_the_proportions(labels: list[str], limit: int) -> None:
    sizes = Counter(labels)
    if limit < len(sizes):
        with pytest.raises(SidebenchError, match="is less than the"):
            limited(_rows_of(labels), limit, "csv:x")
        return
    kept = limited(_rows_of(labels), limit, "csv:x")
    assert len(kept.ids) == min(limit, len(labels))
    index = [int(name) for name in kept.ids]
    assert index == sorted(set(index))
    assert [labels[i] for i in index] == list(kept.labels)
    left = Counter(kept.labels)
    for name, size in sizes.items():
        assert 1 <= left[name] <= size
        fair = len(kept.ids) * size / len(labels)
        assert abs(left[name] - fair) < len(sizes)


@given(st.permutations(list(range(20))), st.integers(2, 20))
def test_a_limit_chooses_the_same_ids_whatever_the_order(order: list[int], limit: int) -> None:
    rows = _rows_of(["ab"[i % 2] for i in range(20)])
    assert set(limited(rows.take(order), limit, "csv:x").ids) == set(limited(rows, limit, "csv:x").ids)


def test_a_limit_keeps_the_parts_in_proportion() -> None:
    parts = (["train"] * 8 + ["val"] + ["test"]) * 10
    kept = limited(_rows_of(["a"] * 50 + ["b"] * 50, parts), 20, "csv:x")
    assert kept.parts is not None
    assert Counter(zip(kept.labels, kept.parts, strict=True)) == {
        (label, part): count for label in "ab" for part, count in (("train", 7), ("val", 1), ("test", 2))
    }


def test_a_class_left_with_one_example_keeps_one_to_train_on() -> None:
    kept = limited(_rows_of(["a"] * 3 + ["b"] * 3, ["test", "train", "val"] * 2), 2, "csv:x")
    assert kept.parts == ("train", "train")


def test_the_limit_comes_before_the_hash_and_a_large_one_changes_nothing(tmp_path: Path) -> None:
    uri = _write_csv(tmp_path / "a.csv", ROWS)
    whole, same, half = (_load(uri, tmp_path, limit) for limit in (None, 99, 2))
    assert whole.examples.content_sha256 == same.examples.content_sha256 != half.examples.content_sha256
    assert sorted(half.examples.targets.tolist()) == [0, 1]


# What is refused


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no examples"),
        (b"text,label\n", "holds no examples"),
        (b"text,label\na,x\nb\xff,y\n", r"a\.csv line 3 is not UTF-8 \(byte 0xff\)"),
        (b"text,label\na,x\nb,\n", r"line 3: 'label' is empty"),
        (b"text,label\n  ,x\nb,y\n", r"line 2: 'text' is empty"),
        (b"text,label\na,x\nb,x\n", "one class only, 'x'"),
        (b"txt,label\na,x\n", r"has no 'text'\. Did you mean 'txt'\? It has: 'txt', 'label'.*\?text=COLUMN"),
        (b"text,lable\na,x\n", r"has no 'label'\. Did you mean 'lable'\?.*\?label=COLUMN"),
        (b"text,text,label\na,b,x\n", "names the column 'text' twice"),
        (b"text,label\na,x,z\n", "line 2 has 3 fields; the first line names 2"),
        (b'text,label\n"a,x\nb,y\n', "no valid csv"),
        (b"text,image,label\na,b,x\n", r"offers text and image; write \?text"),
        (b"text,label,id\na,x,7\nb,y,7\n", "the id '7' stands twice"),
        (b"text,label,split\na,x,trian\n", "line 2: the split is 'trian'; write one of train, val"),
        (b"image,label\nnone.png,x\n", "line 2: there is no image"),
        (b"image,label\n../a.png,x\n", "lies outside"),
        (b"image,label\n/etc/hostname,x\n", "lies outside"),
        (b"image,label\na\0b.png,x\n", "line 2: "),
    ],
)
def test_a_bad_csv_is_refused_with_file_and_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(SidebenchError, match=words):
        _load(f"csv:{tmp_path / 'a.csv'}", tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n\n", "holds no examples"),
        (b'{"text": "a", "label": 1}\n[1]\n', r"line 2 is '\[1\]'; wanted an object"),
        (b'{"text": "a", "label": 1}\n{"text"\n', "line 2 is no valid JSON"),
        (b"[" * 100_000, "line 1 is no valid JSON"),
        (b'{"text": "a", "label": null}\n', "'label' is null"),
        (b'{"text": ["a"], "label": 1}\n', r"'text' is \[\"a\"\]"),
        (b'{"text": "\\ud800", "label": 1}\n', "lone surrogate"),
        (b'{"text": "a", "label": 1}\n{"label": 2}\n', "line 2 has no 'text'"),
        (
            b'{"text": "a", "label": 1}\n{"text": "a", "label": 1, "split": "test"}\n',
            "line 2 has 'split', but the lines",
        ),
        (b'{"text": "a", "label": 1}\n\xe9\n', "line 2 is not UTF-8"),
    ],
)
def test_a_bad_jsonl_is_refused_with_file_and_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(SidebenchError, match=words):
        _load(f"jsonl:{tmp_path / 'a.jsonl'}", tmp_path)


@given(st.binary(max_size=200), st.sampled_from(["csv", "jsonl"]))
def test_hostile_bytes_raise_nothing_but_the_one_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, scheme: str
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    head = b"text,label\n" if scheme == "csv" else b'{"text": "a", "label": "x"}\n'
    (folder / "a").write_bytes(head + content)
    with suppress(SidebenchError):
        assert len(_load(f"{scheme}:{folder / 'a'}", folder).classes) > 1


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    for uri in ("csv:nowhere.csv", "jsonl:nowhere.jsonl"):
        with pytest.raises(SidebenchError, match="there is no file nowhere"):
            _load(uri, tmp_path)
    with pytest.raises(SidebenchError, match="there is no folder nowhere"):
        _load("folder:nowhere", tmp_path)
    with pytest.raises(SidebenchError, match="it is a folder"):
        _load(f"csv:{tmp_path}", tmp_path)


def test_folders_without_images_or_with_mixed_levels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(SidebenchError, match="no class folders"):
        _load(f"folder:{tmp_path / 'none'}", tmp_path)
    (tmp_path / "none" / "cat").mkdir()
    with pytest.raises(SidebenchError, match=r"cat holds no images \(\.jpg"):
        _load(f"folder:{tmp_path / 'none'}", tmp_path)
    uri = _class_folders(tmp_path / "mixed", ("train", "test"))
    _image(tmp_path / "mixed" / "extra" / "a.png")
    with pytest.raises(SidebenchError, match="holds test, train and also extra"):
        _load(uri, tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    _image(tmp_path / "secret.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(SidebenchError, match="lies outside"):
        _load(_write_csv(tmp_path / "set" / "a.csv", [("a.png", "x")], ("image", "label")), tmp_path)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    uri = _class_folders(tmp_path / "set")
    whole = (tmp_path / "set" / "cat" / "0.png").read_bytes()
    for damage in (b"", b"no image", whole[:40], whole[:-30], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        (tmp_path / "set" / "cat" / "0.png").write_bytes(damage)
        with pytest.raises(SidebenchError, match=r"cat/0\.png cannot be read"):
            _load(uri, tmp_path).examples.load(0)


def test_formats_outside_the_list_are_not_even_tried(tmp_path: Path) -> None:
    uri = _class_folders(tmp_path / "set")
    Image.new("L", (4, 4)).save(tmp_path / "set" / "cat" / "0.png", format="PCX")
    with pytest.raises(SidebenchError, match=r"cat/0\.png cannot be read"):
        _load(uri, tmp_path).examples.load(0)


@pytest.mark.parametrize("side", [8_001, 30_000])
def test_a_huge_image_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    uri = _class_folders(tmp_path / "set")
    header = b"P5 %d %d 255\n" % (side, side)
    (tmp_path / "set" / "cat" / "0.png").write_bytes(header)
    with pytest.raises(SidebenchError, match="64,000,000"):
        _load(uri, tmp_path).examples.load(0)


def test_sixteen_bit_images_are_refused_since_they_would_be_clipped(tmp_path: Path) -> None:
    uri = _class_folders(tmp_path / "set")
    Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(tmp_path / "set" / "cat" / "0.png")
    with pytest.raises(SidebenchError, match="convert it to 8 bits"):
        _load(uri, tmp_path).examples.load(0)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("reviews.csv", "has no scheme"),
        ("cvs:a", "no task scheme 'cvs'. Did you mean 'csv'?"),
        ("csv:", "names nothing after 'csv:'"),
        ("csv:a?lable=x", "no option of 'csv:' 'lable'. Did you mean 'label'?"),
        ("csv:a?label", "'label' in task"),
        ("csv:a?label=x&label=y", "stands twice"),
        ("csv:a?pool=maen", "no pooling 'maen'. Did you mean 'mean'?"),
        ("folder:a?text=x", "no option of 'folder:' 'text'"),
        ("sample:tweet", "no sample task 'tweet'. Did you mean 'tweets'?"),
        ("sample:minilm-l6", "is a backbone; the sample tasks are movie-reviews, tweets"),
    ],
)
def test_a_mistyped_uri_gets_a_sentence_and_a_suggestion(tmp_path: Path, uri: str, words: str) -> None:
    with pytest.raises(SidebenchError) as caught:
        _load(uri, tmp_path)
    assert words in str(caught.value)


def test_a_uri_keeps_its_path_as_typed() -> None:
    uri = parse_uri("hf:C:\\models\\a%20b?layers=x%3Dy", kind="backbone", known={"hf": ("layers",)})
    assert (uri.scheme, uri.path, uri.options) == ("hf", "C:\\models\\a%20b", {"layers": "x=y"})


def test_known_tasks_name_every_form_and_every_data_sample() -> None:
    of_classes = {"csv", "jsonl", "folder", "glue", "vtab", "fgvc", "sample"}
    of_pairs = {"pairs", "f30k", "coco-retrieval", "msrvtt", "msvd"}
    of_both = {"vqa2", "gqa", "refcoco", "refcoco+", "refcocog"}
    assert {task.scheme for task in known_tasks()} == of_classes | of_pairs | of_both
    assert {task.form for task in known_tasks() if task.scheme == "sample"} == {
        "sample:movie-reviews",
        "sample:tweets",
        "sample:textile",
        "sample:digits",
        "sample:mnist-5k",
        "sample:digit-scenes",
    }


def test_the_home_folder_follows_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SIDEBENCH_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("SIDEBENCH_HOME")
    assert home().name == "sidebench"


@pytest.mark.samples
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("movie-reviews", {"negative": 5325, "positive": 5241}),
        ("tweets", {"negative": 1269, "positive": 2867}),
        ("textile", {"global": 500, "local": 500, "nominal": 1000}),
    ],
)
def test_sample_tasks_hold_the_known_counts(name: str, counts: dict[str, int]) -> None:
    task = load_task(f"sample:{name}", home=home(), say=print)
    assert Counter(task.classes[target] for target in task.examples.targets) == counts
    assert len(task.examples.content_sha256) == 64
