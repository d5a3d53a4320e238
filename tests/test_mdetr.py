"""MDETR: checkpoints under the official names, the numbers of its two stacks, and methods beside and inside it."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from joint_toys import JointToyExamples
from mdetr_toys import ARGS, HEADS, QUERIES, SIDE, TEXT, UNREAD, WIDTH, make_scenes, official_weights, save_mdetr
from torch import Tensor, nn

from sidebench.cache.backbone import Backbone
from sidebench.cache.errors import SidebenchError
from sidebench.cache.examples import ImageText
from sidebench.cache.load import load_backbone
from sidebench.cache.mdetr import Mdetr, MdetrShape
from sidebench.cache.mdetr_load import MdetrPreprocess

ENCODER = ("positions", "embeddings", *(f"blocks.{i}" for i in range(4)))
DECODER = ("decoder.embeddings", *(f"decoder.blocks.{i}" for i in range(3)), "norm")


def loaded(uri: str, **options: Any) -> Backbone:
    return load_backbone(uri, home=Path("."), device=torch.device("cpu"), **{"image_size": SIDE, **options})


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_mdetr(tmp_path_factory.mktemp("mdetr"))


@pytest.fixture(scope="module")
def mdetr(uri: str) -> Backbone:
    return loaded(uri)


@pytest.fixture(scope="module")
def scenes() -> JointToyExamples:
    return make_scenes(9)


@pytest.fixture(scope="module")
def prepared(mdetr: Backbone, scenes: JointToyExamples) -> list[dict[str, Tensor]]:
    return list(mdetr.preprocess.prepare([scenes.load(i) for i in range(len(scenes))]))


# The network in float64, one example at a time, from the tensors of the checkpoint.


def convolved(
    state: Mapping[str, Tensor], x: Tensor, conv: str, norm: str, stride: int = 1, padding: int = 0
) -> Tensor:
    x = nn.functional.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=padding)
    weight, bias, mean, var = (state[f"{norm}.{n}"] for n in ("weight", "bias", "running_mean", "running_var"))
    centred = (x - mean[:, None, None]) / torch.sqrt(var + 1e-5)[:, None, None]
    return centred * weight[:, None, None] + bias[:, None, None]


def trunk(state: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
    """(3, H, W) -> (C, h, w)."""
    body = "backbone.0.body"
    x = convolved(state, pixels[None], f"{body}.conv1", f"{body}.bn1", 2, 3).relu()
    x = nn.functional.max_pool2d(x, 3, 2, 1)
    for stage in range(1, 5):
        index = 0
        while f"{body}.layer{stage}.{index}.conv1.weight" in state:
            at, stride = f"{body}.layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1
            y = convolved(state, x, f"{at}.conv1", f"{at}.bn1").relu()
            y = convolved(state, y, f"{at}.conv2", f"{at}.bn2", stride, 1).relu()
            y = convolved(state, y, f"{at}.conv3", f"{at}.bn3")
            if index == 0:
                x = convolved(state, x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
            x, index = (x + y).relu(), index + 1
    return x[0]


def places(h: int, w: int) -> Tensor:
    """(h w, D), number by number."""
    rows = []
    for y in range(h):
        for x in range(w):
            row = []
            for place, count in ((y, h), (x, w)):
                for channel in range(WIDTH // 2):
                    angle = (place + 1) / (count + 1e-6) * 2 * math.pi / 10000 ** (2 * (channel // 2) / (WIDTH // 2))
                    row.append(math.cos(angle) if channel % 2 else math.sin(angle))
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def normed(state: Mapping[str, Tensor], at: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    spread = torch.sqrt(((x - x.mean(1, keepdim=True)) ** 2).mean(1, keepdim=True) + eps)
    return (x - x.mean(1, keepdim=True)) / spread * state[f"{at}.weight"] + state[f"{at}.bias"]


def attended(state: Mapping[str, Tensor], at: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weight, bias, each = state[f"{at}.in_proj_weight"], state[f"{at}.in_proj_bias"], WIDTH // HEADS
    q, k, v = (x @ weight[i * WIDTH :][:WIDTH].T + bias[i * WIDTH :][:WIDTH] for i, x in enumerate((query, key, value)))
    heads = []
    for h in range(HEADS):
        part = slice(h * each, (h + 1) * each)
        heads.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(each), 1) @ v[:, part])
    return torch.cat(heads, 1) @ state[f"{at}.out_proj.weight"].T + state[f"{at}.out_proj.bias"]


def mlp(state: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    inner = (x @ state[f"{at}.linear1.weight"].T + state[f"{at}.linear1.bias"]).relu()
    return inner @ state[f"{at}.linear2.weight"].T + state[f"{at}.linear2.bias"]


def text_states(state: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """(T, D) of RoBERTa's tokens; RoBERTa itself is transformers'."""
    from transformers import RobertaConfig, RobertaModel

    stem = "transformer.text_encoder."
    roberta = RobertaModel(RobertaConfig(**TEXT), add_pooling_layer=False).double().eval()
    own = {name.removeprefix(stem): t for name, t in state.items() if name.startswith(stem) and name not in UNREAD}
    roberta.load_state_dict(own)
    with torch.no_grad():
        read = roberta(input_ids=ids[None]).last_hidden_state[0]
    at = "transformer.resizer"
    return normed(state, f"{at}.layer_norm", read @ state[f"{at}.fc.weight"].T + state[f"{at}.fc.bias"], 1e-12)


def by_hand(weights: Mapping[str, Tensor], example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every named layer (T, D) of one example."""
    state = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    grid = trunk(state, example["pixel_values"].double())
    image = torch.einsum("chw,dc->hwd", grid, state["input_proj.weight"][:, :, 0, 0]) + state["input_proj.bias"]
    text = text_states(state, example["input_ids"])
    x = torch.cat([image.reshape(-1, WIDTH), text])
    where = torch.cat([places(*grid.shape[1:]), torch.zeros_like(text)])
    found = {"positions": where, "embeddings": x}
    for i in range(4):
        at = f"transformer.encoder.layers.{i}"
        x = normed(state, f"{at}.norm1", x + attended(state, f"{at}.self_attn", x + where, x + where, x))
        x = normed(state, f"{at}.norm2", x + mlp(state, at, x))
        found[f"blocks.{i}"] = x
    queries, memory = state["query_embed.weight"], x
    x = torch.zeros_like(queries)
    found["decoder.embeddings"] = x
    for i in range(3):
        at = f"transformer.decoder.layers.{i}"
        x = normed(state, f"{at}.norm1", x + attended(state, f"{at}.self_attn", x + queries, x + queries, x))
        across = attended(state, f"{at}.cross_attn_image", x + queries, memory + where, memory)
        x = normed(state, f"{at}.norm3", x + across)
        x = normed(state, f"{at}.norm4", x + mlp(state, at, x))
        found[f"decoder.blocks.{i}"] = x
    found["norm"] = normed(state, "transformer.decoder.norm", x)
    return found


def test_every_layer_is_what_the_formulas_give(mdetr: Backbone, prepared: list[dict[str, Tensor]]) -> None:
    """In a batch of images and texts of several sizes."""
    inputs, mask = mdetr.preprocess.collate(prepared[:4])
    assert mask is not None
    assert not mask.all()
    found, weights = mdetr.capture(inputs, mdetr.layers), official_weights()
    for row, example in enumerate(prepared[:4]):
        wanted = by_hand(weights, example)
        for layer in mdetr.layers:
            real = found[layer][row][mask[row]] if layer in ENCODER else found[layer][row]
            torch.testing.assert_close(real.double(), wanted[layer], atol=2e-5, rtol=2e-5)


def test_both_stacks_have_names(mdetr: Backbone) -> None:
    arch = mdetr.arch
    assert mdetr.layers == (*ENCODER, *DECODER)
    assert (arch.blocks, arch.decoder_blocks, arch.final_layer, arch.width) == (4, 3, "norm", WIDTH)
    assert (arch.modality, arch.norm, arch.activation, arch.heads, arch.mlp_width) == (
        "image-text",
        "post",
        "relu",
        HEADS,
        32,
    )
    shapes = mdetr.shapes(mdetr.layers)
    assert shapes == {**dict.fromkeys(ENCODER, (None, WIDTH)), **dict.fromkeys(DECODER, (QUERIES, WIDTH))}


def test_what_is_known_of_an_example_does_not_depend_on_its_neighbours(
    mdetr: Backbone, prepared: list[dict[str, Tensor]]
) -> None:
    """The trunk never sees a batch's padding, and no key that is padding is looked at."""
    inputs, mask = mdetr.preprocess.collate(prepared[:4])
    assert mask is not None
    together = mdetr.capture(inputs, mdetr.layers)
    for row, example in enumerate(prepared[:4]):
        alone_inputs, alone_mask = mdetr.preprocess.collate([example])
        assert alone_mask is not None
        assert alone_mask.all()
        alone = mdetr.capture(alone_inputs, mdetr.layers)
        for layer in mdetr.layers:
            real = together[layer][row][mask[row]] if layer in ENCODER else together[layer][row]
            torch.testing.assert_close(real, alone[layer][0], atol=1e-5, rtol=1e-5)


def test_images_of_one_size_take_one_pass(mdetr: Backbone, prepared: list[dict[str, Tensor]]) -> None:
    same = [prepared[1], prepared[4]]
    inputs, _ = mdetr.preprocess.collate(same)
    assert "sizes" not in inputs
    at_once = mdetr.capture(inputs, ["norm"])["norm"]
    one_by_one = mdetr.capture({**inputs, "sizes": torch.tensor([[SIDE, SIDE]] * 2)}, ["norm"])["norm"]
    torch.testing.assert_close(at_once, one_by_one, atol=1e-5, rtol=1e-5)


# Inputs


@dataclass(frozen=True)
class Closed(JointToyExamples):
    """Examples whose images nobody may open."""

    def load(self, index: int) -> ImageText:
        raise AssertionError(f"image {index} was decoded")


def test_tokens_are_counted_without_opening_an_image(
    mdetr: Backbone, scenes: JointToyExamples, prepared: list[dict[str, Tensor]]
) -> None:
    counts = mdetr.preprocess.token_counts(Closed(scenes.raw, scenes.targets))  # type: ignore[attr-defined]
    inputs, mask = mdetr.preprocess.collate(prepared)
    assert mask is not None
    assert counts.tolist() == mask.sum(1).tolist()
    assert len(set(counts.tolist())) > 3
    assert mdetr.capture(inputs, ["blocks.0"])["blocks.0"].shape[:2] == mask.shape
    for example, count in zip(prepared, counts, strict=True):
        alone, _ = mdetr.preprocess.collate([example])
        assert mdetr.capture(alone, ["blocks.0"])["blocks.0"].shape[1] == count


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((640, 480), (800, 1066)),  # 1066.67 is cut, not rounded
        ((480, 640), (1066, 800)),
        ((500, 500), (800, 800)),
        ((1600, 400), (333, 1332)),  # the longer side would be 3200: the shorter is 1333 / 4, rounded
        ((333, 1332), (1332, 333)),
        ((2000, 1), (1, 2000)),  # no side vanishes
    ],
)
def test_images_are_scaled_as_the_reference_scales_them(
    mdetr: Backbone, size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    assert MdetrPreprocess(mdetr.preprocess.texts).scaled(*size) == wanted  # type: ignore[attr-defined]


def test_pixels_are_normalised_and_padding_is_zero(mdetr: Backbone, scenes: JointToyExamples) -> None:
    (example,) = mdetr.preprocess.prepare([scenes.load(1)])  # 64 x 64 stays as it is
    assert isinstance(example, dict)
    raw = np.asarray(scenes.load(1).image, dtype=np.float64)
    wanted = (raw[5, 7] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(example["pixel_values"][:, 5, 7].numpy(), wanted, atol=1e-6)
    small = {**example, "pixel_values": example["pixel_values"][:, :40, :32]}
    inputs, mask = mdetr.preprocess.collate([example, small])
    assert inputs["pixel_values"][1, :, 40:].abs().sum() + inputs["pixel_values"][1, :, :, 32:].abs().sum() == 0
    assert inputs["sizes"].tolist() == [[64, 64], [40, 32]]
    assert mask is not None
    assert mask[1, :4].tolist() == [True, False, True, False]


@pytest.mark.parametrize("tokens", [6, 8, 12, 13, 21])
def test_an_example_of_any_length_can_be_asked_for(mdetr: Backbone, tokens: int) -> None:
    inputs = mdetr.preprocess.sized(tokens, torch.device("cpu"))  # type: ignore[attr-defined]
    assert inputs["attention_mask"].shape == (1, tokens)
    assert mdetr.capture(inputs, ["blocks.0"])["blocks.0"].shape[1] == tokens


def test_facts_follow_what_changes_the_result(uri: str, mdetr: Backbone) -> None:
    facts = mdetr.preprocess.facts()
    assert facts["image"]["shorter"] == SIDE
    assert loaded(uri, image_size=96).preprocess.facts() != facts
    assert loaded(uri, max_length=10).preprocess.facts() != facts


# Checkpoints


def test_a_checkpoint_loads_to_the_last_tensor(mdetr: Backbone) -> None:
    state = mdetr.module.state_dict()
    official = {name: tensor for name, tensor in official_weights().items() if name not in UNREAD}
    for name, tensor in official.items():
        if "in_proj_" in name:
            stem, _, kind = name.rpartition("in_proj_")
            ours = torch.cat([state.pop(f"{stem}{part}_proj.{kind}") for part in "qkv"])
        else:
            ours = state.pop(name)
        assert torch.equal(ours, tensor), name
    assert not state


def test_plain_weights_are_read_where_there_are_no_averaged_ones(tmp_path: Path) -> None:
    plain = loaded(save_mdetr(tmp_path, model_ema=None)).module.state_dict()
    assert torch.equal(plain["query_embed.weight"], official_weights(1)["query_embed.weight"])


def args(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**ARGS, **changes})


LINEAR1 = "transformer.encoder.layers.0.linear1.weight"
WEIGHTS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing": ({"bbox_embed.layers.2.bias": None}, r"lacks 1 .* bbox_embed\.layers\.2\.bias"),
    "unexpected": ({"isfinal_embed.weight": torch.zeros(1, 16)}, r"first is isfinal_embed\.weight"),
    "another shape": ({"query_embed.weight": torch.zeros(5, 8)}, r"query_embed\.weight is \(5, 8\)"),
    "odd attention": ({LINEAR1.replace("linear1.", "self_attn.in_proj_"): torch.zeros(47, 16)}, "self_attn.* is"),
    "no trunk": ({"backbone.0.body.conv1.weight": None}, r"lacks backbone\.0\.body\.conv1\.weight"),
    "a forged size": ({LINEAR1: torch.zeros(1, 1).expand(9_000_000, 16)}, "speaks of .* weights and has"),
    "a forged scalar": ({LINEAR1: torch.zeros(())}, r"lacks transformer\.encoder\.layers\.0\.linear1\.weight"),
}
PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "another network": ({"model_ema": {"fc.weight": torch.zeros(1)}}, r"lacks input_proj\.weight"),
    "no weights": ({"model_ema": None, "model": None}, "under model_ema or model; found args, epoch"),
    "other positions": ({"args": args(pass_pos_and_query=False)}, "trained with pass_pos_and_query=False"),
    "odd heads": ({"args": args(nheads=3)}, "do not split into nheads=3"),
    "code": ({"args": Path("to a pickle, a path is a call")}, "cannot be read"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    changes, said = WEIGHTS[case]
    state = {name: tensor for name, tensor in {**official_weights(), **changes}.items() if tensor is not None}
    with pytest.raises(SidebenchError, match=said):
        loaded(save_mdetr(tmp_path, model_ema=state))


@pytest.mark.parametrize("case", PARTS)
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, case: str) -> None:
    parts, said = PARTS[case]
    with pytest.raises(SidebenchError, match=said):
        loaded(save_mdetr(tmp_path, **parts))


def test_files_that_are_not_there_are_asked_for(uri: str, tmp_path: Path) -> None:
    file, folder = uri.removeprefix("mdetr:").split("?text=")
    with pytest.raises(SidebenchError, match="no MDETR checkpoint at nowhere"):
        loaded(f"mdetr:nowhere.pth?text={folder}")
    with pytest.raises(SidebenchError, match=r"write mdetr:.*\?text=FOLDER"):
        loaded(f"mdetr:{file}")
    with pytest.raises(SidebenchError, match=r"no config\.json"):
        loaded(f"mdetr:{file}?text={tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SidebenchError, match="describes no RoBERTa"):
        loaded(f"mdetr:{file}?text={tmp_path}")


def test_the_public_sizes_have_the_printed_number_of_parameters() -> None:
    """185.2 M are tuned (as MP-ISMoE prints it): all but the stem and the first stage, which DETR's code freezes."""
    with torch.device("meta"):
        module = Mdetr(MdetrShape())
    counts = {name: p.numel() for name, p in module.named_parameters()}
    still = sum(n for name, n in counts.items() if name.startswith(("backbone.0.body.conv1", "backbone.0.body.layer1")))
    pooler = 768 * 768 + 768  # RoBERTa's, which is counted there and is not read
    assert (sum(counts.values()) + pooler, still) == (185_382_724, 222_400)
    heads = ("class_embed", "bbox_embed", "contrastive_align")
    assert sum(n for name, n in counts.items() if name.startswith(heads)) == 231_300
