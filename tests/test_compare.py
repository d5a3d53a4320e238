"""Comparisons end to end on a tiny backbone: what a run leaves, what is run again, what fails, what is chosen.

Tests that are about interpreters start real workers; the others run the same jobs in this process.
"""

import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import CATEGORIES, COMMAND, METHOD_FILE, here, spawning, write_texts

from sidebench.bench import choice, training, worker
from sidebench.bench import compare as comparing
from sidebench.bench import launch as launching
from sidebench.bench.compare import compare
from sidebench.bench.jobs import learning_rates
from sidebench.bench.launch import Listener
from sidebench.bench.learner import CachedSource
from sidebench.bench.outcome import Outcome, Request
from sidebench.bench.prepare import Inputs
from sidebench.bench.record import Job, read_predictions, read_record, read_split, split_name, trial_path, write_json
from sidebench.bench.table import comparisons, document, rows
from sidebench.cache.build import CaptureOptions
from sidebench.cache.errors import SidebenchError
from sidebench.cache.store import Index

SPLIT = split_name(None, 0)
QUICK = {"linear_probe": {"candidates": "2", "max_iterations": "60"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task and a home; caches and runs join it."""
    folder = tmp_path_factory.mktemp("comparison")
    write_texts(folder / "reviews.jsonl", 60)
    return folder


@pytest.fixture(scope="module")
def request_for(place: Path, models: Path) -> Callable[..., Request]:
    def make(*methods: str, **changes: Any) -> Request:
        inputs = Inputs(f"hf:{models / 'bert'}", f"jsonl:{place / 'reviews.jsonl'}", device="cpu")
        settings = (QUICK if "linear_probe" in methods else {}) | changes.pop("settings", {})
        usual = {"inputs": inputs, "methods": methods, "settings": settings, "epochs": 2, "seeds": (0,)}
        return Request(**(usual | changes))

    return make


@dataclasses.dataclass
class Heard:
    """What a comparison told."""

    said: list[str] = dataclasses.field(default_factory=list)
    events: list[tuple[str, int, str]] = dataclasses.field(default_factory=list)

    def listener(self) -> Listener:
        def hear(job: Job, event: Mapping[str, Any]) -> None:
            self.events.append((job.method, job.seed, event["event"]))

        return Listener(say=self.said.append, run_event=hear)

    def of(self, kind: str) -> list[tuple[str, int]]:
        return [(method, seed) for method, seed, event in self.events if event == kind]


def _compare(request: Request, place: Path, heard: Heard | None = None, runs: str = "runs") -> Outcome:
    listener = (heard or Heard()).listener()
    return compare(request, home=place, cache_dir=place / "caches", runs_dir=place / runs, listener=listener)


@pytest.fixture(scope="module")
def finished(place: Path, request_for: Callable[..., Request]) -> tuple[Request, Outcome]:
    """Two cached methods and a live one, the first seed in an interpreter per run, the second in this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as in this process, so that numbers can be compared bit for bit
        request = request_for("linear_probe", "unipt", "bitfit", seeds=(0, 1))
        _compare(dataclasses.replace(request, seeds=(0,)), place)
        patch.setattr(launching, "spawn", spawning())
        return request, _compare(request, place)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Runs jobs in this process instead of in workers, and lists those that were started."""
    jobs: list[Job] = []
    monkeypatch.setattr(launching, "spawn", spawning(_run_here(jobs)))
    return jobs


def _run_here(jobs: list[Job]) -> Callable[[Job, Path, Listener], str | None]:
    def run(job: Job, folder: Path, listener: Listener) -> str | None:
        jobs.append(job)
        listener.run_event(job, {"event": "started"})
        return here(job, folder, listener)

    return run


def _names(jobs: list[Job]) -> list[tuple[str, int]]:
    return [(job.method, job.seed) for job in jobs]


# What a comparison leaves


def test_every_row_has_the_keys_of_the_contract(finished: tuple[Request, Outcome]) -> None:
    _, outcome = finished
    table = rows(outcome)
    assert [(row["method"], row["kind"]) for row in table] == [
        ("linear_probe", "cached"),
        ("unipt", "cached"),
        ("bitfit", "live"),
    ]
    for row in table:
        assert set(row) >= {
            *("method", "kind", "score", "trainable_params", "head_params", "total_params", "error"),
            *("peak_device_bytes", "peak_tracked_bytes", "peak_host_bytes", "memory_by_category"),
            *("predicted_peak_bytes", "shots", "train_seconds", "eval_seconds", "examples_per_second"),
            *("cache_bytes", "cache_build_seconds", "unavailable"),
        }
        assert set(row["score"]) >= {"name", "mean", "ci95", "values"}
        assert row["error"] is None
        assert 0 <= row["score"]["mean"] <= 1
        assert len(row["score"]["values"]) == 2
        assert row["train_seconds"] > 0
        assert row["eval_seconds"] > 0
        assert row["examples_per_second"] > 0
        missing = {key for key, value in row.items() if value is None}
        does_not_apply = {"error", "shots", "lr", "cache_bytes", "cache_build_seconds", "initialisation"}
        assert missing - does_not_apply <= set(row["unavailable"])


def test_on_a_cpu_what_was_predicted_is_what_was_tracked(finished: tuple[Request, Outcome]) -> None:
    _, outcome = finished
    trained = [row for row in rows(outcome) if row["memory_by_category"]]
    assert [row["method"] for row in trained] == ["unipt", "bitfit"]
    for row in trained:
        assert row["predicted_peak_bytes"] == row["peak_tracked_bytes"]


def test_the_document_is_json_and_names_records_that_exist(finished: tuple[Request, Outcome], tmp_path: Path) -> None:
    _, outcome = finished
    made = document(outcome, rows(outcome), comparisons(outcome), tmp_path / "report.md")
    found = json.loads(json.dumps(made, allow_nan=False))
    assert {"table", "skipped", "records", "report"} <= set(found)
    assert len(found["records"]) == 6
    for path in found["records"]:
        record = read_record(Path(path))
        assert record.measured is not None
        assert record.asked["config"] is not None
        assert {"sidebench", "packages", "commit"} <= set(record.world)


def test_figures_of_memory_are_those_of_a_cpu(finished: tuple[Request, Outcome]) -> None:
    probe, unipt, bitfit = rows(finished[1])
    for row in (probe, unipt, bitfit):
        assert row["peak_device_bytes"] is None
        assert row["unavailable"]["peak_device_bytes"]
        assert row["peak_tracked_bytes"] > 0
    assert set(unipt["memory_by_category"]) == set(CATEGORIES)
    assert sum(unipt["memory_by_category"].values()) == unipt["peak_tracked_bytes"]
    assert unipt["memory_by_category"]["parameters"] == 4 * unipt["total_params"]  # no backbone in memory
    assert bitfit["total_params"] > bitfit["trainable_params"]
    assert probe["memory_by_category"] is None
    assert probe["unavailable"]["memory_by_category"]


def test_only_cached_methods_carry_the_cost_of_the_cache(finished: tuple[Request, Outcome]) -> None:
    probe, unipt, bitfit = rows(finished[1])
    assert probe["cache_bytes"] == unipt["cache_bytes"] > 0
    assert unipt["cache_build_seconds"] > 0
    assert bitfit["cache_bytes"] is bitfit["cache_build_seconds"] is None


def test_the_score_can_be_computed_again_from_the_predictions_kept(finished: tuple[Request, Outcome]) -> None:
    _, outcome = finished
    for path in outcome.files:
        logits, targets = read_predictions(path.with_suffix(".npz"))
        measured = read_record(path).measured
        assert measured is not None
        assert logits.dtype == np.float32
        assert measured["score"] == float((logits.argmax(1) == targets).mean())


def test_every_method_and_seed_has_the_same_test_examples_and_they_are_the_test_part(
    finished: tuple[Request, Outcome],
) -> None:
    _, outcome = finished
    test = read_split(outcome.folder / SPLIT).test
    for path in outcome.files:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as kept:
            assert kept["ids"].tolist() == [f"example-{i}" for i in test]
            assert len(kept["targets"]) == len(test) == outcome.sizes["test"]


def test_a_finished_folder_holds_no_leftovers(finished: tuple[Request, Outcome]) -> None:
    _, outcome = finished
    expected = {SPLIT} | {f"{path.stem}.{ending}" for path in outcome.files for ending in ("json", "npz")}
    assert {path.name for path in outcome.folder.iterdir()} == expected


# Running again


def test_a_second_call_reuses_every_run_and_starts_no_worker(
    finished: tuple[Request, Outcome], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, outcome = finished
    monkeypatch.setattr(launching, "spawn", lambda *_: pytest.fail("a worker was started"))
    heard = Heard()
    again = _compare(request, place, heard)
    assert len(heard.of("reused")) == 6
    assert again.records == outcome.records
    assert again.store is not None
    assert again.store["status"] == "exists"


def test_a_new_seed_and_a_new_method_run_alone(
    finished: tuple[Request, Outcome], place: Path, started: list[Job], request_for: Callable[..., Request]
) -> None:
    _compare(request_for("unipt", "linear_probe", seeds=(1, 2)), place)
    assert _names(started) == [("unipt", 2), ("linear_probe", 2)]
    started.clear()
    _compare(request_for("unipt", "lst"), place)
    assert _names(started) == [("lst", 0)]


def test_a_changed_option_runs_only_its_own_method_again(
    finished: tuple[Request, Outcome], place: Path, started: list[Job], request_for: Callable[..., Request]
) -> None:
    outcome = _compare(request_for("linear_probe", "unipt", settings={"unipt": {"reduction": "4"}}), place)
    assert _names(started) == [("unipt", 0)]
    assert outcome.records["unipt"][0].asked["config"]["reduction"] == 4


def test_another_protocol_is_another_folder(
    finished: tuple[Request, Outcome], place: Path, started: list[Job], request_for: Callable[..., Request]
) -> None:
    outcome = _compare(request_for("linear_probe", split_seed=1), place)
    assert _names(started) == [("linear_probe", 0)]
    assert outcome.folder != finished[1].folder


def test_an_edited_method_file_is_another_method(
    place: Path, started: list[Job], request_for: Callable[..., Request], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.py"
    for forward in ("pass", "pass", "pass  # edited"):
        mine.write_text(METHOD_FILE.replace("{forward}", forward))
        _compare(request_for(str(mine)), place)
    assert len(started) == 2


@pytest.mark.parametrize("harm", ["truncated record", "no predictions", "truncated predictions", "failed before"])
def test_a_run_that_is_damaged_or_failed_is_run_again_and_no_other(
    harm: str, finished: tuple[Request, Outcome], place: Path, started: list[Job], request_for: Callable[..., Request]
) -> None:
    request = request_for("linear_probe", seeds=(0, 1))
    path = _compare(request, place).files[1]
    before = {file: file.read_bytes() for file in (path, path.with_suffix(".npz"))}
    try:
        if harm == "truncated record":
            path.write_bytes(before[path][:50])
        elif harm == "failed before":
            write_json(path, {**json.loads(before[path]), "measured": None, "error": "it broke"})
        elif harm == "no predictions":
            path.with_suffix(".npz").unlink()
        else:
            path.with_suffix(".npz").write_bytes(before[path.with_suffix(".npz")][:50])
        outcome = _compare(request, place)
        assert _names(started) == [("linear_probe", 1)]
        assert outcome.records["linear_probe"][1].error is None
    finally:
        for file, payload in before.items():
            file.write_bytes(payload)


def test_fresh_runs_everything_again_and_gives_the_same_numbers_in_another_process(
    finished: tuple[Request, Outcome], place: Path, started: list[Job], request_for: Callable[..., Request]
) -> None:
    _, outcome = finished
    before = {path.name: read_predictions(path.with_suffix(".npz"))[0] for path in outcome.files}
    losses = {path.name: (read_record(path).measured or {}).get("losses") for path in outcome.files}
    again = _compare(request_for("linear_probe", "unipt", "bitfit", fresh=True), place)
    assert _names(started) == [("linear_probe", 0), ("unipt", 0), ("bitfit", 0)]
    for path in again.files:
        assert np.array_equal(read_predictions(path.with_suffix(".npz"))[0], before[path.name])
        assert (read_record(path).measured or {}).get("losses") == losses[path.name]


def test_seeds_differ_in_what_they_predict(finished: tuple[Request, Outcome]) -> None:
    logits = [read_predictions(path.with_suffix(".npz"))[0] for path in finished[1].files]
    assert not np.array_equal(logits[2], logits[3])  # unipt
    assert not np.array_equal(logits[4], logits[5])  # bitfit


# The learning rate


def _fake_trials(scores: Mapping[tuple[float, int], float | None]) -> Callable[[Job, Path, Listener], str | None]:
    """A worker whose trials have these validation scores by (learning rate, seed)."""

    def run(job: Job, folder: Path, listener: Listener) -> str | None:
        if len(job.lrs) == 1:
            return here(job, folder, listener)
        for lr in job.lrs:
            write_json(trial_path(folder, job, lr), {"lr": lr, "val_score": scores[lr, job.seed]})
        return None

    return run


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({(0.01, 0): 0.9, (0.01, 1): 0.1, (0.001, 0): 0.6, (0.001, 1): 0.6}, 0.001),  # the mean, not the best seed
        ({(0.01, 0): 0.0, (0.01, 1): 0.9, (0.001, 0): 0.4, (0.001, 1): 0.4}, 0.01),  # a score of 0 counts
        ({(0.01, 0): 0.9, (0.01, 1): None, (0.001, 0): 0.1, (0.001, 1): 0.1}, 0.001),  # a rate that diverged is out
        ({(0.01, 0): 0.5, (0.01, 1): 0.5, (0.001, 0): 0.5, (0.001, 1): 0.5}, 0.01),  # of equals the first as typed
    ],
)
def test_the_rate_is_the_best_mean_on_validation_and_the_same_for_all_seeds(
    scores: dict[tuple[float, int], float | None],
    best: float,
    place: Path,
    tmp_path: Path,
    request_for: Callable[..., Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launching, "spawn", spawning(_fake_trials(scores)))
    outcome = _compare(request_for("unipt", lr="0.01,0.001", seeds=(0, 1), epochs=1), place, runs=str(tmp_path))
    assert [record.measured and record.measured["lr"] for record in outcome.records["unipt"]] == [best, best]


def test_trials_never_look_at_the_test_part_and_the_final_run_does_once_at_its_end(
    place: Path,
    tmp_path: Path,
    started: list[Job],
    request_for: Callable[..., Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[int, list[int]] = {1: [], 2: []}  # by the number of rates of the job
    batches = CachedSource.batches

    def recorded(source: CachedSource, wanted: list[Index]) -> Iterator[Any]:
        asked[len(started[-1].lrs)] += [int(i) for index in wanted for i in index]
        return batches(source, wanted)

    monkeypatch.setattr(CachedSource, "batches", recorded)
    outcome = _compare(request_for("unipt", lr="0.01,0.001", epochs=1), place, runs=str(tmp_path))
    parts = read_split(outcome.folder / SPLIT)
    test = parts.test.tolist()
    assert [len(job.lrs) for job in started] == [2, 1]
    assert set(asked[2]) == {*parts.train.tolist(), *parts.val.tolist()}
    assert asked[1][-len(test) :] == test
    assert not set(asked[1][: -len(test)]) & set(test)


def test_a_rate_at_which_training_diverges_loses_and_does_not_fail_the_method(
    place: Path, tmp_path: Path, started: list[Job], request_for: Callable[..., Request]
) -> None:
    heard = Heard()
    outcome = _compare(request_for("unipt", lr="1e30,0.001", epochs=3), place, heard, runs=str(tmp_path))
    (record,) = outcome.records["unipt"]
    assert record.measured is not None
    assert record.measured["lr"] == 0.001
    assert any("1e+30: diverged" in sentence for sentence in heard.said)


def test_when_every_rate_diverges_the_method_fails_with_a_sentence(
    place: Path, tmp_path: Path, started: list[Job], request_for: Callable[..., Request]
) -> None:
    outcome = _compare(request_for("linear_probe", "unipt", lr="1e30,1e29", epochs=3), place, runs=str(tmp_path))
    assert outcome.records["unipt"][0].error == "the loss is not finite at any learning rate of 1e+30, 1e+29."
    assert outcome.records["linear_probe"][0].error is None


def test_a_final_run_equals_the_trial_of_its_rate_even_with_dropout(
    place: Path, tmp_path: Path, started: list[Job], request_for: Callable[..., Request]
) -> None:
    mine = tmp_path / "drops.py"
    drop = "self.kept = nn.functional.dropout(batch.mask.float(), 0.5, self.training)[..., None]"
    text = METHOD_FILE.replace("{forward}", drop)
    mine.write_text(text.replace("batch.state(self.layer)", "batch.state(self.layer) * self.kept"))
    losses: list[list[float]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "train", lambda *rest: losses.append((found := training.train(*rest)).losses) or found)
        outcome = _compare(request_for(str(mine), lr="0.03,0.003"), place, runs=str(tmp_path))
    measured = outcome.records[str(mine)][0].measured
    assert measured is not None
    trial = losses[(0.03, 0.003).index(measured["lr"])]
    assert len(losses) == 3
    assert measured["losses"] == trial


def test_auto_tries_equally_many_rates_for_every_method() -> None:
    from sidebench.adapters._registry import find_method

    tried = {name: learning_rates("auto", find_method(name).configured({})) for name in ("unipt", "bitfit", "full")}
    assert {len(rates) for rates in tried.values()} == {3}
    assert tried["unipt"] == (0.00015, 0.0005, 0.0015)


# What is refused, skipped, or fails


def test_all_skips_what_this_backbone_refuses_and_says_why(
    place: Path, started: list[Job], request_for: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "known_methods", lambda: ("linear_probe", "unipt"))
    outcome = _compare(request_for("all", settings={"unipt": {"reduction": "1000"}} | QUICK), place)
    assert list(outcome.records) == ["linear_probe"]
    assert outcome.skipped == {"unipt": "reduction 1000 leaves no side width of 32"}


@pytest.mark.parametrize("methods", [("linear_probe", "unipt"), ("all", "unipt")])
def test_a_refused_method_asked_for_by_name_stops_everything_before_it_runs(
    methods: tuple[str, ...],
    place: Path,
    tmp_path: Path,
    started: list[Job],
    request_for: Callable[..., Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "known_methods", lambda: ("linear_probe", "unipt"))
    with pytest.raises(SidebenchError, match="unipt cannot run on BertModel: reduction 1000 leaves no side width"):
        _compare(request_for(*methods, settings={"unipt": {"reduction": "1000"}}), place, runs=str(tmp_path / "runs"))
    assert started == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ("unpit",)}, "no method 'unpit'. Did you mean 'unipt'?"),
        ({"methods": ()}, "no methods given"),
        ({"lr": "fast"}, "--lr wants auto, a number, or numbers with commas; found 'fast'"),
        ({"lr": "0.1,-1"}, "--lr wants positive numbers; found '0.1,-1'"),
        ({"lr": "nan"}, "--lr wants positive numbers"),
        (
            {"settings": {"unpit": {"reduction": "2"}}},
            "no method in --set 'unpit'. Did you mean 'unipt'?",
        ),
        ({"settings": {"unipt": {"reducton": "2"}}}, "no option of unipt 'reducton'. Did you mean 'reduction'?"),
        ({"settings": {"unipt": {"reduction": "two"}}}, "unipt.reduction wants int; found 'two'"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_loaded(
    changes: dict[str, Any],
    sentence: str,
    place: Path,
    request_for: Callable[..., Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comparing, "prepare", lambda *_, **__: pytest.fail("something was loaded"))
    with pytest.raises(SidebenchError) as refused:
        _compare(dataclasses.replace(request_for("unipt"), **changes), place)
    assert sentence in str(refused.value)


def test_a_runs_folder_that_cannot_be_written_is_found_before_the_cache_is_built(
    tmp_path: Path, place: Path, request_for: Callable[..., Request]
) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(SidebenchError, match=r"cannot write to .*: Not a directory\. Choose another with --runs-dir"):
        compare(request_for("unipt"), home=place, cache_dir=tmp_path / "caches", runs_dir=tmp_path / "runs")
    assert not (tmp_path / "caches").exists()


def test_without_building_the_nearest_cache_and_the_fact_that_differs_are_named(
    finished: tuple[Request, Outcome], place: Path, tmp_path: Path, request_for: Callable[..., Request]
) -> None:
    request = request_for("unipt", may_build=False, capture=CaptureOptions(dtype="float32"))
    with pytest.raises(SidebenchError) as refused:
        _compare(request, place)
    assert finished[1].store is not None
    assert Path(finished[1].store["path"]).name in str(refused.value)
    assert "dtype: wanted float32, found float16" in str(refused.value)
    with pytest.raises(SidebenchError, match="holds no complete cache"):
        compare(request, home=place, cache_dir=tmp_path, runs_dir=tmp_path / "runs")


def test_layers_that_leave_out_what_a_method_reads_are_refused(
    place: Path, request_for: Callable[..., Request]
) -> None:
    request = request_for("unipt", capture=CaptureOptions(layers=("blocks.*",)))
    with pytest.raises(
        SidebenchError, match=r"--layers keeps blocks\.0, blocks\.1, but the methods also read embeddings"
    ):
        _compare(request, place)


def test_a_live_comparison_builds_no_cache(
    place: Path, tmp_path: Path, started: list[Job], request_for: Callable[..., Request]
) -> None:
    request = request_for("bitfit", epochs=1)
    outcome = compare(request, home=place, cache_dir=tmp_path / "caches", runs_dir=tmp_path / "runs")
    assert outcome.store is None
    assert not (tmp_path / "caches").exists()


LEAN = """
        loaded = {name.partition(".")[0] for name in sys.modules}
        assert not loaded & {"transformers", "peft", "PIL", "zarr", "tokenizers", "scipy"}, sorted(loaded)
        tasks = {name for name in sys.modules if name.startswith("sidebench.bench.tasks.")}
        assert tasks <= {"sidebench.bench.tasks.base", "sidebench.bench.tasks.score"}, tasks
"""


@pytest.fixture(scope="module")
def bench(place: Path, models: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the real command; its caches and runs are those of this module."""

    def start(*methods: str, **options: str) -> subprocess.Popen[str]:
        command = [*COMMAND, "compare", "--json"]
        command += ["--backbone", f"hf:{models / 'bert'}", "--task", f"jsonl:{place / 'reviews.jsonl'}"]
        command += ["--methods", ",".join(methods), "--seeds", "0", "--epochs", "2", "--device", "cpu"]
        command += [f"--set=linear_probe.{key}={value}" for key, value in QUICK["linear_probe"].items()]
        command += ["--cache-dir", str(place / "caches"), "--runs-dir", str(place / "runs")]
        environment = {**os.environ, "SIDEBENCH_HOME": str(place)}
        return subprocess.Popen(
            command, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )

    return start


def test_a_failing_run_keeps_its_row_and_the_others_finish(
    finished: tuple[Request, Outcome], place: Path, bench: Callable[..., subprocess.Popen[str]]
) -> None:
    forwards = {
        "raises": 'raise RuntimeError("the second | dimension\\nis wrong")',
        "killed": "os.kill(os.getpid(), signal.SIGKILL)",
        "lean": LEAN,
    }
    for name, forward in forwards.items():
        (place / f"{name}.py").write_text(METHOD_FILE.replace("{forward}", forward))
    files = [str(place / f"{name}.py") for name in forwards]
    process = bench(files[0], files[1], files[2], "linear_probe")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    found = json.loads(out)  # one document and nothing else
    raises, killed, lean, probe = found["table"]
    assert [row["method"] for row in found["table"]] == [*files, "linear_probe"]
    assert raises["score"] is None
    assert raises["error"].startswith("is wrong; see ") or "dimension" in raises["error"]
    assert "the second | dimension" in Path(raises["error"].partition("see ")[2]).read_text()
    assert killed["score"] is None
    assert killed["error"].startswith("killed by SIGKILL (often for want of memory); see ")
    assert lean["error"] is None  # a cached run holds neither transformers nor the data
    assert lean["score"] is not None
    assert probe["score"] is not None
    assert "failed" in err
    report = Path(found["report"]).read_text()
    assert report.count("| failed |") == 2
    assert "killed by SIGKILL" in report


def test_an_interrupted_comparison_exits_130_says_how_to_go_on_and_resumes(
    finished: tuple[Request, Outcome],
    place: Path,
    bench: Callable[..., subprocess.Popen[str]],
    started: list[Job],
    request_for: Callable[..., Request],
) -> None:
    waiting, slow = place / "waiting", place / "slow.py"
    wait = f"Path({str(waiting)!r}).exists() or (Path({str(waiting)!r}).write_text(str(os.getpid())), time.sleep(600))"
    slow.write_text(METHOD_FILE.replace("{forward}", wait))
    waiting.unlink(missing_ok=True)
    process = bench("linear_probe", str(slow), "unipt")
    deadline = time.monotonic() + 300
    while not (waiting.exists() and waiting.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert "interrupted; everything finished is kept. To go on: bench compare --json --backbone" in err
    with pytest.raises(ProcessLookupError):
        os.kill(int(waiting.read_text()), 0)  # the worker did not outlive the command
    heard = Heard()
    outcome = _compare(request_for("linear_probe", str(slow), "unipt"), place, heard)
    assert heard.of("reused") == [("linear_probe", 0), ("unipt", 0)]
    assert _names(started) == [(str(slow), 0)]
    assert outcome.records[str(slow)][0].error is None
    assert not list(outcome.folder.glob("*.job.json"))
