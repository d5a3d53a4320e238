"""Layers with token counts of their own: the stage maps of a convolutional network, a fixed layer beside texts."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stages
import torch
import toys
from method_cases import Case, every_case
from torch import Tensor, nn

from sidebench.adapters._base import Batch, Body, CachedMethod, FittedMethod, LiveMethod, PrefixMethod, trained
from sidebench.adapters.unipt import UniPT
from sidebench.bench import training
from sidebench.bench.assemble import Assembled
from sidebench.bench.device_memory import DeviceMeter
from sidebench.bench.goals.classes import Classes
from sidebench.bench.learner import CachedSource, Learner, LiveSource
from sidebench.bench.measure import measure_training
from sidebench.bench.predict import predict
from sidebench.bench.predicted import with_prediction
from sidebench.bench.step import Step, kept_shapes
from sidebench.bench.training import Settings, load_trained, snapshot, train
from sidebench.cache import layout
from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone
from sidebench.cache.build import CaptureOptions, build, plan
from sidebench.cache.errors import SidebenchError
from sidebench.cache.form import Form
from sidebench.cache.manifest import manifest_from_facts, read_manifest
from sidebench.cache.memory_store import MemoryStore
from sidebench.cache.preprocess import ImagePreprocess, PlainImageProcessor
from sidebench.cache.repair import repair
from sidebench.cache.store import LiveStore
from sidebench.cache.zarr_store import ZarrStore

CPU = torch.device("cpu")
TEXT_LAYERS = ("embeddings", "blocks.1", "pooler.dense")  # the last is one vector per text


@pytest.fixture(scope="module")
def tiny_cnn() -> Backbone:
    return stages.tiny_cnn()


# Names


def test_blocks_that_shrink_the_map_are_stages(tiny_cnn: Backbone) -> None:
    assert tiny_cnn.layers == tiny_cnn.arch.states == tuple(stages.GRIDS)
    assert tiny_cnn.arch.grids == stages.GRIDS
    assert (tiny_cnn.arch.blocks, tiny_cnn.blocks, tiny_cnn.final_layer) == (0, [], "stages.2")
    assert tiny_cnn.shapes(tiny_cnn.layers) == {n: (h * w, stages.WIDTHS[n]) for n, (h, w) in stages.GRIDS.items()}
    pixels = torch.randn(2, 3, stages.SIDE, stages.SIDE)
    read = tiny_cnn.capture({"pixels": pixels}, tiny_cnn.layers)
    x = tiny_cnn.module.stem(pixels)  # type: ignore[operator]
    for index, block in enumerate(tiny_cnn.module.blocks):  # type: ignore[arg-type]
        x = block(x)
        if index in (0, 2, 3):
            assert torch.equal(read[f"stages.{(0, None, 1, 2)[index]}"], x.flatten(2).mT)


def test_stages_may_be_named_by_module_paths() -> None:
    trunk = stages.Trunk()
    preprocess = ImagePreprocess(PlainImageProcessor(16), 16, None, input_name="pixels")
    backbone = Backbone(trunk, preprocess, stages=["stem", "blocks.2"])
    assert backbone.arch.grids == {"stages.0": (8, 8), "stages.1": (4, 4)}
    assert backbone.tokens(backbone.dummy()).shape == (1, 16, 6)
    with pytest.raises(SidebenchError, match="a stage is a map"):
        Backbone(Flat(), preprocess, stages=["stem", "head"])


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, 8)
        self.head = nn.Linear(4, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.stem(pixels).mean((2, 3)))


# Stores


def same(one: Any, other: Any, layers: Sequence[str]) -> None:
    assert torch.equal(one.mask, other.mask)
    for layer in layers:
        assert torch.equal(one.mask_of(layer), other.mask_of(layer))
        assert one.mask_of(layer).shape == one.layers[layer].shape[:2]
        torch.testing.assert_close(one.layers[layer].float(), other.layers[layer].float(), atol=1e-6, rtol=1e-6)


@pytest.fixture(params=["maps", "texts"])
def both(request: pytest.FixtureRequest, tiny_cnn: Backbone, tiny_bert: Backbone) -> tuple[Backbone, Any, Any]:
    """A backbone, examples, and the layers to keep: None takes the named ones."""
    if request.param == "maps":
        return tiny_cnn, toys.make_images(30), None
    return tiny_bert, toys.make_texts(30), TEXT_LAYERS


def test_every_way_to_read_gives_each_layer_its_own_tokens(both: tuple[Any, ...], tmp_path: Path) -> None:
    backbone, examples, layers = both
    store = ZarrStore(toys.build_store(backbone, examples, tmp_path, layers=layers).folder)
    live = LiveStore(backbone, toys.prepare(backbone, examples), store.layers)
    in_memory = MemoryStore.of(store, store.layers, CPU)
    assert len(in_memory) == len(store) == 30
    draw = np.random.default_rng(0)
    for wanted in (store.layers, store.layers[::-1], store.layers[-1:], store.layers[:1]):
        index = draw.integers(0, 30, 7)
        read = store.read(index, wanted)
        assert list(read.layers) == list(wanted)
        same(read, live.read(index, wanted), wanted)
        same(in_memory.read(index, wanted), read, wanted)
        lead = store.architecture.final_layer if store.architecture.final_layer in wanted else wanted[-1]
        assert read.mask is read.mask_of(lead)
        same(read.to(CPU), read, wanted)
    pooled = {layer: store.pooled(layer) for layer in store.layers}
    for item in range(30):
        whole = store.read(np.array([item]), store.layers)
        for layer in store.layers:
            torch.testing.assert_close(pooled[layer][item, 1], whole.layers[layer][0].mean(0), atol=1e-6, rtol=1e-6)
            assert torch.equal(pooled[layer][item, 0], whole.layers[layer][0, 0])


@pytest.mark.parametrize("options", [{"dtype": "int8", "per_channel": True}, {"dtype": "fp8"}, {"views": 2}], ids=str)
def test_every_form_keeps_each_layers_tokens(both: tuple[Any, ...], options: Any, tmp_path: Path) -> None:
    backbone, examples, layers = both
    store = ZarrStore(toys.build_store(backbone, examples, tmp_path, layers=layers, **options).folder)
    plain = ZarrStore(toys.build_store(backbone, examples, tmp_path, layers=layers).folder)
    assert len(store) == 30 * (1 + options.get("views", 0))
    index = np.arange(30)
    read, wanted = store.read(index, store.layers), plain.read(index, store.layers)
    loses = 0.2 if "dtype" in options else 1e-6
    for layer in store.layers:
        assert torch.equal(read.mask_of(layer), wanted.mask_of(layer))
        found, right = read.layers[layer].float(), wanted.layers[layer].float()
        assert float((found - right).norm()) <= loses * float(right.norm())
    same(MemoryStore.of(store, store.layers, CPU).read(index, store.layers), read, store.layers)


def test_a_store_that_was_damaged_or_cut_short_ends_with_the_same_bytes(
    both: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 1)
    backbone, _, layers = both
    examples = toys.make_images(150) if layers is None else toys.make_texts(150)
    options = CaptureOptions(layers, "float32", 24)
    folder = build(plan(backbone, examples, options), tmp_path, notes={}).folder
    whole = toys.files_of(folder, without=["notes.json"])
    chunks = [name for name in whole if "/c/" in name and not name.startswith(("targets", "offsets"))]
    for name in chunks[::3]:
        (folder / name).unlink()
    assert repair(folder, lambda _: plan(backbone, examples, options)).bad == []
    assert toys.files_of(folder, without=["notes.json"]) == whole
    for name in (name for name in chunks if name.startswith("pooled/")):  # which need no forward
        (folder / name).unlink()
    assert repair(folder, lambda _: pytest.fail("pooled rows are made of what is stored")).bad == []
    assert toys.files_of(folder, without=["notes.json"]) == whole
    for name in ("manifest.json", *chunks[1::2]):
        (folder / name).unlink()
    resumed = build(plan(backbone, examples, options), tmp_path, notes={})
    assert resumed.status == "resumed"
    assert toys.files_of(folder, without=["notes.json"]) == whole


def test_a_store_of_the_fixed_layer_alone_is_dense(tiny_bert: Backbone, tmp_path: Path) -> None:
    texts = toys.make_texts(20)
    mixed = plan(tiny_bert, texts, CaptureOptions(TEXT_LAYERS)).manifest
    alone = plan(tiny_bert, texts, CaptureOptions(("pooler.dense",)))
    assert mixed.only(("pooler.dense",)).rows == alone.manifest.rows == 20
    assert mixed.only(("pooler.dense",)).digest == alone.manifest.digest
    store = ZarrStore(build(alone, tmp_path, notes={}).folder)
    assert store.offsets is None
    assert store.read(np.arange(3), ["pooler.dense"]).mask.tolist() == [[True]] * 3


def test_a_layer_whose_tokens_follow_nothing_is_refused(tiny_bert: Backbone) -> None:
    backbone = copy.deepcopy(tiny_bert)
    backbone.module.register_module("halved", nn.Identity())
    inner = backbone.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        backbone.module.halved(out[0][:, ::2][:, 1:])  # type: ignore[operator]
        return out

    backbone.module.forward = forward  # type: ignore[method-assign]
    with pytest.raises(SidebenchError, match="layer halved yields 1 tokens for a text of 4 and 3 for one of 8"):
        plan(backbone, toys.make_texts(3), CaptureOptions(("halved",)))


# Facts


def test_the_grids_are_facts_and_token_backbones_have_none(
    tiny_cnn: Backbone, tiny_vit: Backbone, tmp_path: Path
) -> None:
    built = toys.build_store(tiny_cnn, toys.make_images(4), tmp_path)
    manifest, _ = read_manifest(built.folder)
    assert manifest.architecture == tiny_cnn.arch
    assert manifest.digest == built.manifest.digest
    larger = dataclasses.replace(manifest.architecture, stages=((8, 8), (4, 4), (4, 4)))
    assert dataclasses.replace(manifest, architecture=larger).digest != manifest.digest
    facts = plan(tiny_vit, toys.make_images(4), CaptureOptions()).manifest.facts()
    assert "stages" not in facts["architecture"]


@pytest.mark.parametrize("forged", [[[8, 8], [4]], [[0, 4]], [["8", 8]], [[8, 2**60]], 7, [[8, 8]] * 20_000], ids=str)
def test_forged_grids_are_refused(tiny_cnn: Backbone, forged: Any) -> None:
    facts = plan(tiny_cnn, toys.make_images(4), CaptureOptions()).manifest.facts()
    facts["architecture"]["stages"] = forged
    with pytest.raises((SidebenchError, ValueError, TypeError)):
        manifest_from_facts(facts)


@pytest.mark.parametrize(("tokens", "side"), [("mean", 1), ("grid:2", 2)])
def test_reduced_maps_are_smaller_grids(tiny_cnn: Backbone, tokens: str, side: int, tmp_path: Path) -> None:
    images = toys.make_images(5)
    store = ZarrStore(toys.build_store(tiny_cnn, images, tmp_path, tokens=tokens).folder)
    assert store.architecture.grids == dict.fromkeys(stages.GRIDS, (side, side))
    inputs, _ = tiny_cnn.preprocess.collate(toys.prepare(tiny_cnn, images))
    read = store.read(np.arange(5), store.layers)
    for layer, whole in tiny_cnn.capture(inputs, store.layers).items():
        height, width = stages.GRIDS[layer]
        cells = whole.reshape(5, side, height // side, side, width // side, -1).mean((2, 4)).flatten(1, 2)
        torch.testing.assert_close(read.layers[layer], cells, atol=1e-5, rtol=1e-5)


def test_the_first_tokens_of_a_map_are_refused(tiny_cnn: Backbone) -> None:
    with pytest.raises(SidebenchError, match="the first tokens of a map are its upper edge; type mean or grid:4"):
        plan(tiny_cnn, toys.make_images(3), CaptureOptions(tokens="first:2"))


# Training


def assembled(backbone: Backbone, folder: Path, **options: Any) -> tuple[Learner, CachedSource, Tensor]:
    store = ZarrStore(toys.build_store(backbone, toys.make_images(24), folder, **options).folder)
    widths = {spec.layer: spec.width for spec in store.manifest.specs}
    torch.manual_seed(0)
    learner = Learner(UniPT().build(store.architecture, widths, lambda: pytest.fail("no weights")), 2, "mean", 0)
    source = CachedSource(store, UniPT().layers(store.architecture), CPU, store.lengths())
    return learner, source, torch.from_numpy(store.targets)


def settings(**changes: Any) -> Settings:
    given = {"seed": 0, "epochs": 3, "batch_size": 8, "lr": 1e-2, "weight_decay": 0.0, "precision": "fp32"}
    return Settings(**(given | changes))


def test_batch_statistics_of_the_best_epoch_come_back(
    tiny_cnn: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, source, targets = assembled(tiny_cnn, tmp_path)
    start = snapshot(learner)
    seen: list[dict[str, Tensor]] = []
    scores = iter([0.5, 0.9, 0.1] * 2)
    monkeypatch.setattr(training, "score_of", lambda *_: next(scores))
    part = np.arange(24)
    found = train(learner, source, targets, part, part, settings(), lambda _: seen.append(snapshot(learner)))
    load_trained(learner, found.state)
    buffers = dict(learner.named_buffers())
    assert {name.rsplit(".", 1)[-1] for name in buffers} == {"running_mean", "running_var", "num_batches_tracked"}
    for name, buffer in buffers.items():
        assert torch.equal(buffer, seen[1][name])
        assert not torch.equal(buffer, seen[2][name])
    load_trained(learner, start)  # the next learning rate
    assert all(torch.equal(buffer, start[name]) for name, buffer in learner.named_buffers())
    again = train(learner, source, targets, part, part, settings())
    assert again.losses == found.losses
    assert all(torch.equal(again.state[name], tensor) for name, tensor in found.state.items())


def test_measuring_leaves_the_statistics_as_they_were_and_is_predicted_to_the_byte(
    tiny_cnn: Backbone, tmp_path: Path
) -> None:
    learner, source, targets = assembled(tiny_cnn, tmp_path)
    before = snapshot(learner)
    (batch,) = source.batches([np.arange(8)])
    assert sorted(batch.masks) == ["stages.0", "stages.1"]
    memory = measure_training(learner, batch, targets[:8].clone(), settings(), DeviceMeter(CPU))
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(learner).items())
    form = Form(dtype="float32")
    found = predict(UniPT(), tiny_cnn, Step(8, 2, semantics="cpu", form=form)).peak
    assert found.by_category == memory.values["memory_by_category"]
    assert found.peak_bytes == memory.values["peak_tracked_bytes"]
    assert kept_shapes(UniPT(), tiny_cnn, Step(8, 2))["stages.0"] == (64, 4)
    made = Assembled(learner, source, (), targets.numpy(), Classes(2))
    copied = with_prediction(memory, Job(), UniPT(), made, batch)  # type: ignore[arg-type]
    assert copied.values["predicted_peak_bytes"] == memory.values["peak_tracked_bytes"]


class Job:
    precision, device = "fp32", "cpu"


def test_a_cached_text_batch_with_a_fixed_layer_is_predicted_to_the_byte(tiny_bert: Backbone, tmp_path: Path) -> None:
    store = ZarrStore(toys.build_store(tiny_bert, toys.make_texts(12), tmp_path, layers=TEXT_LAYERS).folder)
    torch.manual_seed(0)
    learner = Learner(Mixed().build(tiny_bert.arch, {}, lambda: pytest.fail("no weights")), 2, "mean", 0)
    source = CachedSource(store, TEXT_LAYERS, CPU, store.lengths())
    (batch,) = source.batches([np.arange(8)])
    assert batch.mask_of("pooler.dense").shape == (8, 1)
    assert learner(batch.rows(slice(0, 3))).shape == (3, 2)
    memory = measure_training(learner, batch, torch.zeros(8, dtype=torch.long), settings(), DeviceMeter(CPU))
    length = batch.mask_of("embeddings").shape[1]
    step = Step(8, 2, semantics="cpu", form=Form(dtype="float32"), max_length=length)
    found = predict(Mixed(), tiny_bert, step).peak
    assert found.by_category == memory.values["memory_by_category"]


class Mixed(CachedMethod):
    """Reads texts' tokens beside one vector; the vector, read last, is what it returns as tokens."""

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        return TEXT_LAYERS

    def build(self, arch: Architecture, widths: Any, weights: Any) -> Body:
        return MixedBody(arch.width)


class MixedBody(Body):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, batch: Batch) -> Tensor:
        masked = batch.state("embeddings") * batch.mask_of("embeddings")[..., None]
        return self.scale * (batch.state("pooler.dense") + masked.sum(1, keepdim=True))


def test_a_live_batch_has_the_final_layers_mask(tiny_cnn: Backbone) -> None:
    images = toys.make_images(4)

    source = LiveSource(tiny_cnn, images)
    (batch,) = source.batches([np.arange(4)])
    assert batch.mask.shape == (4, 4)
    assert source.lengths().tolist() == [4] * 4


def test_a_convolutional_backbone_cannot_be_restarted(tiny_cnn: Backbone) -> None:
    for case in every_case(PrefixMethod):
        assert case.method().refusal(tiny_cnn.arch), case


@pytest.mark.parametrize("case", every_case(), ids=str)
def test_every_method_trains_on_stage_maps_or_says_why_not(case: Case, tiny_cnn: Backbone) -> None:
    method = case.method()
    if method.refusal(tiny_cnn.arch):
        wide = dataclasses.replace(tiny_cnn.arch, width=1280)
        assert method.refusal(wide), "refused for the toy's width only"
        return
    backbone = copy.deepcopy(tiny_cnn)
    prepared = toys.prepare(backbone, toys.make_images(8))
    targets = torch.arange(8) % 2
    if isinstance(method, FittedMethod):
        assert set(method.layers(backbone.arch)) <= set(backbone.layers)
        return
    torch.manual_seed(0)
    if isinstance(method, CachedMethod):
        read = LiveStore(backbone, prepared).read(np.arange(8), method.layers(backbone.arch))
        batch = Batch(read.mask, read.layers, {}, read.masks)
        widths = {layer: stages.WIDTHS[layer] for layer in read.layers}
        body = method.build(backbone.arch, widths, lambda: pytest.fail("no block to copy"))
    else:
        assert isinstance(method, LiveMethod)
        batch = Batch(torch.ones(8, 4, dtype=torch.bool), {}, backbone.preprocess.collate(prepared)[0])
        body = method.network(backbone)
    learner = Learner(body, 2, "mean", 0)
    optimizer = torch.optim.AdamW(trained(learner).values(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(learner(batch), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
