"""Suites: the tasks a name stands for, two averages by hand, what is missing, and a run from files to the report."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from outcomes import make_outcome
from vision_fixtures import compare_here, write_vtab

from sidebench.bench import suite as suites
from sidebench.bench.outcome import Outcome, Request
from sidebench.bench.prepare import Inputs
from sidebench.bench.suite import (
    Suite,
    SuiteOutcome,
    absent,
    compare_suite,
    finish_suite,
    show_suite,
    suite_markdown,
    suite_of,
    suite_rows,
)
from sidebench.bench.tasks.load import known_tasks, load_task
from sidebench.bench.tasks.vtab import VTAB
from sidebench.cache.errors import SidebenchError


def _suite(uri: str) -> Suite:
    found = suite_of(uri)
    assert found is not None
    return found


def _row(method: str, score: float | None, shots: int | None = None) -> dict[str, Any]:
    return {"method": method, "shots": shots, "score": None if score is None else {"mean": score}, "error": None}


# Names


def test_all_of_vtab_are_nineteen_tasks_and_each_group_its_own() -> None:
    whole = _suite("vtab:all?root=./data&pool=cls")
    assert [len(tasks) for tasks in whole.groups.values()] == [7, 4, 8]
    assert whole.uris["eurosat"] == "vtab:eurosat?root=./data&pool=cls"
    assert tuple(whole.uris) == tuple(VTAB)
    assert tuple(_suite("vtab:specialised?root=x").uris) == tuple(
        name for name, task in VTAB.items() if task.group == "specialised"
    )


def test_all_of_fgvc_are_vpts_five_or_with_shots_noahs_five() -> None:
    assert tuple(_suite("fgvc:all?root=x").uris) == ("cub", "nabirds", "flowers", "dogs", "cars")
    few = _suite("fgvc:all?root=x&shots=4&seed=1")
    assert few.uris["food101"] == "fgvc:food101?root=x&shots=4&seed=1"
    assert len(few.uris) == 5


@pytest.mark.parametrize("uri", ["vtab:eurosat?root=x", "sample:digits", "glue:all?root=x", "csv:all", "fgvc:cub"])
def test_a_single_task_is_no_suite(uri: str) -> None:
    assert suite_of(uri) is None


@pytest.mark.parametrize("uri", ["vtab:all?root=x", "vtab:natural?root=x", "fgvc:all?root=x"])
def test_a_suite_is_no_task(uri: str) -> None:
    with pytest.raises(SidebenchError, match="stands for several tasks, which only `bench compare` runs"):
        load_task(uri, home=Path("/nowhere"), say=[].append)
    assert any("vtab:all|natural|specialised|structured" in task.form for task in known_tasks())


# Means


def test_both_averages_are_named_and_equal_those_by_hand() -> None:
    suite = _suite("vtab:all?root=x")
    scores = {task: (i * i % 17) / 20 for i, task in enumerate(VTAB)}
    (row,) = suite_rows(suite, {task: [_row("probe", score)] for task, score in scores.items()})
    total = 0.0
    by_group: dict[str, list[float]] = {}
    for task, score in scores.items():
        total += score
        by_group.setdefault(VTAB[task].group, []).append(score)
    of_groups = sum(sum(found) / len(found) for found in by_group.values()) / 3
    assert row["means"] == pytest.approx({"mean of 19 tasks": total / 19, "mean of 3 group means": of_groups})
    assert abs(total / 19 - of_groups) > 0.001
    assert row["groups"] == pytest.approx({group: sum(found) / len(found) for group, found in by_group.items()})
    assert row["scores"] == scores


def test_a_suite_of_one_group_has_one_average() -> None:
    suite = _suite("vtab:specialised?root=x")
    tables = {task: [_row("probe", score)] for task, score in zip(suite.uris, (0.1, 0.2, 0.3, 0.8), strict=True)}
    (row,) = suite_rows(suite, tables)
    assert row["means"] == pytest.approx({"mean of 4 tasks": 0.35})


def test_no_mean_is_given_of_what_is_missing() -> None:
    suite = _suite("vtab:all?root=x")
    tables = {task: [_row("probe", 0.5), _row("unipt", 0.25)] for task in suite.uris if task != "dtd"}
    tables["kitti"] = [_row("probe", 0.5), _row("unipt", None)]
    probe, unipt = suite_rows(suite, tables)
    assert probe["means"] == {"mean of 19 tasks": None, "mean of 3 group means": None}
    assert probe["groups"] == {"natural": None, "specialised": 0.5, "structured": 0.5}
    assert unipt["groups"] == {"natural": None, "specialised": 0.25, "structured": None}
    assert absent([probe, unipt], {"dtd": "there is no folder dtd."}) == [
        "dtd is missing: there is no folder dtd.",
        "unipt has no score on kitti: see their reports.",
    ]


def test_a_method_that_is_left_out_on_a_task_has_no_score_there() -> None:
    suite = _suite("vtab:specialised?root=x")
    tables = {task: [_row("probe", 0.5), _row("lst", 0.5)] for task in suite.uris}
    tables["eurosat"] = [_row("probe", 0.5)]
    probe, lst = suite_rows(suite, tables)
    assert (probe["means"]["mean of 4 tasks"], lst["means"]["mean of 4 tasks"]) == (0.5, None)


def test_every_number_of_shots_has_a_row_of_its_own() -> None:
    suite = _suite("fgvc:all?root=x")
    tables = {task: [_row("probe", 0.1, 1), _row("probe", 0.4, 4)] for task in suite.uris}
    found = suite_rows(suite, tables)
    assert [(row["shots"], row["means"]["mean of 5 tasks"]) for row in found] == [(1, 0.1), (4, 0.4)]


# Report and document


def _outcome(tmp_path: Path, right: Sequence[Sequence[int]], missing: dict[str, str] | None = None) -> SuiteOutcome:
    suite = _suite("vtab:specialised?root=x")
    outcomes: dict[str, Outcome] = {}
    for task in (task for task in suite.uris if task not in (missing or {})):
        (tmp_path / task).mkdir(parents=True)
        outcomes[task] = make_outcome(tmp_path / task, {"linear_probe": right, "a|b": right})
    request = Request(Inputs("hf:toy", suite.uri), ("linear_probe", "a|b"), {}, seeds=(0,))
    return SuiteOutcome(suite, request, tmp_path / "suite", outcomes, missing or {})


def test_the_report_names_the_mean_the_tasks_and_their_reports(tmp_path: Path) -> None:
    outcome = _outcome(tmp_path, [[1, 0, 1, 1]])
    printed = finish_suite(outcome)
    report = Path(printed["suite"]["report"]).read_text("utf-8")
    assert report.startswith("# hf:toy on vtab:specialised?root=x\n")
    assert "| method | mean of 4 tasks |" in report
    assert "| linear_probe | 75.00 |" in report
    assert "| a\\|b | 75.00 |" in report
    assert "| task | group | linear_probe | a\\|b |" in report
    assert "| resisc45 | specialised | 75.00 | 75.00 |" in report
    assert "## Missing" not in report
    assert all((tmp_path / task / "report.md").is_file() for task in outcome.suite.uris)
    assert set(printed["tasks"]) == set(outcome.suite.uris)
    assert set(printed["tasks"]["eurosat"]) >= {"table", "comparisons", "records", "report"}
    json.dumps(printed)


def test_the_report_says_what_is_missing_and_leaves_the_mean_empty(tmp_path: Path) -> None:
    outcome = _outcome(tmp_path, [[1, 0]], {"eurosat": "there is no folder <eurosat>."})
    printed = finish_suite(outcome)
    report = suite_markdown(outcome, printed["suite"]["rows"], {})
    assert "- eurosat is missing: there is no folder &lt;eurosat&gt;." in report
    assert "| linear_probe |  |" in report
    assert "| eurosat | specialised | missing | missing |" in report
    assert printed["suite"]["missing"] == [{"task": "eurosat", "reason": "there is no folder <eurosat>."}]


def test_on_the_terminal_are_the_means_what_is_missing_and_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show_suite(_outcome(tmp_path / "whole", [[1, 0, 1, 1]]), as_json=False)
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("mean of 4 tasks", "75.00", "linear_probe", "resisc45"))
    assert "missing" not in shown
    assert shown.splitlines()[-1] == f"report: {tmp_path / 'whole' / 'suite' / 'report.md'}"
    assert not show_suite(_outcome(tmp_path / "part", [[1, 0]], {"eurosat": "it is gone."}), as_json=False)
    assert "eurosat is missing: it is gone." in capsys.readouterr().out


# Runs


def test_tasks_that_cannot_be_read_or_run_are_missing_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task in ("eurosat", "resisc45", "patch_camelyon"):
        write_vtab(tmp_path, task)
    ran: list[str] = []

    def run(request: Request, **_: Any) -> Outcome:
        ran.append(request.inputs.task)
        if "camelyon" in request.inputs.task:
            raise SidebenchError("no room.")
        folder = tmp_path / str(len(ran))
        folder.mkdir()
        return make_outcome(folder, {"linear_probe": [[1, 0]]})

    monkeypatch.setattr(suites, "compare", run)
    suite = _suite(f"vtab:specialised?root={tmp_path}")
    where = {"home": tmp_path, "cache_dir": tmp_path, "runs_dir": tmp_path}
    request = Request(Inputs("hf:toy", suite.uri), ("linear_probe",), {})
    found = compare_suite(suite, request, **where)
    assert ran == [suite.uris[task] for task in ("patch_camelyon", "eurosat", "resisc45")]
    assert list(found.outcomes) == ["eurosat", "resisc45"]
    assert found.missing["patch_camelyon"] == "no room."
    assert "there is no folder" in found.missing["diabetic_retinopathy"]
    with pytest.raises(SidebenchError, match=r"there is no folder .*caltech101"):
        compare_suite(_suite(f"vtab:natural?root={tmp_path}"), request, **where)


def test_a_suite_is_compared_from_its_lists_to_the_report(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy")
    for name in names:
        write_vtab(tmp_path, name, (12, 6, 6))
    words = ("--methods", "linear_probe", "--json", "--quiet")
    result = compare_here(tmp_path, models, monkeypatch, f"vtab:specialised?root={tmp_path}", *words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (row,) = found["suite"]["rows"]
    by_hand = [found["tasks"][name]["table"][0]["score"]["mean"] for name in names]
    assert list(row["scores"].values()) == by_hand
    assert row["means"] == pytest.approx({"mean of 4 tasks": statistics.mean(by_hand)})
    assert Path(found["suite"]["report"]).is_file()
