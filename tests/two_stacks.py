"""States of an encoder and its decoder, and a T5 to train beside: what the tests of side networks for both share."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from method_cases import Exact, build
from torch import Tensor, nn
from toys import ToyExamples, build_store, prepare

from sidebench.adapters._base import Batch, CachedMethod
from sidebench.bench.device_memory import DeviceMeter
from sidebench.bench.learner import CachedSource, Learner
from sidebench.bench.measure import measure_training
from sidebench.bench.predict import predict
from sidebench.bench.step import Step
from sidebench.bench.training import Settings
from sidebench.cache.backbone import Backbone
from sidebench.cache.form import Form
from sidebench.cache.pooling import masked_mean
from sidebench.cache.store import LiveStore
from sidebench.cache.zarr_store import ZarrStore

lean_and_plain = pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])
Stack = tuple[Sequence[str], Sequence[int]]
"""Layers, and how many tokens of each example are real."""


def random_stacks(
    encoder: Stack, decoder: Stack, widths: Mapping[str, int], *, more: int = 0, noise: float = 0.0
) -> Exact:
    """Random states; padding, `more` of it than needed, is zero or noise."""
    generator = torch.Generator().manual_seed(0)
    found, masks = {}, {}
    for layers, lengths in (encoder, decoder):
        longest = max(lengths)
        mask = torch.arange(longest + more) < torch.tensor(lengths)[:, None]
        for layer in layers:
            shape = (len(lengths), longest, widths[layer])
            real = torch.randn(shape, generator=generator, dtype=torch.float64)
            padded = nn.functional.pad(real, (0, 0, 0, more))
            found[layer] = torch.where(mask[..., None], padded, noise * torch.ones_like(padded).cumsum(2))
            masks[layer] = mask
    return Exact(masks[decoder[0][-1]], found, {}, {layer: masks[layer] for layer in encoder[0]})


def numbers_kept(body: nn.Module, batch: Batch) -> int:
    """How many autograd keeps for backward, the body's own and the states left out."""
    there = {t.data_ptr() for t in (*body.parameters(), *batch.activations.values())}
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        body(batch)
    return sum(t.numel() for at, t in kept.items() if at not in there)


def check_a_cache_trains_as_the_live_backbone(
    method: CachedMethod, backbone: Backbone, examples: ToyExamples, cache_dir: Path
) -> None:
    """One step's output and gradients are equal, on texts of which some are padded."""
    layers = method.layers(backbone.arch)
    cached = ZarrStore(build_store(backbone, examples, cache_dir, dtype="float32", layers=layers).folder)
    assert cached.architecture == backbone.arch
    index = np.array([3, 0, 17, 8])
    found = []
    for store in (cached, LiveStore(backbone, prepare(backbone, examples))):
        torch.manual_seed(5)
        body = build(method, backbone)
        recorded = store.read(index, layers)
        batch = Batch(recorded.mask, recorded.layers, masks=recorded.masks)
        assert not batch.mask_of("blocks.2").all()
        out = body(batch)
        assert out.shape == (4, 1, backbone.arch.width)
        (masked_mean(out, batch.mask) * torch.arange(out.shape[2])).square().mean().backward()
        found.append((out, {name: p.grad for name, p in body.named_parameters()}))
    (out, gradients), (live_out, live_gradients) = found
    torch.testing.assert_close(out, live_out, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, live_gradients[name], atol=1e-5, rtol=1e-4)


def check_the_loss_falls(method: CachedMethod, backbone: Backbone, examples: ToyExamples, steps: int) -> None:
    """To less than half, behind a head that stands still."""
    layers, targets = method.layers(backbone.arch), torch.from_numpy(examples.targets)[:16]
    recorded = LiveStore(backbone, prepare(backbone, examples)).read(np.arange(16), layers)
    batch = Batch(recorded.mask, recorded.layers, masks=recorded.masks)
    torch.manual_seed(0)
    body, head = build(method, backbone), torch.randn(2, backbone.arch.width)
    optimizer = torch.optim.AdamW(body.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(body(batch)[:, 0] @ head.T, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses


def check_a_step_is_predicted(
    method: CachedMethod, backbone: Backbone, examples: ToyExamples, cache_dir: Path, precision: str
) -> None:
    """A real step's tracked bytes from float16 states, exactly in float32."""
    layers = method.layers(backbone.arch)
    store = ZarrStore(build_store(backbone, examples, cache_dir, dtype="float16").folder)
    source = CachedSource(store, layers, torch.device("cpu"), store.lengths())
    (batch,) = source.batches([np.arange(8)])
    learner, targets = Learner(build(method, backbone), 2, "mean", 0), torch.zeros(8, dtype=torch.long)
    settings = Settings(0, 1, 8, method.config.lr, method.config.weight_decay, precision)
    measured = measure_training(learner, batch, targets, settings, DeviceMeter(torch.device("cpu"))).values
    longest = batch.mask_of("embeddings").shape[1]
    step = Step(8, 2, precision, "cpu", form=Form(dtype="float16"), max_length=longest)
    found = predict(method, backbone, step).peak
    if precision == "fp32":
        assert found.by_category == measured["memory_by_category"]
    assert found.peak_bytes == pytest.approx(measured["peak_tracked_bytes"], rel=0 if precision == "fp32" else 0.003)
