"""CLIP's towers with their projection: the embedding that transformers computes, the states as without, their users."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from method_cases import weights_of
from toys import ToyExamples, build_store, prepare

from sidebench.adapters._base import Batch, Body, CachedMethod, LiveMethod, PrefixMethod, trained
from sidebench.adapters._registry import find_method
from sidebench.adapters._unipt_single import SingleAnchor
from sidebench.bench.choice import refusal
from sidebench.bench.predict import predict
from sidebench.bench.step import Step
from sidebench.cache.backbone import Backbone
from sidebench.cache.configs import config_backbone
from sidebench.cache.errors import SidebenchError
from sidebench.cache.form import Form
from sidebench.cache.load import load_backbone
from sidebench.cache.store import LiveStore
from sidebench.cache.suffix import Suffix, entering_layer
from sidebench.cache.zarr_store import ZarrStore

SHARED = 24  # width of the space both towers are projected to, another than the blocks'
CPU = torch.device("cpu")
Row = list[float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    vocabulary = {"vocab_size": 4 + len(toys.WORDS), "max_position_embeddings": 40, "bos_token_id": 2}
    # The tokenizer's end token 3 is the highest id of none of its texts, so the configuration names it.
    text = {**sizes, **vocabulary, "eos_token_id": 3}
    vision = {**sizes, "image_size": toys.IMAGE_SIZE, "patch_size": toys.PATCH}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=SHARED)
    others = (toys.tokenizer(), toys.image_processor("CLIP"))
    return toys._save(tmp_path_factory.mktemp("clip"), CLIPModel, config, *others)


def load(folder: Path, tower: str, options: str = "&projected=true") -> Backbone:
    return load_backbone(f"hf:{folder}?tower={tower}{options}", home=folder, device=CPU)


@pytest.fixture(scope="module", params=["text", "vision"])
def tower(request: pytest.FixtureRequest, folder: Path) -> Backbone:
    return load(folder, request.param)


def examples_of(backbone: Backbone, count: int = 6) -> ToyExamples:
    return toys.make_texts(count) if backbone.arch.modality == "text" else toys.make_images(count)


def published_embeddings(folder: Path, backbone: Backbone, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What CLIPModel, both towers in one, makes of a batch."""
    from transformers import CLIPModel

    whole: Any = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        if backbone.arch.modality == "image":
            return whole.visual_projection(whole.vision_model(**inputs).pooler_output)
        return whole.text_projection(whole.text_model(**inputs).pooler_output)


def test_the_final_layer_is_the_projected_embedding(folder: Path, tower: Backbone) -> None:
    inputs, _ = tower.preprocess.collate(prepare(tower, examples_of(tower)))
    found = tower.capture(inputs, tower.layers)
    assert tower.layers == ("embeddings", "blocks.0", "blocks.1", "projected")
    assert tower.final_layer == tower.arch.final_layer == "projected"
    assert (tower.arch.width, tower.arch.state_width) == (SHARED, 32)
    assert found["projected"].shape == (6, 1, SHARED)
    torch.testing.assert_close(found["projected"][:, 0], published_embeddings(folder, tower, inputs))


def test_the_states_are_those_of_the_tower_alone(folder: Path, tower: Backbone) -> None:
    plain = load(folder, "text" if tower.arch.modality == "text" else "vision", "")
    inputs, _ = tower.preprocess.collate(prepare(tower, examples_of(tower)))
    states = tower.arch.states
    assert states == plain.arch.states
    for layer, value in plain.capture(inputs, states).items():
        torch.testing.assert_close(tower.capture(inputs, [layer])[layer], value)
    assert tower.arch.prefix_tokens == plain.arch.prefix_tokens == (tower.arch.modality == "image")


def test_a_store_keeps_one_token_of_it_beside_ragged_states(tower: Backbone, tmp_path: Path) -> None:
    examples = examples_of(tower)
    store = ZarrStore(build_store(tower, examples, tmp_path).folder)
    live = LiveStore(tower, prepare(tower, examples))
    index = np.array([3, 0, 5])
    read, computed = (kept.read(index, tower.layers) for kept in (store, live))
    assert store.architecture == tower.arch
    assert read.mask.tolist() == [[True]] * 3
    for layer in tower.layers:
        assert torch.equal(read.mask_of(layer), computed.mask_of(layer))
        torch.testing.assert_close(read.layers[layer], computed.layers[layer], atol=1e-5, rtol=1e-5)
    ragged = read.mask_of("blocks.1")
    assert bool(ragged.all()) is (tower.arch.modality == "image")


def method_of(name: str, settings: dict[str, str]) -> Any:
    return find_method(name).configured(settings)


def cached_batch(method: CachedMethod, backbone: Backbone, count: int = 6) -> Batch:
    prepared = prepare(backbone, examples_of(backbone, count))
    read = LiveStore(backbone, prepared).read(np.arange(count), method.layers(backbone.arch))
    return Batch(read.mask, read.layers, masks=read.masks)


def body_of(method: CachedMethod, backbone: Backbone) -> Body:
    widths = {layer: width for layer, (_, width) in backbone.shapes(method.layers(backbone.arch)).items()}
    torch.manual_seed(1)
    return method.build(backbone.arch, widths, lambda: weights_of(backbone))


# UniPT's CLIP4Clip form (methods: X_l = Linear(ReLU(H_l)), anchor from the one projected token), one example at a time


def linear(layer: Any, x: Row) -> Row:
    rows, bias = layer.weight.tolist(), layer.bias.tolist()
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(rows, bias, strict=True)]


def relu(x: Row) -> Row:
    return [max(v, 0.0) for v in x]


def dot(x: Row, y: Row) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def naive(body: SingleAnchor, embedding: Row, states: list[list[Row]], summary: int) -> Row:
    """`states`: of every layer the real tokens; `summary`: which of them sums the example up."""
    anchor = linear(body.anchor, relu(embedding))
    values, logits = [], []
    for layer, tokens in zip(body.down, states, strict=True):
        guide = [linear(layer, relu(token)) for token in tokens]
        scores = relu([dot(anchor, x) for x in guide])
        total = max(sum(scores), 1e-6)
        value = list(guide[summary])
        for score, x in zip(scores, guide, strict=True):
            value = [v + score / total * one for v, one in zip(value, x, strict=True)]
        mean = [sum(column) / len(guide) for column in zip(*guide, strict=True)]
        values.append(value)
        logits.append(linear(body.gate, [a * t for a, t in zip(anchor, mean, strict=True)])[0])
    shares = [math.exp(logit - max(logits)) for logit in logits]
    columns = zip(*values, strict=True)
    merged = [dot(shares, list(column)) / sum(shares) for column in columns]
    return [q + u for q, u in zip(embedding, linear(body.up, relu(merged)), strict=True)]


@pytest.mark.parametrize("lean", ["true", "false"])
def test_unipt_equals_its_formula_on_a_tower(tower: Backbone, lean: str) -> None:
    method = method_of("unipt", {"form": "single_anchor", "reduction": "1", "lean": lean})
    body, batch = body_of(method, tower).double(), cached_batch(method, tower)
    assert isinstance(body, SingleAnchor)
    exact = DoubleBatch(batch.mask, batch.activations, masks=batch.masks)
    out = body(exact)
    assert out.shape == (6, SHARED)
    for row in range(6):
        real = batch.mask_of("blocks.0")[row]
        states = [batch.state(layer)[row][real].double().tolist() for layer in tower.arch.states]
        summary = int(real.sum()) - 1 if tower.arch.modality == "text" else 0
        expected = naive(body, batch.state("projected")[row, 0].double().tolist(), states, summary)
        torch.testing.assert_close(out[row].detach(), torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-9)


class DoubleBatch(Batch):
    """Read in float64."""

    def state(self, layer: str) -> torch.Tensor:
        return self.activations[layer].double()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["unipt", "sherl_single_anchor"])
def test_clip4clip_has_the_published_number_of_parameters(name: str) -> None:
    settings = {"form": "single_anchor", "reduction": "1"} if name == "unipt" else {}
    method, counts = method_of(name, settings), []
    for which in ("text", "vision"):
        backbone = config_backbone("clip-vit-b32", tower=which, projected=True, max_length=32)
        assert (backbone.arch.width, backbone.arch.state_width) == (512, {"text": 512, "vision": 768}[which])
        found = predict(method, backbone, Step(4, num_outputs=2))
        counts.append(found.trainable_params - found.head_params)
    if name == "unipt":
        assert counts == [3_940_353, 5_644_289]
    assert sum(counts) == {"unipt": 9_584_642, "sherl_single_anchor": 9_598_006}[name]


CACHED = {
    "unipt": {"form": "single_anchor"},
    "sherl_single_anchor": {},
    "lst": {"reduction": "4"},
    "lst-merged": {"reduction": "4", "merge_last": "true", "lean": "false"},
}


@pytest.mark.parametrize("name", CACHED)
def test_a_cached_method_yields_the_width_of_the_embedding_and_learns(name: str, tower: Backbone) -> None:
    method = method_of(name.split("-")[0], CACHED[name])
    assert refusal(method, tower.arch, Form()) is None
    body, batch = body_of(method, tower), cached_batch(method, tower)
    out = body(batch)
    assert body.width == SHARED
    assert out.flatten(1).shape == (6, SHARED)
    out.square().sum().backward()
    still = {n for n, p in trained(body).items() if p.grad is None or not p.grad.any()}
    assert still <= {"gate.bias"}  # which cancels in UniPT's softmax


def test_the_ladder_hands_on_its_summary_token(tower: Backbone) -> None:
    method = method_of("lst", {"reduction": "4", "init": "random"})
    body, batch = body_of(method, tower), cached_batch(method, tower)
    summed = body(batch)
    body.summed = False  # type: ignore[assignment]
    real = batch.mask_of("blocks.1").sum(1)
    position = real - 1 if tower.arch.modality == "text" else torch.zeros_like(real)
    torch.testing.assert_close(summed[:, 0], body(batch)[torch.arange(6), position])


@pytest.mark.parametrize("name", CACHED)
def test_texts_do_not_depend_on_who_is_beside_them(name: str, folder: Path) -> None:
    backbone = load(folder, "text")
    method = method_of(name.split("-")[0], CACHED[name])
    body, batch = body_of(method, backbone), cached_batch(method, backbone)
    shortest = int(batch.mask_of("blocks.0").sum(1).argmin())
    alone = [prepare(backbone, examples_of(backbone))[shortest]]
    read = LiveStore(backbone, alone).read(np.array([0]), method.layers(backbone.arch))
    torch.testing.assert_close(
        body(Batch(read.mask, read.layers, masks=read.masks))[0], body(batch)[shortest], atol=1e-5, rtol=1e-5
    )


LIVE = ("lora", "dora", "full", "bitfit", "houlsby", "pfeiffer", "adaptformer", "prefix_tuning", "ssf", "vpt")


@pytest.mark.parametrize("name", LIVE)
def test_a_live_method_trains_to_the_embedding(name: str, tower: Backbone) -> None:
    method, backbone = method_of(name, {}), copy.deepcopy(tower)
    assert isinstance(method, LiveMethod)
    assert refusal(method, backbone.arch, Form()) is None
    inputs, _ = backbone.preprocess.collate(prepare(backbone, examples_of(backbone)))
    with torch.no_grad():
        before = backbone.tokens(inputs)
    body = method.network(backbone)
    out = body(Batch(torch.ones(6, 1, dtype=torch.bool), inputs=inputs))
    assert out.shape == (6, 1, SHARED)
    assert not any("projection" in parameter for parameter in trained(body)) or name == "full"
    if name in ("lora", "dora", "full", "bitfit", "houlsby", "pfeiffer", "adaptformer"):  # start at the function
        torch.testing.assert_close(out.detach(), before, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    assert any(bool(p.grad.any()) for p in trained(body).values() if p.grad is not None)


@pytest.mark.parametrize("deep", ["true", "false"])
def test_the_end_token_is_found_behind_prompts(folder: Path, deep: str) -> None:
    backbone = load(folder, "text")
    inputs, mask = backbone.preprocess.collate(prepare(backbone, examples_of(backbone)))
    assert mask is not None
    tower: Any = backbone.module
    seen: dict[str, torch.Tensor] = {}
    tower.text_model.final_layer_norm.register_forward_hook(lambda _, __, out: seen.update(tokens=out))
    tower.text_projection.register_forward_pre_hook(lambda _, args: seen.update(pooled=args[0]))
    method_of("vpt", {"prompts": "3", "deep": deep}).network(backbone)(Batch(mask[:, :1], inputs=inputs))
    assert seen["tokens"].shape[1] == mask.shape[1] + 3
    assert torch.equal(seen["pooled"], seen["tokens"][torch.arange(6), 3 + mask.sum(1) - 1])


@pytest.mark.parametrize("name", ["partial", "lora@last1"])
def test_the_last_blocks_restart_to_the_same_embedding(name: str, tower: Backbone) -> None:
    method = method_of(name, {})
    assert isinstance(method, PrefixMethod)
    assert refusal(method, tower.arch, Form()) is None
    first = method.first_block(tower.arch)
    prepared = prepare(tower, examples_of(tower))
    inputs, _ = tower.preprocess.collate(prepared)
    read = LiveStore(tower, prepared).read(np.arange(6), [entering_layer(first)])
    body = method.build(Suffix(copy.deepcopy(tower), first))
    out = body(Batch(read.mask, read.layers, masks=read.masks).entering(entering_layer(first)))
    with torch.no_grad():
        torch.testing.assert_close(out, tower.tokens(inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "said"), [("unipt", "unipt.form=single_anchor"), ("qst", "leave .projected out"), ("dtl", "one embedding")]
)
def test_a_method_of_final_tokens_says_so(name: str, said: str, tower: Backbone) -> None:
    assert re.search(said, str(refusal(method_of(name, {}), tower.arch, Form())))


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("?tower=vision&projected=yes", "true or false; found 'yes'"),
        ("?projected=true", "say which"),
        ("?tower=sound&projected=true", "towers text, vision"),
    ],
)
def test_other_names_are_refused(folder: Path, uri: str, said: str) -> None:
    with pytest.raises(SidebenchError, match=said):
        load_backbone(f"hf:{folder}{uri}", home=folder, device=CPU)


def test_only_clip_has_a_projection(models: Path) -> None:
    with pytest.raises(SidebenchError, match="of type bert; projected=true is for CLIP"):
        load_backbone(f"hf:{models / 'bert'}?projected=true", home=models, device=CPU)
    with pytest.raises(SidebenchError, match="of type vit"):
        config_backbone("vit-base", projected=True)
