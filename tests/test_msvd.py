"""MSVD from CLIP4Clip's files, and its pickled captions, of which nothing is ever run."""

import io
import os
import pickle
import pickletools
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from retrieval_files import write_lines, write_msvd

from sidebench.bench.tasks import plain_pickle
from sidebench.bench.tasks.base import PairTask
from sidebench.bench.tasks.pairs import load_pairs
from sidebench.bench.tasks.plain_pickle import read_lists
from sidebench.cache.errors import SidebenchError

LISTS = {"-4w_5_15": [["a", "cat", "sleeps"], ["a", "a", "cat"]], "ö": [["日本", "x" * 300], []], "none": []}
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


def _load(root: Path, said: list[str] | None = None, limit: int | None = None) -> PairTask:
    say = [].append if said is None else said.append
    return load_pairs(f"msvd:retrieval?root={root}", home=root / "home", limit=limit, say=say)


def _refused(root: Path, *parts: str) -> None:
    with pytest.raises(SidebenchError) as caught:
        _load(root)
    for part in parts:
        assert part in str(caught.value)


def _file(folder: Path, content: bytes) -> Path:
    path = folder / "raw-captions.pkl"
    path.write_bytes(content)
    return path


def _not_read(path: Path, *parts: str) -> None:
    with pytest.raises(SidebenchError) as caught:
        read_lists(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


def _captions(task: PairTask, item: str) -> list[str]:
    of = np.flatnonzero(task.text.targets == task.item_ids.index(item))
    return [str(task.text.load(int(j))) for j in of]


def test_lists_are_the_parts_and_words_the_captions(tmp_path: Path) -> None:
    said: list[str] = []
    task = _load(write_msvd(tmp_path), said)
    assert task.item_ids == ("train-0_0_9", "train-1_0_9", "train-2_0_9", "val-0_0_9", "test-0_0_9", "test-1_0_9")
    assert task.item_parts == ("train", "train", "train", "val", "test", "test")
    assert _captions(task, "train-2_0_9") == [f"train video 2 caption {k}" for k in range(4)]
    assert _captions(task, "test-0_0_9") == ["test video 0 caption 0", "test video 0 caption 1"]
    assert task.frames is not None
    assert task.frames.tolist() == [0, 1, 3, 6, 7, 8, 10]
    assert np.asarray(task.visual.load(5)).mean() == pytest.approx(52, abs=2)
    assert any("val_list.txt lists 1 videos; the published list has 100." in line for line in said)


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_is_the_same_content(tmp_path: Path, protocol: int) -> None:
    first, second = _load(write_msvd(tmp_path / "a")), _load(write_msvd(tmp_path / "b", protocol=protocol))
    assert first.text.content_sha256 == second.text.content_sha256


def test_a_limit_keeps_each_part(tmp_path: Path) -> None:
    task = _load(write_msvd(tmp_path), limit=3)
    assert task.item_parts == ("train", "val", "test")
    assert task.frames is not None
    assert task.frames[-1] == len(task.visual)


def test_captions_without_a_word_are_left_out_which_is_said(tmp_path: Path) -> None:
    root = write_msvd(tmp_path)
    captions = read_lists(root / "raw-captions.pkl")
    captions["val-0_0_9"] = [[], ["a", "dog"], [" "]]
    _file(root, pickle.dumps(captions))
    said: list[str] = []
    task = _load(root, said)
    assert _captions(task, "val-0_0_9") == ["a dog"]
    assert any("2 captions without a word are left out" in line for line in said)
    captions["val-0_0_9"] = [[]]
    _file(root, pickle.dumps(captions))
    _refused(root, "'val-0_0_9' has no caption")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    root = write_msvd(tmp_path)
    (root / "MSVD_Videos" / "val-0_0_9.avi").unlink()
    _refused(root, f"there is no video {root / 'MSVD_Videos' / 'val-0_0_9'}.mp4", "YouTubeClips.tar")
    write_lines(root / "val_list.txt", ["train-0_0_9"])
    _refused(root, "'train-0_0_9' is in train and in val")
    write_lines(root / "val_list.txt", ["unknown"])
    _refused(root, "has no captions of 'unknown'")
    (root / "val_list.txt").unlink()
    _refused(root, f"there is no file {root / 'val_list.txt'}", "msvd_data.zip")
    (root / "raw-captions.pkl").unlink()
    _refused(root, str(root / "raw-captions.pkl"), "msvd_data.zip")
    with pytest.raises(SidebenchError, match="no form of MSVD '1k'"):
        load_pairs(f"msvd:1k?root={root}", home=root, say=[].append)


@pytest.mark.parametrize("pickler", [pickle.Pickler, pickle._Pickler])  # type: ignore[attr-defined]
@pytest.mark.parametrize("protocol", range(6))
def test_real_pickles_are_read_as_unpickling_would(tmp_path: Path, protocol: int, pickler: type) -> None:
    stream = io.BytesIO()
    pickler(stream, protocol).dump(LISTS)
    assert read_lists(_file(tmp_path, stream.getvalue())) == LISTS
    many = {str(n): [[str(k), "w"] for k in range(n % 7)] for n in range(3_000)}  # batches, long memo keys, a frame
    assert read_lists(_file(tmp_path, pickle.dumps(many, protocol))) == many
    optimised = pickletools.optimize(pickle.dumps(LISTS, protocol))
    assert read_lists(_file(tmp_path, optimised)) == LISTS


@given(st.dictionaries(WORDS, st.lists(st.lists(WORDS, max_size=4), max_size=4), max_size=4), st.integers(0, 5))
def test_any_lists_of_any_words_come_back(
    tmp_path_factory: pytest.TempPathFactory, lists: dict[str, list[list[str]]], protocol: int
) -> None:
    path = _file(tmp_path_factory.mktemp("pickles"), pickle.dumps(lists, protocol))
    assert read_lists(path) == lists


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"(dp0\nS'ab_1_2'\np1\n(lp2\n(lp3\nS'a'\np4\naS\"it's\"\np5\naa(lp6\ng4\naas.", "it's"),
        (b"\x80\x02}q\x00U\x06ab_1_2q\x01]q\x02(]q\x03(U\x01aq\x04T\x05\x00\x00\x00caf\xc3\xa9e]h\x04aes.", "café"),
    ],
)
def test_byte_strings_of_python_2_are_read_as_utf_8(tmp_path: Path, content: bytes, word: str) -> None:
    assert read_lists(_file(tmp_path, content)) == {"ab_1_2": [["a", word], ["a"]]}


class _Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "ran"
    for value in (_Runs(marker), {"a": [[_Runs(marker)]]}, {"a": [["b"]], "c": _Runs(marker)}):
        _not_read(_file(tmp_path, pickle.dumps(value, protocol)), "the opcode ", "nothing else is read")
    assert not marker.exists()
    pickle.loads(pickle.dumps(_Runs(marker), protocol))  # which shows that it would have
    assert marker.exists()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"a": [["b", 1]]}, "the opcode BININT1"),
        ({"a": [[b"bytes"]]}, "the opcode"),
        ({"a": [("b",)]}, "the opcode TUPLE1"),
        ({"a": {"b": []}}, "no list of lists at the key 'a'"),
        ({"a": ["b"]}, "no list of lists at the key 'a'"),
        ({"a": [[["b"]]]}, "a word that is no text at the key 'a'"),
        ({"a": "b"}, "no list of lists"),
        ({"a": None}, "the opcode NONE"),
        ([["a"]], "holds no dict"),
        ("a", "holds no dict"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, value: object, reason: str) -> None:
    _not_read(_file(tmp_path, pickle.dumps(value, 2)), reason)


def test_lists_in_two_places_are_refused_as_is_what_holds_itself(tmp_path: Path) -> None:
    words = ["a"] * 100
    for value in ({"a": [words, words]}, {"a": [words], "b": [words]}):
        _not_read(_file(tmp_path, pickle.dumps(value)), "a list or a dict in two places")
    endless: list[object] = []
    endless.append(endless)
    _not_read(_file(tmp_path, pickle.dumps({"a": endless})), "in two places")


def test_a_short_file_cannot_spell_out_endless_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    word = "x" * 5_000
    path = _file(tmp_path, pickle.dumps({"a": [[word] * 5_000]}, 2))
    assert path.stat().st_size < 25_000
    monkeypatch.setattr(plain_pickle, "_MAX_MADE", 1 << 20)
    _not_read(path, "more than 1,048,576 bytes of texts")
    _not_read(_file(tmp_path, b"\x80\x02}U\x01a(" + b"]" * 20_000), "more than")
    monkeypatch.setattr(plain_pickle, "_MAX_BYTES", 1_000)
    _not_read(path, "wanted at most 1,000")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"a.",
        b"e.",
        b"(u.",
        b"\x80\x02]K",
        b"}U\xff.",
        b"\x80\x02}X\xff\xff\xff\xff.",
        b"h\x07.",
        b"q\x00.",
        b"}U\x01a]s",  # no end
        b"}]U\x01as.",  # a key that is a list
        b"U\x01aU\x01a]s.",  # a key of a text
        b"]U\x01a]s.",  # of a list
        b"}}.",  # two dicts
        b"}(U\x01au.",  # a key without a value
        b"}(U\x01a]U\x01a]u.",  # one key twice
        b"U\x01aU\x01ba.",  # a text lengthened
        b"}U\x01a](](as.",  # a mark in a list
        b"(((((((.",
        b"\x80\x02U\x01\xff.",
    ],
)
def test_what_is_no_whole_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    _not_read(_file(tmp_path, content))


@given(content=st.binary(max_size=200), start=st.integers(0, 60))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, start: int) -> None:
    whole = pickle.dumps(LISTS, 2)
    path = _file(tmp_path_factory.mktemp("pickles"), whole[:start] + content)
    with suppress(SidebenchError):
        assert isinstance(read_lists(path), dict)
