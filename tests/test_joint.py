"""Images with texts, read by one network as one sequence with holes: cached, measured and predicted like all others."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from joint_toys import HEIGHT, SIDE, VISUAL, JointToyExamples, make_joint, tiny_joint
from method_cases import build
from test_cached_equals_live import TOLERANCE, training
from toys import build_store, files_of, prepare

from sidebench.adapters._base import Batch, CachedMethod, LiveMethod, PrefixMethod, trained
from sidebench.adapters._registry import find_method
from sidebench.bench import learner as learner_module
from sidebench.bench.device_memory import DeviceMeter
from sidebench.bench.learner import CachedSource, Learner, LiveSource, longest_batch
from sidebench.bench.measure import measure_training
from sidebench.bench.plan import PlanRequest
from sidebench.bench.plan import plan as bench_plan
from sidebench.bench.predict import predict, predict_again
from sidebench.bench.step import Step
from sidebench.bench.training import Settings
from sidebench.cache.backbone import Backbone
from sidebench.cache.build import CaptureOptions, plan
from sidebench.cache.build import build as build_planned
from sidebench.cache.errors import SidebenchError
from sidebench.cache.examples import ImageText
from sidebench.cache.fidelity import examine
from sidebench.cache.form import Form
from sidebench.cache.joint import JointExamples, JointPreprocess, Packing
from sidebench.cache.repair import repair
from sidebench.cache.store import LiveStore
from sidebench.cache.zarr_store import ZarrStore

CPU = torch.device("cpu")
LAYERS = ("embeddings", "blocks.0", "blocks.1", "norm")


@pytest.fixture(scope="module")
def toy() -> Backbone:
    return tiny_joint()


@pytest.fixture(scope="module")
def examples() -> JointToyExamples:
    return make_joint(30)


@pytest.fixture(scope="module")
def store(toy: Backbone, examples: JointToyExamples, tmp_path_factory: pytest.TempPathFactory) -> ZarrStore:
    return ZarrStore(build_store(toy, examples, tmp_path_factory.mktemp("joint")).folder)


class Unread(JointToyExamples):
    def load(self, index: int) -> ImageText:
        pytest.fail("an image was decoded")


def test_the_tokens_are_counted_without_looking_at_an_image(toy: Backbone, examples: JointToyExamples) -> None:
    assert isinstance(toy.preprocess, JointPreprocess)
    assert isinstance(examples, JointExamples)
    counted = toy.preprocess.token_counts(Unread(examples.raw, examples.targets))
    for i, prepared in enumerate(prepare(toy, examples)):
        _, mask = toy.preprocess.collate([prepared])
        assert mask is not None
        assert counted[i] == mask.sum() == len(prepared["input_ids"]) + VISUAL


def test_every_layer_follows_the_text(toy: Backbone) -> None:
    assert toy.layers == LAYERS
    assert toy.shapes(LAYERS) == dict.fromkeys(LAYERS, (None, 32))
    assert toy.shapes(["embeddings.patches"]) == {"embeddings.patches": (VISUAL, 32)}


def test_a_store_keeps_the_real_tokens_and_closes_the_holes(
    toy: Backbone, examples: JointToyExamples, store: ZarrStore
) -> None:
    index = np.array([4, 0, 17, 4])
    inputs, mask = toy.preprocess.collate([prepare(toy, examples)[i] for i in index])
    assert mask is not None
    assert (mask[:, 1:] & ~mask[:, :-1]).any(), "no text is padded"
    live, read = toy.capture(inputs, LAYERS), store.read(index, LAYERS)
    for layer in LAYERS:
        for row in range(4):
            real = live[layer][row][mask[row]]
            torch.testing.assert_close(read.layers[layer][row][: len(real)], real, atol=1e-5, rtol=1e-5)
            assert not read.layers[layer][row][len(real) :].any()
            assert read.mask[row].tolist() == [token < len(real) for token in range(read.mask.shape[1])]
    assert store.verify() == []
    assert store.manifest.facts()["architecture"]["modality"] == "image-text"


def test_the_live_store_says_what_the_cache_says(toy: Backbone, examples: JointToyExamples, store: ZarrStore) -> None:
    live, index = LiveStore(toy, prepare(toy, examples)), np.array([3, 0, 17, 3])
    one, other = (kept.read(index, LAYERS) for kept in (store, live))
    assert torch.equal(one.mask, other.mask)
    for layer in LAYERS:
        torch.testing.assert_close(one.layers[layer], other.layers[layer], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", ["cls", "mean", "cls+mean", "first:9", "proj:5"])
def test_fewer_tokens_are_those_of_the_example_alone(
    toy: Backbone, examples: JointToyExamples, tokens: str, tmp_path: Path
) -> None:
    """In a batch of one there is no padding and no hole."""
    many, one = (
        ZarrStore(build_store(toy, examples, tmp_path / str(size), tokens=tokens, batch_size=size).folder)
        for size in (8, 1)
    )
    assert np.array_equal(many.lengths(), one.lengths())
    for layer in LAYERS:
        torch.testing.assert_close(many.whole(layer), one.whole(layer), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(many.pooled(layer), one.pooled(layer), atol=1e-5, rtol=1e-5)


def test_what_a_form_loses_is_counted_over_real_tokens(toy: Backbone, examples: JointToyExamples) -> None:
    """Of the first nine tokens: all that lies behind the ninth real one, example by example."""
    found = examine(plan(toy, examples, CaptureOptions(dtype="float32", tokens="first:9"))).relative_errors
    for layer in LAYERS:
        lost = whole = 0.0
        for one in prepare(toy, examples):
            value = toy.capture(toy.preprocess.collate([one])[0], [layer])[layer][0].double()
            lost, whole = lost + float(value[9:].square().sum()), whole + float(value.square().sum())
        assert found[layer] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)


def test_a_damaged_chunk_is_repaired_to_the_byte(toy: Backbone, examples: JointToyExamples, tmp_path: Path) -> None:
    built = build_store(toy, examples, tmp_path)
    before = files_of(built.folder)
    chunk = built.folder / "layers" / "blocks.0" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    options = CaptureOptions(dtype="float32", batch_size=8)
    mended = repair(built.folder, lambda _: plan(toy, examples, options))
    assert (mended.bad, mended.repaired) == ([], 1)
    assert files_of(built.folder) == before


def test_a_value_that_is_not_finite_names_its_example(
    toy: Backbone, examples: JointToyExamples, tmp_path: Path
) -> None:
    broken = copy.deepcopy(toy)
    words = broken.module.get_submodule("embeddings.words")
    said = broken.preprocess.prepare([examples.load(9)])[0]["input_ids"]  # type: ignore[call-overload]
    with torch.no_grad():
        words.weight[said[1]] = float("inf")
    first = next(i for i in range(30) if said[1] in broken.preprocess.prepare([examples.load(i)])[0]["input_ids"])  # type: ignore[call-overload]
    with pytest.raises(SidebenchError, match=f"layer .*example 'pair-{first}'"):
        build_store(broken, examples, tmp_path)


def test_what_has_no_meaning_here_is_refused(toy: Backbone, examples: JointToyExamples, tiny_bert: Backbone) -> None:
    with pytest.raises(SidebenchError, match="--views 2: no augmentation is defined for an image with a text"):
        plan(toy, examples, CaptureOptions(views=2))
    with pytest.raises(SidebenchError, match="--tokens grid:2 is for images; JointToy reads image-text"):
        plan(toy, examples, CaptureOptions(tokens="grid:2"))
    with pytest.raises(SidebenchError, match="BertModel reads text, the task holds image-text"):
        plan(tiny_bert, examples, CaptureOptions())


def test_tokens_that_were_counted_otherwise_are_found(
    toy: Backbone, examples: JointToyExamples, tmp_path: Path
) -> None:
    shorter = dataclasses.replace(examples.raw[3], text=examples.raw[3].text.rpartition(" ")[0])
    other = dataclasses.replace(examples, raw=(*examples.raw[:3], shorter, *examples.raw[4:]))
    planned = plan(toy, examples, CaptureOptions(dtype="float32", batch_size=8))
    planned = dataclasses.replace(planned, examples=other)
    with pytest.raises(SidebenchError, match=r"example 'pair-3' has .* tokens, and .* were counted before"):
        build_planned(planned, tmp_path, notes={})


METHODS = {
    "unipt": ("unipt", {}),
    "unipt-mlp": ("unipt", {"form": "mlp"}),
    "lst": ("lst", {}),
}


@pytest.mark.parametrize(("name", "settings"), METHODS.values(), ids=METHODS)
def test_every_step_from_the_cache_is_the_step_beside_the_live_backbone(
    name: str, settings: dict[str, str], toy: Backbone, examples: JointToyExamples, store: ZarrStore
) -> None:
    method = find_method(name).configured(settings)
    assert isinstance(method, CachedMethod)
    targets = torch.from_numpy(examples.targets)
    live = LiveStore(toy, prepare(toy, examples))
    from_cache, beside = (training(method, copy.deepcopy(toy), read, targets) for read in (store, live))
    for (loss, gradients), (live_loss, live_gradients) in zip(from_cache, beside, strict=True):
        assert loss == pytest.approx(live_loss, abs=TOLERANCE, rel=TOLERANCE)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, live_gradients[parameter], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["sherl", "partial", "lora@last1"])
def test_the_last_blocks_run_on_from_the_cache_as_in_the_whole_network(
    name: str, toy: Backbone, examples: JointToyExamples, store: ZarrStore
) -> None:
    """Where the method changes nothing yet (sherl: against the same body fed live), tokens and gradients are equal."""
    method = find_method(name).configured({})
    assert isinstance(method, PrefixMethod)
    index, found = np.array([4, 0, 17, 9]), []
    layers = (*method.layers(toy.arch), "norm")
    for kept in (store, LiveStore(toy, prepare(toy, examples))):
        read = kept.read(index, layers)
        torch.manual_seed(3)
        body = build(method, toy)
        out = body(Batch(read.mask, read.layers).entering(method.layers(toy.arch)[-1]))
        real = out * read.mask[..., None]
        (real * torch.arange(out.shape[-1])).square().mean().backward()
        found.append((real.detach(), {n: p.grad for n, p in trained(body).items()}))
        if name != "sherl":
            assert not read.mask.all()
            torch.testing.assert_close(found[-1][0], read.layers["norm"], atol=1e-5, rtol=1e-5)
    (one, gradients), (other, live_gradients) = found
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, live_gradients[parameter], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("held", [True, False])
def test_a_live_source_yields_the_same_batches_held_or_prepared_one_by_one(
    toy: Backbone, examples: JointToyExamples, held: bool, monkeypatch: pytest.MonkeyPatch, store: ZarrStore
) -> None:
    if not held:
        monkeypatch.setattr(learner_module, "_PREPARED_IN_RAM_BYTES", 0)
    source = LiveSource(toy, examples)
    assert (source.prepared is not None) is held
    assert np.array_equal(source.lengths(), store.lengths())
    index = np.array([7, 2, 11])
    (batch,) = source.batches([index])
    inputs, mask = toy.preprocess.collate([prepare(toy, examples)[i] for i in index])
    assert mask is not None
    assert torch.equal(batch.mask, mask)
    assert all(torch.equal(batch.inputs[name], inputs[name]) for name in inputs)


@pytest.mark.parametrize("name", ["lora", "full", "vpt", "bitfit", "houlsby"])
def test_a_live_method_trains(name: str, toy: Backbone, examples: JointToyExamples) -> None:
    method = find_method(name).configured({})
    assert isinstance(method, LiveMethod)
    own = copy.deepcopy(toy)
    torch.manual_seed(0)
    body, head = build(method, own), torch.randn(2, toy.arch.width)
    targets, index = torch.from_numpy(examples.targets)[:16], np.arange(16)
    (batch,) = LiveSource(toy, examples).batches([index])
    optimizer, losses = torch.optim.AdamW(trained(body).values(), lr=1e-2), []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(body(batch)[:, 0] @ head.T, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def learned(
    name: str, toy: Backbone, examples: JointToyExamples, store: ZarrStore
) -> tuple[Learner, Batch, CachedMethod | PrefixMethod | LiveMethod]:
    """A learner and its longest batch, as a run has them."""
    method = find_method(name).configured({})
    assert isinstance(method, CachedMethod | PrefixMethod | LiveMethod)
    torch.manual_seed(0)
    if isinstance(method, LiveMethod):
        source: LiveSource | CachedSource = LiveSource(toy, examples)
    else:
        entering = method.layers(toy.arch)[-1] if isinstance(method, PrefixMethod) else None
        source = CachedSource(store, method.layers(toy.arch), CPU, store.lengths(), entering=entering)
    learner = Learner(build(method, copy.deepcopy(toy)), 2, "mean", 0)
    (batch,) = source.batches([longest_batch(np.arange(30), source.lengths(), 8)])
    return learner, batch, method


@pytest.mark.parametrize("name", ["unipt", "lst", "sherl", "lora", "full"])
def test_a_step_is_predicted_to_the_byte(
    name: str, toy: Backbone, examples: JointToyExamples, store: ZarrStore
) -> None:
    learner, batch, method = learned(name, toy, examples, store)
    assert not batch.mask.all()
    settings = Settings(0, 1, 8, method.config.lr, method.config.weight_decay, "fp32")
    measured = measure_training(learner, batch, torch.zeros(8, dtype=torch.long), settings, DeviceMeter(CPU)).values
    assert isinstance(toy.preprocess, JointPreprocess)
    longest = int(toy.preprocess.token_counts(examples).max())
    step = Step(8, 2, "fp32", "cpu", form=Form(dtype="float32"), max_length=longest)
    again = [] if isinstance(method, CachedMethod) else [predict_again(method, {"": toy}, batch, step)]
    for found in (each.peak for each in (predict(method, toy, step), *again)):
        assert found.by_category == measured["memory_by_category"]
        assert found.peak_bytes == measured["peak_tracked_bytes"]


def test_a_plan_without_a_task_counts_the_longest_example(tmp_path: Path) -> None:
    """12 tokens of text and 6 of the image, four layers of 32 in float16, and their two pooled rows."""
    request = PlanRequest("module:joint_toys:tiny_joint", ("unipt", "lst", "sherl", "lora"), num_examples=10)
    found = bench_plan(request, home=tmp_path, cache_dir=tmp_path, say=lambda _: None)
    assert found["skipped"] == []
    assert found["cache"]["ragged"]
    assert found["cache"]["bytes_per_example"] == 3 * 32 * 2 * (18 + 2) + 8 + 8
    assert found["step"]["image_size"] == (HEIGHT, SIDE)
    assert found["step"]["max_length"] == 12


def test_packing_keeps_the_order_and_cuts_what_is_padding_everywhere() -> None:
    mask = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    packing = Packing(mask)
    packed = packing(torch.arange(15.0).view(3, 5, 1))
    assert packing.mask is not None
    assert packing.mask.tolist() == [[True, True, True, False], [True] * 4, [True, False, False, False]]
    assert packed[packing.mask].flatten().tolist() == [0, 3, 4, 5, 6, 8, 9, 14]
    whole = Packing(torch.tensor([[True, True], [True, False]]))
    value = torch.ones(2, 2, 1)
    assert whole(value) is value
