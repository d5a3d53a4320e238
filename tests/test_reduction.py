"""Which tokens are kept, against loops in float64; what methods are told of the backbone; and what is lost."""

import dataclasses
import subprocess
import sys

import by_hand
import numpy as np
import pytest
import torch
import toys
from torch import Tensor

from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone
from sidebench.cache.build import CaptureOptions, plan
from sidebench.cache.errors import SidebenchError
from sidebench.cache.fidelity import examine
from sidebench.cache.pooling import masked_mean, pooling_mask
from sidebench.cache.reduction import Projection, reduction_of

TEXT = Architecture("Text", "text", 2, 8, 0, "blocks.1", heads=2, norm="post")
CAUSAL = dataclasses.replace(TEXT, name="Causal", causal=True)
IMAGE = Architecture("Image", "image", 2, 8, 1, "norm", heads=2, norm="pre")
REGISTERS = dataclasses.replace(IMAGE, name="Registers", prefix_tokens=3)
BARE = dataclasses.replace(IMAGE, name="Bare", prefix_tokens=0)
ARCHITECTURES = {a.name: a for a in (TEXT, CAUSAL, IMAGE, REGISTERS, BARE)}
LENGTHS = (6, 1, 3)
SIDE = 5  # patches per side: no multiple of a grid of 2 or 3


def _draw(arch: Architecture, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """(B, T, D) and its mask, with noise in the padding."""
    draw = np.random.default_rng(seed)
    if arch.modality == "image":
        return torch.from_numpy(draw.standard_normal((3, arch.prefix_tokens + SIDE**2, 8))).float(), None
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.from_numpy(draw.standard_normal((3, max(LENGTHS), 8))).float(), mask


FORMS = ("all", "cls", "mean", "cls+mean", "first:1", "first:2", "first:4", "first:99", "proj:1", "proj:5")
CASES = [(tokens, name) for tokens in FORMS for name in ARCHITECTURES if "cls" not in tokens or name != "Bare"]
CASES += [(f"grid:{k}", name) for k in (1, 2, 3, 5) for name in ("Image", "Registers", "Bare")]


@pytest.mark.parametrize(("tokens", "name"), CASES)
def test_what_is_kept_is_what_a_loop_keeps(tokens: str, name: str) -> None:
    arch = ARCHITECTURES[name]
    reduction = reduction_of(tokens, arch, 7)
    value, mask = _draw(arch)
    kept, kept_mask = reduction.keep(value, mask)
    lengths = np.array(LENGTHS) if mask is not None else None
    reduced = None if lengths is None else reduction.lengths(lengths)
    stated = reduction.shape(None if mask is not None else value.shape[1], 8)
    for row in range(3):
        real = value[row] if mask is None else value[row][mask[row]]
        wanted = by_hand.kept(tokens, arch, real.double().numpy(), 7)
        found = kept[row] if kept_mask is None else kept[row][kept_mask[row]]
        torch.testing.assert_close(found.double(), torch.from_numpy(wanted), rtol=1e-5, atol=1e-6)
        assert stated[1] == wanted.shape[1]
        if stated[0] is None:
            assert reduced is not None
            assert reduced[row] == len(wanted)
        else:
            assert stated[0] == len(wanted)


@pytest.mark.parametrize(("tokens", "name"), CASES)
def test_a_mean_and_a_first_token_over_what_is_kept_mean_what_they_meant(tokens: str, name: str) -> None:
    """`seen` tells where the prefix of what is kept ends, so that pooling needs no case per form."""
    arch = ARCHITECTURES[name]
    reduction = reduction_of(tokens, arch, 7)
    value, mask = _draw(arch)
    kept, kept_mask = reduction.keep(value, mask)
    real = torch.ones(kept.shape[:2], dtype=torch.bool) if kept_mask is None else kept_mask
    mean = masked_mean(kept, pooling_mask(real, reduction.seen.prefix_tokens))
    for row in range(3):
        x = (value[row] if mask is None else value[row][mask[row]]).double().numpy()
        if tokens in ("mean", "cls+mean"):
            torch.testing.assert_close(mean[row].double(), torch.from_numpy(x[arch.prefix_tokens :].mean(0)))
        if tokens in ("cls", "cls+mean"):
            torch.testing.assert_close(kept[row, 0].double(), torch.from_numpy(x[-1] if arch.causal else x[0]))
    assert reduction.seen.prefix_tokens <= kept.shape[1]


def test_what_methods_are_told_is_what_is_kept() -> None:
    def seen(tokens: str, arch: Architecture) -> Architecture:
        return reduction_of(tokens, arch, 0).seen

    assert seen("all", REGISTERS) == REGISTERS
    assert [seen(t, REGISTERS).prefix_tokens for t in ("cls", "mean", "cls+mean", "grid:2")] == [1, 0, 1, 3]
    assert [seen(f"first:{n}", REGISTERS).prefix_tokens for n in (1, 2, 3, 9)] == [1, 2, 3, 3]
    assert [seen(t, TEXT).prefix_tokens for t in ("cls", "mean", "cls+mean", "first:2")] == [0, 0, 1, 0]
    # A mean is last among what is kept, and sums nothing up that a summary token would.
    assert [seen(t, CAUSAL).causal for t in ("all", "cls", "mean", "cls+mean")] == [True, True, False, False]
    assert (seen("proj:5", IMAGE).width, seen("proj:5", IMAGE).norm) == (5, None)
    assert seen("proj:5", IMAGE).states == IMAGE.states


def test_nan_in_padding_does_not_reach_what_is_kept() -> None:
    value, mask = _draw(TEXT)
    assert mask is not None
    spoiled = value.masked_fill(~mask[..., None], torch.nan)
    for tokens in ("mean", "cls", "cls+mean"):
        reduction = reduction_of(tokens, TEXT, 0)
        assert torch.equal(reduction.keep(spoiled, mask)[0], reduction.keep(value, mask)[0])


# The summary token of a real tower


def test_the_last_token_sums_a_causal_text_up_whatever_the_batch_pads(tiny_clip_text: Backbone) -> None:
    assert tiny_clip_text.arch.causal
    texts = toys.make_texts(12)
    inputs, mask = tiny_clip_text.preprocess.collate(toys.prepare(tiny_clip_text, texts))
    value = tiny_clip_text.capture(inputs, ["blocks.1"])["blocks.1"]
    kept, _ = reduction_of("cls", tiny_clip_text.arch, None).keep(value, mask)
    assert mask is not None
    assert len(set(mask.sum(1).tolist())) > 3
    for row in range(12):
        assert torch.equal(kept[row, 0], value[row, int(mask[row].sum()) - 1])


# What is refused


@pytest.mark.parametrize(
    ("tokens", "arch", "parts"),
    [
        ("grid:2", TEXT, ["--tokens grid:2 is for images; Text reads text. Type first:N or mean."]),
        ("cls", BARE, ["wants a class token, and Bare has none; type mean."]),
        ("cls+mean", BARE, ["wants a class token, and Bare has none; type mean."]),
        *[
            (t, IMAGE, [f"no tokens {t!r}; wanted all, cls, mean, cls+mean, grid:K, first:N, proj:M"])
            for t in ("first", "first:0", "grid:-1", "proj:", "proj:1.5", "mean+cls", "ALL", "", "first:1\n", "x")
        ],
        ("first:" + "9" * 400, IMAGE, ["no tokens 'first:999"]),
    ],
)
def test_tokens_that_cannot_be_are_one_sentence(tokens: str, arch: Architecture, parts: list[str]) -> None:
    with pytest.raises(SidebenchError) as caught:
        reduction_of(tokens, arch, 0)
    assert len(str(caught.value)) < 200
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ("grid:3", "--tokens grid:3 wants a square of 3 x 3 patches or more; this layer has 4 patches"),
        (f"proj:{toys.WIDTH}", f"--tokens proj:{toys.WIDTH} keeps no less than this layer's width {toys.WIDTH}."),
        ("proj:999", "keeps no less than this layer's width"),
    ],
)
def test_what_a_layer_is_too_small_for_is_refused_before_the_build(tiny_vit: Backbone, tokens: str, said: str) -> None:
    with pytest.raises(SidebenchError) as caught:
        plan(tiny_vit, toys.make_images(3), CaptureOptions(tokens=tokens))
    assert said in str(caught.value)


def test_a_layer_without_a_square_of_patches_has_no_grid() -> None:
    with pytest.raises(SidebenchError, match="this layer has 6 patches"):
        reduction_of("grid:1", IMAGE, 0).shape(7, 8)


# The projection


def test_the_projection_is_orthonormal_and_another_for_another_seed_or_width() -> None:
    basis = Projection(IMAGE, 24, 3).basis(64)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(24), rtol=0, atol=1e-5)
    assert not torch.equal(basis, Projection(IMAGE, 24, 4).basis(64))
    assert torch.equal(basis, Projection(TEXT, 24, 3).basis(64)), "every layer and backbone of a width is turned alike"


def test_the_projection_is_the_same_in_another_process() -> None:
    code = (
        "from sidebench.cache.reduction import Projection\n"
        "print(Projection(None, 5, 11).basis(32).numpy().tobytes().hex())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert told == Projection(IMAGE, 5, 11).basis(32).numpy().tobytes().hex()


# What is lost


@pytest.mark.parametrize(("tokens", "name"), CASES)
def test_the_best_guess_puts_back_what_was_kept_and_zeros_elsewhere(tokens: str, name: str) -> None:
    arch = ARCHITECTURES[name]
    reduction = reduction_of(tokens, arch, 7)
    value, mask = _draw(arch)
    kept, kept_mask = reduction.keep(value, mask)
    kept = kept if kept_mask is None else kept * kept_mask[..., None]
    back = reduction.restore(kept, mask, value.shape)
    assert back.shape == value.shape
    for row in range(3):
        real = torch.ones(value.shape[1], dtype=torch.bool) if mask is None else mask[row]
        wanted = by_hand.restored(tokens, arch, value[row][real].double().numpy(), 7)
        torch.testing.assert_close(back[row][real].double(), torch.from_numpy(wanted), rtol=1e-5, atol=1e-5)


LOSSY = ("cls", "mean", "cls+mean", "first:2", "proj:5")


@pytest.mark.parametrize(
    ("family", "tokens"),
    [*((family, tokens) for family in ("bert", "clip_text", "vit") for tokens in LOSSY), ("vit", "grid:1")],
)
def test_the_relative_error_is_that_of_the_best_guess(family: str, tokens: str, request: pytest.FixtureRequest) -> None:
    backbone: Backbone = request.getfixturevalue(f"tiny_{family}")
    text = backbone.arch.modality == "text"
    examples = toys.make_texts(20) if text else toys.make_images(20)
    found = examine(plan(backbone, examples, CaptureOptions(tokens=tokens, dtype="float32", seed=7)))
    assert found.channels == {}
    inputs, mask = backbone.preprocess.collate(toys.prepare(backbone, examples))  # 20 are all of them
    captured = backbone.capture(inputs, backbone.layers)
    assert tuple(found.relative_errors) == backbone.layers
    for layer, value in captured.items():
        lost = size = 0.0
        for row in range(20):
            x = (value[row] if mask is None else value[row][mask[row]]).double().numpy()
            lost += float(((by_hand.restored(tokens, backbone.arch, x, 7) - x) ** 2).sum())
            size += float((x**2).sum())
        assert found.relative_errors[layer] == pytest.approx((lost / size) ** 0.5, rel=1e-3)
        assert 0 < found.relative_errors[layer] <= 1 + 1e-6


def test_a_form_that_loses_nothing_has_no_relative_error(tiny_vit: Backbone) -> None:
    found = examine(plan(tiny_vit, toys.make_images(5), CaptureOptions(tokens="grid:2", dtype="float32")))
    assert set(found.relative_errors.values()) == {0.0}


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_what_quantising_loses_is_measured_on_the_same_sample_each_time(tiny_bert: Backbone, dtype: str) -> None:
    texts = toys.make_texts(60)
    found = [examine(plan(tiny_bert, texts, CaptureOptions(dtype=dtype))).relative_errors for _ in range(2)]
    assert all(1e-3 < error < 6e-2 for error in found[0].values())
    assert found[0] == found[1]
