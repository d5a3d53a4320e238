"""`bench plan`: every method's predicted memory, what fits, and the cache; from an architecture or from weights."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from method_cases import known_methods
from outcomes import COMMAND, write_texts
from toys import build_store, make_images, make_texts
from typer.testing import CliRunner

from sidebench.adapters._base import FittedMethod
from sidebench.adapters._registry import find_method
from sidebench.bench import plan as planning
from sidebench.bench import plan_cache
from sidebench.bench.plan import PlanRequest, largest_batch, needed_bytes, parse_bytes, plan
from sidebench.bench.plan_report import cells, columns, sentences, title
from sidebench.bench.predict import Prediction, predict
from sidebench.bench.step import Step
from sidebench.cache.backbone import Backbone
from sidebench.cache.configs import without_weights
from sidebench.cache.errors import SidebenchError
from sidebench.cache.planning import CaptureOptions
from sidebench.cli import app

Plan = Callable[..., dict[str, Any]]
TRAINED = tuple(name for name in known_methods() if not issubclass(find_method(name).cls, FittedMethod))


@pytest.fixture
def planned(models: Path, tmp_path: Path) -> Plan:
    """A plan for a tiny architecture; the methods `lora` and `unipt` unless told otherwise."""

    def run(family: str = "vit", **options: Any) -> dict[str, Any]:
        chosen = {"backbone": f"hf-config:{models / family}", "methods": ("lora", "unipt"), "batch_size": 4, **options}
        return plan(PlanRequest(**chosen), home=tmp_path, cache_dir=tmp_path / "caches", say=lambda _: None)

    return run


def test_every_method_has_a_row_or_a_reason_and_every_figure_its_kind(planned: Plan) -> None:
    document = planned(methods=("all",), num_outputs=7)
    named = [row["method"] for row in document["methods"]] + [row["method"] for row in document["skipped"]]
    assert sorted(named) == sorted(known_methods())
    assert document["kind"] == "predicted"
    assert document["semantics"] == "cuda, attention: efficient"
    for row in document["methods"]:
        assert row["predicted_peak_bytes"] <= row["predicted_allocated_bytes"] <= row["predicted_reserved_bytes"]
        assert max(row["by_phase"].values()) == row["predicted_peak_bytes"]
        assert row["trainable_params"] >= row["head_params"] > 0
        assert row["fits"] is None
        if row["by_category"] is None:
            assert row["unavailable"]["by_category"]
        else:
            assert sum(row["by_category"].values()) == row["predicted_peak_bytes"]
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize("family", ["bert", "dinov2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_trained_method_is_predicted_on_every_family(planned: Plan, family: str, precision: str) -> None:
    document = planned(family, methods=TRAINED, precision=precision)
    assert [row["method"] for row in document["methods"] if row["predicted_peak_bytes"] is None] == []
    assert [row["method"] for row in document["skipped"]] == ["sherl_two_stacks"]  # made for an encoder and a decoder


def test_a_solver_states_the_examples_it_assumes(planned: Plan) -> None:
    (assumed,) = planned(methods=("linear_probe",))["methods"]
    assert assumed["training_examples"] == 1000
    assert "1,000 training examples" in assumed["assumes"]
    (given,) = planned(methods=("linear_probe",), num_examples=4000)["methods"]
    assert given["training_examples"] == 4000
    assert given["predicted_peak_bytes"] > assumed["predicted_peak_bytes"]


def test_settings_reach_the_method(planned: Plan) -> None:
    (small,), (large,) = (
        planned(methods=("lora",), settings={"lora": {"rank": rank}})["methods"] for rank in ("2", "16")
    )
    assert (
        large["trainable_params"] - small["trainable_params"] == 14 * 2 * 2 * 2 * 32
    )  # ranks x q,v x A,B x blocks x D


def test_what_a_method_does_once_before_training_is_said_with_what_it_takes(planned: Plan) -> None:
    plain = planned(methods=("lst", "full"))
    assert [row["initialisation_peak_bytes"] for row in plain["methods"]] == [None, None]
    assert "before training MiB" not in columns(plain)
    asked = {"methods": ("lst", "lora"), "settings": {"lst": {"init": "fisher"}}}
    document = planned(**asked)
    (lst, lora), (_, full) = document["methods"], plain["methods"]
    weights = full["by_category"]["parameters"]
    assert 2 * weights < (peak := lst["initialisation_peak_bytes"]) < 3 * weights
    assert lora["initialisation_peak_bytes"] is None
    shown = dict(zip(columns(document), cells(document, lst), strict=True))["before training MiB"]
    assert shown == f"{peak / 2**20:,.1f}"
    (line,) = (line for line in sentences(document) if "before training" in line)
    assert line.startswith("lst: before training it back-propagates through the whole backbone, one example at a time")
    assert line.endswith(f"{shown} MiB.")
    assert lst["predicted_peak_bytes"] == plain["methods"][0]["predicted_peak_bytes"]


def test_a_method_fits_only_where_what_it_does_before_training_fits_too(
    planned: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "largest_batch", lambda *_: None)  # which takes its time, and is of a training step
    step = {"semantics": "cpu", "batch_size": 1, "max_length": 8}
    asked = {"methods": ("lst",), "settings": {"lst": {"init": "fisher"}}, **step}
    (row,) = planned("bert", **asked)["methods"]
    small = max(row["predicted_peak_bytes"], row["initialisation_peak_bytes"]) - 1
    assert row["initialisation_peak_bytes"] > row["predicted_peak_bytes"]
    for memory, fits in ((small, False), (small + 1, True)):
        document = planned("bert", **asked, device_memory=str(memory))
        assert document["methods"][0]["fits"] is fits
        assert any("more than there is" in line for line in sentences(document)) is not fits


def test_cpu_semantics_have_no_allocator(planned: Plan) -> None:
    (row,) = planned(methods=("lora",), semantics="cpu")["methods"]
    assert row["predicted_allocated_bytes"] is row["predicted_reserved_bytes"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ("unpit",)}, "Did you mean 'unipt'"),
        ({"methods": ()}, "no methods given"),
        ({"settings": {"lora": {"rang": "2"}}}, "rank"),
        ({"settings": {"vpt": {"prompts": "2"}}}, "no method in --set"),
        ({"precision": "fp16"}, "precision"),
        ({"semantics": "gpu"}, "semantics"),
        ({"attention": "flesh"}, "flash"),
        ({"attention": "flash"}, "float32"),
        ({"attention": "math", "semantics": "cpu"}, "leave it out"),
        ({"device_memory": "24 gibs"}, "24GiB"),
        ({"backbone": "hf-config:vit-bass"}, "vit-base"),
        ({"backbone": "imported:mine"}, "no network"),
        ({"backbone": "vit-base"}, "scheme"),
        ({"capture": CaptureOptions(layers=("blocs.*",))}, "blocs"),
        ({"capture": CaptureOptions(dtype="int7")}, "int8"),
        ({"task": "csv:nowhere.csv"}, "nowhere.csv"),
        ({"task": "vqa2:v2?root=nowhere"}, "leave --task out and give --recipe .*unipt-clipvil-vqa2"),
        ({"task": "refcoco+:val?root=nowhere"}, "leave --task out and give --recipe .*unipt-mdetr-refcoco"),
        ({"task": "sample:digit-scenes"}, "pair:image=URI,text=URI"),
        ({"limit": 5}, "--num-examples"),
    ],
)
def test_what_is_refused_is_a_sentence(planned: Plan, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SidebenchError, match=said):
        planned(**options)


def test_a_method_that_refuses_the_backbone_is_skipped_with_its_reason(planned: Plan) -> None:
    document = planned(methods=("lst", "lora"), settings={"lst": {"reduction": "7"}})
    assert [row["method"] for row in document["methods"]] == ["lora"]
    assert document["skipped"][0]["method"] == "lst"
    assert "lst.reduction" in document["skipped"][0]["reason"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("1.5 TiB", 3 * 2**39),
        ("500mb", 5 * 10**8),
        ("123", 123),
        ("7B", 7),
    ],
)
def test_memory_is_read_in_every_spelling(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "1e9", "24 GiBs", "nan", "1,5GiB", "9" * 40])
def test_what_is_no_memory_is_refused(text: str) -> None:
    with pytest.raises(SidebenchError, match="24GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("memory", [3_000_000, 30_000_000])
def test_the_largest_batch_fits_and_where_it_is_exact_the_next_does_not(tiny_vit: Backbone, memory: int) -> None:
    method, backbone = find_method("bitfit").configured({}), without_weights(tiny_vit)
    step = Step(4, 2, semantics="cpu")  # requested bytes: no segments of 20 MiB
    found = largest_batch(method, backbone, step, predict(method, backbone, step), memory)  # type: ignore[arg-type]
    at, beyond = (
        needed_bytes(predict(method, backbone, Step(size, 2, semantics="cpu")))
        for size in (found["batch_size"], found["batch_size"] + 1)
    )
    assert found["confirmed"]
    assert found["exact"]
    assert at == found["predicted_bytes"] <= memory < beyond


def test_no_batch_fits_where_the_weights_alone_do_not(planned: Plan) -> None:
    (row,) = planned(methods=("full",), device_memory="1KB")["methods"]
    assert row["fits"] is False
    assert row["largest_batch"]["batch_size"] == 0
    (row,) = planned(methods=("full",), device_memory="64GiB")["methods"]
    assert row["fits"] is True


def test_a_batch_that_takes_too_long_to_predict_is_left_to_the_line(
    tiny_vit: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that works in slices: bytes 100 + 10 per example, 100 operations per example."""
    operations = []

    class Peak:
        def __init__(self, batch: int) -> None:
            self.peak_bytes = 100 + 10 * batch

    def sliced(method: Any, backbone: Any, step: Step) -> Prediction:
        operations.append(100 * step.batch_size)
        return Prediction(Peak(step.batch_size), None, 1, 1, operations[-1])  # type: ignore[arg-type]

    monkeypatch.setattr(planning, "predict", sliced)
    step = Step(8)
    first = sliced(None, None, step)
    found = largest_batch(None, tiny_vit, step, first, 10**6)  # type: ignore[arg-type]
    assert found == {"batch_size": 99_990, "predicted_bytes": None, "confirmed": False, "exact": False}
    assert 0.9 * planning._MOST_EVENTS < sum(operations[1:]) <= planning._MOST_EVENTS
    near = largest_batch(None, tiny_vit, step, first, 1100)  # type: ignore[arg-type]
    assert near == {"batch_size": 100, "predicted_bytes": 1100, "confirmed": True, "exact": True}


@pytest.mark.parametrize("tokens", ["all", "cls+mean"])
@pytest.mark.parametrize(("family", "dtype"), [("vit", "float16"), ("bert", "float32"), ("vit", "int8")])
def test_the_bytes_of_the_cache_are_those_of_the_built_store(
    models: Path, tmp_path: Path, request: pytest.FixtureRequest, family: str, dtype: str, tokens: str
) -> None:
    backbone = request.getfixturevalue(f"tiny_{family}")
    examples = make_images(70) if family == "vit" else make_texts(70)
    built = build_store(backbone, examples, tmp_path / "built", dtype=dtype, tokens=tokens)
    lengths = () if family == "vit" else tuple(len(ids) for ids in backbone.preprocess.prepare(list(examples.raw)))
    about = plan_cache.CacheFacts(
        CaptureOptions(dtype=dtype, tokens=tokens),
        (),
        without_weights(backbone),
        Step(8, form=built.manifest.form, max_length=max(lengths, default=0) or None),
        plan_cache.Data(2, 70, lengths=lengths),
    )
    facts = plan_cache.cache_facts(about, None, tmp_path, lambda _: None)
    assert facts["bytes"] == built.manifest.stored_bytes
    assert facts["layers"] == list(built.manifest.layers)
    if family == "vit":
        arrays = built.manifest.arrays().values()
        assert facts["bytes_per_example"] == sum(a.row_bytes * (a.shape[0] // 70) for a in arrays)


def test_an_example_takes_its_rows_and_nothing_that_is_there_once(tiny_bert: Backbone) -> None:
    """A text of 10 tokens of width 32 in 3 layers, each int8 with a float32 scale; no channel's centre and spread."""
    form = CaptureOptions(dtype="int8", per_channel=True).form()
    step = Step(8, form=form, max_length=10)
    about = plan_cache.CacheFacts(CaptureOptions(), (), without_weights(tiny_bert), step, plan_cache.Data(2))
    tokens, pooled, target, offset = 10 * (32 + 4), 2 * 32 * 4, 8, 8
    assert plan_cache.bytes_per_example(about) == 3 * (tokens + pooled) + target + offset


def test_what_is_not_known_of_the_cache_is_null_with_the_reason(planned: Plan) -> None:
    cache = planned()["cache"]
    assert cache["bytes_per_example"] > 0
    nulls = {name for name, value in cache.items() if value is None} - {"examples"}
    assert nulls == set(cache["unavailable"])
    assert planned(num_examples=500)["cache"]["bytes"] > 0
    assert "at most" in planned("bert", num_examples=500)["cache"]["unavailable"]["bytes"]


def test_the_layers_are_those_that_the_methods_read(planned: Plan) -> None:
    assert planned(methods=("unipt",))["cache"]["layers"] == ["embeddings", "blocks.0", "blocks.1"]
    assert planned(methods=("linear_probe",))["cache"]["layers"] == ["norm"]
    assert planned(methods=("lora",))["cache"]["layers"] == ["embeddings", "blocks.0", "blocks.1", "norm"]
    chosen = planned(capture=CaptureOptions(layers=("blocks.*",)))
    assert chosen["cache"]["layers"] == ["blocks.0", "blocks.1"]


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "_SAMPLE_BYTES", 200_000)


@pytest.mark.usefixtures("small_sample")
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_with_weights_this_machine_is_measured(planned: Plan, models: Path, tmp_path: Path, family: str) -> None:
    cache = planned(backbone=f"hf:{models / family}", num_examples=10)["cache"]
    for name in ("forward_seconds_per_example", "write_bytes_per_second", "read_bytes_per_second"):
        assert cache[name] > 0
    written = cache["bytes_per_example"] / cache["write_bytes_per_second"]
    assert cache["build_seconds"] == pytest.approx(10 * (cache["forward_seconds_per_example"] + written))
    assert cache["ragged"] == (family == "bert")
    assert (cache["break_even_passes"] is None) == ("break_even_passes" in cache["unavailable"])
    assert list((tmp_path / "caches").iterdir()) == []  # the trial store is gone


@pytest.mark.usefixtures("small_sample")
def test_every_view_is_computed_and_written_and_one_is_read(
    planned: Plan, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_cache, "store_speed", lambda about, folder: (1e9, 1e12))
    monkeypatch.setattr(plan_cache, "forward_seconds", lambda real, about: 2.0)
    plain, viewed = (
        planned(backbone=f"hf:{models / 'vit'}", num_examples=10, capture=CaptureOptions(views=views))["cache"]
        for views in (0, 3)
    )
    assert plain["build_seconds"] == pytest.approx(20, rel=1e-3)
    assert viewed["build_seconds"] == pytest.approx(80, rel=1e-3)
    assert viewed["break_even_passes"] == pytest.approx(4, rel=1e-3)


@pytest.mark.usefixtures("small_sample")
def test_a_cache_that_cannot_be_written_leaves_the_plan(planned: Plan, models: Path, tmp_path: Path) -> None:
    (tmp_path / "caches").write_text("a file")
    cache = planned(backbone=f"hf:{models / 'vit'}")["cache"]
    assert cache["forward_seconds_per_example"] > 0
    assert "could not be written" in cache["unavailable"]["break_even_passes"]


@pytest.mark.usefixtures("small_sample")
def test_reading_that_is_slower_than_computing_never_pays(
    planned: Plan, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_cache, "store_speed", lambda about, folder: (1.0, 1.0))
    cache = planned(backbone=f"hf:{models / 'vit'}")["cache"]
    assert cache["break_even_passes"] is None
    assert cache["unavailable"]["break_even_passes"].startswith("never: ")


def test_break_even_is_the_build_over_what_a_pass_saves() -> None:
    assert plan_cache.break_even(3.0, 2.0, 0.5) == 2.0


@pytest.mark.usefixtures("small_sample")
def test_a_task_says_how_many_classes_examples_and_tokens(planned: Plan, models: Path, tmp_path: Path) -> None:
    task = write_texts(tmp_path / "reviews.jsonl")
    document = planned(backbone=f"hf:{models / 'bert'}", methods=("lora", "linear_probe"), task=task)
    assert document["step"]["num_outputs"] == 2
    assert document["step"]["max_length"] < 40
    assert document["cache"]["bytes"] > 0
    assert document["methods"][1]["training_examples"] < document["cache"]["examples"]
    with pytest.raises(SidebenchError, match="of one kind"):
        planned(task=task)
    with pytest.raises(SidebenchError, match="--num-examples"):
        planned("bert", task=task, num_examples=5)


def test_the_table_names_its_units_and_kind(planned: Plan) -> None:
    document = planned(methods=("lora", "linear_probe"), device_memory="10MiB", num_examples=100)
    head = columns(document)
    assert "predicted, requested bytes, CUDA semantics" in title(document)
    for row in document["methods"]:
        assert len(cells(document, row)) == len(head)
    assert {"peak MiB", "allocated MiB", "fits", "largest batch"} <= set(head)
    said = sentences(document)
    assert any("No GPU" in line for line in said)
    assert any("bytes per example" in line for line in said)
    without = planned(semantics="cpu")
    assert "allocated MiB" not in columns(without)
    assert len(cells(without, without["methods"][0])) == len(columns(without))


def test_the_command_prints_one_document_or_a_table(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDEBENCH_HOME", str(tmp_path))
    words = ["plan", "--backbone", f"hf-config:{models / 'vit'}", "--methods", "bitfit,unipt", "--batch-size", "2"]
    result = CliRunner().invoke(app, [*words, "--json", "--set", "unipt.reduction=4", "--device-memory", "1GiB"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [row["method"] for row in document["methods"]] == ["bitfit", "unipt"]
    assert document["methods"][0]["fits"] is True
    table = CliRunner().invoke(app, [*words, "--quiet"])
    assert "requested bytes" in table.stdout
    assert "unipt" in table.stdout
    refused = CliRunner().invoke(app, [*words, "--precision", "fp8"])
    assert refused.exit_code == 2
    assert "Traceback" not in refused.output


@pytest.mark.long
def test_the_accepted_command_answers_with_the_figures_without_network_or_gpu(tmp_path: Path) -> None:
    options = {"--backbone": "hf-config:vit-base", "--methods": "all", "--batch-size": "64", "--precision": "fp32"}
    words = ["plan", *(word for pair in options.items() for word in pair), "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "SIDEBENCH_HOME": str(tmp_path)}
    command = [*COMMAND, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = {row["method"]: row["predicted_peak_bytes"] / 2**20 for row in json.loads(done.stdout)["methods"]}
    for name, wanted in {"full": 8316, "lora": 5559, "vpt": 5383, "bitfit": 5141}.items():
        assert found[name] == pytest.approx(wanted, rel=0.02)
