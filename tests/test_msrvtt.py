"""MSR-VTT from CLIP4Clip's files: the parts, whose captions are whose, what validates, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from retrieval_files import write_lines, write_msrvtt, write_video

from sidebench.bench.tasks.base import PairTask
from sidebench.bench.tasks.msrvtt import validating
from sidebench.bench.tasks.pairs import load_pairs
from sidebench.cache.errors import SidebenchError


def _load(root: Path, form: str = "9k", said: list[str] | None = None, limit: int | None = None) -> PairTask:
    say = [].append if said is None else said.append
    return load_pairs(f"msrvtt:{form}?root={root}", home=root / "home", limit=limit, say=say)


def _refused(root: Path, *parts: str, form: str = "9k") -> None:
    with pytest.raises(SidebenchError) as caught:
        _load(root, form)
    for part in parts:
        assert part in str(caught.value)


def _captions(task: PairTask, item: str) -> list[str]:
    of = np.flatnonzero(task.text.targets == task.item_ids.index(item))
    return [str(task.text.load(int(j))) for j in of]


def _change_sentences(root: Path, change: object) -> None:
    content = json.loads((root / "MSRVTT_data.json").read_text())
    (root / "MSRVTT_data.json").write_text(json.dumps({**content, "sentences": change}))


def test_training_videos_have_all_their_sentences_and_test_videos_the_listed_one(tmp_path: Path) -> None:
    task = _load(write_msrvtt(tmp_path, 6, 3))
    assert sorted(task.item_ids) == [f"video{n}" for n in range(9)]
    assert task.item_parts is not None
    assert [task.item_parts[task.item_ids.index(f"video{n}")] for n in (6, 7, 8)] == ["test"] * 3
    assert _captions(task, "video2") == [f"video2 caption {k}" for k in range(4)]
    assert _captions(task, "video7") == ["the test sentence, of video7"]
    assert len(task.text) == 6 * 4 + 3


def test_an_item_is_the_frames_of_its_video(tmp_path: Path) -> None:
    task = _load(write_msrvtt(tmp_path, 3, 2))
    assert task.frames is not None
    assert task.frames.tolist() == [0, 2, 4, 6, 8, 10]
    assert task.visual.targets.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for place, name in enumerate(task.item_ids):
        first, second = (np.asarray(task.visual.load(2 * place + k)).mean() for k in (0, 1))
        number = int(name.removeprefix("video"))
        assert (first, second) == pytest.approx((10 + number, 100 + number), abs=2)


def test_videos_that_validate_are_drawn_from_train_by_their_names_alone_and_never_from_test(tmp_path: Path) -> None:
    said: list[str] = []
    task = _load(write_msrvtt(tmp_path, 40, 5), said=said)
    assert task.item_parts is not None
    assert [task.item_parts.count(part) for part in ("train", "val", "test")] == [36, 4, 5]
    held = {name for name, part in zip(task.item_ids, task.item_parts, strict=True) if part == "val"}
    assert not held & {f"video{n}" for n in range(40, 45)}
    assert held != {f"video{n}" for n in range(4)}
    assert any("no validation part: 4 of 40 training videos validate" in line for line in said)
    names = [f"video{n}" for n in range(40)][::-1]
    write_lines(tmp_path / "MSRVTT_train.9k.csv", ["video_id", *names])
    again = _load(tmp_path)
    assert again.item_parts is not None
    assert held == {name for name, part in zip(again.item_ids, again.item_parts, strict=True) if part == "val"}


@pytest.mark.parametrize(("train", "held"), [(9, 1), (30, 3), (9_000, 900), (10_500, 1_000)])
def test_a_tenth_and_at_most_a_thousand_validate(train: int, held: int) -> None:
    assert len(validating([f"video{n}" for n in range(train)])) == held


def test_the_7k_list_is_another_list_of_the_same_videos(tmp_path: Path) -> None:
    root = write_msrvtt(tmp_path, 6, 3)
    _refused(root, "there is no file", "MSRVTT_train.7k.csv", "CLIP4Clip", form="7k")
    write_lines(root / "MSRVTT_train.7k.csv", ["video_id", "video0", "video3"])
    said: list[str] = []
    assert set(_load(root, "7k", said).item_ids) == {"video0", "video3", "video6", "video7", "video8"}
    assert any("MSRVTT_train.7k.csv lists 2 videos; the published list has 7010." in line for line in said)
    _refused(root, "no form of MSR-VTT '1k'", "7k, 9k", form="1k")


def test_a_limit_keeps_videos_of_every_part_with_their_frames_and_captions(tmp_path: Path) -> None:
    root = write_msrvtt(tmp_path, 20, 6)
    whole, task = _load(root), _load(root, limit=8)
    assert len(task.item_ids) == 8
    assert set(task.item_parts or ()) == {"train", "val", "test"}
    assert list(task.item_ids) == [name for name in whole.item_ids if name in task.item_ids]
    assert all(_captions(task, name) == _captions(whole, name) for name in task.item_ids)
    assert task.frames is not None
    assert len(task.frames) == 9
    assert len(task.visual) == 16


@pytest.mark.parametrize("folder", ["videos/all", "MSRVTT/videos/all", "videos"])
def test_videos_lie_where_their_download_puts_them_and_may_be_webm(tmp_path: Path, folder: str) -> None:
    root = write_msrvtt(tmp_path, 2, 2, videos=False)
    _refused(root, f"there is no video {root / 'MSRVTT_Videos' / 'video0'}.mp4", "MSRVTT.zip")
    for n in range(4):
        write_video(root / folder / f"video{n}.webm", [1], codec="libvpx")
    assert len(_load(root).visual) == 4


@pytest.mark.parametrize("name", ["MSRVTT_data.json", "MSRVTT_JSFUSION_test.csv", "MSRVTT_train.9k.csv"])
def test_a_missing_file_names_itself_and_where_it_comes_from(tmp_path: Path, name: str) -> None:
    root = write_msrvtt(tmp_path, 2, 2, videos=False)
    (root / name).unlink()
    _refused(root, f"{root / name}", "msrvtt_data.zip of CLIP4Clip")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["video_id", "video0", "video0"], "line 3 lists 'video0' again"),
        (["video_id", "video0", "video9"], "no sentence for 'video9'"),
        (["video_id", "video0", "video2"], "'video2' is in train and in test"),
        (["video", "video0", "video1"], "has no 'video_id'"),
        (["video_id"], "lists no videos"),
        (["video_id", "../video0"], "no sentence for '../video0'"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path: Path, lines: list[str], reason: str) -> None:
    root = write_msrvtt(tmp_path, 2, 2)
    write_lines(root / "MSRVTT_train.9k.csv", lines)
    _refused(root, reason)


@pytest.mark.parametrize(
    ("sentences", "reason"),
    [
        ("no list", "no list of 'sentences'"),
        (None, "no list of 'sentences'"),
        ([{"video_id": "video0"}], "sentence 0 has no 'video_id' and 'caption'"),
        (["a"], "sentence 0 has no"),
        ([{"video_id": f"video{n}", "caption": " "} for n in range(2)], "the caption 'video0#0' is ''"),
        ([{"video_id": f"video{n}", "caption": "\ud800"} for n in range(2)], "the caption 'video0#0' is"),
    ],
)
def test_sentences_that_do_not_fit_are_refused(tmp_path: Path, sentences: object, reason: str) -> None:
    root = write_msrvtt(tmp_path, 2, 2)
    _change_sentences(root, sentences)
    _refused(root, reason)


def test_a_test_video_outside_the_folder_is_refused(tmp_path: Path) -> None:
    root = write_msrvtt(tmp_path, 2, 2)
    write_video(root / "outside.mp4", [1])
    write_lines(root / "MSRVTT_JSFUSION_test.csv", ["key,vid_key,video_id,sentence", "ret0,msr0,../outside,hello"])
    _refused(root, "'../outside' is no name of a video")
