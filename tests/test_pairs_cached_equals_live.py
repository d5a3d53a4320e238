"""Two towers trained from their stores, or beside their live backbones, take the same steps."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from convolutions import tiny_resnet
from method_cases import build
from torch import Tensor

from sidebench.adapters._base import CachedMethod, trained
from sidebench.adapters._registry import find_method
from sidebench.bench.goals.base import Tower
from sidebench.bench.goals.pairs import Pairs
from sidebench.bench.learner import CachedSource
from sidebench.bench.towers import PairSource
from sidebench.cache.backbone import Backbone
from sidebench.cache.feed import batches_of, epoch_order
from sidebench.cache.store import LiveStore, Store
from sidebench.cache.zarr_store import ZarrStore

EPOCHS, BATCH_SIZE, TOLERANCE, ITEMS = 2, 6, 1e-5, 12
CPU = torch.device("cpu")
Towers = tuple[Backbone, Backbone]
Step = tuple[float, dict[str, Tensor]]
SYSTEMS: dict[str, tuple[Callable[[Path], Towers], Pairs]] = {
    "generic": (lambda models: (toys.load(models / "vit"), toys.load(models / "bert")), Pairs(12, "mean")),
    "vse": (
        lambda models: (tiny_resnet(), toys.load(models / "bert")),
        Pairs(32, "gpo", "triplet"),
    ),
    "clip4clip": (
        lambda models: (
            toys.load(models / "clip", tower="vision&projected=true"),
            toys.load(models / "clip", tower="text&projected=true"),
        ),
        Pairs(32, "mean", video=True),
    ),
}
METHODS = {
    "generic-unipt": ("generic", "unipt", {}),
    "generic-lst": ("generic", "lst", {}),
    "vse-unipt": ("vse", "unipt", {"width": "32"}),
    "vse-lst": ("vse", "lst", {"reduction": "2"}),
    "clip4clip-unipt": ("clip4clip", "unipt", {"form": "single_anchor", "reduction": "1"}),
    "clip4clip-sherl": ("clip4clip", "sherl_single_anchor", {}),
}
FRAMES = np.arange(0, 2 * ITEMS + 1, 2)  # two each


def steps(method: CachedMethod, goal: Pairs, towers: Towers, stores: tuple[Store, Store], owners: Tensor) -> list[Step]:
    """Loss and gradients of every step of AdamW."""
    torch.manual_seed(5)
    made = [Tower(build(method, tower), tower.arch.prefix_tokens) for tower in towers]
    learner = goal.learner({"image": made[0], "text": made[1]})
    sources = [
        CachedSource(store, method.layers(tower.arch), CPU, np.arange(len(store)))
        for store, tower in zip(stores, towers, strict=True)
    ]
    source = PairSource(*sources, owners.numpy(), FRAMES if goal.video else None)
    named = trained(learner)
    optimizer = torch.optim.AdamW(named.values(), lr=method.config.lr)
    taken = []
    for epoch in range(EPOCHS):
        batches = batches_of(epoch_order(np.arange(len(owners)), seed=3, epoch=epoch), BATCH_SIZE)
        for index, batch in zip(batches, source.batches(batches), strict=True):
            loss = goal.loss(learner, batch, owners[torch.from_numpy(index)], "fp32", epoch)
            optimizer.zero_grad()
            loss.backward()
            taken.append((float(loss.detach()), {n: p.grad.clone() for n, p in named.items() if p.grad is not None}))
            optimizer.step()
    return taken


@pytest.mark.parametrize(("system", "name", "settings"), METHODS.values(), ids=METHODS)
def test_every_step_from_the_caches_is_the_step_beside_the_live_towers(
    system: str, name: str, settings: dict[str, str], models: Path, tmp_path: Path
) -> None:
    load, goal = SYSTEMS[system]
    towers = load(models)
    images = toys.make_images(2 * ITEMS if goal.video else ITEMS)
    texts = toys.make_texts(2 * ITEMS)
    owners = torch.arange(2 * ITEMS) // 2
    cached = tuple(
        ZarrStore(toys.build_store(tower, examples, tmp_path / kind, dtype="float32", batch_size=8).folder)
        for kind, tower, examples in zip(("image", "text"), towers, (images, texts), strict=True)
    )
    live = tuple(
        LiveStore(copy.deepcopy(tower), toys.prepare(tower, examples))
        for tower, examples in zip(towers, (images, texts), strict=True)
    )
    method = find_method(name).configured(settings)
    assert isinstance(method, CachedMethod)
    from_caches, beside = (steps(method, goal, towers, stores, owners) for stores in (cached, live))  # type: ignore[arg-type]
    assert len(from_caches) == EPOCHS * 2 * ITEMS // BATCH_SIZE
    for (loss, gradients), (live_loss, live_gradients) in zip(from_caches, beside, strict=True):
        assert loss == pytest.approx(live_loss, abs=TOLERANCE, rel=TOLERANCE)
        assert gradients.keys() == live_gradients.keys()
        largest = max(float(g.abs().max()) for g in live_gradients.values())
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, live_gradients[parameter], atol=TOLERANCE * max(1.0, largest), rtol=TOLERANCE
            )
    assert any(float(g.abs().max()) > 0 for g in from_caches[0][1].values())
