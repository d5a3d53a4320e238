"""The report: hostile names stay text, every figure has its unit and its own column, what is missing is blank."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from outcomes import CATEGORIES, make_outcome

from sidebench.bench.report import cells, columns, failures, markdown, print_table, skipped, verdicts
from sidebench.bench.table import comparisons, rows
from sidebench.cache.form import Form

RIGHT = [[1, 0, 1, 1, 0, 1, 1, 1]]
COLUMNS = columns("accuracy", [])
HOSTILE = (
    "./a|b.py",
    "./back\\|slash.py",
    "`code`.py",
    "<script>alert(1)</script>",
    "&lt;b&gt;",
    "a\nb\r\n# heading",
    "![x](http://x/y.png)",
    "[link](http://x)",
    "**bold** __bold__ _it_ ~~gone~~",
    "$x^2$",
)


def _markdown(outcome: Any) -> str:
    return markdown(outcome, rows(outcome), comparisons(outcome))


def _table(text: str, title: str) -> list[list[str]]:
    """The cells of the first table below a heading, split as GitHub does: at every pipe without a backslash."""
    body = text.partition(title)[2].strip().partition("\n\n")[0]
    return [[c.strip() for c in re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]] for line in body.splitlines()]


def _rendered(cell: str) -> str:
    """What a reader sees: backslash escapes and entities undone."""
    plain = re.sub(r"\\([\\`*_|~$\[\]])", r"\1", cell)
    return plain.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_method_name_stays_one_cell_of_plain_text(name: str, tmp_path: Path) -> None:
    table = _table(_markdown(make_outcome(tmp_path, {name: RIGHT, "other": RIGHT})), "## Results")
    assert [len(line) for line in table] == [len(COLUMNS)] * 4
    assert _rendered(table[2][0]) == " ".join(name.split())
    left_bare = re.sub(r"\\.", "", table[2][0])
    assert not re.search(r"[`*|~$\[\]<>]|(?<!\w)_|_(?!\w)", left_bare)


@pytest.mark.parametrize("error", HOSTILE)
def test_a_hostile_error_stays_one_line_of_the_list(error: str, tmp_path: Path) -> None:
    text = _markdown(make_outcome(tmp_path, {"ok": RIGHT, "broken": error}))
    lines = text.partition("## Failed\n\n")[2].partition("\n\n## ")[0].splitlines()
    assert [_rendered(line) for line in lines] == [f"- broken failed: {' '.join(error.split())}"]
    assert "<script" not in text


def test_a_hostile_task_does_not_leave_the_title(tmp_path: Path) -> None:
    outcome = make_outcome(tmp_path, {"ok": RIGHT})
    inputs = dataclasses.replace(outcome.request.inputs, task="csv:x\n\n# owned <img src=x>")
    text = _markdown(dataclasses.replace(outcome, request=dataclasses.replace(outcome.request, inputs=inputs)))
    assert text.splitlines()[0] == "# hf:toy on csv:x # owned &lt;img src=x&gt;"


def test_an_underscore_inside_a_name_needs_no_escape(tmp_path: Path) -> None:
    assert "| linear_probe |" in _markdown(make_outcome(tmp_path, {"linear_probe": RIGHT}))


def test_every_column_of_figures_names_its_unit(tmp_path: Path) -> None:
    units = ("%", "MiB", "params", "train s", "/s", "95 % over")
    assert all(any(unit in column for unit in units) for column in COLUMNS[2:])
    head = _table(_markdown(make_outcome(tmp_path, {"ok": RIGHT})), "## Memory by category")
    assert all("MiB" in column for column in head[0][1:])


def test_each_kind_of_peak_has_its_own_column(tmp_path: Path) -> None:
    peaks = {"peak_tracked_bytes": 11 * 2**20, "peak_device_bytes": 22 * 2**20, "peak_host_bytes": 33 * 2**20}
    (row,) = rows(make_outcome(tmp_path, {"ok": RIGHT}, **peaks))
    shown = dict(zip(COLUMNS, cells(row), strict=True))
    assert shown["tracked peak MiB"] == "11.0"
    assert shown["device peak MiB"] == "22.0"
    assert shown["host growth MiB"] == "33.0"


def test_what_was_not_measured_is_blank_and_never_zero(tmp_path: Path) -> None:
    (row,) = rows(make_outcome(tmp_path, {"ok": RIGHT}, peak_device_bytes=None, peak_host_bytes=None))
    shown = dict(zip(COLUMNS, cells(row), strict=True))
    assert shown["device peak MiB"] == shown["host growth MiB"] == ""
    assert shown["95 % over seeds"] == ""  # one seed
    assert shown["tracked peak MiB"] == "3.0"


def test_a_failed_row_says_failed_and_shows_no_figure(tmp_path: Path) -> None:
    outcome = make_outcome(tmp_path, {"ok": RIGHT, "broken": "it broke"})
    assert cells(rows(outcome)[1]) == ["broken", "cached", "failed", *[""] * (len(COLUMNS) - 3)]
    assert "- broken failed: it broke" in _markdown(outcome)
    assert failures(rows(outcome)) == ["broken failed: it broke"]


def test_a_skipped_method_is_named_with_its_reason(tmp_path: Path) -> None:
    outcome = dataclasses.replace(make_outcome(tmp_path, {"ok": RIGHT}), skipped={"vpt": "it needs | blocks"})
    assert "## Skipped\n\n- vpt is left out: it needs \\| blocks\n" in _markdown(outcome)
    assert skipped(outcome) == ["vpt is left out: it needs | blocks"]


def test_a_report_without_failures_or_skips_has_no_such_headings(tmp_path: Path) -> None:
    text = _markdown(make_outcome(tmp_path, {"ok": RIGHT}))
    assert "## Failed" not in text
    assert "## Skipped" not in text


def test_scores_are_percent_in_the_report(tmp_path: Path) -> None:
    assert cells(rows(make_outcome(tmp_path, {"ok": RIGHT}))[0])[2] == "75.00"


def test_a_verdict_says_difference_interval_test_correction_and_numbers(tmp_path: Path) -> None:
    outcome = make_outcome(tmp_path, {"linear_probe": [[0] * 40], "unipt": [[1] * 40]})
    (line,) = verdicts(outcome, comparisons(outcome))
    assert line.startswith(
        "unipt beats linear_probe: +100.00 points, 95 % paired bootstrap interval [+100.00, +100.00]"
    )
    assert re.search(r"sign-flip permutation p = 0\.0001, 0\.0001 after Holm over 1; 40 test examples, 1 seeds\.", line)


def test_no_difference_is_not_called_a_tie(tmp_path: Path) -> None:
    outcome = make_outcome(tmp_path, {"linear_probe": [[0, 1] * 8], "unipt": [[1, 0] * 8]})
    assert verdicts(outcome, comparisons(outcome))[0].startswith("unipt shows no difference from linear_probe: +0.00")


def test_the_world_is_that_of_the_records_and_tells_where_they_differ(tmp_path: Path) -> None:
    outcome = make_outcome(tmp_path, {"old": RIGHT, "new": RIGHT})
    versions = {"old": "0.0.9", "new": "0.1.0"}
    runs = [
        dataclasses.replace(
            r, records=[dataclasses.replace(r.records[0], world={"sidebench": versions[r.method], "cpu": "same"})]
        )
        for r in outcome.runs
    ]
    text = _markdown(dataclasses.replace(outcome, runs=runs))
    assert "- cpu: same\n- sidebench differs between runs: 0.0.9 / 0.1.0\n" in text


def test_a_probe_whose_solver_did_not_converge_at_its_choice_is_told(tmp_path: Path) -> None:
    converged = make_outcome(tmp_path, {"linear_probe": RIGHT}, l2=0.1, unconverged_l2=[1e-6])
    assert "did not converge" not in _markdown(converged)
    assert "in 1 runs the solver did not converge" in _markdown(
        make_outcome(tmp_path, {"linear_probe": RIGHT}, l2=1e-6, unconverged_l2=[1e-6])
    )


def test_memory_by_category_leaves_out_a_method_that_has_none(tmp_path: Path) -> None:
    text = _markdown(make_outcome(tmp_path, {"linear_probe": RIGHT}, memory_by_category=None))
    table = _table(text, "## Memory by category at the tracked peak")
    sums = ["sum MiB", 'sum, literature "GB"', "predicted sum MiB"]
    assert table[0] == ["method", *(f"{name} MiB" for name in CATEGORIES), *sums]
    assert len(table) == 2


def test_what_a_start_from_squared_gradients_took_has_a_section_of_its_own(tmp_path: Path) -> None:
    took = {"examples": 1024, "seconds": 12.34, "peak_tracked_bytes": 7 * 2**20}
    assert "## Initialisation" not in _markdown(make_outcome(tmp_path, {"lst": RIGHT}))
    text = _markdown(make_outcome(tmp_path, {"lst": RIGHT}, initialisation=took))
    (line,) = text.partition("## Initialisation\n\n")[2].partition("\n\n")[0].splitlines()
    assert line.startswith("- lst: squared gradients of 1,024 training examples through the whole backbone")
    assert "12.3 s, tracked peak 7.0 MiB, in no other figure here" in line


def test_the_cache_is_described_with_its_size_and_build_time(tmp_path: Path) -> None:
    store = {
        "digest": "ab" * 32,
        "bytes": 5 * 2**20,
        "form": dataclasses.asdict(Form()),
        "layers": ["blocks.0"],
        "build_seconds": 4.25,
        "relative_errors": {},
    }
    outcome = make_outcome(tmp_path, {"ok": RIGHT})
    assert "5.0 MiB, float16, 1 layers (blocks.0), built in 4.2 s" in _markdown(
        dataclasses.replace(outcome, store=store)
    )
    assert "over several sessions" in _markdown(dataclasses.replace(outcome, store={**store, "build_seconds": None}))


def test_the_terminal_table_shows_names_with_brackets_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(rows(make_outcome(tmp_path, {"[red]mine[/red].py": RIGHT, "a[0].py": RIGHT})), "accuracy")
    shown = capsys.readouterr().out
    assert "[red]mine[/red].py" in shown
    assert " a[0].py" in shown
    assert all(column in shown for column in COLUMNS)
