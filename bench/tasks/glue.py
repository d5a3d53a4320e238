"""The eight GLUE tasks (Wang et al., ICLR 2019, arXiv 1804.07461) from the tab-separated files of their own download.

The public test parts hold no labels, so the parts are those of LST (arXiv 2206.06522): with 10,000 training lines or
more, 1,000 of them validate and the public validation part is the test; with fewer, that part is halved; MNLI validates
on the mismatched part and is tested on the matched one. LST's code measures accuracy and F1 of MRPC and QQP, and both
Pearson and Spearman correlation of STS-B; its table has one figure each. We take the mean of the two (ours: the paper
was not read), and records keep both.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...cache.errors import SidebenchError, unknown
from ...cache.examples import Text
from .files import text_lines
from .rows import Rows, id_order
from .score import ACCURACY, ACCURACY_AND_F1, CORRELATIONS, MATTHEWS

_SMALL = 10_000  # training lines below which validation is not taken from them
_VALIDATION = 1000
_SOURCE = "the download of gluebenchmark.com"
_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_MRPC, _MRPC_WHOLE, _MRPC_VALIDATION = "MRPC", "msr_paraphrase_train.txt", "dev_ids.tsv"


class Line(NamedTuple):
    """A line of a file and its fields by column."""

    path: Path
    number: int
    fields: Mapping[str, str]

    @property
    def where(self) -> str:
        """For errors."""
        return f"{self.path} line {self.number}"


class Example(NamedTuple):
    """What is kept of a line."""

    id: str
    content: Text
    label: str


@dataclass(frozen=True)
class GlueTask:
    """Where a task lies below the root, its columns and its score. `labels` is empty where they are numbers."""

    folder: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    score: str = ACCURACY
    held: tuple[str, ...] = ("dev.tsv",)  # two: the first validates, the second tests
    columns: tuple[str, ...] = ()  # of files without a line that names them
    broken_lines: bool = False  # the official file has some


GLUE: Mapping[str, GlueTask] = {
    "cola": GlueTask(
        "CoLA", ("sentence",), "label", _BINARY, MATTHEWS, columns=("source", "label", "star", "sentence")
    ),
    "sst2": GlueTask("SST-2", ("sentence",), "label", _BINARY),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", _BINARY, ACCURACY_AND_F1),
    "qqp": GlueTask("QQP", ("question1", "question2"), "is_duplicate", _BINARY, ACCURACY_AND_F1, broken_lines=True),
    "mnli": GlueTask(
        "MNLI",
        ("sentence1", "sentence2"),
        "gold_label",
        ("contradiction", "entailment", "neutral"),
        held=("dev_mismatched.tsv", "dev_matched.tsv"),
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", _ENTAILMENT),
    "rte": GlueTask("RTE", ("sentence1", "sentence2"), "label", _ENTAILMENT),
    "stsb": GlueTask("STS-B", ("sentence1", "sentence2"), "score", (), CORRELATIONS),
}


def glue_task(name: str) -> GlueTask:
    """The task of a name such as `sst2` or, officially, `SST-2`. Raises SidebenchError for another."""
    key = name.casefold().replace("-", "")
    if key not in GLUE:
        raise unknown("GLUE task", name, GLUE)
    return GLUE[key]


def read_glue(task: GlueTask, root: Path, say: Callable[[str], None]) -> Rows:
    """Rows of a task below `root`, which holds the folders CoLA, SST-2, …; ids are file and line."""
    folder = root / task.folder
    files = [[_example(task, line) for line in _lines(task, folder / name, say)] for name in ("train.tsv", *task.held)]
    for name, file in zip(("train.tsv", *task.held), files, strict=True):
        if not file:
            raise SidebenchError(f"{folder / name} holds no examples.")
    examples = [example for file in files for example in file]
    ids = tuple(example.id for example in examples)
    return Rows(
        "text",
        ids,
        tuple(example.label for example in examples),
        tuple(example.content for example in examples),
        _parts(ids, *map(len, files)),
    )


def _parts(ids: tuple[str, ...], train: int, held: int, test: int = 0) -> tuple[str, ...]:
    """The part of every example, from the lengths of the files. What is drawn is fixed by the ids alone."""
    if test:
        return ("train",) * train + ("val",) * held + ("test",) * test
    parts = ["train"] * train + ["test"] * held
    small = train < _SMALL
    drawn_from = range(train, len(ids)) if small else range(train)
    shuffled = sorted(drawn_from, key=lambda i: id_order("glue", ids[i]))
    for i in shuffled[: held // 2 if small else _VALIDATION]:
        parts[i] = "val"
    return tuple(parts)


def _example(task: GlueTask, line: Line) -> Example:
    for column in (*task.texts, task.label):
        if column not in line.fields:
            has = ", ".join(map(repr, line.fields))
            raise SidebenchError(f"{line.path} has no column {column!r}; it has {has}. Is it {_SOURCE}?")
    texts = [line.fields[column] for column in task.texts]
    if not any(text.strip() for text in texts):
        raise SidebenchError(f"{line.where}: {' and '.join(map(repr, task.texts))} hold no text; remove the line.")
    content = texts[0] if len(texts) == 1 else (texts[0], texts[1])
    return Example(f"{line.path.stem}-{line.number}", content, _label(task, line))


def _label(task: GlueTask, line: Line) -> str:
    text = line.fields[task.label]
    if task.labels:
        if text not in task.labels:
            wanted = ", ".join(task.labels)
            raise SidebenchError(f"{line.where}: {task.label} is {text[:40]!r}; wanted one of {wanted}.")
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 5:
        raise SidebenchError(f"{line.where}: {task.label} is {text[:40]!r}; wanted a number from 0 to 5.")
    return repr(number)


def _lines(task: GlueTask, path: Path, say: Callable[[str], None]) -> Iterator[Line]:
    """Lines of a file of the task; those with a field too many or too few are refused, or left out where known."""
    columns = task.columns
    broken = []
    for number, text in _lines_of_file(path):
        fields = text.split("\t")
        if not columns:
            columns = tuple(fields)
        elif len(fields) == len(columns):
            yield Line(path, number, dict(zip(columns, fields, strict=True)))
        elif task.broken_lines:
            broken.append(number)
        else:
            raise SidebenchError(f"{path} line {number} has {len(fields)} fields; wanted {len(columns)} between tabs.")
    if broken:
        say(
            f"{path}: {len(broken)} lines with a field too many or too few are left out, line {broken[0]} first; the "
            f"official {task.folder} files hold some, and their usual readers leave them out too."
        )


def _lines_of_file(path: Path) -> Iterator[tuple[int, str]]:
    if path.is_file():
        for number, text in text_lines(path):
            if text.strip("\r\n"):
                yield number, text.rstrip("\r\n")
    elif path.parent.name == _MRPC and (path.parent / _MRPC_WHOLE).is_file():
        yield from _mrpc_lines(path)
    else:
        raise SidebenchError(
            f"there is no file {path}; ?root=FOLDER is the folder that {_SOURCE} unpacks to, and "
            f"{path.parent.name}/{path.name} lies below it."
        )


def _mrpc_lines(path: Path) -> Iterator[tuple[int, str]]:
    """train.tsv or dev.tsv of MRPC from Microsoft's own file, cut by GLUE's list of the pairs that validate."""
    whole, list_of_ids = path.parent / _MRPC_WHOLE, path.parent / _MRPC_VALIDATION
    if not list_of_ids.is_file():
        raise SidebenchError(
            f"there is no file {list_of_ids}, which says what of {whole.name} validates; {_SOURCE} holds it "
            "(or train.tsv and dev.tsv, ready)."
        )
    validating = {tuple(text.split()) for _, text in text_lines(list_of_ids)}
    for number, text in _lines_of_file(whole):
        if number == 1 or (tuple(text.split("\t")[1:3]) in validating) == (path.name == "dev.tsv"):
            yield number, text
