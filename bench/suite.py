"""Several published tasks after one another, and the means that the literature gives: over tasks and over groups.

The two differ by some points, so each is named in full, and none is given while a score it is made of is missing.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..cache.errors import SidebenchError
from .compare import compare
from .finish import finish
from .launch import Listener
from .markdown import bullets, table, text
from .outcome import Outcome, Request
from .record import write_text
from .report import print_columns
from .tasks.fgvc import FEW_SHOT, FGVC
from .tasks.load import load_task
from .tasks.vtab import GROUPS, SUITES, VTAB

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Suite:
    """The tasks that a name such as vtab:all stands for, by group, and the URI of each."""

    uri: str
    groups: Mapping[str, tuple[str, ...]]
    uris: Mapping[str, str]


@dataclass(frozen=True)
class SuiteOutcome:
    """The comparisons by task, and why the other tasks are missing."""

    suite: Suite
    request: Request
    folder: Path
    outcomes: Mapping[str, Outcome]
    missing: Mapping[str, str]


def suite_of(uri: str) -> Suite | None:
    """The suite that a task's name stands for; None for the name of one task."""
    scheme, _, rest = uri.partition(":")
    name, mark, query = rest.partition("?")
    if scheme == "vtab" and name in SUITES:
        chosen = GROUPS if name == "all" else (name,)
        groups = {group: tuple(key for key, task in VTAB.items() if task.group == group) for group in chosen}
    elif scheme == "fgvc" and name == "all":
        groups = {"fgvc": tuple(FEW_SHOT if "shots=" in query else FGVC)}
    else:
        return None
    return Suite(uri, groups, {task: f"{scheme}:{task}{mark}{query}" for tasks in groups.values() for task in tasks})


def compare_suite(
    suite: Suite, request: Request, *, home: Path, cache_dir: Path, runs_dir: Path, listener: Listener | None = None
) -> SuiteOutcome:
    """Compare on every task. One that cannot be read or run is missing, with its reason; the others go on.

    Raises SidebenchError, with the first reason, when none is left.
    """
    listener = listener or Listener()
    missing: dict[str, str] = {}
    for task, uri in suite.uris.items():  # all at first: what is missing is better known before hours of training
        try:
            load_task(uri, home=home, limit=request.inputs.limit, say=lambda _: None)
        except SidebenchError as error:
            listener.say(f"{task} will be missing: {error}")
            missing[task] = str(error)
    outcomes: dict[str, Outcome] = {}
    for task in (task for task in suite.uris if task not in missing):
        listener.say(f"task {len(outcomes) + len(missing) + 1} of {len(suite.uris)}: {task}")
        asked = replace(request, inputs=replace(request.inputs, task=suite.uris[task]))
        try:
            outcomes[task] = compare(asked, home=home, cache_dir=cache_dir, runs_dir=runs_dir, listener=listener)
        except SidebenchError as error:
            listener.say(f"{task} is missing: {error}")
            missing[task] = str(error)
    if not outcomes:
        raise SidebenchError(next(iter(missing.values())))
    folders = "".join(outcome.folder.name for outcome in outcomes.values())
    name = suite.uri.partition("?")[0].replace(":", "-")
    folder = runs_dir / f"{name}-{hashlib.sha256(folders.encode()).hexdigest()[:8]}"
    return SuiteOutcome(suite, request, folder, outcomes, missing)


def suite_rows(suite: Suite, tables: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """A row per method (and number of shots) from the tables of the tasks: scores, group means, and each mean by name.

    A score that is missing is None, and so is every mean that it belongs to.
    """
    found = {task: {(row["method"], row["shots"]): row["score"] for row in rows} for task, rows in tables.items()}
    methods = dict.fromkeys(key for scores in found.values() for key in scores)
    result = []
    for method, shots in methods:
        row: dict[str, Any] = {"method": method, "shots": shots}
        row["scores"] = {task: _mean_of(found.get(task, {}).get((method, shots))) for task in suite.uris}
        row["groups"] = {group: _mean([row["scores"][task] for task in tasks]) for group, tasks in suite.groups.items()}
        row["means"] = {f"mean of {len(suite.uris)} tasks": _mean(list(row["scores"].values()))}
        if len(suite.groups) > 1:
            row["means"][f"mean of {len(suite.groups)} group means"] = _mean(list(row["groups"].values()))
        result.append(row)
    return result


def _mean_of(score: Mapping[str, Any] | None) -> float | None:
    return None if score is None else float(score["mean"])


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return statistics.mean(known) if len(known) == len(scores) else None


def absent(found: Sequence[Row], missing: Mapping[str, str]) -> list[str]:
    """A sentence per score that is missing."""
    sentences = [f"{task} is missing: {reason}" for task, reason in missing.items()]
    for row in found:
        tasks = [task for task, score in row["scores"].items() if score is None and task not in missing]
        if tasks:
            sentences.append(f"{_name(row)} has no score on {', '.join(tasks)}: see their reports.")
    return sentences


def suite_markdown(outcome: SuiteOutcome, found: Sequence[Row], reports: Mapping[str, Path]) -> str:
    """The report of a suite: means first, then every task; figures are of the tasks' own reports."""
    suite, request = outcome.suite, outcome.request
    parts = [
        f"# {text(request.inputs.backbone)} on {text(suite.uri)}",
        f"Test scores in percent, mean over the seeds {', '.join(map(str, request.seeds))}; intervals, paired tests, "
        "memory and time are in the reports of the tasks. Of several groups the literature gives two averages, "
        "over all tasks and over the means of the groups, which differ by some points: compare like with like. A mean "
        "is left empty while a score that belongs to it is missing.",
        table(*_summary(suite, found)),
    ]
    if lines := absent(found, outcome.missing):
        parts += ["## Missing", bullets(lines)]
    parts += ["## Tasks", table(*_by_task(suite, found))]
    parts += ["## Reports", bullets([f"{task}: {path}" for task, path in reports.items()])]
    return "\n\n".join(parts) + "\n"


def _summary(suite: Suite, found: Sequence[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    """The heads and lines of the table of means."""
    groups = tuple(suite.groups) if len(suite.groups) > 1 else ()
    means = tuple(found[0]["means"]) if found else ()
    body = [
        [_name(row), *(_percent(row["groups"][group]) for group in groups), *(_percent(row["means"][m]) for m in means)]
        for row in found
    ]
    return ("method", *groups, *means), body


def _by_task(suite: Suite, found: Sequence[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    """The heads and lines of the table of scores: a line per task."""
    body = [
        [task, group, *(_percent(row["scores"][task]) or "missing" for row in found)]
        for group, tasks in suite.groups.items()
        for task in tasks
    ]
    return ("task", "group", *map(_name, found)), body


def _name(row: Row) -> str:
    return str(row["method"]) if row["shots"] is None else f"{row['method']}, {row['shots']} shots"


def _percent(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.2f}"


def finish_suite(outcome: SuiteOutcome) -> dict[str, Any]:
    """Write every report; returns what `bench compare --json` prints: the suite, and the document of each task."""
    finished = {task: finish(one) for task, one in outcome.outcomes.items()}
    tables = {task: one.table for task, one in finished.items()}
    documents = {task: one.document for task, one in finished.items()}
    found, report = suite_rows(outcome.suite, tables), outcome.folder / "report.md"
    reports = {task: Path(one["report"]) for task, one in documents.items()}
    write_text(report, suite_markdown(outcome, found, reports))
    absences = [{"task": task, "reason": reason} for task, reason in outcome.missing.items()]
    about = {"task": outcome.suite.uri, "rows": found, "missing": absences, "report": str(report)}
    return {"suite": about, "tasks": documents}


def show_suite(outcome: SuiteOutcome, as_json: bool) -> bool:
    """Write the reports and print the result; whether nothing is missing and no run failed."""
    printed = finish_suite(outcome)
    found = printed["suite"]["rows"]
    if as_json:
        print(json.dumps(printed, indent=1))
    else:
        print_columns(*_by_task(outcome.suite, found))
        print_columns(*_summary(outcome.suite, found))
        print("\n".join([*absent(found, outcome.missing), f"report: {printed['suite']['report']}"]))
    failed = any(row["error"] for one in printed["tasks"].values() for row in one["table"])
    return not (outcome.missing or failed)
