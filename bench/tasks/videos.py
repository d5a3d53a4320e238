"""The frames of videos as examples: one a second, at most twelve, evenly over the video (CLIP4Clip, arXiv 2104.08860).

A video of S started seconds is seen at its seconds 0, 1, …, S - 1; of more than twelve of these, twelve are kept at
even distance, the first and the last among them. What is seen at a second is the frame that a player shows then.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import SidebenchError
from .contents import content_hash, file_hashes, remember

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_FRAMES = 12
SUFFIXES = (".mp4", ".webm", ".avi", ".mkv")
# Containers of one file only: a playlist could name other files, or addresses, for FFmpeg to open.
_OPEN_OPTIONS = {"format_whitelist": "mov,mp4,matroska,webm,avi", "protocol_whitelist": "file"}
_MAX_PIXELS = 64_000_000
_CLOCK_SECONDS = 1e-6  # a container's clock may be off a whole second by its rounding
_MANY = 100  # videos; opening these takes a second or more
_LATE_SECONDS = 2.0  # so much earlier than its container says a video may end


@dataclass(frozen=True, eq=False)
class FrameExamples:
    """Frames of video files, in order of the videos; `memo` is the file that remembers the files' hashes."""

    videos: tuple[str, ...]
    paths: tuple[Path, ...]
    seconds: tuple[tuple[int, ...], ...]  # at which each video is seen
    memo: Path
    modality: Literal["image"] = "image"
    _last: dict[int, "list[Image]"] = field(default_factory=dict, repr=False)  # frames of the video decoded last

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(videos + 1,) first frame of each video."""
        return np.cumsum([0, *map(len, self.seconds)], dtype=np.int64)

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """(frames,) index of the video that each is of."""
        return np.repeat(np.arange(len(self.videos), dtype=np.int64), np.diff(self.offsets))

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The names "video#0", "video#1", …"""
        return tuple(
            f"{name}#{k}" for name, seen in zip(self.videos, self.seconds, strict=True) for k in range(len(seen))
        )

    def load(self, index: int) -> "Image":
        """RGB image as stored (a rotation that the container asks for is not applied); a broken file is named."""
        video = int(self.targets[index])
        frames = self._last.get(video)
        if frames is None:
            frames = decode(self.paths[video], self.seconds[video])
            self._last.clear()
            self._last[video] = frames
        return frames[index - int(self.offsets[video])]

    @cached_property
    def content_sha256(self) -> str:
        """Hash over ids, bytes of the video files, at which second each frame is, and its video."""
        hashes = file_hashes(self.paths, self.memo)
        digests = (f"{digest} {second}" for digest, seen in zip(hashes, self.seconds, strict=True) for second in seen)
        return content_hash(self.modality, self.ids, self.targets, (), digests)


def frames_of(videos: Sequence[str], paths: Sequence[Path], home: Path, say: Callable[[str], None]) -> FrameExamples:
    """The frames of these videos; how many each has follows from its length, for which no picture is decoded."""
    memo = home / "hashes.json"
    lengths = _lengths(paths, file_hashes(paths, memo), home / "videos.json", say)
    return FrameExamples(tuple(videos), tuple(paths), tuple(map(seconds_seen, lengths)), memo)


def _lengths(paths: Sequence[Path], hashes: Sequence[str], memo: Path, say: Callable[[str], None]) -> Sequence[float]:
    """`length_of` each file; opening ten thousand takes minutes, so `memo` remembers it by the files' hashes."""
    known = _remembered(memo)
    unknown = {digest: path for path, digest in zip(paths, hashes, strict=True) if digest not in known}
    if len(unknown) > _MANY:
        say(f"reading how long {len(unknown):,} videos are")
    if unknown:
        known |= {digest: length_of(path) for digest, path in unknown.items()}
        with suppress(OSError):  # a disk that is full or read-only: they are opened again the next time
            remember(memo, known)
    return [known[digest] for digest in hashes]


def _remembered(memo: Path) -> dict[str, float]:
    """What `memo` holds; one that is missing or damaged only costs the openings."""
    try:
        known = json.loads(memo.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    pairs = known.items() if isinstance(known, dict) else ()
    return {digest: length for digest, length in pairs if isinstance(length, float) and math.isfinite(length)}


def video_below(folder: Path, name: str, source: str) -> Path:
    """The file of a video in `folder`. Raises SidebenchError that says where it comes from."""
    if name != Path(name).name or "\\" in name or "\0" in name:
        raise SidebenchError(
            f"{name[:80]!r} is no name of a video; wanted that of a file in {folder}, without its end."
        )
    for path in (folder / f"{name}{suffix}" for suffix in SUFFIXES):
        if path.is_file():
            return path.absolute()
    ends = ", ".join(SUFFIXES[1:])
    raise SidebenchError(f"there is no video {folder / name}{SUFFIXES[0]} (nor {ends}); it comes with {source}.")


def seconds_seen(length: float) -> tuple[int, ...]:
    """The seconds at which a video of this length (seconds) is seen: 1 to 12 of them, ascending."""
    started = max(1, math.ceil(length - _CLOCK_SECONDS))
    if started <= MAX_FRAMES:
        return tuple(range(started))
    return tuple(k * (started - 1) // (MAX_FRAMES - 1) for k in range(MAX_FRAMES))


def length_of(path: Path) -> float:
    """How long (seconds) the pictures last, as the container says; of one that does not, all packets are read."""
    with _opened(path) as (container, stream):
        if stream.duration is not None and stream.duration > 0:
            return float(stream.duration * stream.time_base)
        start, end = math.inf, -math.inf
        for packet in container.demux(stream):
            if packet.pts is not None:
                start, end = min(start, packet.pts), max(end, packet.pts + (packet.duration or 0))
        return float(stream.time_base) * max(0.0, end - start)


def decode(path: Path, seconds: Sequence[int]) -> "list[Image]":
    """What a player shows at these seconds. Raises SidebenchError where the video is broken or ends too early."""
    found: list[Image] = []
    with _opened(path) as (container, stream):
        shown, ends = None, 0.0
        for start, end, frame in _frames(container, stream):
            while shown is not None and len(found) < len(seconds) and seconds[len(found)] < start - _CLOCK_SECONDS:
                found.append(shown.to_image())
            if len(found) == len(seconds):
                return found
            shown, ends = frame, end
        if shown is None:
            raise SidebenchError(f"the video {path} holds no picture; replace it or remove it.")
        if seconds[-1] > ends + _LATE_SECONDS:
            raise SidebenchError(f"the video {path} breaks off at {ends:.1f} s of {seconds[-1]} or more; get it anew.")
        return found + [shown.to_image()] * (len(seconds) - len(found))


def _frames(container: Any, stream: Any) -> Iterator[tuple[float, float, Any]]:
    """(start, end, frame) in seconds since the first one; a frame without a time follows the one before at once."""
    usual = float(1 / stream.average_rate) if stream.average_rate else 0.0
    first, end = None, 0.0
    for frame in container.decode(stream):
        if first is None:
            first = frame.time or 0.0
        start = end if frame.time is None else frame.time - first
        end = start + (float(frame.duration * frame.time_base) if frame.duration else usual)
        yield start, end, frame


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its stream of pictures; what FFmpeg finds wrong, now or later, names the file."""
    try:
        import av
    except ImportError as error:
        raise SidebenchError("videos are read by PyAV, which is not there; pip install 'sidebench[video]'.") from error
    try:
        with av.open(str(path), options=_OPEN_OPTIONS, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None:
                raise SidebenchError(f"the video {path} holds no picture; replace it or remove it.")
            if stream.codec_context is None:
                raise SidebenchError(f"the video {path} is in a code that FFmpeg cannot read; convert or remove it.")
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > _MAX_PIXELS:
                raise SidebenchError(
                    f"the video {path} has {width} x {height} pixels; wanted at most {_MAX_PIXELS:,}. Scale it down."
                )
            stream.codec_context.options = {"max_pixels": str(_MAX_PIXELS)}  # the size may change on the way
            yield container, stream
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SidebenchError(f"the video {path} cannot be read ({reason}); replace it or remove it.") from error
