"""Frames of videos: at which seconds, which picture, in any container, known without decoding; broken files refused."""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from retrieval_files import write_video

from sidebench.bench.tasks import videos
from sidebench.bench.tasks.videos import FrameExamples, decode, frames_of, length_of, seconds_seen, video_below
from sidebench.cache.errors import SidebenchError

CONTAINERS = [
    ("a.mp4", {}),
    ("a.mp4", {"bframes": 2}),
    ("a.mp4", {"rate": 30}),
    ("a.avi", {}),
    ("a.avi", {"bframes": 2}),  # whose first frame does not start at zero
    ("a.mkv", {}),
    ("a.webm", {"codec": "libvpx"}),  # these two do not say how long the pictures last
]


def _greys(frames: Sequence[object]) -> list[int]:
    return [round(float(np.asarray(frame).mean())) for frame in frames]


def _near(found: Sequence[int], wanted: Sequence[int]) -> bool:
    """Of the same greys, up to what a lossy codec does to them."""
    return len(found) == len(wanted) and all(abs(a - b) <= 3 for a, b in zip(found, wanted, strict=True))


def _examples(folder: Path, *lengths: int) -> FrameExamples:
    paths = [write_video(folder / f"v{i}.mp4", range(40 * i, 40 * i + 8 * n, 8)) for i, n in enumerate(lengths)]
    return frames_of([path.stem for path in paths], paths, folder / "home", [].append)


def _refused(action: object, *parts: str) -> None:
    with pytest.raises(SidebenchError) as caught:
        action()  # type: ignore[operator]
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("length", "seconds"),
    [
        (0, [0]),
        (0.3, [0]),
        (1, [0]),
        (1.01, [0, 1]),
        (11.5, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        (12.0000001, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        (13, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12]),
        (23, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]),
        (3600, [int(Fraction(3599 * k, 11)) for k in range(12)]),
    ],
)
def test_a_video_is_seen_once_a_second_and_at_most_twelve_times(length: float, seconds: list[int]) -> None:
    assert list(seconds_seen(length)) == seconds


@pytest.mark.parametrize(("name", "how"), CONTAINERS)
@pytest.mark.parametrize("count", [1, 3, 14])
def test_what_is_seen_at_a_second_is_what_is_shown_then(tmp_path: Path, name: str, how: dict, count: int) -> None:
    greys = range(20, 20 + 15 * count, 15)
    path = write_video(tmp_path / name, greys, **how)
    assert length_of(path) == pytest.approx(count, abs=0.05)
    seconds = seconds_seen(length_of(path))
    assert len(seconds) == min(count, 12)
    assert _near(_greys(decode(path, seconds)), [greys[second] for second in seconds])


def _stretched(path: Path, starts: Sequence[int], lasts: int) -> Path:
    """The video with its pictures at other seconds, the last of which lasts for so many."""
    import av

    found = path.with_name(f"stretched-{path.name}")
    with av.open(str(path)) as source, av.open(str(found), "w") as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        for packet, start, end in zip(packets, starts, [*starts[1:], starts[-1] + lasts], strict=True):
            second = int(1 / packet.time_base)
            packet.pts = packet.dts = start * second
            packet.duration = (end - start) * second
            packet.stream = stream
            sink.mux(packet)
    return found


def test_between_two_pictures_the_first_is_still_shown_and_the_last_stays(tmp_path: Path) -> None:
    path = write_video(tmp_path / "slow.mp4", [50, 100, 150], rate=1)
    slow = _stretched(path, [0, 3, 6], 3)
    assert length_of(slow) == pytest.approx(9)
    assert _near(_greys(decode(slow, [0, 2, 3, 5, 6, 8])), [50, 50, 100, 100, 150, 150])
    still = _stretched(path, [0, 1, 2], 10)
    assert length_of(still) == pytest.approx(12)
    assert _near(_greys(decode(still, [0, 1, 2, 11])), [50, 100, 150, 150])


def test_examples_are_the_frames_of_every_video_in_order(tmp_path: Path) -> None:
    examples = _examples(tmp_path, 1, 3, 14)
    assert examples.offsets.tolist() == [0, 1, 4, 16]
    assert (len(examples), examples.modality) == (16, "image")
    assert examples.targets.tolist() == [0] + [1] * 3 + [2] * 12
    assert examples.ids[:5] == ("v0#0", "v1#0", "v1#1", "v1#2", "v2#0")
    order = [3, 0, 15, 2, 4, 1]  # back and forth between videos
    frames = [examples.load(i) for i in order]
    assert _near(_greys(frames), [40 + 16, 0, 80 + 13 * 8, 40 + 8, 80, 40])
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (32, 32))}


def test_a_video_is_decoded_once_for_frames_that_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = _examples(tmp_path, 3, 2)
    seen: list[str] = []
    monkeypatch.setattr(videos, "decode", lambda path, seconds: seen.append(path.name) or decode(path, seconds))
    for i in range(5):
        examples.load(i)
    assert seen == ["v0.mp4", "v1.mp4"]
    assert len(examples._last) == 1  # nor are the frames of more than one kept


def test_how_many_frames_there_are_is_known_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_video(tmp_path / name, [10] * 3, **how) for name, how in CONTAINERS]
    monkeypatch.setattr(videos, "_frames", None)
    names = [str(i) for i in range(len(paths))]
    assert frames_of(names, paths, tmp_path, [].append).offsets[-1] == 3 * len(paths)


def test_a_container_that_says_how_long_its_pictures_last_is_not_read_through(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(duration=150, time_base=Fraction(1, 10))
    monkeypatch.setattr(videos, "_opened", lambda path: nullcontext((None, stream)))
    assert length_of(Path("v.mp4")) == 15


def test_lengths_are_remembered_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(videos, "length_of", lambda path: opened.append(path.name) or length_of(path))
    first, again = _examples(tmp_path, 2, 3), _examples(tmp_path, 2, 3)
    assert first.seconds == again.seconds == ((0, 1), (0, 1, 2))
    assert opened == ["v0.mp4", "v1.mp4"]
    assert _examples(tmp_path, 2, 4).seconds == ((0, 1), (0, 1, 2, 3))
    assert opened[2:] == ["v1.mp4"]
    for spoiled in ("{", "[1]", '{"' + "0" * 64 + '": "x"}', json.dumps(dict.fromkeys(_remembered(tmp_path), "long"))):
        (tmp_path / "home" / "videos.json").write_text(spoiled)
        assert _examples(tmp_path, 2, 3).seconds == first.seconds


def _remembered(folder: Path) -> dict[str, float]:
    return json.loads((folder / "home" / "videos.json").read_text())


def test_many_videos_are_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "_MANY", 1)
    said: list[str] = []
    paths = [write_video(tmp_path / f"{n}.mp4", [n]) for n in (1, 99)]
    for _ in range(2):
        frames_of(["a", "b"], paths, tmp_path, said.append)
    assert said == ["reading how long 2 videos are"]


def test_the_content_hash_sees_bytes_names_and_seconds_but_not_the_folder(tmp_path: Path) -> None:
    first, same = _examples(tmp_path / "one", 3, 2), _examples(tmp_path / "two", 3, 2)
    assert first.content_sha256 == same.content_sha256
    other = _examples(tmp_path / "three", 3, 3)
    renamed = FrameExamples(("v0", "w"), first.paths, first.seconds, first.memo)
    later = FrameExamples(first.videos, first.paths, ((0, 1, 2), (0, 2)), first.memo)
    assert len({first.content_sha256, other.content_sha256, renamed.content_sha256, later.content_sha256}) == 4


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", range(0, 200, 10)).read_bytes()
    for name, content in (("empty", b""), ("text", b"no video"), ("start", whole[: len(whole) // 2])):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        _refused(lambda path=path: frames_of(["v"], [path], tmp_path, [].append), f"the video {path} cannot be read")
    _refused(
        lambda: length_of(tmp_path / "none.mp4"), f"the video {tmp_path / 'none.mp4'} cannot be read (No such file"
    )


def test_a_video_that_breaks_off_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.avi", range(0, 200, 10))
    _refused(lambda: decode(path, [0, 19, 29]), f"the video {path} breaks off at 20.0 s of 29 or more")
    assert _near(_greys(decode(path, [0, 19, 21])), [0, 190, 190])  # the last picture stays, as in a player
    path.write_bytes(path.read_bytes()[:-3_000])
    _refused(lambda: decode(path, seconds_seen(20)), f"the video {path}")
    assert len(decode(path, [0, 1])) == 2


def test_pictures_spoiled_on_the_way_are_refused_or_decoded_but_never_a_crash(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", range(0, 200, 10))
    content = path.read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(30):
        spoiled = bytearray(content)
        for at in draw.integers(0, len(content), 20):
            spoiled[at] = draw.integers(256)
        path.write_bytes(bytes(spoiled))
        with suppress(SidebenchError):
            seconds = seconds_seen(length_of(path))
            assert len(decode(path, seconds)) == len(seconds)


def test_a_file_that_names_other_files_is_not_followed(tmp_path: Path) -> None:
    write_video(tmp_path / "other.mp4", [10])
    path = tmp_path / "v.mp4"
    for content in ("ffconcat version 1.0\nfile other.mp4\n", "#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n"):
        path.write_text(content)
        _refused(lambda: length_of(path), f"the video {path} cannot be read")


def test_sound_alone_and_pictures_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    _refused(lambda: length_of(path), f"the video {path} holds no picture")
    monkeypatch.setattr(videos, "_MAX_PIXELS", 1_000)
    _refused(lambda: length_of(write_video(tmp_path / "v.mp4", [1])), "32 x 32 pixels; wanted at most 1,000")


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    _refused(lambda: length_of(tmp_path / "v.mp4"), "pip install 'sidebench[video]'")


@pytest.mark.parametrize("name", ["../v", "/v", "a/v", "a\\v", "v\0"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    _refused(lambda: video_below(tmp_path, name, "X"), "is no name of a video")


def test_a_video_is_found_by_its_name_and_else_said_where_from(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.b.webm", [1], codec="libvpx")
    assert video_below(tmp_path, "a.b", "the download") == path
    _refused(
        lambda: video_below(tmp_path, "a", "the download"), f"there is no video {tmp_path / 'a'}.mp4", "the download"
    )
