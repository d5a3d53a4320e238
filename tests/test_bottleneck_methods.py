"""The methods on a convolutional network of bottlenecks: cached as live, live ones by hand, memory to the byte."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import toys
from convolutions import TINY, tiny_resnet
from method_cases import Case, batch_of, build
from torch import Tensor, nn

from sidebench.adapters._base import Batch, CachedMethod, LiveMethod, PrefixMethod, trained
from sidebench.adapters._registry import find_method
from sidebench.bench.device_memory import DeviceMeter
from sidebench.bench.learner import CachedSource, Learner
from sidebench.bench.measure import measure_training
from sidebench.bench.predict import predict
from sidebench.bench.step import Step
from sidebench.bench.training import Settings
from sidebench.cache.backbone import Backbone
from sidebench.cache.errors import SidebenchError
from sidebench.cache.form import Form
from sidebench.cache.manifest import manifest_from_facts
from sidebench.cache.pooling import masked_mean
from sidebench.cache.store import LiveStore, Store
from sidebench.cache.suffix import entering
from sidebench.cache.zarr_store import ZarrStore

CPU = torch.device("cpu")
CACHED = {"unipt": {"width": "10"}, "lst": {"init": "random"}, "sherl": {"side_width": "8"}}
cached_methods = pytest.mark.parametrize(("name", "settings"), CACHED.items(), ids=CACHED)


@pytest.fixture
def backbone(tiny_resnet: Backbone) -> Backbone:
    return copy.deepcopy(tiny_resnet)


@pytest.fixture(scope="module")
def store(tiny_resnet: Backbone, tmp_path_factory: pytest.TempPathFactory) -> ZarrStore:
    built = toys.build_store(tiny_resnet, toys.make_images(12), tmp_path_factory.mktemp("maps"), dtype="float32")
    return ZarrStore(built.folder)


def batch_from(store: Store, method: Any, backbone: Backbone, index: list[int]) -> Batch:
    read = store.read(np.array(index), method.layers(backbone.arch))
    batch = Batch(read.mask, read.layers, {}, read.masks)
    if isinstance(method, PrefixMethod):
        return batch.entering(entering(backbone.arch, method.first_block(backbone.arch)))
    return batch


def training(method: Any, backbone: Backbone, store: Store) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of four steps."""
    torch.manual_seed(0)
    body = build(method, backbone).train()
    head = nn.Linear(body.width, 2)
    optimizer = torch.optim.AdamW([*trained(body).values(), *head.parameters()], lr=1e-3)
    steps = []
    for first in (0, 4, 8, 2):
        batch = batch_from(store, method, backbone, list(range(first, first + 4)))
        loss = nn.functional.cross_entropy(head(masked_mean(body(batch), batch.mask)), torch.arange(4) % 2)
        optimizer.zero_grad()
        loss.backward()
        steps.append(
            (float(loss.detach()), {n: p.grad.clone() for n, p in trained(body).items() if p.grad is not None})
        )
        optimizer.step()
    return steps


@cached_methods
def test_every_step_from_the_cache_is_the_step_beside_the_live_backbone(
    name: str, settings: dict[str, str], backbone: Backbone, store: ZarrStore
) -> None:
    method = find_method(name).configured(settings)
    live = LiveStore(backbone, toys.prepare(backbone, toys.make_images(12)))
    for (loss, gradients), (live_loss, live_gradients) in zip(
        training(method, backbone, store), training(method, backbone, live), strict=True
    ):
        assert loss == pytest.approx(live_loss, abs=1e-5, rel=1e-5)
        assert gradients.keys() == live_gradients.keys()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, live_gradients[parameter], atol=1e-5, rtol=1e-4)


@cached_methods
def test_a_step_is_predicted_to_the_byte(
    name: str, settings: dict[str, str], backbone: Backbone, store: ZarrStore
) -> None:
    method = find_method(name).configured(settings)
    assert isinstance(method, CachedMethod | PrefixMethod)
    found = predict(method, backbone, Step(8, 2, semantics="cpu", form=Form(dtype="float32"))).peak
    layer = entering(backbone.arch, -1) if isinstance(method, PrefixMethod) else None
    learner = Learner(build(method, backbone), 2, "mean", 0)
    source = CachedSource(store, method.layers(backbone.arch), CPU, store.lengths(), entering=layer)
    (batch,) = source.batches([np.arange(8)])
    options: Any = {"seed": 0, "epochs": 1, "batch_size": 8, "lr": 1e-3, "weight_decay": 0.0, "precision": "fp32"}
    targets = torch.arange(8) % 2
    memory = measure_training(learner, batch, targets, Settings(**options), DeviceMeter(CPU))
    assert found.by_category == memory.values["memory_by_category"]
    assert found.peak_bytes == memory.values["peak_tracked_bytes"]


def pixels(backbone: Backbone, count: int = 3) -> dict[str, Tensor]:
    return backbone.preprocess.collate(toys.prepare(backbone, toys.make_images(count)))[0]


def one_by_one(backbone: Backbone) -> dict[str, nn.Conv2d]:
    found = {name: m for name, m in backbone.module.named_modules() if isinstance(m, nn.Conv2d)}
    return {name: m for name, m in found.items() if m.kernel_size == (1, 1)}


@pytest.mark.parametrize("groups", [1, 2])
def test_lora_trains_every_1_x_1_convolution_of_the_bottlenecks(groups: int) -> None:
    backbone = tiny_resnet(shape=replace(TINY, groups=groups))
    convolutions = one_by_one(backbone)
    assert len(convolutions) == 2 * sum(TINY.layers) + 4
    expected = sum(3 * (conv.in_channels + conv.out_channels) for conv in convolutions.values())
    body = build(Case("lora", (("rank", "3"),)).method(), backbone)
    names = trained(body)
    assert sum(p.numel() for p in names.values()) == expected
    assert {name.partition(".lora_")[0].removeprefix("module.") for name in names} == set(convolutions)
    assert not any("conv2" in name for name in names)


def test_loras_update_is_the_product_of_its_two_matrices(backbone: Backbone) -> None:
    method = Case("lora", (("rank", "3"), ("alpha", "6"))).method()
    plain = copy.deepcopy(backbone)
    body = build(method, backbone)
    batch = batch_of(method, backbone, toys.prepare(backbone, toys.make_images(3)))
    inputs = pixels(plain)
    with torch.no_grad():
        torch.testing.assert_close(body(batch), plain.tokens(inputs))  # it starts at the frozen function
        generator = torch.Generator().manual_seed(0)
        state = {name: 0.2 * torch.randn(p.shape, generator=generator) for name, p in trained(body).items()}
        body.load_state_dict(state, strict=False)
        for name, conv in one_by_one(plain).items():
            down, up = (state[f"module.{name}.lora_{part}.default.weight"][..., 0, 0] for part in "AB")
            conv.weight += 6 / 3 * (up @ down)[..., None, None]
        torch.testing.assert_close(body(batch), plain.tokens(inputs), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["full", "lora", "bitfit"])
def test_checkpointing_bottlenecks_changes_no_gradient(name: str, backbone: Backbone) -> None:
    found = []
    for checkpointing in ("false", "true"):
        torch.manual_seed(0)
        method = Case(name, (("checkpointing", checkpointing),)).method()
        assert isinstance(method, LiveMethod)
        own = copy.deepcopy(backbone)
        body = method.network(own)
        body(batch_of(method, own, toys.prepare(own, toys.make_images(3)))).square().mean().backward()
        found.append({name: p.grad for name, p in trained(body).items()})
    plain, again = found
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)  # type: ignore[arg-type]


def test_checkpointing_keeps_what_enters_each_bottleneck_alone(backbone: Backbone) -> None:
    step = Step(4, 2, semantics="cpu")
    plain, again = (
        predict(Case("full", (("checkpointing", value),)).method(), backbone, step)  # type: ignore[arg-type]
        for value in ("false", "true")
    )
    assert again.peak.by_category["activations"] < 0.8 * plain.peak.by_category["activations"]


def test_checkpointing_without_blocks_is_refused(backbone: Backbone) -> None:
    import stages

    method = Case("full", (("checkpointing", "true"),)).method()
    with pytest.raises(SidebenchError, match="checkpointing=true goes by blocks, and Trunk has none; leave it out"):
        method.network(stages.tiny_cnn())  # type: ignore[attr-defined]


def test_full_fine_tuning_trains_all_and_leaves_the_statistics_alone(backbone: Backbone) -> None:
    before = {name: value.clone() for name, value in backbone.module.named_buffers()}
    method = Case("full").method()
    body = build(method, backbone).train()
    assert len(trained(body)) == len(list(backbone.module.parameters()))
    body(batch_of(method, backbone, toys.prepare(backbone, toys.make_images(3)))).sum().backward()
    assert all(p.grad is not None for p in backbone.module.parameters())
    assert not any(module.training for module in backbone.module.modules())
    assert all(torch.equal(value, before[name]) for name, value in backbone.module.named_buffers())


def test_the_cache_holds_what_enters_the_last_bottleneck(store: ZarrStore) -> None:
    assert store.layers == ("stages.0", "stages.1", "stages.2", "before_last", "stages.3")
    assert store.architecture.bottlenecks
    assert [spec.tokens for spec in store.manifest.specs] == [256, 64, 16, 4, 4]
    facts = store.manifest.facts()
    facts["architecture"]["bottlenecks"] = "yes"
    with pytest.raises(SidebenchError, match="its architecture describes no backbone"):
        manifest_from_facts(facts)
