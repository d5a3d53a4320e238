"""Caching changes the cost and not the answer: trained from a store on disk or beside the live backbone, a method
takes the same steps."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from method_cases import build
from torch import Tensor, nn
from toys import ToyExamples, build_store, prepare

from sidebench.adapters._base import Batch, Body, CachedMethod, trained
from sidebench.adapters._registry import find_method
from sidebench.cache.backbone import Backbone
from sidebench.cache.feed import activation_batches, batches_of, epoch_order
from sidebench.cache.pooling import masked_mean
from sidebench.cache.store import LiveStore, Store
from sidebench.cache.zarr_store import ZarrStore

EPOCHS, BATCH_SIZE, TOLERANCE = 2, 7, 1e-5
METHODS = {
    "attentive_probe": ("attentive_probe", {"queries": "2"}),
    "side_tuning": ("side_tuning", {}),
    "unipt": ("unipt", {}),
    "unipt-single_anchor": ("unipt", {"form": "single_anchor"}),
    "lst": ("lst", {}),
    "unipt-mlp": ("unipt", {"form": "mlp"}),
    "lst-random": ("lst", {"init": "random", "reduction": "2"}),
    "qst": ("qst", {}),
    "res_tuning_bypass": ("res_tuning_bypass", {}),
    "vqt": ("vqt", {}),
    "lst-dropped": ("lst", {"keep": "1", "merge_last": "true", "reduction": "2"}),
    "sherl_single_anchor": ("sherl_single_anchor", {}),
}

Step = tuple[float, dict[str, Tensor]]


def stored(backbone: Backbone, examples: ToyExamples, folder: Path) -> ZarrStore:
    return ZarrStore(build_store(backbone, examples, folder, dtype="float32", batch_size=8).folder)


@pytest.fixture(scope="session")
def text_store(tiny_bert: Backbone, text_examples: ToyExamples, tmp_path_factory: pytest.TempPathFactory) -> ZarrStore:
    return stored(tiny_bert, text_examples, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def image_store(
    tiny_dinov2: Backbone, image_examples: ToyExamples, tmp_path_factory: pytest.TempPathFactory
) -> ZarrStore:
    return stored(tiny_dinov2, image_examples, tmp_path_factory.mktemp("image"))


@pytest.fixture(params=["text", "image"])
def both(request: pytest.FixtureRequest) -> tuple[Backbone, Store, Store, Tensor]:
    """The backbone, a store on disk, the live backbone as a store, and the targets."""
    name = {"text": "tiny_bert", "image": "tiny_dinov2"}[request.param]
    backbone: Backbone = copy.deepcopy(request.getfixturevalue(name))
    examples: ToyExamples = request.getfixturevalue(f"{request.param}_examples")
    cached: ZarrStore = request.getfixturevalue(f"{request.param}_store")
    return backbone, cached, LiveStore(backbone, prepare(backbone, examples)), torch.from_numpy(examples.targets)


def new_body(method: CachedMethod, backbone: Backbone, seed: int) -> tuple[Body, nn.Linear]:
    torch.manual_seed(seed)
    body = build(method, backbone)
    return body, nn.Linear(body.width, 2)


def training(method: CachedMethod, backbone: Backbone, store: Store, targets: Tensor, *, seed: int = 5) -> list[Step]:
    """Loss and gradients of every step of AdamW, in the order every method is trained in."""
    body, head = new_body(method, backbone, seed)
    named = {**trained(body), **{f"head.{name}": p for name, p in head.named_parameters()}}
    optimizer = torch.optim.AdamW(named.values(), lr=method.config.lr, weight_decay=method.config.weight_decay)
    steps = []
    for epoch in range(EPOCHS):
        order = epoch_order(np.arange(len(store)), seed=seed, epoch=epoch)
        for index, read in activation_batches(store, batches_of(order, BATCH_SIZE), method.layers(backbone.arch)):
            out = body(Batch(read.mask, read.layers))
            vector = masked_mean(out, read.mask) if out.ndim == 3 else out
            loss = nn.functional.cross_entropy(head(vector), targets[torch.from_numpy(index)])
            optimizer.zero_grad()
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
            steps.append((float(loss.detach()), gradients))
            optimizer.step()
    return steps


@pytest.mark.parametrize(("name", "settings"), METHODS.values(), ids=METHODS)
def test_every_step_from_the_cache_is_the_step_beside_the_live_backbone(
    name: str, settings: dict[str, str], both: tuple[Backbone, Store, Store, Tensor]
) -> None:
    backbone, cached, live, targets = both
    method = find_method(name).configured(settings)
    assert isinstance(method, CachedMethod)
    from_cache = training(method, backbone, cached, targets)
    beside = training(method, backbone, live, targets)
    assert len(from_cache) == len(beside) == EPOCHS * -(-len(targets) // BATCH_SIZE) >= 12
    for (loss, gradients), (live_loss, live_gradients) in zip(from_cache, beside, strict=True):
        assert loss == pytest.approx(live_loss, abs=TOLERANCE, rel=TOLERANCE)
        assert gradients.keys() == live_gradients.keys()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, live_gradients[parameter], atol=TOLERANCE, rtol=TOLERANCE)


def test_both_stores_hold_the_same_numbers(both: tuple[Backbone, Store, Store, Tensor]) -> None:
    backbone, cached, live, _ = both
    index = np.array([3, 0, 17, 3])
    one, other = (store.read(index, backbone.layers) for store in (cached, live))
    assert torch.equal(one.mask, other.mask)
    for layer in backbone.layers:
        assert one.layers[layer].dtype == torch.float32
        torch.testing.assert_close(one.layers[layer], other.layers[layer], atol=1e-5, rtol=1e-5)


def test_the_toys_pad_and_the_losses_move(both: tuple[Backbone, Store, Store, Tensor]) -> None:
    backbone, cached, _, targets = both
    method = find_method("unipt").configured({"lr": "1e-2"})
    assert isinstance(method, CachedMethod)
    read = cached.read(np.arange(BATCH_SIZE), method.layers(backbone.arch))
    assert bool(read.mask.all()) is (backbone.arch.modality == "image")
    losses = [loss for loss, _ in training(method, backbone, cached, targets)]
    assert min(losses) < 0.9 * losses[0]
    assert all(
        float(g.abs().max()) > 0
        for n, g in training(method, backbone, cached, targets)[0][1].items()
        if n != "gate.bias"
    )


def test_another_seed_would_have_been_noticed(both: tuple[Backbone, Store, Store, Tensor]) -> None:
    backbone, cached, live, targets = both
    method = find_method("unipt").configured({})
    assert isinstance(method, CachedMethod)
    one, other = training(method, backbone, cached, targets), training(method, backbone, live, targets, seed=6)
    assert abs(one[0][0] - other[0][0]) > 100 * TOLERANCE
