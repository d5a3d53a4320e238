"""Backbones: the same layer names in every family, the forward that reads them, and what refuses to load."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from toys import BLOCKS, HEADS, IMAGE_SIZE, PATCH, WIDTH

from sidebench.cache.backbone import Backbone
from sidebench.cache.block_weights import attention_projections, read_weights
from sidebench.cache.errors import SidebenchError
from sidebench.cache.load import load_backbone, weights_sha256
from sidebench.cache.preprocess import ImagePreprocess, PlainImageProcessor

FAMILIES = ("bert", "vit", "dinov2", "clip_vision", "clip_text")


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return request.getfixturevalue(f"tiny_{request.param}")


def _batch(backbone: Backbone, count: int = 5) -> tuple[dict[str, Tensor], Tensor | None]:
    examples = toys.make_texts(count) if backbone.arch.modality == "text" else toys.make_images(count)
    return backbone.preprocess.collate(toys.prepare(backbone, examples))


def _attention(x: Tensor, p: Callable[[str], Any], names: tuple[str, ...], allowed: Tensor) -> Tensor:
    heads = (functional.linear(x, *p(n)).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in names[:3])
    q, k, v = heads  # each (B, H, T, D / H)
    scores = (q @ k.mT / (WIDTH // HEADS) ** 0.5).masked_fill(~allowed, -torch.inf)
    return functional.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), *p(names[3]))


def _norm(x: Tensor, p: Callable[[str], Any], name: str, eps: float) -> Tensor:
    weight, bias = p(name)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt() * weight + bias


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_BERT_ATTENTION = tuple(f"attention.{n}" for n in ("self.query", "self.key", "self.value", "output.dense"))
_DINOV2_ATTENTION = tuple(f"attention.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj"))
_CLIP_ATTENTION = tuple(f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj"))


def _reference(backbone: Backbone, inputs: dict[str, Tensor], mask: Tensor | None) -> dict[str, Tensor]:
    """Every named layer in float64, from the weights alone: what the five papers say a block computes."""
    weights = {name: tensor.double() for name, tensor in backbone.module.state_dict().items()}
    family, eps = backbone.module.config.model_type, backbone.arch.norm_eps

    def at(prefix: str) -> Callable[[str], Any]:
        return lambda name: (weights[f"{prefix}{name}.weight"], weights.get(f"{prefix}{name}.bias"))

    e = at("embeddings.")
    if backbone.arch.modality == "text":
        ids = inputs["input_ids"]
        length = ids.shape[1]
        allowed = mask[:, None, None, :]
        if family == "bert":
            x = e("word_embeddings")[0][ids] + e("position_embeddings")[0][:length] + e("token_type_embeddings")[0][0]
            x = _norm(x, e, "LayerNorm", eps)
        else:
            x = e("token_embedding")[0][ids] + e("position_embedding")[0][:length]
            allowed = allowed & torch.ones(length, length).tril().bool()
    else:
        name = "patch_embedding" if family.startswith("clip") else "patch_embeddings.projection"
        kernel, bias = e(name)
        patches = functional.conv2d(inputs["pixel_values"].double(), kernel, bias, stride=PATCH).flatten(2).mT
        first = "class_embedding" if family.startswith("clip") else "cls_token"
        cls = weights[f"embeddings.{first}"].reshape(1, 1, -1).expand(len(patches), 1, -1)
        position = "position_embedding.weight" if family.startswith("clip") else "position_embeddings"
        x = torch.cat([cls, patches], 1) + weights[f"embeddings.{position}"]
        if family.startswith("clip"):
            x = _norm(x, at(""), "pre_layrnorm", eps)
        allowed = torch.ones(1, dtype=torch.bool)

    found = {"embeddings": x}
    for i in range(BLOCKS):
        p = at(f"{backbone.blocks_path}.{i}.")
        if family == "bert":
            x = _norm(x + _attention(x, p, _BERT_ATTENTION, allowed), p, "attention.output.LayerNorm", eps)
            inner = functional.gelu(functional.linear(x, *p("intermediate.dense")))
            x = _norm(x + functional.linear(inner, *p("output.dense")), p, "output.LayerNorm", eps)
        elif family.startswith("clip"):
            x = x + _attention(_norm(x, p, "layer_norm1", eps), p, _CLIP_ATTENTION, allowed)
            inner = _quick_gelu(functional.linear(_norm(x, p, "layer_norm2", eps), *p("mlp.fc1")))
            x = x + functional.linear(inner, *p("mlp.fc2"))
        elif family == "vit":
            named = read_weights(backbone).blocks[i]  # its module names changed between versions; the formula did not
            lookup = {n: tuple(None if t is None else t.double() for t in getattr(named, n)) for n in _BLOCK}
            x = x + _attention(_norm(x, lookup.__getitem__, "norm1", eps), lookup.__getitem__, _BLOCK[:4], allowed)
            inner = functional.gelu(functional.linear(_norm(x, lookup.__getitem__, "norm2", eps), *lookup["fc1"]))
            x = x + functional.linear(inner, *lookup["fc2"])
        else:
            prefix = f"{backbone.blocks_path}.{i}."
            attended = _attention(_norm(x, p, "norm1", eps), p, _DINOV2_ATTENTION, allowed)
            x = x + attended * weights[f"{prefix}layer_scale1.lambda1"]
            inner = functional.gelu(functional.linear(_norm(x, p, "norm2", eps), *p("mlp.fc1")))
            x = x + functional.linear(inner, *p("mlp.fc2")) * weights[f"{prefix}layer_scale2.lambda1"]
        found[f"blocks.{i}"] = x
    final = {"vit": "layernorm", "dinov2": "layernorm", "clip_text_model": "final_layer_norm"}.get(family)
    if final:
        found["norm"] = _norm(x, at(""), final, eps)
    return found


_BLOCK = ("query", "key", "value", "out", "norm1", "norm2", "fc1", "fc2")


def test_every_named_layer_equals_a_float64_reference_written_from_the_paper(backbone: Backbone) -> None:
    inputs, mask = _batch(backbone)
    found = backbone.capture(inputs, backbone.layers)
    wanted = _reference(backbone, inputs, mask)
    assert tuple(found) == tuple(wanted) == backbone.layers
    for layer, value in wanted.items():
        real = slice(None) if mask is None else mask
        torch.testing.assert_close(found[layer][real].double(), value[real], rtol=1e-4, atol=1e-4, msg=layer)


def test_the_architecture_says_what_the_configuration_says(backbone: Backbone) -> None:
    arch = backbone.arch
    assert (arch.blocks, arch.width, arch.heads, arch.mlp_width) == (BLOCKS, WIDTH, HEADS, toys.MLP)
    assert arch.states == ("embeddings", "blocks.0", "blocks.1")
    assert arch.norm == ("post" if arch.name == "BertModel" else "pre")
    assert arch.layer_scale == (arch.name == "Dinov2Model")
    assert arch.final_layer == ("norm" if arch.name in ("ViTModel", "Dinov2Model", "CLIPTextModel") else "blocks.1")


def test_the_class_token_leads_images_and_nothing_leads_a_text(backbone: Backbone) -> None:
    assert backbone.arch.prefix_tokens == (1 if backbone.arch.modality == "image" else 0)


def test_registers_are_prefix_tokens_too(tmp_path: Path) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(**toys._image_options(), mlp_ratio=2, num_register_tokens=4)
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    toys.image_processor("Bit").save_pretrained(tmp_path)
    assert toys.load(tmp_path).arch.prefix_tokens == 5


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["blocks.*"], ("blocks.0", "blocks.1")),
        (["norm", "embeddings"], ("embeddings", "norm")),
        (["*"], ("embeddings", "blocks.0", "blocks.1", "norm")),
        (["blocks.1", "blocks.*"], ("blocks.0", "blocks.1")),
        (["layers.0.*fc1"], ("layers.0.mlp.fc1",)),
    ],
)
def test_globs_expand_once_each_in_forward_order(
    tiny_vit: Backbone, patterns: list[str], wanted: tuple[str, ...]
) -> None:
    assert tiny_vit.resolve(patterns) == wanted


def test_an_unknown_layer_suggests_the_nearest_and_says_what_else_works(tiny_vit: Backbone) -> None:
    with pytest.raises(SidebenchError, match=r"no layer 'block\.1'\. Did you mean 'blocks\.1'\?.*dotted module path"):
        tiny_vit.resolve(["block.1"])


def test_a_dotted_module_path_is_a_layer(tiny_vit: Backbone) -> None:
    inputs, _ = _batch(tiny_vit)
    assert tiny_vit.capture(inputs, ["layers.0.mlp.fc1"])["layers.0.mlp.fc1"].shape == (5, 5, toys.MLP)


def test_a_module_that_the_forward_never_reaches_is_named(tiny_dinov2: Backbone) -> None:
    backbone = copy.deepcopy(tiny_dinov2)
    backbone.module.spare = nn.Linear(2, 2)
    with pytest.raises(SidebenchError, match="never reaches spare"):
        backbone.capture(_batch(backbone)[0], ["blocks.0", "spare"])


def test_stopping_early_runs_nothing_beyond_and_changes_no_number(backbone: Backbone) -> None:
    inputs, _ = _batch(backbone)
    everything = backbone.capture(inputs, backbone.layers)
    ran: list[str] = []
    hooks = [
        block.register_forward_hook(lambda *_, i=i: ran.append(f"blocks.{i}"))
        for i, block in enumerate(backbone.blocks)
    ]
    try:
        early = backbone.capture(inputs, ["blocks.0"])
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == ["blocks.0"]
    assert torch.equal(early["blocks.0"], everything["blocks.0"])
    whole = backbone.module(**inputs, **backbone.forward_options).last_hidden_state
    final = everything[backbone.final_layer]
    torch.testing.assert_close(whole, final, rtol=0, atol=0)


def test_a_failing_forward_leaves_no_hook_behind(tiny_bert: Backbone) -> None:
    with pytest.raises(Exception, match="out of range"):
        tiny_bert.capture({"input_ids": torch.full((1, 3), 10**6)}, tiny_bert.layers)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_bert.module.modules())


def test_capture_keeps_no_graph_while_tokens_does(tiny_bert: Backbone) -> None:
    backbone = copy.deepcopy(tiny_bert)
    backbone.module.requires_grad_(True)
    inputs, _ = _batch(backbone)
    assert not any(value.requires_grad for value in backbone.capture(inputs, backbone.layers).values())
    assert backbone.tokens(inputs).requires_grad


def test_dropout_in_the_checkpoint_is_off(tmp_path: Path) -> None:
    backbone = toys.load(toys.save_bert(tmp_path, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5))
    inputs, _ = _batch(backbone)
    once, twice = backbone.tokens(inputs), backbone.tokens(inputs)
    assert torch.equal(once, twice)


@pytest.mark.parametrize("family", ["bert", "clip_text"])
def test_a_text_means_the_same_beside_a_longer_one(family: str, request: pytest.FixtureRequest) -> None:
    backbone: Backbone = request.getfixturevalue(f"tiny_{family}")
    short, long = backbone.preprocess.prepare(["good film", "the plot was very dull and the cast not good"])
    assert short.tolist() == [2, 9, 6, 3], "[CLS] good film [SEP]"
    inputs, mask = backbone.preprocess.collate([short, long])
    assert mask is not None
    assert inputs["input_ids"][0].tolist() == [2, 9, 6, 3] + [0] * (len(long) - 4)
    assert inputs["attention_mask"].tolist() == mask.long().tolist()
    assert mask.sum(1).tolist() == [4, len(long)]
    alone = backbone.capture(backbone.preprocess.collate([short])[0], backbone.layers)
    beside = backbone.capture(inputs, backbone.layers)
    for layer in backbone.layers:
        torch.testing.assert_close(beside[layer][:1, :4], alone[layer], rtol=1e-5, atol=1e-5)


def test_long_texts_are_cut_at_max_length_and_keep_their_end_token(models: Path) -> None:
    backbone = toys.load(models / "bert", max_length=6)
    assert backbone.preprocess.prepare(["the film was good and the cast fine"])[0].tolist() == [2, 5, 6, 8, 9, 3]


def test_used_parameters_leave_out_what_the_final_tokens_do_not_depend_on(backbone: Backbone) -> None:
    used, every = backbone.used_parameters(), dict(backbone.module.named_parameters())
    unused = {
        "BertModel": {"pooler.dense.weight", "pooler.dense.bias"},
        "ViTModel": {"pooler.dense.weight", "pooler.dense.bias"},
        "Dinov2Model": {"embeddings.mask_token"},
        "CLIPVisionModel": {"post_layernorm.weight", "post_layernorm.bias"},
        "CLIPTextModel": set(),
    }[backbone.arch.name]
    assert set(every) - set(used) == unused
    assert not any(p.requires_grad for p in every.values())
    assert all(used[name] is every[name] for name in used)


def test_query_and_value_projections_are_found_by_name_in_every_family(backbone: Backbone) -> None:
    for block in backbone.blocks:
        found = attention_projections(block)
        assert len(found) == 2
        assert all(m.weight.shape == (WIDTH, WIDTH) for m in found.values())


# Checkpoints


def _add_tokens(folder: Path) -> None:
    tokenizer = toys.tokenizer()
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(folder)


def _reshape_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_a_checkpoint_that_lacks_weights_is_refused_by_name(tmp_path: Path) -> None:
    folder = toys.save_bert(tmp_path)
    _reshape_weights(folder, lambda held: {n: t for n, t in held.items() if "layer.1.attention.self.key" not in n})
    with pytest.raises(SidebenchError, match=r"lacks 2 weights of BertModel, the first is encoder\.layer\.1\..*random"):
        toys.load(folder)


def test_a_pooler_that_the_checkpoint_lacks_is_neither_missed_nor_hashed(tmp_path: Path) -> None:
    folder = toys.save_bert(tmp_path)
    _reshape_weights(folder, lambda held: {n: t for n, t in held.items() if "pooler" not in n})
    backbone = toys.load(folder)
    assert backbone.unloaded == {"pooler.dense.weight", "pooler.dense.bias"}
    torch.manual_seed(123)  # another random pooler
    again = toys.load(folder)
    assert weights_sha256(backbone.module, backbone.unloaded) == weights_sha256(again.module, again.unloaded)


def test_weights_hash_the_same_however_the_files_are_split(tmp_path: Path, models: Path, tiny_bert: Backbone) -> None:
    folder = toys.save_bert(tmp_path)
    (folder / "model.safetensors").unlink()
    tiny_bert.module.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert weights_sha256(toys.load(folder).module) == weights_sha256(tiny_bert.module)


def test_weights_hash_differently_when_one_bit_changes(tiny_bert: Backbone) -> None:
    changed = copy.deepcopy(tiny_bert.module)
    with torch.no_grad():
        weight = changed.encoder.layer[1].output.dense.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    assert weights_sha256(changed) != weights_sha256(tiny_bert.module)


def test_weights_hash_sees_names_shapes_and_dtypes() -> None:
    def hashed(**tensors: Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_sha256(module)

    base = torch.arange(6.0)
    variants = [{"a": base}, {"b": base}, {"a": base.view(2, 3)}, {"a": base.view(torch.int32)}, {"a": base.bfloat16()}]
    assert len({hashed(**v) for v in variants}) == len(variants)
    assert hashed(a=base, b=base + 1) == hashed(b=base + 1, a=base)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "config.json").unlink(), r"looked for .*config\.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot load the backbone hf:"),
        (lambda f: (f / "config.json").write_text("[1]"), "cannot load the backbone hf:"),
        (lambda f: (f / "config.json").write_text('{"model_type": "nonesuch"}'), "nonesuch"),
        (lambda f: (f / "model.safetensors").unlink(), r"no file named model\.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 40), "cannot load the backbone hf:"),
        (
            lambda f: toys.edit_json(f / "config.json", lambda c: {**c, "hidden_size": 64}),
            "cannot load the backbone hf:",
        ),
        (lambda f: [p.unlink() for p in f.glob("token*")], "holds no tokenizer; every word would be unknown"),
        (lambda f: _add_tokens(f), "has 21 tokens and the backbone embeds 20"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "cannot load the backbone hf:"),
    ],
)
def test_a_damaged_folder_is_one_sentence(tmp_path: Path, damage: Callable[[Path], Any], said: str) -> None:
    folder = toys.save_bert(tmp_path)
    damage(folder)
    with pytest.raises(SidebenchError, match=said) as caught:
        toys.load(folder)
    assert "\n" not in str(caught.value)


def test_an_image_folder_without_processor_is_one_sentence(tmp_path: Path) -> None:
    folder = toys.save_vit(tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(SidebenchError, match="cannot load the backbone hf:"):
        toys.load(folder)


def test_a_hub_name_without_a_hub_says_what_works_instead() -> None:
    with pytest.raises(SidebenchError, match=r"hf:nobody/nothing.*hf:\./folder.*bench backbones"):
        load_backbone("hf:nobody/nothing", home=Path(), device=torch.device("cpu"))


@pytest.mark.parametrize("uri", ["clip", "clip?tower=audio"])
def test_a_network_of_two_towers_asks_which(models: Path, uri: str) -> None:
    with pytest.raises(SidebenchError, match="towers text, vision; say which"):
        load_backbone(f"hf:{models}/{uri}", home=models, device=torch.device("cpu"))


def test_a_network_without_towers_has_none_to_choose(models: Path) -> None:
    with pytest.raises(SidebenchError, match="it is one network, and no tower 'vision'"):
        toys.load(models / "bert", tower="vision")


# Sizes


@pytest.mark.parametrize("length", [-1, 0, 1, 2])
def test_a_length_without_room_for_a_word_is_refused(models: Path, length: int) -> None:
    with pytest.raises(SidebenchError, match=f"--max-length {length} leaves no room for a word"):
        toys.load(models / "bert", max_length=length)


def test_a_length_beyond_the_positions_is_refused(models: Path) -> None:
    with pytest.raises(SidebenchError, match="--max-length 41 is beyond this backbone's 40 positions"):
        toys.load(models / "bert", max_length=41)


@pytest.mark.parametrize("size", [-16, 0])
def test_an_image_size_that_is_none_is_refused(models: Path, size: int) -> None:
    with pytest.raises(SidebenchError, match=f"--image-size {size} is no size"):
        toys.load(models / "vit", image_size=size)


def test_an_image_size_between_patches_names_the_two_that_fit(models: Path) -> None:
    with pytest.raises(SidebenchError, match=r"--image-size 28 is no multiple .* patch size 8; use 24 or 32"):
        toys.load(models / "vit", image_size=28)


@pytest.mark.parametrize(("family", "tower"), [("vit", None), ("dinov2", None), ("clip", "vision")])
def test_another_image_size_interpolates_the_positions(models: Path, family: str, tower: str | None) -> None:
    native, larger = (toys.load(models / family, tower=tower, image_size=size) for size in (None, 2 * IMAGE_SIZE))
    inputs, _ = _batch(larger)
    assert inputs["pixel_values"].shape[-2:] == (2 * IMAGE_SIZE, 2 * IMAGE_SIZE)
    assert larger.tokens(inputs).shape == (5, 1 + 4**2, WIDTH)
    assert larger.arch.prefix_tokens == native.arch.prefix_tokens == 1
    assert larger.preprocess.facts() != native.preprocess.facts()


def test_the_position_of_a_token_is_part_of_its_embedding(tiny_bert: Backbone) -> None:
    inputs = {"input_ids": torch.tensor([[9, 9]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    first, second = tiny_bert.capture(inputs, ["embeddings"])["embeddings"][0]
    assert not torch.allclose(first, second)


# module:


FACTORIES = """
import toys
from torch import nn

class Convs(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.blocks = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    def forward(self, picture):
        return self.blocks(self.stem(picture)).mean((2, 3))

class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Conv2d(3, 8, 8)
    def forward(self, x):
        return self.only(x)

def text():
    from pathlib import Path
    return toys.load(Path(__file__).with_name("bert"))

def number():
    return 7

def broken():
    raise KeyError("weights")

def needs(argument):
    return Convs()

PLAIN = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delitem(sys.modules, "my_factories", raising=False)
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    (tmp_path / "my_typo.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def _module(uri: str, **options: Any) -> Backbone:
    return load_backbone(f"module:{uri}", home=Path(), device=torch.device("cpu"), **options)


def test_a_convolutional_map_becomes_tokens_row_by_row(factories: Path) -> None:
    backbone = _module("my_factories:Convs", image_size=16)
    assert backbone.layers == ("embeddings", "blocks.0", "blocks.1")
    assert (backbone.arch.width, backbone.arch.prefix_tokens, backbone.arch.norm) == (8, 0, None)
    pixels = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    tokens = backbone.capture({"picture": pixels}, ["embeddings"])["embeddings"]
    wanted = backbone.module.stem(pixels)
    assert tokens.shape == (2, 6, 8)
    assert torch.equal(tokens[:, 1 * 3 + 2], wanted[:, :, 1, 2])


def test_a_vector_becomes_one_token() -> None:
    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(nn.Linear(768, 4), nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x.flatten(1))

    backbone = Backbone(Vectors(), ImagePreprocess(PlainImageProcessor(16), 16, None, input_name="x"))
    assert backbone.tokens(backbone.preprocess.dummy(torch.device("cpu"))).shape == (1, 1, 4)


def test_a_factory_may_return_a_backbone_of_its_own(factories: Path) -> None:
    toys.save_bert(factories / "bert")
    assert _module("my_factories:text").arch.modality == "text"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("my_factories", "lacks the factory; write module:package.file:factory"),
        ("my_factories:", "lacks the factory"),
        ("my_factories:Conv", "no factory in my_factories 'Conv'. Did you mean 'Convs'?"),
        ("my_factoriez:Convs", "cannot import 'my_factoriez'"),
        (":Convs", "cannot import ''"),
        ("my_typo:f", "cannot import 'my_typo' for module:my_typo:f: SyntaxError"),
        ("my_factories:number", "returned int; wanted a torch.nn.Module or a Backbone"),
        ("my_factories:broken", "calling broken() for module:my_factories:broken failed: KeyError: 'weights'"),
        ("my_factories:needs", "missing 1 required positional argument"),
        ("my_factories:PLAIN", "not callable"),
        ("my_factories:Flat", "Flat has no blocks to name"),
    ],
)
def test_a_factory_that_gives_no_backbone_is_one_sentence(factories: Path, uri: str, said: str) -> None:
    with pytest.raises(SidebenchError) as caught:
        _module(uri, image_size=16)
    assert said in str(caught.value)


# Preprocessing facts


def test_the_facts_name_whatever_changes_the_tensors(models: Path, tmp_path: Path) -> None:
    base = toys.load(models / "bert").preprocess.facts()
    assert json.loads(json.dumps(base)) == base
    assert toys.load(models / "bert", max_length=20).preprocess.facts() != base
    folder = toys.save_bert(tmp_path)
    toys.edit_json(folder / "tokenizer.json", lambda t: t["model"]["vocab"].update(good=10, bad=9))
    assert toys.load(folder).preprocess.facts() != base


def test_using_a_tokenizer_does_not_change_its_facts(models: Path) -> None:
    preprocess = toys.load(models / "bert").preprocess
    before = preprocess.facts()
    preprocess.prepare(["good", "bad film"])
    assert toys.load(models / "bert").preprocess.facts() == preprocess.facts() == before


def test_the_plain_processor_scales_and_normalises_as_torchvision_documents() -> None:
    from PIL import Image

    red = Image.new("RGB", (9, 5), (255, 0, 0))
    pixels = PlainImageProcessor(4)(images=[red])["pixel_values"]
    wanted = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    torch.testing.assert_close(pixels, wanted.view(1, 3, 1, 1).expand(1, 3, 4, 4))
