"""From a task's URI to a task: csv, jsonl, class folders and the pinned samples."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...cache import samples
from ...cache.errors import SidebenchError, unknown
from ...cache.examples import Examples
from ...cache.uri import Uri, parse_uri
from .base import Pooling, Task
from .contents import ImageExamples, TextExamples
from .files import COLUMN_OPTIONS, read_csv, read_jsonl
from .folder import read_folder
from .rows import Rows, classes_of, limited, targets_of

_POOLINGS: dict[str, Pooling] = {"mean": "mean", "cls": "cls"}
_OPTIONS = {
    "csv": (*COLUMN_OPTIONS, "pool"),
    "jsonl": (*COLUMN_OPTIONS, "pool"),
    "folder": ("pool",),
    "sample": ("pool",),
}


@dataclass(frozen=True)
class KnownTask:
    """A row of `bench tasks`: what can be typed."""

    scheme: str
    form: str
    summary: str


def known_tasks() -> tuple[KnownTask, ...]:
    """Every form of task, and each sample by name."""
    columns = "?text=COL&image=COL&label=COL&split=COL&id=COL&pool=mean|cls"
    forms = (
        KnownTask("csv", f"csv:PATH[{columns}]", "comma-separated rows of text or image path, label, split, id"),
        KnownTask("jsonl", f"jsonl:PATH[{columns}]", "one JSON object per line, with the same columns"),
        KnownTask("folder", "folder:PATH[?pool=mean|cls]", "images in class folders, with or without train/val/test"),
    )
    data = {name: sample for name, sample in samples.SAMPLES.items() if sample.kind != "backbone"}
    return forms + tuple(KnownTask("sample", f"sample:{name}", data[name].summary) for name in data)


def load_task(uri: str, *, home: Path, limit: int | None = None, say: Callable[[str], None]) -> Task:
    """The task a URI names; `limit` keeps that many examples, stratified by label.

    `home` holds samples and remembered hashes; `say` is told what takes long.
    """
    parsed = parse_uri(uri, kind="task", known=_OPTIONS)
    pool = parsed.options.get("pool", "mean")
    if pool not in _POOLINGS:
        raise unknown("pooling", pool, _POOLINGS)
    try:
        rows = _read(parsed, home, say)
    except OSError as error:
        raise SidebenchError(f"{uri} cannot be read ({error}).") from error
    classes = classes_of(rows, uri)
    if limit is not None:
        rows = limited(rows, limit, uri)
    return Task(uri, _examples(rows, classes, home), classes, rows.parts, _POOLINGS[pool])


def _read(uri: Uri, home: Path, say: Callable[[str], None]) -> Rows:
    path = Path(uri.path).expanduser()
    columns = {option: column for option, column in uri.options.items() if option != "pool"}
    if uri.scheme == "csv":
        return read_csv(path, columns)
    if uri.scheme == "jsonl":
        return read_jsonl(path, columns)
    if uri.scheme == "folder":
        return read_folder(path)
    return _read_sample(uri.path, home, say)


def _read_sample(name: str, home: Path, say: Callable[[str], None]) -> Rows:
    sample = samples.SAMPLES.get(name)
    data = [known for known, other in samples.SAMPLES.items() if other.kind != "backbone"]
    if sample is None:
        raise unknown("sample task", name, data)
    if sample.kind == "backbone":
        raise SidebenchError(f"the sample {name!r} is a backbone; the sample tasks are {', '.join(data)}.")
    folder = samples.fetch(name, home, say)
    return read_jsonl(folder / "data.jsonl", {}) if sample.kind == "text" else read_folder(folder)


def _examples(rows: Rows, classes: tuple[str, ...], home: Path) -> Examples:
    targets = targets_of(rows, classes)
    if rows.modality == "text":
        return TextExamples(rows.ids, targets, classes, tuple(map(str, rows.contents)))
    return ImageExamples(rows.ids, targets, classes, tuple(map(Path, rows.contents)), home / "hashes.json")
