"""CLIP-ViL: the released names to the last tensor, a sequence as BERT would compute it, cached and live alike."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_vil_toys import (
    BLOCKS,
    HEADS,
    MLP,
    SIDE,
    VISUAL,
    VISUAL_NAME,
    WIDTH,
    released_weights,
    save_clip_vil,
)
from joint_toys import JointToyExamples, make_joint
from method_cases import batch_of, build
from PIL import Image
from test_cached_equals_live import TOLERANCE, training
from torch import Tensor
from toys import build_store, prepare

from sidebench.adapters._base import Batch, CachedMethod, LiveMethod, trained
from sidebench.adapters._registry import find_method
from sidebench.bench.device_memory import DeviceMeter
from sidebench.bench.learner import Learner, LiveSource
from sidebench.bench.measure import measure_training
from sidebench.bench.plan import PlanRequest
from sidebench.bench.plan import plan as bench_plan
from sidebench.bench.predict import predict, predict_again
from sidebench.bench.step import Step
from sidebench.bench.training import Settings
from sidebench.cache.backbone import Backbone
from sidebench.cache.clip_resnet import ClipResNetShape, ModifiedResNet
from sidebench.cache.clip_vil import ClipVil
from sidebench.cache.clip_vil_load import ClipVilPreprocess, config_clip_vil
from sidebench.cache.configs import TextShapes
from sidebench.cache.errors import SidebenchError
from sidebench.cache.examples import ImageText
from sidebench.cache.load import load_backbone
from sidebench.cache.store import LiveStore
from sidebench.cache.zarr_store import ZarrStore

CPU = torch.device("cpu")
LAYERS = ("embeddings", "blocks.0", "blocks.1")


def loaded(uri: str, **options: int) -> Backbone:
    return load_backbone(uri, home=Path("nowhere"), device=CPU, **{"image_size": SIDE, **options})


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip_vil(tmp_path_factory.mktemp("vil"))


@pytest.fixture(scope="module")
def vil(uri: str) -> Backbone:
    return loaded(uri)


@pytest.fixture(scope="module")
def examples() -> JointToyExamples:
    """Some images stand upright, some lie."""
    square = make_joint(16)
    sizes = [(30, 20), (20, 30), (24, 24), (50, 20)]
    raw = [ImageText(both.image.resize(sizes[i % 4]), both.text) for i, both in enumerate(square.raw)]
    return JointToyExamples(tuple(raw), square.targets)


def test_the_sequence_is_what_berts_model_makes_of_the_embeddings(vil: Backbone, examples: JointToyExamples) -> None:
    """Words, positions and the first type; behind them the map with its places, projected: no position, no type."""
    from transformers import BertConfig, BertModel

    weights, prepared = released_weights(), prepare(vil, examples)[:4]
    config = BertConfig(
        vocab_size=20,
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        max_position_embeddings=40,
    )
    bert = BertModel(config, add_pooling_layer=False).eval()
    bert.load_state_dict({name.removeprefix("bert."): value for name, value in weights.items()}, strict=False)
    trunk = ModifiedResNet(ClipResNetShape((1, 2, 1, 2), 4, 0, 0), attnpool=False).eval()
    trunk.load_state_dict({n.removeprefix(f"{VISUAL_NAME}."): v for n, v in weights.items()}, strict=False)
    rows, columns = (weights[f"bert.encoder.visual_pos.{axis}_position_embedding.weight"] for axis in "xy")
    visn = "bert.encoder.visn_fc.visn"

    def joint(one: dict[str, Tensor]) -> list[Tensor]:
        """The states of one example, which has no padding."""
        ids = one["input_ids"]
        words = weights["bert.embeddings.word_embeddings.weight"][ids]
        words = words + weights["bert.embeddings.position_embeddings.weight"][: len(ids)]
        words = words + weights["bert.embeddings.token_type_embeddings.weight"][0]
        text = normed(words, "bert.embeddings.LayerNorm")
        grid = trunk(one["pixel_values"][None])[0]  # (C, h, w)
        places = [grid[:, h, w] + rows[h] + columns[w] for h in range(grid.shape[1]) for w in range(grid.shape[2])]
        image = torch.stack(places) @ weights[f"{visn}_fc.weight"].T + weights[f"{visn}_fc.bias"]
        x = torch.cat([text, normed(image, f"{visn}_layer_norm")])[None]
        states = [x]
        for layer in bert.encoder.layer:
            states.append(layer(states[-1]))
        return [state[0] for state in states]

    def normed(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-12).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    inputs, mask = vil.preprocess.collate(prepared)
    assert mask is not None
    assert inputs["upright"].shape == (4, 2)
    found = vil.capture(inputs, LAYERS)
    with torch.no_grad():
        for row, one in enumerate(prepared):
            for layer, wanted in zip(LAYERS, joint(one), strict=True):
                torch.testing.assert_close(found[layer][row][mask[row]], wanted, atol=1e-5, rtol=1e-5)


def test_it_says_what_it_is(vil: Backbone) -> None:
    arch = vil.arch
    assert vil.layers == LAYERS
    assert (arch.modality, arch.blocks, arch.width, arch.heads, arch.mlp_width) == ("image-text", 2, WIDTH, HEADS, MLP)
    assert (arch.norm, arch.norm_eps, arch.activation, arch.final_layer) == ("post", 1e-12, "gelu", "blocks.1")
    assert vil.shapes(LAYERS) == dict.fromkeys(LAYERS, (None, WIDTH))
    weights = released_weights()
    assert torch.equal(vil.head_parts["pooler_weight"], weights["bert.pooler.dense.weight"])
    assert torch.equal(vil.head_parts["pooler_bias"], weights["bert.pooler.dense.bias"])


def test_a_checkpoint_is_read_to_the_last_tensor(vil: Backbone) -> None:
    """What is passed over are pre-training's heads, boxes, CLIP's other half and its pooling, and counters."""
    weights = released_weights()
    assert isinstance(vil.module, ClipVil)
    held = vil.module.as_released().state_dict()
    held = {name: value for name, value in held.items() if not name.endswith("num_batches_tracked")}
    assert sum(value.numel() for value in held.values()) == sum(
        value.numel() for name, value in vil.module.state_dict().items() if not name.endswith("num_batches_tracked")
    )
    assert all(torch.equal(value, weights[name]) for name, value in held.items())
    unread = ("cls.", "answer_head.", "bert.encoder.visn_fc.box_", "bert.encoder.visual_model.logit_scale")
    unread += ("bert.encoder.visual_model.transformer.", f"{VISUAL_NAME}.attnpool.")
    assert all(name.startswith(unread) or name.endswith("num_batches_tracked") for name in weights.keys() - held.keys())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bert.encoder.layer.1.output.dense.bias": None}, "the first is bert.encoder.layer.1.output.dense.bias"),
        ({f"{VISUAL_NAME}.layer2.1.conv3.weight": None}, f"lacks 1 of .*{VISUAL_NAME}.layer2.1.conv3.weight"),
        ({"bert.encoder.x_layers.0.weight": torch.zeros(2)}, "has not, the first is bert.encoder.x_layers.0.weight"),
        ({"bert.pooler.dense.bias": torch.zeros(3)}, r"bert.pooler.dense.bias is \(3,\)"),
        ({"bert.encoder.visual_pos.x_position_embedding.weight": None}, "it lacks bert.encoder.visual_pos"),
        ({"bert.encoder.layer.150.output.dense.bias": torch.zeros(WIDTH)}, "lacks .* bert.encoder.layer.2"),
        ({f"bert.encoder.layer.{i}.x": torch.zeros(1) for i in range(150)}, "speaks of .* weights and has"),
    ],
)
def test_other_weights_are_refused_by_name(changes: dict[str, Tensor | None], said: str, tmp_path: Path) -> None:
    with pytest.raises(SidebenchError, match=said):
        loaded(save_clip_vil(tmp_path, **changes))


def test_what_is_not_there_is_asked_for(uri: str, tmp_path: Path) -> None:
    file, text = uri.removeprefix("clipvil:").split("?text=")
    with pytest.raises(SidebenchError, match="no CLIP-ViL checkpoint at nowhere"):
        loaded("clipvil:nowhere.pth")
    with pytest.raises(SidebenchError, match=r"write clipvil:.*\?text=FOLDER"):
        loaded(f"clipvil:{file}")
    with pytest.raises(SidebenchError, match="holds 0 files of weights"):
        loaded(f"clipvil:{tmp_path}?text={text}")
    with pytest.raises(SidebenchError, match=r"--image-size 100 is no shorter side for CLIP-ViL: a multiple of 96 up"):
        loaded(uri, image_size=100)
    with pytest.raises(SidebenchError, match="--max-length 41 is beyond this text encoder's 40 positions"):
        loaded(uri, max_length=41)
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(SidebenchError, match="describes no BERT"):
        loaded(f"clipvil:{file}?text={tmp_path}")


def test_a_folder_may_hold_both(vil: Backbone, tmp_path: Path) -> None:
    save_clip_vil(tmp_path)
    (tmp_path / "vil.pth").rename(tmp_path / "bert" / "Epoch11_LXRT.pth")
    again = loaded(f"clipvil:{tmp_path / 'bert'}")
    assert again.arch == vil.arch
    assert again.preprocess.facts() == vil.preprocess.facts()


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        ((640, 480), (512, 384), (64, 0)),
        ((480, 640), (384, 512), (0, 64)),
        ((500, 500), (384, 384), (0, 128)),  # a square stands upright, as in the reference
        ((1000, 200), (640, 128), (0, 128)),
        ((333, 250), (511, 384), (65, 0)),  # an odd rest goes to the left
    ],
)
def test_an_image_is_scaled_into_the_canvas_and_lies_in_its_middle(
    size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    preprocess = ClipVilPreprocess(TextShapes(20))
    pixels = preprocess._pixels(Image.new("RGB", size, (255, 255, 255)))
    width, height = (640, 384) if size[0] > size[1] else (384, 640)
    assert pixels.shape == (3, height, width)
    white, black = ((torch.full((3,), value) - MEAN) / STD for value in (1.0, 0.0))
    (left, top), (wide, high) = corner, resized
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[top : top + high, left : left + wide] = True
    torch.testing.assert_close(pixels[:, inside], white[:, None].expand(-1, wide * high))
    torch.testing.assert_close(pixels[:, ~inside], black[:, None].expand(-1, width * height - wide * high))


MEAN, STD = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])


def test_rows_of_a_mixed_batch_are_what_they_are_in_it(vil: Backbone, examples: JointToyExamples) -> None:
    inputs, mask = vil.preprocess.collate(prepare(vil, examples)[:6])
    assert mask is not None
    whole = vil.capture(inputs, ["embeddings"])["embeddings"]
    for rows in (slice(0, 2), slice(1, 2), slice(3, 6)):
        some = Batch(mask, inputs=inputs).rows(rows).inputs
        part = vil.capture(some, ["embeddings"])["embeddings"]
        torch.testing.assert_close(part, whole[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_step_on_a_mixed_batch_is_predicted_to_the_byte(name: str, vil: Backbone, examples: JointToyExamples) -> None:
    method, own = find_method(name).configured({}), copy.deepcopy(vil)
    assert isinstance(method, LiveMethod)
    (batch,) = LiveSource(own, examples).batches([np.arange(8)])
    assert batch.inputs["upright"].shape == (8, 4)
    step = Step(8, 2, "fp32", "cpu")
    torch.manual_seed(0)
    learner = Learner(build(method, own), 2, "mean", 0)
    settings = Settings(0, 1, 8, method.config.lr, method.config.weight_decay, "fp32")
    measured = measure_training(learner, batch, torch.zeros(8, dtype=torch.long), settings, DeviceMeter(CPU)).values
    assert predict_again(method, {"": vil}, batch, step).peak.peak_bytes == measured["peak_tracked_bytes"]


def test_images_of_one_kind_take_one_pass(vil: Backbone, examples: JointToyExamples) -> None:
    prepared = prepare(vil, examples)
    for kind in ([0, 4], [1, 5]):
        same, _ = vil.preprocess.collate([prepared[i] for i in kind])
        mixed, _ = vil.preprocess.collate([prepared[i] for i in (0, 1, 4, 5)])
        assert "upright" not in same
        (alone, among) = (vil.capture(inputs, ["embeddings.visn_fc"]) for inputs in (same, mixed))
        rows = [(0, 1, 4, 5).index(i) for i in kind]
        torch.testing.assert_close(alone["embeddings.visn_fc"], among["embeddings.visn_fc"][rows], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def store(vil: Backbone, examples: JointToyExamples, tmp_path_factory: pytest.TempPathFactory) -> ZarrStore:
    return ZarrStore(build_store(vil, examples, tmp_path_factory.mktemp("store")).folder)


def test_a_store_holds_the_real_tokens(vil: Backbone, examples: JointToyExamples, store: ZarrStore) -> None:
    lengths = [len(one["input_ids"]) + VISUAL for one in prepare(vil, examples)]
    assert store.lengths().tolist() == lengths
    live, index = LiveStore(vil, prepare(vil, examples)), np.array([3, 0, 9])
    one, other = (kept.read(index, LAYERS) for kept in (store, live))
    assert torch.equal(one.mask, other.mask)
    for layer in LAYERS:
        torch.testing.assert_close(one.layers[layer], other.layers[layer], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "settings"), [("unipt", {"form": "mlp"}), ("lst", {})])
def test_every_step_from_the_cache_is_the_step_beside_the_live_backbone(
    name: str, settings: dict[str, str], vil: Backbone, examples: JointToyExamples, store: ZarrStore
) -> None:
    method = find_method(name).configured(settings)
    assert isinstance(method, CachedMethod)
    targets, live = torch.from_numpy(examples.targets), LiveStore(vil, prepare(vil, examples))
    from_cache, beside = (training(method, copy.deepcopy(vil), read, targets) for read in (store, live))
    for (loss, gradients), (live_loss, live_gradients) in zip(from_cache, beside, strict=True):
        assert loss == pytest.approx(live_loss, abs=TOLERANCE, rel=TOLERANCE)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, live_gradients[parameter], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_gradients_reach_what_is_trained(name: str, vil: Backbone, examples: JointToyExamples) -> None:
    """Of full fine-tuning the trunk and the places too, and not the pooler, which nothing reads."""
    method, own = find_method(name).configured({}), copy.deepcopy(vil)
    assert isinstance(method, LiveMethod)
    body = build(method, own)
    body(batch_of(method, own, prepare(own, examples)[:4]))[:, 0].square().sum().backward()
    reached = {name for name, p in trained(body).items() if p.grad is not None and p.grad.abs().sum() > 0}
    if name == "lora":
        assert len(reached) == 2 * BLOCKS  # of each pair of matrices the one that begins at zero
        return
    assert all("pooler" not in name for name in trained(body))
    for part in ("visual.conv1.weight", "x_position_embedding", "words.word_embeddings", "visn_fc.weight"):
        assert any(part in name for name in reached), part


def test_sherl_restarts_the_last_block_without_the_trunk(vil: Backbone) -> None:
    body = build(find_method("sherl").configured({}), vil)
    assert sum(p.numel() for name, p in body.named_parameters() if "visual" in name) == 0


@pytest.fixture(scope="module")
def base() -> Backbone:
    return config_clip_vil("base")


def test_the_released_size(base: Backbone) -> None:
    """BERT-base with its pooler, RN50x4 without its pooling, two tables of 25 x 2560, and the way to BERT's width."""
    assert (base.arch.blocks, base.arch.width, base.arch.heads) == (12, 768, 12)
    assert len(base.arch.states) == 13
    assert base.preprocess.dummy(base.device)["pixel_values"].shape == (1, 3, 384, 640)
    embeddings = 768 * (30522 + 512 + 2 + 2)
    block = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    trunk = sum(p.numel() for p in base.module.get_submodule("embeddings.visual").parameters())
    visual = 2 * 25 * 2560 + 2560 * 768 + 768 + 2 * 768
    pooler = 768 * 768 + 768
    assert sum(p.numel() for p in base.module.parameters()) == embeddings + 12 * block + trunk + visual + pooler


def test_unipt_has_4_736_641_side_parameters(base: Backbone) -> None:
    method = find_method("unipt").configured({"form": "mlp"})
    found = predict(method, base, Step(2, num_outputs=3129, semantics="cpu"))
    assert found.trainable_params - found.head_params == 4_736_641


def test_a_plan_needs_no_weights(tmp_path: Path) -> None:
    """Of the longest example 20 + 240 tokens, 13 states of 768 in float16, and two pooled rows of each."""
    request = PlanRequest("clipvil-config:base", ("unipt", "lora"), batch_size=2, num_examples=1, semantics="cpu")
    found = bench_plan(request, home=tmp_path, cache_dir=tmp_path, say=lambda _: None)
    assert [row["method"] for row in found["methods"]] == ["unipt", "lora"]
    assert found["cache"]["bytes_per_example"] == 13 * 768 * 2 * (260 + 2) + 8 + 8
    with pytest.raises(SidebenchError, match="no preset in clipvil-config:"):
        config_clip_vil("large")
    with pytest.raises(SidebenchError, match="it has no weights to run"):
        loaded("clipvil-config:base")
