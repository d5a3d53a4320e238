"""Few shots: the same examples for every method, nested, apart from what validates; runs, tables and curves of them."""

import dataclasses
import itertools
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outcomes import METHOD_FILE, here, make_outcome, spawning, write_texts

from sidebench.bench import few_shot_report
from sidebench.bench import launch as launching
from sidebench.bench.compare import compare
from sidebench.bench.jobs import LR_SHOTS, folder_name
from sidebench.bench.launch import Listener
from sidebench.bench.options import shots_of
from sidebench.bench.outcome import Outcome, Request, Runs
from sidebench.bench.prepare import Inputs
from sidebench.bench.progress import Display
from sidebench.bench.record import Job, read_split, split_name
from sidebench.bench.report import markdown
from sidebench.bench.table import comparisons, document, gains, rows
from sidebench.bench.tasks.base import Split, Task
from sidebench.bench.tasks.contents import TextExamples
from sidebench.bench.tasks.few_shot import few_shot
from sidebench.cache.errors import SidebenchError

# What is drawn


def _task(labels: Sequence[int], ids: Sequence[str] | None = None) -> Task:
    names = tuple(ids or map(str, range(len(labels))))
    classes = tuple(f"class{i}" for i in range(max(labels) + 1))
    return Task("csv:x", TextExamples(names, np.array(labels, np.int64), classes, names), classes, None)


def _parts(pool: Sequence[int], rest: Sequence[int]) -> Split:
    half = len(rest) // 2
    return Split(np.array(sorted(pool)), np.array(sorted(rest[:half])), np.array(sorted(rest[half:])))


@given(st.lists(st.integers(0, 3), min_size=30, max_size=120), st.integers(1, 20), st.integers(0, 3))
def test_of_each_class_as_many_as_asked_or_all_and_others_to_validate(labels: list[int], shots: int, seed: int) -> None:
    labels = [0] * 30 + labels  # of one class something is left to validate
    everything = list(range(len(labels)))
    pool, rest = everything[: len(labels) * 3 // 4], everything[len(labels) * 3 // 4 :]
    parts = _parts(pool, rest)
    found = few_shot(_task(labels), parts, shots, seed)
    assert found.test is parts.test
    assert not set(found.train) & set(found.val)
    assert set(found.train) | set(found.val) <= set(pool)
    of_pool, train, val = (Counter(labels[i] for i in index) for index in (pool, found.train, found.val))
    for label, size in of_pool.items():
        assert train[label] == min(shots, size)
        assert val[label] == min(shots, 4, size - train[label])


@given(st.permutations(list(range(60))), st.integers(1, 8))
def test_neither_the_order_of_the_file_nor_a_new_example_of_another_class_moves_any(order: list[int], k: int) -> None:
    labels = [i % 3 for i in range(60)]
    plain = few_shot(_task(labels), _parts(range(48), range(48, 60)), k, 0)
    mixed = few_shot(
        _task([labels[i] for i in order], [str(i) for i in order]),
        _parts([at for at, i in enumerate(order) if i < 48], [at for at, i in enumerate(order) if i >= 48]),
        k,
        0,
    )
    assert sorted(order[i] for i in mixed.train) == plain.train.tolist()
    assert sorted(order[i] for i in mixed.val) == plain.val.tolist()
    joined = few_shot(_task([*labels, 3]), _parts([*range(48), 60], range(48, 60)), k, 0)
    assert [i for i in joined.train if i != 60] == plain.train.tolist()


def test_fewer_shots_of_a_seed_are_some_of_more_and_another_seed_draws_others() -> None:
    task, parts = _task([i % 2 for i in range(100)]), _parts(range(80), range(80, 100))
    by_shots = [few_shot(task, parts, k, 0) for k in (1, 2, 4, 8, 16)]
    for fewer, more in itertools.pairwise(by_shots):
        assert set(fewer.train) < set(more.train)
        assert set(fewer.val) <= set(more.val)
    assert by_shots[0].sizes() == {"train": 2, "val": 2, "test": 10}
    assert by_shots[4].sizes() == {"train": 32, "val": 8, "test": 10}
    assert few_shot(task, parts, 8, 0).train.tolist() == by_shots[3].train.tolist()
    assert few_shot(task, parts, 8, 1).train.tolist() != by_shots[3].train.tolist()


def test_a_regression_and_shots_that_leave_nothing_to_validate_are_refused() -> None:
    task, parts = _task([0, 1] * 10), _parts(range(16), range(16, 20))
    with pytest.raises(SidebenchError, match=r"with 8 shots every class trains with all its examples.*fewer --shots"):
        few_shot(task, parts, 8, 0)
    with pytest.raises(SidebenchError, match="is a regression"):
        few_shot(dataclasses.replace(task, values=(0.0, 1.0)), parts, 1, 0)


@pytest.mark.parametrize(("text", "shots"), [(None, ()), ("4", (4,)), ("16,1,4,1", (1, 4, 16))])
def test_shots_as_typed(text: str | None, shots: tuple[int, ...]) -> None:
    assert shots_of(text) == shots


def test_shots_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(SidebenchError, match=r"--shots wants whole numbers.*found '1,x'"):
        shots_of("1,x")


@pytest.mark.parametrize(
    ("steps", "examples", "epochs"), [(60, 10, 60), (60, 40, 30), (60, 160, 12), (60, 33, 30), (3, 160, 1)]
)
def test_as_many_epochs_as_the_steps_allow_and_one_at_least(steps: int, examples: int, epochs: int) -> None:
    job = _job(steps=steps)
    assert job.epochs_of(examples) == epochs
    assert epochs == 1 or epochs * -(-examples // 32) <= steps


def _job(**changes: Any) -> Job:
    usual = dict.fromkeys((field.name for field in dataclasses.fields(Job)), None)
    usual |= {"batch_size": 32, "epochs": 7, "score": "accuracy"}
    return Job(**(usual | changes))


# Comparisons


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few-shot")
    write_texts(folder / "texts.jsonl", 60)
    return folder


@pytest.fixture
def request_for(place: Path, models: Path) -> Callable[..., Request]:
    def make(*methods: str, **changes: Any) -> Request:
        inputs = Inputs(f"hf:{models / 'bert'}", f"jsonl:{place / 'texts.jsonl'}", device="cpu")
        settings = {"linear_probe": {"candidates": "2", "max_iterations": "60"}} if "linear_probe" in methods else {}
        usual = {
            "inputs": inputs,
            "methods": methods,
            "settings": settings,
            "seeds": (0, 1),
            "shots": (1, 4),
            "steps": 3,
            "lr": "0.001",
        }
        return Request(**(usual | changes))

    return make


def _compare(request: Request, place: Path, runs: str, listener: Listener | None = None) -> Outcome:
    return compare(request, home=place, cache_dir=place / "caches", runs_dir=place / runs, listener=listener)


def test_every_seed_has_one_interpreter_for_all_its_shots_and_all_methods_the_same_examples(
    request_for: Callable[..., Request], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[list[tuple[str, int, int | None]]] = []

    def spawn(jobs: Sequence[Job], folder: Path, listener: Listener) -> list[str | None]:
        begun.append([(job.method, job.seed, job.shots) for job in jobs])
        return spawning()(jobs, folder, listener)

    monkeypatch.setattr(launching, "spawn", spawn)
    outcome = _compare(request_for("linear_probe", "bitfit"), place, "shots")
    assert begun == [[(m, seed, 1), (m, seed, 4)] for m in ("linear_probe", "bitfit") for seed in (0, 1)]
    table = rows(outcome)
    assert [(row["method"], row["shots"]) for row in table] == [
        (m, k) for m in ("linear_probe", "bitfit") for k in (1, 4)
    ]
    assert all(row["error"] is None and len(row["score"]["values"]) == 2 for row in table)
    for runs in outcome.runs:
        for record in runs.records:
            assert record.measured is not None
            parts = read_split(outcome.folder / split_name(runs.shots, record.asked["seed"]))
            assert record.measured["sizes"] == parts.sizes() == outcome.few_shot_sizes[runs.shots or 0]
    assert outcome.few_shot_sizes[4] == {"train": 8, "val": 8, "test": outcome.sizes["test"]}
    found = document(outcome, table, comparisons(outcome), place / "report.md")
    assert found["few_shot_examples"][1]["train"] == 2
    assert len(found["records"]) == 8


def test_a_second_number_of_shots_trains_as_it_would_in_an_interpreter_of_its_own(
    request_for: Callable[..., Request], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "spawn", spawning())
    together = _compare(request_for("bitfit", "unipt", seeds=(0,)), place, "together")
    apart = _compare(request_for("bitfit", "unipt", seeds=(0,), shots=(4,)), place, "apart")
    by_method = {runs.method: runs.records[0].measured for runs in together.runs if runs.shots == 4}
    for runs in apart.runs:
        one, other = by_method[runs.method], runs.records[0].measured
        assert one is not None
        assert other is not None
        assert one["losses"] == other["losses"]
        assert one["peak_tracked_bytes"] == other["peak_tracked_bytes"]


def test_memory_is_measured_for_each_size_of_the_step(
    request_for: Callable[..., Request], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "spawn", spawning())
    one, four = rows(_compare(request_for("unipt", seeds=(0,)), place, "sizes"))
    assert one["peak_tracked_bytes"] < four["peak_tracked_bytes"]


def test_the_learning_rate_is_chosen_once_at_four_shots_of_the_first_seed(
    request_for: Callable[..., Request], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[tuple[int, int | None]] = []

    def run(job: Job, folder: Path, listener: Listener) -> str | None:
        if len(job.lrs) > 1:
            trials.append((job.seed, job.shots))
        return here(job, folder, listener)

    monkeypatch.setattr(launching, "spawn", spawning(run))
    outcome = _compare(request_for("unipt", lr=None, shots=(1, 2), seeds=(1, 0)), place, "rates")
    assert trials == [(1, LR_SHOTS)]
    assert len({record.measured and record.measured["lr"] for record in outcome.records["unipt"]}) == 1
    assert "at 4 shots of seed 1" in markdown(outcome, rows(outcome), comparisons(outcome))


def test_a_method_whose_rates_all_diverge_fails_at_every_number_of_shots(
    request_for: Callable[..., Request], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "spawn", spawning())
    outcome = _compare(request_for("unipt", lr="1e30,1e29"), place, "diverged")
    assert [row["error"] for row in rows(outcome)] == [
        "the loss is not finite at any learning rate of 1e+30, 1e+29."
    ] * 2


def test_where_no_rate_is_chosen_few_examples_are_enough_and_else_this_is_said(
    request_for: Callable[..., Request], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "spawn", spawning())
    lines = (place / "texts.jsonl").read_text("utf-8").splitlines(keepends=True)
    yes, no = ([line for line in lines if f'"label": "{label}"' in line] for label in ("yes", "no"))
    (tmp_path / "small.jsonl").write_text("".join(yes[:5] + no[:5]), "utf-8")  # three of each train
    request = request_for("unipt", seeds=(0,), shots=(1,))
    inputs = dataclasses.replace(request.inputs, task=f"jsonl:{tmp_path / 'small.jsonl'}")
    outcome = _compare(dataclasses.replace(request, inputs=inputs), place, "small")
    assert outcome.few_shot_sizes == {1: {"train": 2, "val": 2, "test": 2}}
    assert rows(outcome)[0]["error"] is None
    with pytest.raises(SidebenchError, match=r"learning rates are chosen at 4 shots: .* Or type one --lr\."):
        _compare(dataclasses.replace(request, inputs=inputs, lr=None), place, "small")


def test_another_split_of_the_same_examples_is_another_comparison(
    request_for: Callable[..., Request], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "spawn", spawning())
    write_texts(tmp_path / "parts.jsonl", 60, parts=True)
    request = request_for("unipt", seeds=(0,), shots=(1,))
    inputs = dataclasses.replace(request.inputs, task=f"jsonl:{tmp_path / 'parts.jsonl'}")
    first = _compare(dataclasses.replace(request, inputs=inputs), place, "parts")
    lines = (tmp_path / "parts.jsonl").read_text("utf-8")
    (tmp_path / "parts.jsonl").write_text(lines.replace('"split": "val"', '"split": "test"', 3), "utf-8")
    second = _compare(dataclasses.replace(request, inputs=inputs), place, "parts")
    assert first.folder != second.folder
    assert second.sizes["test"] == first.sizes["test"] + 3


@pytest.mark.parametrize("shots", [(0, 1), (-1,)])
def test_less_than_one_shot_is_refused(
    shots: tuple[int, ...], request_for: Callable[..., Request], place: Path
) -> None:
    with pytest.raises(SidebenchError, match="--shots wants numbers of 1 or more"):
        _compare(request_for("unipt", shots=shots), place, "none")


def test_a_run_that_is_killed_costs_neither_those_before_it_nor_those_behind_it(
    request_for: Callable[..., Request], place: Path, tmp_path: Path
) -> None:
    dies = "len(batch.mask) == 4 and os.kill(os.getpid(), signal.SIGKILL)"  # two classes at 2 shots
    (tmp_path / "mortal.py").write_text(METHOD_FILE.replace("{forward}", dies))
    events: list[str] = []
    request = request_for(str(tmp_path / "mortal.py"), seeds=(0,), shots=(1, 2, 8), batch_size=64)
    outcome = _compare(request, place, "killed", Listener(run_event=lambda job, event: events.append(event["event"])))
    errors = [row["error"] for row in rows(outcome)]
    assert errors[0] is errors[2] is None
    assert "killed by SIGKILL" in errors[1]
    assert events.count("started") == 3


# Gains, the report and the curve


def _outcome(folder: Path, hits: dict[tuple[str, int], list[list[int]]]) -> Outcome:
    made = make_outcome(folder, {f"{method} {shots}": right for (method, shots), right in hits.items()})
    runs = [
        Runs(method, shots, found.records, found.files) for (method, shots), found in zip(hits, made.runs, strict=True)
    ]
    sizes = {shots: {"train": 2 * shots, "val": 2, "test": 8} for _, shots in hits}
    twins = {"vpt@pre.safetensors": "vpt"}
    return dataclasses.replace(made, runs=runs, few_shot_sizes=sizes, twins=twins)


HITS = {
    ("linear_probe", 1): [[1, 0, 0, 0, 0, 0, 0, 0]] * 2,
    ("linear_probe", 2): [[1, 1, 0, 0, 0, 0, 0, 0]] * 2,
    ("vpt", 1): [[1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]],
    ("vpt", 2): [[1, 1, 1, 0, 0, 0, 0, 0]] * 2,
    ("vpt@pre.safetensors", 1): [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]],
    ("vpt@pre.safetensors", 2): [[1, 1, 1, 1, 0, 0, 0, 0]] * 2,
}


def test_gains_are_paired_by_seed_and_example_at_equal_shots(tmp_path: Path) -> None:
    outcome = _outcome(tmp_path, HITS)
    compared = comparisons(outcome)
    assert len(compared) == 6  # at either number of shots: two against the probe, one against its twin
    one, two = gains(outcome, compared)
    assert (one.method, one.against, one.shots) == ("vpt@pre.safetensors", "vpt", 1)
    assert one.difference == pytest.approx(((4 - 1) + (2 - 0)) / 2 / 8)
    half = 12.706205 * abs(3 / 8 - 2 / 8) / 2  # Student t of two seeds' differences, 3/8 and 2/8
    assert one.seeds_ci95 == pytest.approx((2.5 / 8 - half, 2.5 / 8 + half), abs=1e-6)
    assert (two.shots, two.difference) == (2, pytest.approx(1 / 8))
    assert two.seeds_ci95 == pytest.approx((1 / 8, 1 / 8))


def test_runs_on_different_test_examples_are_never_paired(tmp_path: Path) -> None:
    outcome = _outcome(tmp_path, HITS)
    path = outcome.runs[0].files[0].with_suffix(".npz")
    with np.load(path) as found:
        kept = dict(found)
    np.savez(path, **(kept | {"targets": 1 - kept["targets"]}))
    np.savez(outcome.runs[0].files[1].with_suffix(".npz"), **(kept | {"targets": 1 - kept["targets"]}))
    with pytest.raises(SidebenchError, match="tested on different examples"):
        comparisons(outcome)


def test_of_hundreds_of_epochs_a_tenth_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(quiet=False)
    job = _job(method="unipt", seed=0, shots=2)
    for epoch in range(1, 106):
        display.run_event(job, {"event": "epoch", "epoch": epoch, "epochs": 105, "val_score": 0.5})
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 11
    assert shown[0].startswith("unipt seed 0, 2 shots: epoch 10/105")
    assert "epoch 105/105" in shown[-1]


def test_the_report_has_scores_over_shots_and_gains_and_says_how_examples_were_drawn(tmp_path: Path) -> None:
    outcome = _outcome(tmp_path, HITS)
    text = markdown(outcome, rows(outcome), comparisons(outcome))
    assert "| method | 1 shot | 2 shots |" in text
    assert "vpt@pre.safetensors | 37.50 (" in text
    assert "| vpt@pre.safetensors | 1 | +31.25 |" in text
    assert "Shots: training and validation examples, 1: 2 and 2; 2: 4 and 2." in text
    assert "vpt at 1 shot " in text
    assert "| method | kind | shots | accuracy % |" in text
    assert few_shot_report.CURVE not in text  # it is shown where it was drawn


def test_the_curve_is_the_same_bytes_for_the_same_rows_and_names_stay_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    hits = {(method.replace("linear_probe", "<b>$x^2$&_"), shots): right for (method, shots), right in HITS.items()}
    outcome = _outcome(tmp_path, hits)
    assert few_shot_report.draw_curve(outcome, rows(outcome)) is None
    drawn = (tmp_path / few_shot_report.CURVE).read_bytes()
    texts = [element.text for element in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert {"<b>$x^2$&_", "vpt", "vpt@pre.safetensors", "training examples of each class"} <= set(texts)
    assert few_shot_report.draw_curve(outcome, rows(outcome)) is None
    assert (tmp_path / few_shot_report.CURVE).read_bytes() == drawn
    assert f"]({few_shot_report.CURVE})" in markdown(outcome, rows(outcome), comparisons(outcome))


def test_without_a_plotting_library_the_curve_is_not_drawn_and_this_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    outcome = _outcome(tmp_path, HITS)
    assert "pip install 'sidebench[plots]'" in (few_shot_report.draw_curve(outcome, rows(outcome)) or "")
    assert not (tmp_path / few_shot_report.CURVE).exists()


def test_shots_and_other_comparisons_do_not_share_a_folder(request_for: Callable[..., Request]) -> None:
    facts = {"dataset": "x"}
    plain, few = request_for("unipt", shots=(), steps=None), request_for("unipt", steps=None)
    names = {folder_name(r, facts) for r in (plain, few, dataclasses.replace(few, steps=3))}
    assert len(names) == 3
    assert folder_name(dataclasses.replace(few, shots=(2,)), facts) in names  # shots added later join
