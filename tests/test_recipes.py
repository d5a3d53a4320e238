"""Recipes: they name what exists, count as published, and dry runs of one backbone and of pairs need nothing else."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_cases import batch_of, build
from outcomes import write_texts
from pair_fixtures import two_towers, write_pairs
from retrieval_files import MSVD_PARTS, write_msvd
from toys import ToyExamples, build_store, make_images
from typer.testing import CliRunner

from sidebench.adapters._base import Batch, CachedMethod, trained
from sidebench.adapters._registry import find_method
from sidebench.bench import recipes_plan
from sidebench.bench.assemble import seeded
from sidebench.bench.device_memory import DeviceMeter
from sidebench.bench.goals.base import Tower
from sidebench.bench.goals.pairs import Pairs
from sidebench.bench.measure import measure_training
from sidebench.bench.plan import PlanRequest
from sidebench.bench.plan_pair import plan_pair, predict_pair
from sidebench.bench.plan_report import sentences
from sidebench.bench.predict import Unpredictable
from sidebench.bench.recipes import PAPER_G, Published, recipe_named
from sidebench.bench.recipes_plan import plan_any, recipe_lines
from sidebench.bench.recipes_table import RECIPES
from sidebench.bench.step import Step
from sidebench.bench.tasks.karpathy import COCO, F30K, KarpathySet
from sidebench.bench.tasks.load import family_of
from sidebench.bench.tasks.pairs import is_pairs
from sidebench.bench.towers import PairBatch
from sidebench.bench.training import Settings
from sidebench.bench.with_forward import WithForward
from sidebench.cache.backbone import Backbone
from sidebench.cache.configs import config_backbone, without_weights
from sidebench.cache.errors import SidebenchError
from sidebench.cache.form import Form
from sidebench.cache.load import CONFIG_ONLY, backbone_uri
from sidebench.cache.pair import is_pair, towers_of
from sidebench.cli import app

CPU = torch.device("cpu")
NAMES = (
    "unipt-vse-f30k",
    "unipt-vse-coco",
    "unipt-clip4clip-msrvtt",
    "unipt-clip4clip-msvd",
    "unipt-clipvil-vqa2",
    "unipt-clipvil-gqa",
    "unipt-mdetr-refcoco",
    "unipt-mdetr-refcoco+",
    "unipt-mdetr-refcocog",
    "unipt-t5-glue",
)
# UniPT with the head of the task, T5 without: methods and counts of the released code.
TRAINED = {"vse": 12_380_226, "clip4clip": 9_584_642, "clipvil": 10_730_170, "mdetr": 712_966, "t5": 3_039_746}


def test_every_published_setting_has_a_recipe() -> None:
    assert tuple(RECIPES) == NAMES
    assert all(recipe.name == name for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_what_exists(name: str) -> None:
    recipe = recipe_named(name)
    for typed in (recipe.backbone, recipe.architecture):
        towers = towers_of(typed).values() if is_pair(typed) else (typed,)
        for tower in towers:
            backbone_uri(tower)
            assert tower.startswith(CONFIG_ONLY) is (typed == recipe.architecture)
    assert is_pairs(recipe.task) is is_pair(recipe.backbone)
    for method, settings in recipe.settings.items():
        find_method(method).configured(settings, family_of(recipe.task))
    assert {"full", "lst", "unipt"} <= set(recipe.published)
    assert recipe.not_reproduced
    assert all(row.memory_g > 0 for row in recipe.published.values())
    json.dumps(recipe.facts(), allow_nan=False)


def test_published_totals_are_of_all_devices_and_in_a_unit_of_their_own() -> None:
    assert PAPER_G == 1_048_576_000
    assert Published("1 M", 13.6, 4).bytes_per_device == 3_565_158_400


@pytest.mark.parametrize(("recipe", "known"), [("unipt-vse-f30k", F30K), ("unipt-vse-coco", COCO)])
def test_a_recipe_counts_what_the_reader_keeps(recipe: str, known: KarpathySet) -> None:
    parts = {part: count for part, (_, count) in known.parts.items()}
    items = sum({**parts, "val": known.validate_on or parts["val"]}.values())
    assert (recipe_named(recipe).num_examples, recipe_named(recipe).num_captions) == (items, 5 * items)


def test_figures_of_a_device_are_of_its_share_of_the_batch() -> None:
    def lines(name: str, batch: int) -> list[str]:
        return recipe_lines({"recipe": recipe_named(name).facts(), "step": {"batch_size": batch}})

    full, *others = (line for line in lines("unipt-vse-f30k", 112) if " parameters, " in line)
    assert full.endswith("on 8 devices, which are 22,100 MiB on each, at 14 of the batch of 112")
    assert all(line.endswith("on each, at 112 of the batch of 112") for line in others)
    (line,) = (line for line in lines("unipt-vse-f30k", 112) if "--batch-size" in line)
    assert line == "  the table is of batch 112: --batch-size 14 predicts what a device had (full)"
    shares = {"unipt-clip4clip-msrvtt": 32, "unipt-clipvil-vqa2": 32, "unipt-mdetr-refcoco": 4, "unipt-t5-glue": 100}
    for name, share in shares.items():
        recipe = recipe_named(name)
        published = recipe.facts()["published"].values()
        assert {row["batch_per_device"] for row in published} == {share}
        advice = [line for line in lines(name, recipe.batch_size) if f"--batch-size {share} " in line]
        assert len(advice) == (share != recipe.batch_size)
        assert not any("--batch-size" in line for line in lines(name, share))


@pytest.mark.parametrize("name", ["unipt-clipvil-vqa2", "unipt-clipvil-gqa"])
def test_another_form_of_a_reported_method_is_not_reproduced(name: str) -> None:
    assert any("SHERL" in line and "gated" in line for line in recipe_named(name).not_reproduced)


def small(recipe_name: str) -> dict[str, Any]:
    """The recipe's dry run at sizes that change no count of parameters."""
    recipe = replace(recipe_named(recipe_name), frames=min(recipe_named(recipe_name).frames, 2))
    image_size = {"vse": 64, "mdetr": 64}.get(recipe_name.split("-")[1])
    request = PlanRequest(
        "",
        recipe.methods,
        recipe.settings_with({}, recipe.methods),
        batch_size=2,
        image_size=image_size,
        max_length=8,
    )
    nowhere = Path("/nowhere")
    return plan_any(request, home=nowhere, cache_dir=nowhere, say=lambda _: None, recipe=recipe)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.split("-")[2] in {"f30k", "msrvtt", "vqa2", "refcoco", "glue"}]
)
def test_a_dry_run_trains_as_many_parameters_as_the_released_code(name: str) -> None:
    document = small(name)
    (row,) = document["methods"]
    wanted = TRAINED[name.split("-")[1]]
    heads = row["head_params"] if name == "unipt-t5-glue" else 0  # a head of ours
    assert row["trainable_params"] - heads == wanted == document["recipe"]["trained"]
    assert row["predicted_peak_bytes"] <= row["predicted_allocated_bytes"] <= row["predicted_reserved_bytes"]
    cache = document["cache"]
    assert all(one["bytes_per_example"] > 0 for one in cache.get("streams", {"": cache}).values())
    assert any("Not reproduced" in line for line in recipe_lines(document))
    json.dumps(document, allow_nan=False)


def test_unipt_on_t5_is_the_reported_share() -> None:
    assert round(100 * recipe_named("unipt-t5-glue").trained / 222_903_552, 2) == 1.36


def test_what_is_typed_goes_before_a_recipe() -> None:
    recipe = recipe_named("unipt-t5-glue")
    assert recipe.settings_with({}, ("unipt",)) == {"unipt": {"reduction": "4"}}
    typed = recipe.settings_with({"unipt": {"reduction": "8"}, "lora": {"rank": "2"}}, ("unipt", "lora"))
    assert typed == {"unipt": {"reduction": "8"}, "lora": {"rank": "2"}}
    assert set(recipe.settings_with({}, ("all",))) == {"unipt", "lst"}
    assert recipe.settings_with({}, ("lora@last4",)) == {}


def test_an_unknown_recipe_gets_the_nearest() -> None:
    with pytest.raises(SidebenchError, match="Did you mean 'unipt-vse-f30k'"):
        recipe_named("unipt-vse-f30")
    ran = CliRunner().invoke(app, ["compare", "--recipe", "unipt-t5-glu", "--dry-run"])
    assert ran.exit_code == 2


class Taken:
    """What a command hands on to be planned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[PlanRequest] = []
        document = {"methods": [], "skipped": []}

        def planned(request: PlanRequest, **_: Any) -> dict[str, Any]:
            self.requests.append(request)
            return document

        monkeypatch.setattr(recipes_plan, "plan", planned)
        monkeypatch.setattr(recipes_plan, "plan_pair", planned)

    def run(self, *words: str) -> tuple[PlanRequest, dict[str, Any]]:
        ran = CliRunner().invoke(app, [*words, "--json", "--quiet"], catch_exceptions=False)
        assert ran.exit_code == 0, ran.output
        return self.requests.pop(), json.loads(ran.stdout)


@pytest.mark.parametrize("command", [("compare", "--dry-run"), ("plan",)])
def test_commands_take_a_recipe_and_what_is_typed_besides(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Taken(monkeypatch)
    request, document = taken.run(*command, "--recipe", "unipt-clip4clip-msrvtt")
    recipe = recipe_named("unipt-clip4clip-msrvtt")
    assert (request.backbone, request.task, request.goal) == (recipe.architecture, None, recipe.goal)
    assert (request.methods, request.settings) == (("unipt",), recipe.settings)
    assert (request.batch_size, request.max_length, request.frames) == (128, 32, 12)
    assert (request.num_examples, request.num_captions) == (10_000, 181_000)
    assert document["recipe"]["name"] == recipe.name
    typed = (
        "--backbone",
        "hf-config:bert-base",
        "--methods",
        "unipt,lora",
        "--batch-size",
        "7",
        "--set",
        "lora.rank=2",
    )
    request, _ = taken.run(*command, "--recipe", "unipt-t5-glue", *typed)
    assert (request.backbone, request.methods, request.batch_size) == ("hf-config:bert-base", ("unipt", "lora"), 7)
    assert request.settings == {"unipt": {"reduction": "4"}, "lora": {"rank": "2"}}
    request, _ = taken.run(*command, "--recipe", "unipt-t5-glue", "--task", "csv:mine.csv")
    assert (request.task, request.goal, request.num_outputs) == ("csv:mine.csv", None, None)


def test_a_comparison_may_be_dry_without_a_recipe(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task = write_texts(tmp_path / "texts.csv")
    words = ("--backbone", f"hf:{models / 'bert'}", "--task", task, "--methods", "lora", "--cache-dir", str(tmp_path))
    ran = CliRunner().invoke(app, ["compare", *words, "--dry-run", "--json", "--quiet"], catch_exceptions=False)
    assert ran.exit_code == 0
    document = json.loads(ran.stdout)
    assert [row["method"] for row in document["methods"]] == ["lora"]
    assert document["cache"]["examples"] == 60
    assert not (tmp_path / "runs").exists()


# With the forward


@pytest.mark.parametrize("name", ["unipt", "lst"])
def test_states_computed_in_the_step_yield_what_cached_ones_do(name: str, tiny_bert: Backbone) -> None:
    method, backbone = find_method(name).configured({}), copy.deepcopy(tiny_bert)
    assert isinstance(method, CachedMethod)
    texts = backbone.preprocess.prepare(TEXTS)
    cached = batch_of(method, backbone, texts)
    inputs, _ = backbone.preprocess.collate(texts)
    with seeded(0):
        side = build(method, backbone)
    with seeded(0):
        body = WithForward(method).network(backbone).train()
    out = body(Batch(cached.mask, inputs=inputs))
    torch.testing.assert_close(out[cached.mask], side(cached)[cached.mask])
    out.sum().backward()
    assert trained(body).keys() == {f"side.{parameter}" for parameter in trained(side)}
    assert not body.module.training  # type: ignore[union-attr]


def test_a_plan_has_cached_methods_with_their_forward_where_asked(models: Path) -> None:
    request = PlanRequest(f"hf-config:{models / 'bert'}", ("unipt", "lora", "linear_probe"), with_forward=True)
    document = plan_any(request, home=models, cache_dir=models, say=lambda _: None)
    rows = {row["method"]: row for row in document["methods"]}
    assert list(rows) == ["unipt", "unipt+forward", "lora", "linear_probe"]
    assert rows["unipt"]["trainable_params"] == rows["unipt+forward"]["trainable_params"]
    frozen = rows["unipt+forward"]["by_category"]["parameters"] - rows["unipt"]["by_category"]["parameters"]
    module = config_backbone(str(models / "bert")).module
    assert frozen == sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


# Pairs


TEXTS = ["good", *["the film is very bad and dull"] * 2, "a plot"]


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("name", ["unipt", "lora"])
def test_a_pair_is_predicted_to_the_byte(name: str, frames: int, tiny_vit: Backbone, tiny_bert: Backbone) -> None:
    goal, method = Pairs(8, "mean"), find_method(name).configured({})
    backbones = {"image": tiny_vit, "text": tiny_bert}
    own = copy.deepcopy(backbones)
    images = own["image"].preprocess.prepare(list(make_images(4 * frames).raw))
    starts = None if frames == 1 else tuple(range(0, 4 * frames + 1, frames))
    texts = own["text"].preprocess.prepare(TEXTS)
    batch = PairBatch(batch_of(method, own["image"], images), batch_of(method, own["text"], texts), starts)
    with seeded(0):
        learner = goal.learner({s: Tower(build(method, one), one.arch.prefix_tokens) for s, one in own.items()})
    settings = Settings(0, 1, 4, 1e-3, 0.0, "fp32")
    memory = measure_training(learner, batch, torch.arange(4), settings, DeviceMeter(CPU), goal).values
    step = Step(4, semantics="cpu", form=Form(dtype="float32"), max_length=batch.mask.shape[1], goal=goal)
    found = predict_pair(method, backbones, step, frames)
    assert found.peak.by_phase == memory["memory_by_phase"]
    assert found.peak.peak_bytes == memory["peak_tracked_bytes"]


def planned(models: Path, **options: Any) -> dict[str, Any]:
    backbone = f"pair:image=hf-config:{models / 'vit'},text=hf-config:{models / 'bert'}"
    request = PlanRequest(**{"backbone": backbone, "methods": ("unipt",), "batch_size": 3, "max_length": 6, **options})
    return plan_pair(request, home=models, cache_dir=models, say=lambda _: None)


def test_a_plan_of_a_pair_has_both_caches(models: Path) -> None:
    document = planned(models, num_examples=10, num_captions=50, frames=2)
    image, text = (document["cache"]["streams"][stream] for stream in ("image", "text"))
    assert {"examples", "bytes_per_example"} <= document["cache"]["unavailable"].keys()  # of each stream its own
    assert (image["examples"], text["examples"]) == (20, 50)
    (line,) = (line for line in sentences(document) if line.startswith("cache of"))
    assert f"images {image['bytes_per_example']:,} bytes per example" in line
    assert f"texts {text['bytes_per_example']:,} bytes per example" in line
    assert "not measured for two backbones" in line
    assert text["bytes"] is None
    assert document["cache"]["bytes"] is None  # of texts nobody has counted the tokens
    assert {layer.partition(":")[0] for layer in document["cache"]["layers"]} == {"image", "text"}
    assert document["step"]["frames"] == 2
    assert (document["step"]["image_size"], document["step"]["max_length"]) == (16, 6)


def test_a_plan_of_a_task_of_pairs_knows_its_captions(models: Path, tmp_path: Path, tiny_bert: Backbone) -> None:
    task = f"pairs:{write_pairs(tmp_path)}"
    document = planned(models, backbone=two_towers(models), task=task, max_length=None)
    captions = [json.loads(row)["text"] for row in (tmp_path / "pairs.jsonl").read_text("utf-8").splitlines()]
    lengths = [len(ids) for ids in tiny_bert.preprocess.prepare(captions)]
    assert document["step"]["max_length"] == max(lengths) > min(lengths)
    assert document["methods"] == planned(models, max_length=max(lengths))["methods"]
    text = document["cache"]["streams"]["text"]
    held = ToyExamples("text", tuple(captions), np.zeros(len(captions), np.int64))
    built = build_store(tiny_bert, held, tmp_path / "built", layers=tuple(text["layers"]), dtype="float16")
    assert text["bytes"] == built.manifest.stored_bytes
    assert document["cache"]["bytes"] == text["bytes"] + document["cache"]["streams"]["image"]["bytes"]
    assert "without" not in str(document["cache"]["unavailable"])


def test_a_plan_of_videos_counts_the_frames_that_there_are(models: Path, tmp_path: Path) -> None:
    """Videos of 1, 2, 3, … frames in each part; a step is of the longest."""
    document = planned(models, task=f"msvd:retrieval?root={write_msvd(tmp_path)}")
    assert document["step"]["frames"] == max(MSVD_PARTS.values())
    frames = sum(n + 1 for count in MSVD_PARTS.values() for n in range(count))
    assert document["cache"]["streams"]["image"]["examples"] == frames


def test_what_a_pair_cannot_take_is_said(models: Path, tiny_vit: Backbone, tiny_bert: Backbone) -> None:
    document = planned(
        models, methods=("linear_probe", "unipt"), settings={"unipt": {"form": "single_anchor", "reduction": "99"}}
    )
    (probe,) = document["methods"]
    assert "not trained in steps" in probe["unavailable"]["predicted_peak_bytes"]
    assert document["skipped"][0]["reason"].startswith("of the images: reduction 99")
    swapped = f"pair:text=hf-config:{models / 'vit'},image=hf-config:{models / 'bert'}"
    with pytest.raises(SidebenchError, match="reads text and stands for the images"):
        planned(models, backbone=swapped)
    both = {"image": without_weights(tiny_vit), "text": without_weights(tiny_bert)}
    with pytest.raises(Unpredictable, match="not trained in steps"):
        predict_pair(find_method("linear_probe").configured({}), both, Step(2))
