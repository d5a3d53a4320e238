"""Fixtures of the whole suite: no hub, one thread, and tiny backbones that are built once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from pathlib import Path

import convolutions
import pytest
import torch
import toys
from hypothesis import HealthCheck, settings

from sidebench.cache.backbone import Backbone

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds one saved model per family: bert, vit, dinov2, clip, t5."""
    folder = tmp_path_factory.mktemp("models")
    toys.save_bert(folder / "bert")
    toys.save_vit(folder / "vit")
    toys.save_dinov2(folder / "dinov2")
    toys.save_clip(folder / "clip")
    toys.save_t5(folder / "t5")
    return folder


@pytest.fixture(scope="session")
def tiny_bert(models: Path) -> Backbone:
    return toys.load(models / "bert")


@pytest.fixture(scope="session")
def tiny_vit(models: Path) -> Backbone:
    return toys.load(models / "vit")


@pytest.fixture(scope="session")
def tiny_dinov2(models: Path) -> Backbone:
    return toys.load(models / "dinov2")


@pytest.fixture(scope="session")
def tiny_clip_vision(models: Path) -> Backbone:
    return toys.load(models / "clip", tower="vision")


@pytest.fixture(scope="session")
def tiny_clip_text(models: Path) -> Backbone:
    return toys.load(models / "clip", tower="text")


@pytest.fixture(scope="session")
def tiny_t5(models: Path) -> Backbone:
    """An encoder with its decoder."""
    return toys.load(models / "t5", tower="both")


@pytest.fixture(scope="session")
def tiny_resnet() -> Backbone:
    """A convolutional network of bottlenecks."""
    return convolutions.tiny_resnet()


@pytest.fixture(scope="session")
def text_examples() -> toys.ToyExamples:
    return toys.make_texts(50)


@pytest.fixture(scope="session")
def image_examples() -> toys.ToyExamples:
    return toys.make_images(40)


@pytest.fixture(autouse=True)
def _same_backbone_for_everyone(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that changes a shared backbone would poison the ones after it, so it fails."""
    shared = {n: request.getfixturevalue(n) for n in request.fixturenames if n.startswith("tiny_")}
    before = {name: _state(backbone) for name, backbone in shared.items()}
    yield
    for name, backbone in shared.items():
        assert _state(backbone) == before[name], f"the test changed the shared backbone {name}; copy it first"


def _state(backbone: Backbone) -> tuple[float, bool, bool, int]:
    parameters = list(backbone.module.parameters())
    total = sum(float(p.detach().double().abs().sum()) for p in parameters)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.module.modules())
    return total, any(p.requires_grad for p in parameters), any(m.training for m in backbone.module.modules()), hooks
