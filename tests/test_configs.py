"""Architectures without weights: presets and files become backbones on fake tensors, everything else a sentence."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor

from sidebench.cache.backbone import Backbone
from sidebench.cache.configs import PRESETS, config_backbone, fake_mode, without_weights
from sidebench.cache.errors import SidebenchError
from sidebench.cache.load import load_backbone

# (blocks, width, heads, tokens of an example, parameters that the final tokens depend on): from the papers and hubs.
PUBLISHED = {
    "vit-base": (12, 768, 12, 197, 85_798_656),
    "vit-large": (24, 1024, 16, 197, 303_301_632),
    "vit-huge": (32, 1280, 16, 257, 630_764_800),
    "deit-small": (12, 384, 6, 197, 21_665_664),
    "dinov2-small": (12, 384, 6, 257, 22_056_192),
    "dinov2-base": (12, 768, 12, 257, 86_579_712),
    "clip-vit-b32": (12, 768, 12, 50, 87_454_464),
    "bert-base": (12, 768, 12, 4, 108_891_648),
    "roberta-base": (12, 768, 12, 4, 124_055_040),
    "t5-base": (12, 768, 12, 4, 109_628_544),
    "t5-large": (24, 1024, 16, 4, 334_939_648),
}


def test_every_preset_is_among_the_published_ones() -> None:
    assert set(PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_shapes_and_no_memory(name: str) -> None:
    blocks, width, heads, tokens, parameters = PUBLISHED[name]
    backbone = config_backbone(name)
    arch = backbone.arch
    assert (arch.blocks, arch.width, arch.heads) == (blocks, width, heads)
    assert all(isinstance(p, FakeTensor) and not p.requires_grad for p in backbone.module.parameters())
    mode = fake_mode(backbone)
    assert mode is not None
    with mode:
        out = backbone.tokens(backbone.preprocess.dummy(backbone.device))
        used = sum(p.numel() for p in backbone.used_parameters().values())
    assert out.shape == (1, tokens, width)
    assert used == parameters


def test_a_folder_a_file_and_the_real_thing_are_one_architecture(models: Path, tiny_vit: Backbone) -> None:
    for name in (models / "vit", models / "vit" / "config.json"):
        assert config_backbone(str(name)).arch == tiny_vit.arch


def test_the_image_processor_of_a_folder_says_the_side(models: Path, tiny_dinov2: Backbone) -> None:
    assert config_backbone(str(models / "dinov2")).preprocess.dummy(torch.device("cpu"))["pixel_values"].shape[-1] == 16
    assert config_backbone(str(models / "dinov2")).arch == tiny_dinov2.arch


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_tower_of_clip_is_chosen(models: Path, tower: str, request: pytest.FixtureRequest) -> None:
    assert config_backbone(str(models / "clip"), tower=tower).arch == request.getfixturevalue(f"tiny_clip_{tower}").arch
    with pytest.raises(SidebenchError, match="towers text, vision"):
        config_backbone(str(models / "clip"))


def test_sizes_are_as_asked_for() -> None:
    larger = config_backbone("vit-base", image_size=384)
    mode = fake_mode(larger)
    assert mode is not None
    with mode:
        assert larger.tokens(larger.preprocess.dummy(larger.device)).shape[1] == 24**2 + 1
    assert config_backbone("bert-base", max_length=64).preprocess.max_length == 64  # type: ignore[attr-defined]
    with pytest.raises(SidebenchError, match="512 positions"):
        config_backbone("bert-base", max_length=513)
    with pytest.raises(SidebenchError, match="no multiple"):
        config_backbone("vit-base", image_size=225)


def test_a_copy_without_weights_is_of_the_same_shapes_and_ties(tiny_bert: Backbone) -> None:
    copied = without_weights(tiny_bert)
    again = without_weights(copied)
    ours, theirs = dict(copied.module.named_parameters()), dict(tiny_bert.module.named_parameters())
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}
    assert copied.arch == tiny_bert.arch
    assert fake_mode(copied) is fake_mode(again) is not None
    assert fake_mode(tiny_bert) is None
    assert not {id(p) for p in ours.values()} & {id(p) for p in again.module.parameters()}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("[]", "holds a JSON list"),
        ("{", "cannot be read"),
        ("\xff", "cannot be read"),
        ("{}", "model type 'None'"),
        ('{"model_type": "resnot"}', "resnot"),
        ('{"model_type": ["vit"]}', "does not know"),
        ('{"model_type": "vit", "hidden_size": 7}', "describes no backbone"),
        ('{"model_type": "vit", "hidden_size": "wide"}', "describes no backbone"),
        ('{"model_type": "vit", "hidden_size": 0}', "describes no backbone"),
        ('{"model_type": "vit", "num_hidden_layers": 1000000000}', "num_hidden_layers"),
        ('{"model_type": "vit", "hidden_size": 1000000000000}', "hidden_size"),
        ('{"model_type": "vit", "num_hidden_layers": 0}', "no blocks|describes no backbone"),
        ('{"model_type": "vit", "hidden_act": "maxout"}', "describes no backbone"),
        ('{"model_type": "vit", "image_size": null}', "image|describes no backbone"),
    ],
)
def test_a_file_that_describes_no_backbone_is_a_sentence(tmp_path: Path, document: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(document.encode("latin-1"))
    with pytest.raises(SidebenchError, match=said):
        config_backbone(str(path))


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 70), st.text(max_size=5), st.lists(st.integers(), max_size=2)
)
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
_OTHERS = ("hidden_act", "layer_norm_eps", "qkv_bias", "auto_map", "num_channels", "dtype", "attn_implementation")
KEYS = st.sampled_from((*_SIZES, *_OTHERS))
SMALL = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_any_configuration_is_a_backbone_or_a_sentence(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "any.json"
    path.write_text(json.dumps({**SMALL, **changes}), "utf-8")
    with contextlib.suppress(SidebenchError):  # anything else fails the test
        assert config_backbone(str(path)).arch.modality == "image"


def test_an_unknown_preset_gets_the_nearest_and_a_missing_file_is_said() -> None:
    with pytest.raises(SidebenchError, match="Did you mean 'vit-base'"):
        config_backbone("vit-bose")
    with pytest.raises(SidebenchError, match="no configuration at"):
        config_backbone("./nowhere/config.json")


def test_a_file_too_large_to_be_a_configuration_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b" " * (2**20 + 1))
    with pytest.raises(SidebenchError, match="larger than any"):
        config_backbone(str(path))


def test_what_must_run_refuses_an_architecture_without_weights(tmp_path: Path) -> None:
    with pytest.raises(SidebenchError, match="no weights to run"):
        load_backbone("hf-config:vit-base", home=tmp_path, device=torch.device("cpu"))


def test_a_text_architecture_has_no_tokenizer() -> None:
    preprocess = config_backbone("bert-base").preprocess
    assert preprocess.facts() == {"kind": "text", "max_length": 128}
    for call in (preprocess.prepare, preprocess.collate):
        with pytest.raises(SidebenchError, match="bench plan"):
            call([])
    with pytest.raises(SidebenchError, match="bench plan"):
        config_backbone("vit-base").preprocess.prepare([None])
