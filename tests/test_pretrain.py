"""Pre-training end to end on a tiny backbone: what a file holds, how two arms differ, what is refused, what resumes."""

import dataclasses
import gc
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from outcomes import COMMAND, METHOD_FILE, write_texts
from typer.testing import CliRunner

from sidebench.adapters._base import trained
from sidebench.adapters._pretrained import read_pretrained
from sidebench.adapters._registry import find_method
from sidebench.bench import compare as comparing
from sidebench.bench import launch as launching
from sidebench.bench import pretrain as pretraining
from sidebench.bench import training, worker
from sidebench.bench.assemble import Initial, Shared, assemble
from sidebench.bench.compare import compare
from sidebench.bench.contrastive import Contrastive, nt_xent
from sidebench.bench.launch import Listener
from sidebench.bench.outcome import Outcome, Request
from sidebench.bench.prepare import Inputs
from sidebench.bench.pretrain import pretrain, sentence
from sidebench.bench.pretrain_request import PretrainRequest
from sidebench.bench.record import Job
from sidebench.bench.report import markdown
from sidebench.bench.table import comparisons, rows
from sidebench.bench.tasks.contents import example_hashes
from sidebench.bench.tasks.load import load_task
from sidebench.bench.training import Diverged
from sidebench.cache.backbone import Backbone
from sidebench.cache.build import CaptureOptions
from sidebench.cache.errors import SidebenchError
from sidebench.cli import app

LST = {"lst": {"reduction": "4"}}
METHODS = {
    "vpt": {},
    "vpt-shallow": {"vpt": {"deep": "false"}},
    "lora": {},
    "houlsby": {},
    "adaptformer": {},
    "unipt": {},
    "lst": LST,
    "lora@last1": {},
}


def write_source(path: Path, *, seed: int = 1, without: Sequence[str] = (), count: int = 60) -> str:
    """Like outcomes.write_texts, of other sentences: none of `without`, and none twice."""
    texts = toys.make_texts(4 * count, seed=seed)
    seen = set(without)
    kept = []
    for text, target in zip(texts.raw, texts.targets, strict=True):
        if text not in seen and len(kept) < count:
            seen.add(text)
            kept.append({"text": text, "label": "yes" if target else "no", "id": f"source-{len(kept)}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    return f"jsonl:{path}"


@dataclasses.dataclass(frozen=True)
class Place:
    """A source, a target that shares no text with it, a backbone, and where the rest goes."""

    folder: Path
    source: str
    target: str
    backbone: str

    def request(self, method: str, out: str, **changes: Any) -> PretrainRequest:
        inputs = Inputs(self.backbone, changes.pop("task", self.source), device="cpu", limit=changes.pop("limit", None))
        usual = {"inputs": inputs, "method": method, "settings": {}, "out": self.folder / out, "epochs": 2, "lr": 0.01}
        return PretrainRequest(**(usual | changes))

    def pretrain(self, request: PretrainRequest, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        return pretrain(request, home=self.folder, cache_dir=self.folder / "caches", say=say)

    def compare(self, *methods: str, **changes: Any) -> Outcome:
        inputs = Inputs(self.backbone, changes.pop("task", self.target), device="cpu")
        heard: list[str] = changes.pop("heard", [])
        usual = {"inputs": inputs, "methods": methods, "settings": {}, "epochs": 1, "seeds": (0,)}
        return compare(
            Request(**(usual | changes)),
            home=self.folder,
            cache_dir=self.folder / "caches",
            runs_dir=self.folder / "runs",
            listener=Listener(say=heard.append),
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Place:
    folder = tmp_path_factory.mktemp("pretraining")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIDEBENCH_HOME", str(folder))
        target = write_texts(folder / "target.jsonl", 40)
        source = write_source(folder / "source.jsonl", without=toys.make_texts(40).raw)
    return Place(folder, source, target, f"hf:{models / 'bert'}")


@pytest.fixture(autouse=True)
def _here(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs happen in this process, with its home."""
    monkeypatch.setenv("SIDEBENCH_HOME", str(place.folder))

    def spawn(jobs: Sequence[Job], folder: Path, listener: Listener) -> list[str | None]:
        errors: list[str | None] = []
        for job in jobs:
            try:
                worker.run(job, folder, Shared())
                errors.append(None)
            except SidebenchError as error:
                errors.append(str(error))
        return errors

    monkeypatch.setattr(launching, "spawn", spawn)


@pytest.fixture(scope="module")
def made(place: Place) -> Callable[[str], tuple[PretrainRequest, dict[str, Any]]]:
    """The modules of a method, pre-trained once for all tests."""
    found: dict[str, tuple[PretrainRequest, dict[str, Any]]] = {}

    def make(name: str) -> tuple[PretrainRequest, dict[str, Any]]:
        if name not in found:
            method = name.partition("-")[0]
            request = place.request(method, f"{name}.safetensors", settings=METHODS[name])
            found[name] = (request, place.pretrain(request))
        return found[name]

    return make


def jobs_of(place: Place, monkeypatch: pytest.MonkeyPatch, *methods: str, **changes: Any) -> list[Job]:
    """What a comparison would run."""
    jobs: list[Job] = []

    def note(_: Request, job: Job, *__: Any) -> list[Any]:
        jobs.append(job)
        return []

    monkeypatch.setattr(comparing, "_run", note)
    place.compare(*methods, **changes)
    return jobs


def begun(job: Job) -> Any:
    """The learner as a worker begins with it."""
    method = find_method(job.method).configured(job.settings, job.family)
    initial = Initial(job, method, np.arange(4), torch.device("cpu"), lambda *_, **__: None)
    return assemble(job, method, torch.device("cpu"), initial, Shared())


# What a file holds, and how the arms differ


@pytest.mark.parametrize("name", METHODS)
def test_both_arms_differ_in_the_modules_alone(
    name: str,
    place: Place,
    made: Callable[[str], tuple[PretrainRequest, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request, document = made(name)
    file = read_pretrained(request.out)
    methods = request.method, f"{request.method}@{request.out}"
    plain, pretrained = jobs_of(place, monkeypatch, *methods, settings=request.settings)
    assert pretrained.init is not None
    assert pretrained.init["sha256"] == file.sha256 == document["sha256"]
    assert dataclasses.replace(pretrained, init=None, method=plain.method) == plain  # data, order, rate, all of it
    ours, theirs = begun(plain).learner, begun(pretrained).learner
    tensors = file.tensors()
    assert set(tensors) == set(trained(ours.body))
    assert not any("head" in tensor for tensor in tensors)
    for (tensor, random), loaded in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        inner = tensor.removeprefix("body.")
        assert torch.equal(loaded, tensors.get(inner, random)), tensor
    assert any(not torch.equal(tensors[key], p) for key, p in trained(ours.body).items())  # it was trained
    count = sum(p.numel() for p in trained(ours.body).values())
    head = sum(p.numel() for p in ours.head.parameters())
    assert (document["module_params"], document["trainable_params"]) == (count, count + head)


def test_a_comparison_of_both_arms_says_what_the_modules_are(
    place: Place, made: Callable[[str], tuple[PretrainRequest, dict[str, Any]]]
) -> None:
    paths = [made(name)[0].out for name in ("vpt", "unipt")]
    methods = ("vpt", f"vpt@{paths[0]}", "unipt", f"unipt@{paths[1]}")
    outcome = place.compare(*methods)
    table = rows(outcome)
    assert [row["method"] for row in table] == list(methods)
    assert [row["error"] for row in table] == [None] * 4
    assert table[0]["trainable_params"] == table[1]["trainable_params"]
    assert table[0]["predicted_peak_bytes"] == table[1]["predicted_peak_bytes"] == table[1]["peak_tracked_bytes"]
    report = markdown(outcome, table, comparisons(outcome))
    assert f"its modules start as pre-trained on {place.source} (48 examples, supervised, 4 steps" in report.replace(
        "\\", ""
    )
    losses = [outcome.records[method][0].measured["losses"] for method in methods]  # type: ignore[index]
    assert losses[0] != losses[1]
    again = place.compare(*methods)
    assert [r.measured for rs in again.records.values() for r in rs] == [
        r.measured for rs in outcome.records.values() for r in rs
    ]


def test_runs_of_a_file_that_was_changed_are_not_reused(
    place: Place, made: Callable[[str], tuple[PretrainRequest, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place.folder / "moving.safetensors"
    path.write_bytes(made("vpt")[0].out.read_bytes())
    (before,) = jobs_of(place, monkeypatch, f"vpt@{path}")
    path.unlink()
    place.pretrain(place.request("vpt", path.name, seed=3))
    (after,) = jobs_of(place, monkeypatch, f"vpt@{path}")
    assert before.digest != after.digest
    with pytest.raises(SidebenchError, match="was changed since the comparison began"):
        begun(before)


def test_a_mapping_asked_for_is_in_the_job_and_in_the_record(
    place: Place, made: Callable[[str], tuple[PretrainRequest, dict[str, Any]]]
) -> None:
    text = f"vpt@{made('vpt')[0].out}"
    settings = {"vpt": {"prompts": "4"}}
    with pytest.raises(SidebenchError, match=r"vpt\.prompts is 10 in the file and 4 here; type --set vpt\.prompts=10"):
        place.compare(text, settings=settings)
    outcome = place.compare(text, settings=settings, map_init=("prompts",))
    (record,) = outcome.records[text]
    assert record.asked["init"]["mappings"] == ["prompts"]
    assert record.measured is not None
    assert record.measured["mapped"] == ["prompts: the first 4 of 10"]
    assert "prompts: the first 4 of 10" in markdown(outcome, rows(outcome), [])


# Leakage


def test_a_source_that_holds_examples_of_the_target_is_refused_with_the_count(place: Place) -> None:
    target = load_task(place.target, home=place.folder, say=lambda _: None)
    texts = list(target.examples.load(i) for i in range(40))
    mixed = write_source(place.folder / "mixed.jsonl", seed=2, without=texts)
    shared = [i for i in range(40) if texts.count(texts[i]) == 1][:12]
    lines = [{"text": texts[i], "label": "no", "id": f"shared-{i}"} for i in shared]
    path = Path(mixed.removeprefix("jsonl:"))
    path.write_text(path.read_text("utf-8") + "".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    request = place.request("vpt", "mixed.safetensors", task=mixed, epochs=1)
    place.pretrain(request)
    source = load_task(mixed, home=place.folder, say=lambda _: None)
    from sidebench.bench.tasks.split import split

    used = split(source, 0)
    seen = {source.examples.load(i) for i in (*used.train, *used.val)}
    parts = split(target, 0)
    counts = {part: sum(texts[i] in seen for i in getattr(parts, part)) for part in ("train", "val", "test")}
    assert sum(counts.values()) > 0
    said = ", ".join(f"{count} {part}" for part, count in counts.items())
    with pytest.raises(SidebenchError) as caught:
        place.compare(f"vpt@{request.out}")
    assert f"holds examples of {place.target} ({said})" in str(caught.value)
    outcome = place.compare(f"vpt@{request.out}", allow_overlap=True)
    (record,) = outcome.records[f"vpt@{request.out}"]
    assert record.asked["init"]["overlap"] == counts
    assert "--allow-overlap: these examples of this task were in that source" in markdown(outcome, rows(outcome), [])


def test_an_example_is_known_by_its_content_whatever_its_name_and_label(tmp_path: Path) -> None:
    for name, label in (("a", "x"), ("b", "y")):
        for number, side in ((0, 4), (1, 6)):
            path = tmp_path / name / label / f"{name}{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            toys.make_images(1, side=side).raw[0].save(path)
        (tmp_path / name / "other").mkdir()
        toys.make_images(1, seed=ord(name), side=5).raw[0].save(tmp_path / name / "other" / "o.png")
    hashes = [
        {
            bytes(row)
            for row in example_hashes(
                load_task(f"folder:{tmp_path / name}", home=tmp_path, say=lambda _: None).examples, 16
            )
        }
        for name in "ab"
    ]
    assert [len(found) for found in hashes] == [3, 3]
    assert len(hashes[0] & hashes[1]) == 2


def test_options_of_pretrained_modules_without_any_are_refused(place: Place) -> None:
    with pytest.raises(SidebenchError, match="no method has one"):
        place.compare("bitfit", map_init=("prompts",))


# Training


def test_the_epoch_best_on_validation_is_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.1, 0.9, 0.5])
    states = []

    def score(_: Any, learner: Any, *__: Any) -> float:
        states.append({name: p.detach().clone() for name, p in trained(learner.body).items()})
        return next(scores)

    monkeypatch.setattr(training.Supervised, "score", score)
    document = place.pretrain(place.request("vpt", "best.safetensors", epochs=3))
    tensors = read_pretrained(place.folder / "best.safetensors").tensors()
    assert (document["best_epoch"], document["val_score"]) == (2, 0.9)
    assert torch.equal(tensors["prompts"], states[1]["prompts"])
    assert not torch.equal(tensors["prompts"], states[2]["prompts"])


@pytest.mark.parametrize("method", ["unipt", "lst"])
def test_a_side_method_trains_with_no_backbone_in_memory(
    method: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def look(*args: Any, **options: Any) -> Any:
        gc.collect()
        held = [thing for thing in gc.get_objects() if type(thing) is Backbone]
        seen.append(len(held) - before)
        return training.train(*args, **options)

    monkeypatch.setattr(pretraining, "train", look)
    gc.collect()
    before = len([thing for thing in gc.get_objects() if type(thing) is Backbone])
    place.pretrain(place.request(method, f"bare-{method}.safetensors", settings=LST if method == "lst" else {}))
    assert seen == [0]


def test_steps_are_whole_epochs(place: Place) -> None:
    document = place.pretrain(place.request("bitfit", "steps.safetensors", steps=7, epochs=50, batch_size=16))
    assert (document["epochs"], document["steps"]) == (2, 6)  # 48 examples, 3 steps each


def test_a_loss_that_is_not_finite_leaves_no_file(place: Place) -> None:
    request = place.request("unipt", "wild.safetensors", lr=1e30)
    with pytest.raises(Diverged):
        place.pretrain(request)
    assert not request.out.exists()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"method": "linear_probe"}, "linear_probe is solved"),
        ({"method": "unpit"}, "Did you mean 'unipt'"),
        ({"method": "vpt,lora"}, "no method 'vpt,lora'"),
        ({"method": "all"}, "--method names one method"),
        ({"out": Path("x.bin")}, "ends in .safetensors"),
        ({"out": Path("/proc/none/x.safetensors")}, "Choose another --out"),
        ({"objective": "masked"}, "no objective 'masked'"),
        ({"objective": "contrastive"}, "type --views 2"),
        ({"settings": {"vpt": {"prompt": "3"}}}, "Did you mean 'prompts'"),
        ({"settings": {"lora": {"rank": "3"}}}, "no method in --set 'lora'"),
        (
            {
                "method": "lst",
                "settings": {"lst": {"reduction": "4", "init": "fisher"}},
                "objective": "contrastive",
                "capture": CaptureOptions(views=2),
            },
            "lst.init=fisher reads them",
        ),
        ({"lr": 0.0}, "--lr wants a positive number"),
        ({"settings": {"vpt": {"prompts": "0"}}}, "0 prompts are none"),
        ({"inputs": Inputs("imported:x", "jsonl:none.jsonl")}, "none.jsonl"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_runs(changes: dict[str, Any], part: str, place: Place) -> None:
    request = dataclasses.replace(place.request("vpt", "wrong.safetensors"), **changes)
    with pytest.raises(SidebenchError) as caught:
        place.pretrain(request)
    assert part in str(caught.value)
    assert not request.out.exists()


# Zero-shot control


def test_the_source_head_is_tried_on_the_test_part_of_another_task(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    original = training.load_trained

    def keep(learner: Any, state: Any) -> None:
        kept.append(learner)
        original(learner, state)

    monkeypatch.setattr(pretraining, "load_trained", keep)
    for method in ("vpt", "unipt"):
        request = place.request(method, f"control-{method}.safetensors", zero_shot=place.target, epochs=4)
        document = place.pretrain(request)
        without = place.pretrain(
            dataclasses.replace(request, out=place.folder / f"without-{method}.safetensors", zero_shot=None)
        )
        assert document["sha256"] == without["sha256"]  # it changed nothing
        assert without["zero_shot"] is None
        control = document["zero_shot"]
        assert (control["task"], control["name"], control["examples"], control["seen"]) == (
            place.target,
            "accuracy",
            4,
            0,
        )
        assert control["score"] * 4 == pytest.approx(round(control["score"] * 4))
        assert "control: the source head as it is, zero-shot" in sentence(document)
        assert place.pretrain(request)["zero_shot"] is None
        assert place.pretrain(request)["unavailable"]["zero_shot"].startswith("the head is gone")


def test_the_control_scores_what_the_task_itself_would_score(place: Place) -> None:
    """On the source as the other task: its own test part, as a comparison measures it."""
    request = place.request("unipt", "own.safetensors", zero_shot=place.source, seed=0, epochs=2)
    document = place.pretrain(request)
    outcome = place.compare("unipt", task=place.source, epochs=2, lr="0.01")
    (record,) = outcome.records["unipt"]
    assert record.measured is not None
    assert record.measured["losses"] == read_pretrained(request.out).facts.result["losses"]
    assert document["zero_shot"]["score"] == record.measured["score"]
    assert document["zero_shot"]["seen"] == 0


def test_other_classes_are_refused_before_training(place: Place) -> None:
    rows = [{"text": f"good film {i}", "label": "abc"[i % 3], "id": str(i)} for i in range(30)]
    path = place.folder / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    request = place.request("vpt", "classes.safetensors", zero_shot=f"jsonl:{path}")
    with pytest.raises(SidebenchError, match=r"wants the classes and the score of .* only one of them has 'a'"):
        place.pretrain(request)
    contrastive = dataclasses.replace(
        request, objective="contrastive", capture=CaptureOptions(views=2), zero_shot=place.target
    )
    with pytest.raises(SidebenchError, match="--objective contrastive has none"):
        place.pretrain(contrastive)


# Contrastive


def test_the_loss_is_that_of_a_naive_reference() -> None:
    rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors = [[float(x) for x in row] for row in rows]

    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5

    total = 0.0
    for i in range(8):
        partner = i + 4 if i < 4 else i - 4
        exps = [np.exp(cosine(vectors[i], vectors[j]) / 0.1) for j in range(8) if j != i]
        total -= np.log(np.exp(cosine(vectors[i], vectors[partner]) / 0.1) / sum(exps))
    assert float(nt_xent(rows, 0.1)) == pytest.approx(total / 8, abs=1e-9)


@pytest.mark.parametrize("views", [2, 3, 5])
def test_two_different_views_of_each_example_are_drawn_anew(views: int) -> None:
    index = np.array([7, 2, 9])
    drawn = []
    for epoch in range(40):
        items = Contrastive().items(index, examples=10, views=views, seed=0, epoch=epoch)
        assert np.array_equal(items % 10, np.concatenate([index, index]))
        first, second = (items // 10)[:3], (items // 10)[3:]
        assert ((first != second) & (first >= 1) & (second >= 1) & (first <= views) & (second <= views)).all()
        assert np.array_equal(items, Contrastive().items(index, examples=10, views=views, seed=0, epoch=epoch))
        drawn.append(tuple(items))
    assert {view // 10 for items in drawn for view in items} == set(range(1, views + 1))
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("method", ["vpt", "unipt"])
def test_contrastive_pre_training_looks_at_no_label(method: str, place: Place) -> None:
    turned = place.folder / "turned.jsonl"
    rows = [json.loads(line) for line in Path(place.source.removeprefix("jsonl:")).read_text("utf-8").splitlines()]
    turned.write_text(
        "".join(json.dumps({**row, "label": {"yes": "no", "no": "yes"}[row["label"]]}) + "\n" for row in rows), "utf-8"
    )
    found = []
    for number, task in enumerate((place.source, f"jsonl:{turned}")):
        request = place.request(
            method,
            f"contrastive-{method}-{number}.safetensors",
            task=task,
            objective="contrastive",
            capture=CaptureOptions(dtype="float32", views=2),
        )
        document = place.pretrain(request)
        found.append(read_pretrained(request.out))
        assert document["val_score"] < 0
        assert document["head_params"] == (32 + 1) * 128
    assert found[0].facts.training["objective"] == "contrastive"
    first, second = (file.tensors() for file in found)
    assert all(torch.equal(first[name], second[name]) for name in first)


# Stopped and resumed


@pytest.mark.parametrize("method", ["vpt", pytest.param("unipt", marks=pytest.mark.long)])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(method: str, place: Place) -> None:
    def command(out: Path) -> list[str]:
        words = ["pretrain", "--backbone", place.backbone, "--task", place.source, "--method", method, "--json"]
        return [*COMMAND, *words, "--epochs", "30", "--device", "cpu", "--out", str(out)]

    environment = {**os.environ, "SIDEBENCH_HOME": str(place.folder), "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"env": environment, "cwd": place.folder, "stdout": subprocess.PIPE, "text": True}
    killed, whole = (place.folder / f"{name}-{method}.safetensors" for name in ("killed", "whole"))
    resume = killed.with_name(f"{killed.name}.resume")
    process = subprocess.Popen(command(killed), **options, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 120
        while not resume.exists() and time.monotonic() < limit:
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert resume.exists()
    assert not killed.exists()
    done = subprocess.run(command(killed), **options, stderr=subprocess.PIPE, check=True)
    assert json.loads(done.stdout)["status"] == "resumed"
    assert "goes on behind epoch" in done.stderr
    assert "epoch 1/30" not in done.stderr
    inputs = Inputs(place.backbone, place.source, device="cpu")
    document = place.pretrain(PretrainRequest(inputs, method, {}, whole, epochs=30))
    assert document["status"] == "trained"
    assert killed.read_bytes() == whole.read_bytes()
    assert not resume.exists()
    assert not list(place.folder.glob("*.partial"))


class Stopped(Exception):
    """Stands for a crash."""


@pytest.fixture
def stopped(place: Place, monkeypatch: pytest.MonkeyPatch) -> PretrainRequest:
    """A request whose training stopped after the second epoch of four."""
    request = place.request("vpt", "stopped.safetensors", epochs=4)
    request.out.unlink(missing_ok=True)

    def say(text: str) -> None:
        if text.startswith("epoch 3/"):
            raise Stopped

    with pytest.raises(Stopped):
        place.pretrain(dataclasses.replace(request, fresh=True), say)
    return request


def test_a_training_that_stopped_goes_on_behind_its_last_whole_epoch(place: Place, stopped: PretrainRequest) -> None:
    said: list[str] = []
    document = place.pretrain(stopped, said.append)
    assert document["status"] == "resumed"
    assert [line[:9] for line in said if line.startswith("epoch")] == ["epoch 3/4", "epoch 4/4"]
    other = place.pretrain(dataclasses.replace(stopped, out=place.folder / "unstopped.safetensors"))
    assert document["sha256"] == other["sha256"]


DRAWING = "return nn.functional.dropout(self.map(batch.state(self.layer)), 0.5, self.training)"


def test_a_method_that_draws_while_it_trains_goes_on_drawing_as_if_it_had_not_been_stopped(place: Place) -> None:
    (place.folder / "drawing.py").write_text(METHOD_FILE.replace("{forward}", DRAWING))
    request = place.request(str(place.folder / "drawing.py"), "drawn.safetensors", epochs=3)

    def say(text: str) -> None:
        if text.startswith("epoch 2/"):
            raise Stopped

    with pytest.raises(Stopped):
        place.pretrain(request, say)
    resumed = place.pretrain(request)
    whole = place.pretrain(dataclasses.replace(request, out=place.folder / "drawn-whole.safetensors"))
    assert (resumed["status"], resumed["sha256"]) == ("resumed", whole["sha256"])


@pytest.mark.parametrize("changes", [{"lr": 0.02}, {"epochs": 5}, {"seed": 1}, {"batch_size": 8}], ids=str)
def test_the_state_of_another_training_is_never_mixed_in(
    changes: dict[str, Any], place: Place, stopped: PretrainRequest
) -> None:
    with pytest.raises(SidebenchError, match="unfinished state of another training"):
        place.pretrain(dataclasses.replace(stopped, **changes))
    anew = dataclasses.replace(stopped, **changes, fresh=True)
    document = place.pretrain(anew)
    other = place.pretrain(dataclasses.replace(anew, out=place.folder / "elsewhere.safetensors"))
    assert document["status"] == "trained"
    assert document["sha256"] == other["sha256"]


def test_a_new_training_over_a_finished_file_goes_on_after_it_was_stopped(
    place: Place, stopped: PretrainRequest
) -> None:
    """`--fresh`, stopped, and then the same command without it: the old file is what --fresh was to replace."""
    stopped.out.write_bytes(b"an older file")
    assert place.pretrain(stopped)["status"] == "resumed"
    assert read_pretrained(stopped.out).facts.training["epochs"] == 4


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_state_is_said_and_the_training_begins_anew(
    damage: bytes | None, place: Place, stopped: PretrainRequest
) -> None:
    path = stopped.out.with_name(f"{stopped.out.name}.resume")
    path.write_bytes(path.read_bytes()[:2000] if damage is None else damage)
    said: list[str] = []
    assert place.pretrain(stopped, said.append)["status"] == "trained"
    assert any("cannot be read" in line and "anew" in line for line in said)


def test_a_state_that_would_run_code_is_not_run(place: Place, stopped: PretrainRequest) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(place.folder / "pwned"),)

    torch.save({"about": Evil(), "state": {}}, stopped.out.with_name(f"{stopped.out.name}.resume"))
    assert place.pretrain(stopped)["status"] == "trained"
    assert not (place.folder / "pwned").exists()


def test_a_finished_file_is_found_and_one_of_other_facts_is_kept(
    place: Place, made: Callable[[str], tuple[PretrainRequest, dict[str, Any]]]
) -> None:
    request, document = made("vpt")
    content = request.out.read_bytes()
    again = place.pretrain(request)
    assert (again["status"], again["sha256"]) == ("exists", document["sha256"])
    assert set(again) == set(document)
    with pytest.raises(SidebenchError, match=r"was made otherwise \(training is .*; choose another --out"):
        place.pretrain(dataclasses.replace(request, lr=0.5))
    assert request.out.read_bytes() == content
    foreign = place.folder / "foreign.safetensors"
    foreign.write_bytes(b"junk")
    with pytest.raises(SidebenchError, match="cannot be read as safetensors"):
        place.pretrain(dataclasses.replace(request, out=foreign))
    assert place.pretrain(dataclasses.replace(request, out=foreign, fresh=True))["sha256"] == document["sha256"]


# The command


@pytest.fixture
def bench(place: Place) -> Callable[..., Any]:
    def run(*words: str) -> Any:
        given = ["pretrain", "--backbone", place.backbone, "--task", place.source, "--device", "cpu", *words]
        return CliRunner().invoke(app, given)

    return run


def test_the_command_prints_one_document_or_sentences(bench: Callable[..., Any], place: Place) -> None:
    words = ["--method", "bitfit", "--epochs", "1", "--out", str(place.folder / "typed.safetensors")]
    told = bench(*words, "--zero-shot", place.target)
    assert told.exit_code == 0, told.output
    first, control, use = told.stdout.splitlines()
    assert first.startswith("bitfit: modules trained on jsonl:")
    assert control.startswith("control: the source head as it is, zero-shot on jsonl:")
    assert use.endswith(f"--methods bitfit,bitfit@{place.folder / 'typed.safetensors'} …")
    assert "epoch 1/1, loss " in told.stderr
    document = json.loads(bench(*words, "--json", "--quiet").stdout)
    assert document["status"] == "exists"
    assert {"path", "method", "trainable_params", "source", "val_score", "steps", "seconds", "zero_shot"} <= set(
        document
    )


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--method", "unipt", "--lr", "1e30"], 1, "try a smaller --lr"),
        (["--method", "linear_probe"], 2, "it has no modules to pre-train"),
        (["--method", "unipt", "--precision", "fp8"], 2, "--precision is fp32 or bf16"),
    ],
)
def test_what_fails_and_what_is_refused_is_one_sentence(
    words: list[str], code: int, part: str, bench: Callable[..., Any], place: Place
) -> None:
    result = bench(*words, "--epochs", "1", "--out", str(place.folder / "failing.safetensors"))
    assert (result.exit_code, result.stdout) == (code, "")
    assert part in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
