"""From a task's URI to a task: csv, jsonl, class folders, published files and the pinned samples."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...cache import samples
from ...cache.errors import SidebenchError, unknown
from ...cache.examples import Examples
from ...cache.uri import Uri, parse_uri
from .base import AnyTask, Pooling, Task
from .contents import ImageExamples, TextExamples
from .fgvc import FEW_SHOT, FGVC, read_fgvc
from .files import COLUMN_OPTIONS, read_csv, read_jsonl
from .folder import read_folder
from .glue import GLUE, glue_task, read_glue
from .gqa import load_gqa
from .pairs import PAIR_SAMPLES, PAIR_SCHEMES, is_pairs, load_pairs
from .refcoco import load_refcoco
from .rows import Rows, classes_of, limited, targets_of
from .score import ACCURACY, score_named
from .vqa import load_vqa
from .vtab import SUITES, VTAB, read_vtab, vtab_task

FAMILIES = ("glue", "vtab", "fgvc")  # schemes of benchmarks on which methods have published settings
_POOLINGS: dict[str, Pooling] = {"mean": "mean", "cls": "cls"}
_OPTIONS = {
    "csv": (*COLUMN_OPTIONS, "pool"),
    "jsonl": (*COLUMN_OPTIONS, "pool"),
    "folder": ("pool",),
    "glue": ("root", "pool"),
    "vtab": ("root", "pool"),
    "fgvc": ("root", "shots", "seed", "pool"),
    "sample": ("pool",),
}


@dataclass(frozen=True)
class JointScheme:
    """Tasks on images with texts: what can be typed, and what reads them."""

    form: str
    summary: str
    load: Callable[..., AnyTask]
    options: tuple[str, ...] = ("root",)


_BOXES = "expressions for things in COCO images (MDETR's files), tested on that part"
JOINT = {
    "vqa2": JointScheme("vqa2:v2?root=FOLDER[&submit=test]", "VQA v2 (LXMERT's files)", load_vqa, ("root", "submit")),
    "gqa": JointScheme("gqa:balanced?root=FOLDER[&submit=test]", "GQA (LXMERT's files)", load_gqa, ("root", "submit")),
    "refcoco": JointScheme("refcoco:val|testA|testB?root=FOLDER", f"RefCOCO: {_BOXES}", load_refcoco),
    "refcoco+": JointScheme("refcoco+:val|testA|testB?root=FOLDER", f"RefCOCO+: {_BOXES}", load_refcoco),
    "refcocog": JointScheme("refcocog:val|test?root=FOLDER", f"RefCOCOg: {_BOXES}", load_refcoco),
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
    forms: tuple[KnownTask, ...] = (
        KnownTask("csv", f"csv:PATH[{columns}]", "comma-separated rows of text or image path, label, split, id"),
        KnownTask("jsonl", f"jsonl:PATH[{columns}]", "one JSON object per line, with the same columns"),
        KnownTask("folder", "folder:PATH[?pool=mean|cls]", "images in class folders, with or without train/val/test"),
        KnownTask("glue", "glue:NAME?root=FOLDER[&pool=mean|cls]", f"GLUE's official files: {', '.join(GLUE)}"),
        KnownTask("vtab", "vtab:NAME?root=FOLDER[&pool=mean|cls]", f"VTAB-1k's lists: {', '.join(VTAB)}"),
        KnownTask(
            "vtab", f"vtab:{'|'.join(SUITES)}?root=FOLDER", "several of them in one comparison, with their means"
        ),
        KnownTask("fgvc", "fgvc:NAME|all?root=FOLDER[&pool=mean|cls]", f"VPT's FGVC splits: {', '.join(FGVC)}"),
        KnownTask(
            "fgvc",
            "fgvc:NAME|all?root=FOLDER&shots=K[&seed=S&pool=mean|cls]",
            f"NOAH's few-shot lists: {', '.join(FEW_SHOT)}",
        ),
    )
    forms += tuple(KnownTask(scheme, pairs.form, pairs.summary) for scheme, pairs in PAIR_SCHEMES.items())
    forms += tuple(KnownTask(scheme, joint.form, joint.summary) for scheme, joint in JOINT.items())
    forms += tuple(KnownTask("sample", f"sample:{name}", summary) for name, summary in PAIR_SAMPLES.items())
    data = {name: sample for name, sample in samples.SAMPLES.items() if sample.kind != "backbone"}
    return forms + tuple(KnownTask("sample", f"sample:{name}", data[name].summary) for name in data)


def family_of(uri: str) -> str | None:
    """The family of tasks that a task belongs to, known by its scheme before it is read; None where it has none."""
    scheme = uri.partition(":")[0]
    return scheme if scheme in FAMILIES else None


def load_any(uri: str, *, home: Path, limit: int | None = None, say: Callable[[str], None]) -> AnyTask:
    """The task a URI names, of whatever kind; see `load_task`, `tasks.pairs.load_pairs`, and the readers of `JOINT`."""
    if is_pairs(uri):
        return load_pairs(uri, home=home, limit=limit, say=say)
    if uri.partition(":")[0] in JOINT:
        parsed = parse_uri(uri, kind="task", known={scheme: known.options for scheme, known in JOINT.items()})
        try:
            return JOINT[parsed.scheme].load(parsed, _root(parsed), home=home, limit=limit, say=say)
        except OSError as error:
            raise SidebenchError(f"{uri} cannot be read ({error}).") from error
    return load_task(uri, home=home, limit=limit, say=say)


def load_task(uri: str, *, home: Path, limit: int | None = None, say: Callable[[str], None]) -> Task:
    """The task of classes or numbers a URI names; `limit` keeps that many examples, stratified by label.

    `home` holds samples and remembered hashes; `say` is told what takes long.
    """
    if is_pairs(uri) or uri.partition(":")[0] in JOINT:
        raise SidebenchError(f"{uri} has no classes, and this works on tasks that have some; `bench compare` takes it.")
    parsed = parse_uri(uri, kind="task", known=_OPTIONS)
    pool = parsed.options.get("pool", "mean")
    if pool not in _POOLINGS:
        raise unknown("pooling", pool, _POOLINGS)
    try:
        rows = _read(parsed, home, say)
    except OSError as error:
        raise SidebenchError(f"{uri} cannot be read ({error}).") from error
    score = glue_task(parsed.path).score if parsed.scheme == "glue" else ACCURACY
    of_numbers = score_named(score).of_numbers
    classes = classes_of(rows, uri)
    if limit is not None:
        rows = limited(rows, limit, uri, by_label=not of_numbers)
    values = tuple(map(float, classes)) if of_numbers else None
    own = rows.classes is not None
    return Task(uri, _examples(rows, classes, home), classes, rows.parts, _POOLINGS[pool], score, values, own)


def _read(uri: Uri, home: Path, say: Callable[[str], None]) -> Rows:
    path = Path(uri.path).expanduser()
    columns = {option: column for option, column in uri.options.items() if option != "pool"}
    if uri.scheme == "csv":
        return read_csv(path, columns)
    if uri.scheme == "jsonl":
        return read_jsonl(path, columns)
    if uri.scheme == "folder":
        return read_folder(path)
    if uri.scheme == "glue":
        return read_glue(glue_task(uri.path), _root(uri), say)
    if uri.scheme == "vtab":
        return read_vtab(vtab_task(uri.path), _root(uri), say)
    if uri.scheme == "fgvc":
        return read_fgvc(uri.path, _root(uri), uri.options.get("shots"), uri.options.get("seed"), say)
    return _read_sample(uri.path, home, say)


def _root(uri: Uri) -> Path:
    if "root" not in uri.options:
        raise SidebenchError(f"{uri.text} does not say where the files lie; type {uri.scheme}:{uri.path}?root=FOLDER.")
    return Path(uri.options["root"]).expanduser()


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
        texts = tuple(content for content in rows.contents if not isinstance(content, Path))
        return TextExamples(rows.ids, targets, classes, texts)
    paths = tuple(content for content in rows.contents if isinstance(content, Path))
    return ImageExamples(rows.ids, targets, classes, paths, home / "hashes.json")
