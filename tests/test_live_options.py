"""What every method offers that trains through the backbone: gradient checkpointing, and AdamW's state in 8 bits."""

import copy
import importlib.util
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from method_cases import FAMILIES, batch_of, build, every_case
from torch import Tensor, nn

from sidebench.adapters._at_last import AtLast
from sidebench.adapters._base import Batch, LiveConfig, LiveMethod, trained
from sidebench.adapters._registry import find_method
from sidebench.bench.assemble import seeded
from sidebench.bench.device_memory import DeviceMeter
from sidebench.bench.learner import Learner
from sidebench.bench.measure import measure_training
from sidebench.bench.predict import predict
from sidebench.bench.step import Step
from sidebench.bench.tracker import TrackedPeak, track
from sidebench.bench.training import Settings, loss_of, make_optimizer, optimizer_of
from sidebench.cache.backbone import Backbone
from sidebench.cache.errors import SidebenchError
from sidebench.cache.form import Form
from sidebench.cache.suffix import ENTERING, MASK, Suffix

LIVE = sorted({case.name for case in every_case(LiveMethod)})
SETTINGS = Settings(seed=0, epochs=1, batch_size=8, lr=1e-3, weight_decay=0.01, precision="fp32")
CPU = torch.device("cpu")


def prepared_for(backbone: Backbone, count: int = 4) -> list[Tensor]:
    if backbone.arch.modality == "image":
        return backbone.preprocess.prepare(list(toys.make_images(count).raw))
    return backbone.preprocess.prepare(["good", *["the film was very dull and not good"] * (count - 1)])


def learner_of(method: LiveMethod, backbone: Backbone, count: int = 4) -> tuple[Learner, Batch, Tensor]:
    own = copy.deepcopy(backbone)
    batch = batch_of(method, own, prepared_for(own, count))
    with seeded(0):
        learner = Learner(build(method, own), 3, "mean", own.arch.prefix_tokens)
    return learner, batch, torch.arange(count) % 3


def configured(name: str, **settings: str) -> LiveMethod:
    method = find_method(name).configured(settings)
    assert isinstance(method, LiveMethod)
    return method


@pytest.mark.parametrize("name", LIVE)
def test_every_live_method_offers_them(name: str) -> None:
    assert issubclass(find_method(name).cls.Config, LiveConfig)


# --- gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", LIVE)
def test_the_gradients_are_the_same_bit_for_bit(name: str, family: str, request: pytest.FixtureRequest) -> None:
    backbone = request.getfixturevalue(f"tiny_{family}")
    if refused := configured(name).refusal(backbone.arch):
        pytest.skip(f"refused: {refused}")
    kept, again = (gradients(configured(name, checkpointing=flag), backbone) for flag in ("false", "true"))
    assert kept.keys() == again.keys()
    assert {key for key in kept if not torch.equal(kept[key], again[key])} == set()
    assert any(gradient.any() for gradient in kept.values())


def gradients(method: LiveMethod, backbone: Backbone) -> dict[str, Tensor]:
    """After one step, so that no zero of an initialisation hides a path."""
    learner, batch, targets = learner_of(method, backbone)
    optimizer = torch.optim.SGD(trained(learner).values(), lr=0.1)
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        loss_of(learner, batch, targets, "fp32").backward()
    return {name: p.grad for name, p in trained(learner).items() if p.grad is not None}


@pytest.fixture(scope="module")
def deep_vit(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return toys.load(toys.save_vit(tmp_path_factory.mktemp("models") / "vit", num_hidden_layers=8))


@pytest.mark.parametrize("name", LIVE)
def test_it_takes_less_memory(name: str, deep_vit: Backbone) -> None:
    kept, again = (tracked(configured(name, checkpointing=flag), deep_vit) for flag in ("false", "true"))
    fixed = ("parameters", "optimizer", "gradients", "inputs")
    assert [again.by_category[part] for part in fixed[:2]] == [kept.by_category[part] for part in fixed[:2]]
    kept_bytes, again_bytes = (p.peak_bytes - sum(p.by_category[part] for part in fixed) for p in (kept, again))
    assert again_bytes < 0.5 * kept_bytes


def tracked(method: LiveMethod, backbone: Backbone) -> TrackedPeak:
    learner, batch, targets = learner_of(method, backbone, count=32)
    inputs = [targets, batch.mask, *batch.inputs.values()]
    return track(learner, make_optimizer(learner, SETTINGS), inputs, lambda: loss_of(learner, batch, targets, "fp32"))


def test_each_block_runs_twice_per_step_and_once_without_gradients(tiny_vit: Backbone) -> None:
    method = configured("full", checkpointing="true")
    backbone = copy.deepcopy(tiny_vit)
    batch = batch_of(method, backbone, prepared_for(backbone))
    calls: list[int] = []
    for index, block in enumerate(backbone.blocks):
        block.get_submodule("mlp").register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    body = build(method, backbone)
    calls.clear()  # it has looked which parameters are used
    body(batch).sum().backward()
    assert calls == [0, 1, 1, 0]
    calls.clear()
    with torch.no_grad():
        body(batch)
    assert calls == [0, 1]


def test_on_the_last_blocks_alone_they_run_twice_too(tiny_vit: Backbone) -> None:
    suffix = Suffix(copy.deepcopy(tiny_vit), 1)
    calls: list[int] = []
    suffix.blocks[0].get_submodule("mlp").register_forward_pre_hook(lambda *_: calls.append(1))
    body = AtLast(configured("full", checkpointing="true"), 1).build(suffix)
    tokens = tiny_vit.shapes([tiny_vit.final_layer])[tiny_vit.final_layer][0]
    mask = torch.ones(2, tokens or 1, dtype=torch.bool)
    calls.clear()  # it has looked which parameters are used
    body(Batch(mask, inputs={ENTERING: torch.randn(*mask.shape, suffix.arch.width), MASK: mask})).sum().backward()
    assert calls == [1, 1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["vit", "bert"])
@pytest.mark.parametrize("name", LIVE)
def test_what_is_predicted_is_what_is_tracked(
    name: str, family: str, precision: str, request: pytest.FixtureRequest
) -> None:
    backbone = request.getfixturevalue(f"tiny_{family}")
    assert_predicted(configured(name, checkpointing="true"), backbone, precision)


def assert_predicted(method: LiveMethod, backbone: Backbone, precision: str) -> None:
    learner, batch, targets = learner_of(method, backbone, count=8)
    settings = replace(SETTINGS, precision=precision, optimizer=optimizer_of(method))
    found = measure_training(learner, batch, targets, settings, DeviceMeter(CPU)).values
    step = Step(8, 3, precision, "cpu", form=Form(dtype="float32"), max_length=batch.mask.shape[1])
    peak = predict(method, backbone, step).peak
    if precision == "fp32":
        assert peak.by_category == found["memory_by_category"]
        assert peak.at == found["memory_peak_at"]
    assert peak.peak_bytes == pytest.approx(found["peak_tracked_bytes"], rel=0 if precision == "fp32" else 0.003)


def test_a_config_from_outside_need_not_offer_it(tiny_vit: Backbone) -> None:
    method = find_method("bitfit").cls(types.SimpleNamespace(lr=1.0, weight_decay=0.0))
    assert isinstance(method, LiveMethod)
    assert trained(method.network(copy.deepcopy(tiny_vit)))
    assert optimizer_of(method) == "adamw"


# --- AdamW in 8 bits -------------------------------------------------------------------------------------------------


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SidebenchError, match=r"bitsandbytes, which is not installed: pip install 'sidebench\[8bit\]'"):
        find_method("lora").configured({"optimizer": "adamw8bit"})
    assert optimizer_of(find_method("lora").configured({})) == "adamw"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "installed")
    assert optimizer_of(find_method("lora").configured({"optimizer": "adamw8bit"})) == "adamw8bit"


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(SidebenchError, match="adamw8bit"):
        find_method("full").configured({"optimizer": "adam8bit"})


def test_it_is_bitsandbytes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class AdamW8bit(torch.optim.AdamW):
        pass

    stub: Any = types.ModuleType("bitsandbytes.optim")
    stub.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", stub)
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    optimizer = make_optimizer(layer, replace(SETTINGS, optimizer="adamw8bit", weight_decay=0.3))
    assert type(optimizer) is AdamW8bit
    (group,) = optimizer.param_groups
    assert group["params"] == [layer.weight]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.3)
    assert type(make_optimizer(layer, SETTINGS)) is torch.optim.AdamW


@pytest.fixture
def wide_vit(tmp_path: Path) -> Backbone:
    """With tensors beyond the 4,096 numbers below which bitsandbytes keeps 32 bits."""
    pytest.importorskip("bitsandbytes")
    return toys.load(toys.save_vit(tmp_path / "vit", hidden_size=64, intermediate_size=256))


def test_its_state_takes_a_quarter_and_it_trains(wide_vit: Backbone) -> None:
    method = configured("full", optimizer="adamw8bit")
    learner, batch, targets = learner_of(method, wide_vit, count=8)
    optimizer = make_optimizer(learner, replace(SETTINGS, lr=1e-3, optimizer=optimizer_of(method)))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(learner, batch, targets, "fp32")
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    large = [p for p in trained(learner).values() if p.numel() >= 4096]
    assert {optimizer.state[p]["state1"].dtype for p in large} == {torch.uint8}


def test_its_bytes_are_predicted(wide_vit: Backbone) -> None:
    assert_predicted(configured("full", optimizer="adamw8bit"), wide_vit, "fp32")
