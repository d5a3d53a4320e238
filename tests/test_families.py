"""Defaults of a family of tasks, from a method's file to the run's record; schedules of the learning rate."""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from method_cases import build
from outcomes import here, make_outcome, spawning, write_texts
from torch import Tensor
from typer.testing import CliRunner

from sidebench.adapters._base import Batch, Body, TrainingConfig, defaults, family_defaults
from sidebench.adapters._registry import describe, find_method, known_methods
from sidebench.bench import launch as launching
from sidebench.bench import training
from sidebench.bench.assemble import settings_of
from sidebench.bench.compare import compare
from sidebench.bench.jobs import learning_rates
from sidebench.bench.launch import Listener
from sidebench.bench.learner import Learner
from sidebench.bench.outcome import Outcome, Request
from sidebench.bench.plan import PlanRequest, plan
from sidebench.bench.prepare import Inputs
from sidebench.bench.record import Job
from sidebench.bench.report import markdown
from sidebench.bench.table import comparisons, rows
from sidebench.bench.tasks.load import FAMILIES, family_of
from sidebench.bench.training import Settings, rate_factor, schedule_of, train
from sidebench.cache.backbone import Backbone
from sidebench.cache.errors import SidebenchError
from sidebench.cli import app

STATED = [
    (name, family) for name in known_methods() for family in getattr(find_method(name).cls.Config, "families", {})
]
OUTSIDE = '''
from dataclasses import dataclass
from sidebench.adapters import Body, CachedMethod, TrainingConfig
from sidebench.adapters._base import defaults

@dataclass(frozen=True)
class Config{base}:
    lr: float = 0.25
    weight_decay: float = 0.0
    {line}

class Mine(CachedMethod):
    """My own."""
    Config = Config
    def build(self, arch, widths, weights):
        return Body()
'''


def write_sst2(root: Path) -> str:
    """SST-2 in the files of the official download; returns its URI."""
    folder = root / "SST-2"
    folder.mkdir(parents=True)
    for file in ("train.tsv", "dev.tsv"):
        lines = [f"{('a good day', 'a bad night')[i % 2]} number {i} of {file}\t{i % 2}" for i in range(24)]
        (folder / file).write_text("\n".join(["sentence\tlabel", *lines, ""]), "utf-8")
    return f"glue:sst2?root={root}"


def write_method(folder: Path, *, base: str = "", line: str = "") -> str:
    """A method file; returns its path."""
    (folder / "mine.py").write_text(OUTSIDE.format(base=base, line=line), "utf-8")
    return str(folder / "mine.py")


# What methods state


@pytest.mark.parametrize(("name", "family"), STATED)
def test_a_family_gives_options_that_exist_other_valid_values_and_names_its_source(name: str, family: str) -> None:
    config_class = find_method(name).cls.Config
    hints, stated = get_type_hints(config_class), family_defaults(config_class, family)
    assert family in FAMILIES
    assert re.search(r"\w{3}.* .*\w{3}", stated.source)
    assert stated.options
    for key, value in stated.options.items():
        assert type(value) is hints[key] or value in get_args(hints[key])
        assert value != getattr(config_class(), key), f"{key} is as everywhere"
        typed = find_method(name).configured({key: str(value).lower()}).config  # as by --set, with all its checks
        assert getattr(typed, key) == value


@pytest.mark.parametrize(("name", "family"), STATED)
def test_a_method_is_built_with_the_defaults_of_a_family(
    name: str, family: str, tiny_bert: Backbone, tiny_vit: Backbone
) -> None:
    backbone = copy.deepcopy(tiny_bert if family == "glue" else tiny_vit)
    method = find_method(name).configured({}, family)
    assert method.refusal(backbone.arch) is None
    assert build(method, backbone).width > 0


def test_families_are_known_by_their_scheme() -> None:
    assert [family_of(f"{family}:x?root=y") for family in FAMILIES] == list(FAMILIES)
    assert {family_of(uri) for uri in ("csv:glue:x", "sample:tweets", "folder:./vtab", "GLUE:x", "")} == {None}


def test_what_is_typed_goes_before_the_family_and_the_family_before_the_rest() -> None:
    lora = find_method("lora")
    common, glue = (lora.configured({}, family).config for family in (None, "glue"))
    assert (common.lr, common.rank, common.alpha) == (3e-3, 8, 8.0)
    assert (glue.lr, glue.rank, glue.alpha) == (3e-4, 32, 32.0)
    assert glue.schedule == common.schedule  # of which the family says nothing
    typed = lora.configured({"rank": "2"}, "glue").config
    assert (typed.lr, typed.rank) == (3e-4, 2)
    assert lora.configured({}, "fgvc").config == common
    assert find_method("lora@last2").configured({}, "glue").config == glue
    assert find_method("unipt").configured({}, "glue").config == find_method("unipt").configured({}).config
    assert find_method("linear_probe").configured({}, "glue").config == find_method("linear_probe").cls.Config()


def test_automatic_rates_go_around_the_default_of_the_family() -> None:
    bitfit = find_method("bitfit")
    assert learning_rates("auto", bitfit.configured({}, "glue")) == pytest.approx((9e-5, 3e-4, 9e-4))
    assert learning_rates("auto", bitfit.configured({})) == pytest.approx((9e-4, 3e-3, 9e-3))
    assert learning_rates("0.5", bitfit.configured({}, "glue")) == (0.5,)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("families = {'glue': defaults('a source of mine', lrr=1.0)}", "no option of mine 'lrr'. Did you mean 'lr'"),
        ("families = {'glue': defaults('a source of mine', warm_up=1.5)}", "warm_up is a share of the steps.*1.5"),
    ],
)
def test_a_file_that_states_nonsense_for_a_family_gets_a_sentence(tmp_path: Path, line: str, sentence: str) -> None:
    named = find_method(write_method(tmp_path, base="(TrainingConfig)", line=line))
    assert named.configured({}).config.lr == 0.25
    with pytest.raises(SidebenchError, match=sentence):
        named.configured({}, "glue")


def test_bench_methods_says_what_holds_for_which_family_and_by_whom() -> None:
    found = {row["name"]: row["families"] for row in json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)}
    assert {(name, family) for name, families in found.items() for family in families} == set(STATED)
    assert found["unipt"] == {}
    assert found["lora"]["glue"]["options"] == {"lr": 3e-4, "rank": 32, "alpha": 32.0}
    assert "LST" in found["lora"]["glue"]["source"]
    assert describe("lora")["families"] == found["lora"]
    text = CliRunner().invoke(app, ["methods"]).stdout
    assert "  on glue tasks: lr=0.0003, rank=32, alpha=32.0  LST's LoRA baseline" in text


# Schedules


def _by_hand(schedule: str, warm_up: float, steps: int) -> list[float]:
    warm = max(round(warm_up * steps), 1)
    factors = []
    for step in range(steps):
        rise = (step + 1) / warm if step < warm else 1.0
        if schedule == "cosine":
            factors.append(rise * (1 + math.cos(math.pi * step / steps)) / 2)
        elif schedule == "linear" and step >= warm:
            factors.append((steps - step) / (steps - warm))
        else:
            factors.append(rise)
    return factors


def _settings(**changes: Any) -> Settings:
    usual = {"seed": 0, "epochs": 1, "batch_size": 1, "lr": 0.5, "weight_decay": 0.0, "precision": "fp32"}
    return Settings(**(usual | changes))


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("warm_up", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("schedule", training.SCHEDULES)
def test_a_schedule_has_the_shape_that_it_is_named_after(schedule: str, warm_up: float, steps: int) -> None:
    settings = _settings(schedule=schedule, warm_up=warm_up)
    found = [rate_factor(step, steps, settings) for step in range(steps)]
    assert found == pytest.approx(_by_hand(schedule, warm_up, steps), abs=1e-12)


def test_without_a_choice_the_factors_are_bit_for_bit_what_they_always_were() -> None:
    for steps in (1, 3, 130):
        for step in range(steps + 1):
            warm = max(round(steps * 0.1), 1)
            always = min((step + 1) / warm, 1.0) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
            assert rate_factor(step, steps, _settings()) == always


class Still(Body):
    """Hands its numbers on."""

    width = 3

    def forward(self, batch: Batch) -> Tensor:
        return batch.activations["x"]  # type: ignore[return-value]


class Numbers:
    """A source of random vectors."""

    views = 0

    def batches(self, indices: Any) -> Any:
        for index in indices:
            yield Batch(torch.ones(len(index), 1, dtype=torch.bool), {"x": torch.ones(len(index), 3)})


@pytest.mark.parametrize("schedule", training.SCHEDULES)
def test_the_loop_steps_at_the_rates_of_its_schedule(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def watched(optimizer: torch.optim.AdamW, *arguments: Any) -> Any:
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    index, settings = torch.arange(6).numpy(), _settings(epochs=2, schedule=schedule, warm_up=0.25)
    train(Learner(Still(), 2, "mean", 0), Numbers(), torch.zeros(6).long(), index, index, settings)  # type: ignore[arg-type]
    assert rates == pytest.approx([0.5 * factor for factor in _by_hand(schedule, 0.25, 12)])


def test_a_config_from_outside_need_not_know_schedules(tmp_path: Path) -> None:
    method = find_method(write_method(tmp_path)).configured({}, "glue")
    assert schedule_of(method) == ("cosine", 0.1)
    chosen = find_method("lora").configured({"schedule": "constant", "warm_up": "0"})
    assert schedule_of(chosen) == ("constant", 0.0)


def test_a_schedule_that_the_loop_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SidebenchError, match=r"no value of lora.schedule 'cosin'. Did you mean 'cosine'"):
        find_method("lora").configured({"schedule": "cosin"})
    for name in ("lora", "unipt"):
        with pytest.raises(SidebenchError, match=r"warm_up is a share of the steps, 0 to 1; found 1.5"):
            find_method(name).configured({"warm_up": "1.5"})
    own = find_method(write_method(tmp_path, line="schedule: str = 'steps'")).configured({})
    with pytest.raises(SidebenchError, match="no schedule 'steps'"):
        schedule_of(own)


# From the command to the record


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Outcome:
    """A GLUE task: one method with its family's defaults, one with a schedule of its own."""

    def run(job: Job, folder: Path, listener: Listener) -> str | None:
        kept = json.loads(json.dumps(dataclasses.asdict(job)))  # as a worker reads it
        return here(Job(**{**kept, "lrs": tuple(kept["lrs"])}), folder, listener)

    folder = tmp_path_factory.mktemp("families")
    inputs = Inputs(f"hf:{models / 'bert'}", write_sst2(folder), device="cpu")
    settings = {"full": {"schedule": "linear", "warm_up": "0.05"}}
    request = Request(inputs, ("lora", "full"), settings, seeds=(0,), epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "spawn", spawning(run))
        return compare(request, home=folder, cache_dir=folder / "caches", runs_dir=folder / "runs")


def _asked(outcome: Outcome, method: str) -> Any:
    (record,) = outcome.records[method]
    assert record.error is None
    return record


def test_the_record_holds_what_the_run_was_made_with(compared: Outcome, tiny_bert: Backbone) -> None:
    lora, full = (_asked(compared, name) for name in ("lora", "full"))
    assert lora.asked["family"] == full.asked["family"] == "glue"
    assert lora.asked["settings"] == {}
    assert (lora.asked["config"]["rank"], lora.asked["config"]["alpha"]) == (32, 32.0)
    assert lora.asked["config"]["lr"] == lora.measured["lr"] == 3e-4
    assert (full.asked["config"]["schedule"], full.asked["config"]["warm_up"]) == ("linear", 0.05)
    arch = tiny_bert.arch
    added = lora.measured["trainable_params"] - lora.measured["head_params"]
    assert added == arch.blocks * 2 * 2 * arch.width * 32  # two projections, two matrices of rank 32


def _job(outcome: Outcome, method: str) -> Job:
    names = {field.name for field in dataclasses.fields(Job)}
    return Job(**{key: value for key, value in _asked(outcome, method).asked.items() if key in names})


@pytest.mark.parametrize(("name", "schedule"), [("lora", ("cosine", 0.1)), ("full", ("linear", 0.05))])
def test_a_worker_trains_by_the_schedule_of_the_config(
    name: str, schedule: tuple[str, float], compared: Outcome
) -> None:
    job = _job(compared, name)
    settings = settings_of(job, find_method(name).configured(job.settings, job.family), 1.0, 24)
    assert (settings.schedule, settings.warm_up) == schedule


def test_another_family_is_another_job(compared: Outcome) -> None:
    job = _job(compared, "lora")
    assert len({dataclasses.replace(job, family=family).digest for family in (None, *FAMILIES)}) == 1 + len(FAMILIES)


def test_the_report_says_which_defaults_held_and_which_schedule_is_not_the_common_one(compared: Outcome) -> None:
    report = markdown(compared, rows(compared), comparisons(compared))
    assert "10 % linear warm-up and cosine decay (full: 5 % and linear decay);" in report
    below = report.partition("## Learning rates")[2].partition("## World")[0]
    assert "lora 0.0003" in below
    assert "- lora: lr=0.0003, rank=32, alpha=32.0 (LST's LoRA baseline" in below
    assert "- full" not in below


def test_a_report_without_families_does_not_speak_of_them(tmp_path: Path) -> None:
    outcome = make_outcome(tmp_path, {"lora": [[1, 0]]})
    report = markdown(outcome, rows(outcome), comparisons(outcome))
    assert "family" not in report
    assert "10 % linear warm-up and cosine decay; the epoch" in report


def test_a_hostile_source_stays_one_line_of_the_list(tmp_path: Path) -> None:
    outcome = make_outcome(tmp_path, {"m": [[1, 0]]})
    hostile = {"m": defaults("a\n\n# heading <b>", lr=1.0)}
    report = markdown(dataclasses.replace(outcome, defaults=hostile), rows(outcome), comparisons(outcome))
    assert "- m: lr=1.0 (a # heading &lt;b&gt;)" in report


@pytest.mark.parametrize(
    ("methods", "settings", "sentence"),
    [
        (("lora", "lroa"), {}, "no method 'lroa'"),
        (("lora",), {"lora": {"rnak": "1"}}, "no option of lora 'rnak'"),
        (("lora",), {"lora": {"warm_up": "2"}}, "warm_up is a share"),
    ],
)
def test_what_is_wrong_with_methods_is_said_before_the_task_is_read(
    methods: tuple[str, ...], settings: dict[str, dict[str, str]], sentence: str, tmp_path: Path
) -> None:
    request = Request(Inputs("hf:nowhere", "glue:sst2?root=nowhere", device="cpu"), methods, settings)
    with pytest.raises(SidebenchError, match=sentence):
        compare(request, home=tmp_path, cache_dir=tmp_path, runs_dir=tmp_path / "runs")


def test_what_was_typed_is_not_called_a_default(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidebench.bench.compare._run", lambda *_: [])
    inputs = Inputs(f"hf:{models / 'bert'}", write_sst2(tmp_path), device="cpu")

    def held(methods: tuple[str, ...], settings: dict[str, dict[str, str]], lr: str | None) -> dict[str, Any]:
        request = Request(inputs, methods, settings, seeds=(0,), lr=lr)
        outcome = compare(request, home=tmp_path, cache_dir=tmp_path / "caches", runs_dir=tmp_path / "runs")
        return {name: dict(found.options) for name, found in outcome.defaults.items()}

    assert held(("lora", "bitfit", "full"), {}, None) == {
        "lora": {"lr": 3e-4, "rank": 32, "alpha": 32.0},
        "bitfit": {"lr": 3e-4},
    }
    assert held(("lora", "bitfit"), {"lora": {"rank": "4"}}, "auto") == {
        "lora": {"lr": 3e-4, "alpha": 32.0},
        "bitfit": {"lr": 3e-4},
    }
    assert held(("lora", "bitfit"), {}, "0.1,0.2") == {"lora": {"rank": 32, "alpha": 32.0}}


def test_a_plan_takes_the_defaults_of_its_tasks_family(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidebench.bench.plan.cache_facts", lambda *_: {})  # what it times is not asked for here

    def trained(task: str) -> int:
        request = PlanRequest(f"hf:{models / 'bert'}", ("lora",), task=task, batch_size=2, max_length=8)
        (row,) = plan(request, home=tmp_path, cache_dir=tmp_path / "caches", say=lambda _: None)["methods"]
        return int(row["trainable_params"] - row["head_params"])

    assert trained(write_sst2(tmp_path)) == 4 * trained(write_texts(tmp_path / "reviews.jsonl"))


def test_the_common_loop_is_what_every_trained_method_offers() -> None:
    for name in known_methods():
        config = find_method(name).cls.Config()
        if isinstance(config, TrainingConfig):
            assert (config.schedule, config.warm_up) == ("cosine", 0.1), "the protocol that the report states"
