"""LST on an encoder and its decoder against transformers' own T5 blocks at the side width, and from a cache of T5."""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import write_texts
from torch import Tensor, nn
from toys import ToyExamples, load, save_t5
from two_stacks import (
    check_a_cache_trains_as_the_live_backbone,
    check_a_step_is_predicted,
    check_the_loss_falls,
    lean_and_plain,
    numbers_kept,
    random_stacks,
)

from sidebench.adapters import _recompute
from sidebench.adapters._base import Batch, Body
from sidebench.adapters._lst_two_stacks import RMSNorm, SideStack, SlimBlock, TwoLadders, buckets
from sidebench.adapters._registry import find_method
from sidebench.adapters.lst import LST, Config
from sidebench.bench.choice import refusal
from sidebench.bench.compare import compare
from sidebench.bench.outcome import Request
from sidebench.bench.prepare import Inputs
from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone
from sidebench.cache.block_weights import read_weights
from sidebench.cache.configs import config_backbone
from sidebench.cache.form import Form

ARCH = Architecture(
    "Toy",
    "text",
    blocks=4,
    width=16,
    prefix_tokens=0,
    final_layer="norm",
    heads=2,
    mlp_width=24,
    decoder_blocks=3,
    t5_blocks=True,
)
SIDE, HIDDEN = 8, 12  # at reduction 2
ALL = ((0, 1, 2, 3), (0, 1, 2))
TEXTS, TARGETS = (4, 25, 2), (3, 1, 13)  # tokens of each example in the encoder, and in a decoder that is padded too
LAYERS = (*ARCH.states, *ARCH.decoder_states, "norm")
states = partial(
    random_stacks, (ARCH.states, TEXTS), ((*ARCH.decoder_states, "norm"), TARGETS), dict.fromkeys(LAYERS, 16)
)


def shaken(kept: Sequence[tuple[int, ...]] = ALL, **options: Any) -> TwoLadders:
    """In float64, every parameter moved, so that every term shows."""
    torch.manual_seed(0)
    body = TwoLadders(ARCH, dict.fromkeys(LAYERS, ARCH.width), 2, 0.1, kept=kept, **options).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            size = 0.05 if "alpha" in name else 0.3
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return body


# --- transformers' blocks, one example without padding at a time -----------------------------------------------------

NAMES = {"query": "q", "key": "k", "value": "v", "out": "o"}


def t5_block(stack: SideStack, place: int) -> nn.Module:
    """transformers' block with the weights of a side block; the first of a stack owns the table."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Block

    sizes = {"d_model": SIDE, "d_kv": SIDE // 2, "d_ff": HIDDEN, "num_heads": 2, "dropout_rate": 0.0}
    config = T5Config(**sizes, attn_implementation="eager")
    config.is_decoder = stack.decoder
    made = T5Block(config, place == 0, layer_idx=place).double()
    side = stack.blocks[place]
    assert isinstance(side, SlimBlock)
    parts = [("layer.0", "SelfAttention", side.own)]
    if side.across is not None:
        parts.append(("layer.1", "EncDecAttention", side.across))
    values = {
        f"{layer}.{name}.{NAMES[linear]}.weight": getattr(part, linear).weight
        for layer, name, part in parts
        for linear in NAMES
    }
    values |= {f"{layer}.layer_norm.weight": part.norm.weight for layer, _, part in parts}
    last = f"layer.{len(parts)}"
    values[f"{last}.layer_norm.weight"] = side.norm.weight
    values[f"{last}.DenseReluDense.wi.weight"] = side.fc1.weight
    values[f"{last}.DenseReluDense.wo.weight"] = side.fc2.weight
    if place == 0:
        values["layer.0.SelfAttention.relative_attention_bias.weight"] = stack.positions.weight
    made.load_state_dict(values)
    return made


def mixed(alpha: Tensor | None, ours: Tensor, frozen: Tensor) -> Tensor:
    if alpha is None:
        return ours + frozen
    mu = 1 / (1 + math.exp(-float(alpha.detach()) / 0.1))
    return mu * ours + (1 - mu) * frozen


def rms(norm: RMSNorm, x: Tensor) -> Tensor:
    return torch.stack([v / ((v * v).sum() / len(v) + 1e-6).sqrt() * norm.weight for v in x])


def climbed(
    stack: SideStack, kept: Sequence[int], tokens: Mapping[str, Tensor], prefix: str, memory: Tensor | None
) -> Tensor:
    """(T, S) of one example's real tokens."""
    downs = iter(stack.down)
    side = next(downs)(tokens[f"{prefix}embeddings"])
    length = len(side)
    behind = None
    if stack.decoder:
        behind = torch.full((length, length), -1e30, dtype=torch.float64).triu(1)[None, None]
    across = None if memory is None else memory[None]
    bias = None
    for index in range(stack.depth):
        if index not in kept:
            continue
        alpha = None if stack.alpha is None else stack.alpha[index]
        entering = mixed(alpha, side, next(downs)(tokens[f"{prefix}blocks.{index}"]))
        block = t5_block(stack, list(kept).index(index))
        found, bias, _ = block(entering[None], behind, bias, across)
        side = found[0]
    return rms(stack.norm, side)


def reference(body: TwoLadders, kept: Sequence[Sequence[int]], batch: Batch, row: int) -> Tensor:
    real = {**dict.fromkeys(ARCH.states, TEXTS[row]), **dict.fromkeys((*ARCH.decoder_states, "norm"), TARGETS[row])}
    tokens = {layer: batch.state(layer)[row, :length] for layer, length in real.items()}
    memory = climbed(body.encoder, kept[0], tokens, "", None)
    out = body.up(climbed(body.decoder, kept[1], tokens, "decoder.", memory))
    return out if body.alpha_last is None else mixed(body.alpha_last, out, tokens["norm"])


@lean_and_plain
@pytest.mark.parametrize("kept", [ALL, ((1, 2), (1, 2)), ((0,), (0,))], ids=["all", "dropped", "one"])
@pytest.mark.parametrize("options", [{}, {"gated": False}, {"merge_last": True}], ids=["gated", "no_gate", "merged"])
def test_both_ladders_equal_transformers_blocks_at_every_real_token(
    kept: Sequence[tuple[int, ...]], options: dict[str, bool], lean: bool
) -> None:
    body, batch = shaken(kept, lean=lean, **options), states()
    out = body(batch)
    assert out.shape == (3, max(TARGETS), ARCH.width)
    for row, real in enumerate(TARGETS):  # T5's norm sums squares in float32
        torch.testing.assert_close(out[row, :real], reference(body, kept, batch, row), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_positions_fall_into_t5s_buckets(causal: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    place = torch.arange(300)
    wanted = T5Attention._relative_position_bucket(place[None] - place[:, None], bidirectional=not causal)
    assert torch.equal(buckets(300, torch.device("cpu"), causal=causal), wanted)


@lean_and_plain
def test_padding_changes_no_real_token(lean: bool) -> None:
    body, batch = shaken(lean=lean), states()
    for other in (states(more=3), states(more=3, noise=50.0)):
        found = body(other)[:, : max(TARGETS)]
        torch.testing.assert_close(found[batch.mask], body(batch)[batch.mask], atol=1e-10, rtol=1e-10)


def test_the_decoder_does_not_look_ahead() -> None:
    body, batch = shaken(), states()
    changed = {
        layer: torch.cat([state[:, :5], state[:, 5:] + 1], 1) if layer.startswith("decoder") else state
        for layer, state in batch.activations.items()
    }
    out, other = body(batch), body(dataclasses.replace(batch, activations=changed))
    torch.testing.assert_close(other[2, :5], out[2, :5])
    assert not torch.allclose(other[2, 5:], out[2, 5:])


def test_the_decoder_reads_the_encoders_side() -> None:
    body, batch = shaken(), states()
    changed = {**batch.activations, "blocks.2": batch.activations["blocks.2"] + 1}
    assert not torch.allclose(body(dataclasses.replace(batch, activations=changed)), body(batch))


# --- how it begins ---------------------------------------------------------------------------------------------------


def test_the_gates_start_half_open() -> None:
    body = TwoLadders(ARCH, dict.fromkeys(LAYERS, ARCH.width), 2, 0.1, kept=ALL, lean=False).double()
    batch = states()
    for stack, prefix in ((body.encoder, ""), (body.decoder, "decoder.")):
        seen: list[Tensor] = []
        hook = stack.blocks[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        body(batch)
        hook.remove()
        terms = zip(stack.down, (f"{prefix}embeddings", f"{prefix}blocks.0"), strict=False)
        torch.testing.assert_close(seen[0], sum(0.5 * down(batch.state(layer)) for down, layer in terms))


def test_the_projections_start_small_and_without_bias() -> None:
    wide = dataclasses.replace(ARCH, width=256)
    body = TwoLadders(wide, dict.fromkeys(LAYERS, 256), 2, 0.1, kept=ALL)
    for projection in (*body.encoder.down, *body.decoder.down, body.up):
        assert isinstance(projection, nn.Linear)
        assert float(projection.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert not projection.bias.any()


def test_a_dropped_block_is_not_read_and_its_gate_does_not_learn() -> None:
    body, batch = shaken(((1, 3), (1,))), states()
    noise = {
        layer: state * 100 if layer in ("blocks.0", "blocks.2", "decoder.blocks.2") else state
        for layer, state in batch.activations.items()
    }
    out = body(batch)
    assert torch.equal(body(dataclasses.replace(batch, activations=noise)), out)
    out.square().sum().backward()
    for stack, learns in ((body.encoder, [False, True, False, True]), (body.decoder, [False, True, False])):
        assert stack.alpha is not None
        assert stack.alpha.grad is not None
        assert [float(g) != 0 for g in stack.alpha.grad] == learns


def strongest(importance: Tensor, keep: int) -> list[int]:
    ranked = sorted(range(len(importance)), key=lambda i: float(importance[i]), reverse=True)
    return sorted(ranked[:keep])


def rows_to_keep(group: Sequence[Tensor], columns: list[int], keep: int) -> list[int]:
    product = torch.stack([matrix.double().abs()[:, columns] for matrix in group]).prod(0)
    return strongest(product.sum(1), keep)


@pytest.mark.parametrize("fisher", [False, True], ids=["magnitude", "fisher"])
@pytest.mark.parametrize("keep", ["all", "1"])
def test_pruning_walks_up_the_encoder_and_on_up_the_decoder(tiny_t5: Backbone, keep: str, fisher: bool) -> None:
    own = copy.deepcopy(tiny_t5)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in own.module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    named = {name: value.clone() for name, value in own.module.state_dict().items()}
    weights = read_weights(own)
    measure = named
    if fisher:
        with torch.no_grad():
            for parameter in own.module.parameters():
                parameter.copy_(1e-16 * torch.randn(parameter.shape, generator=generator).square())
        measure = own.module.state_dict()
        weights = dataclasses.replace(weights, importance=read_weights(own))
    method = LST(Config(reduction=2, keep=keep, init="fisher" if fisher else "magnitude"))
    body = method.build(own.arch, dict.fromkeys(method.layers(own.arch), 32), lambda: weights)
    assert isinstance(body, TwoLadders)

    kept = strongest(measure["shared.weight"].abs().sum(0), 16)

    def step(names: Sequence[str], sides: Sequence[nn.Linear | None], count: int) -> None:
        nonlocal kept
        rows = rows_to_keep([measure[f"{name}.weight"] for name in names], kept, count)
        for name, side in zip(names, sides, strict=True):
            if side is not None:
                assert torch.equal(side.weight, named[f"{name}.weight"][rows][:, kept]), name
        kept = rows

    for name, stack in (("encoder", body.encoder), ("decoder", body.decoder)):
        assert torch.equal(
            stack.positions.weight, named[f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        )
        for index in range(stack.depth):
            side = stack.blocks[stack.kept.index(index)] if index in stack.kept else None
            assert side is None or isinstance(side, SlimBlock)
            at = f"{name}.block.{index}.layer"
            for layer, kind in enumerate(("SelfAttention", "EncDecAttention") if stack.decoder else ("SelfAttention",)):
                part = side and (side.across if layer else side.own)
                assert not part or torch.equal(part.norm.weight, named[f"{at}.{layer}.layer_norm.weight"][kept])
                linears = [part.query, part.key, part.value] if part else [None] * 3
                step([f"{at}.{layer}.{kind}.{letter}" for letter in "qkv"], linears, 16)
                step([f"{at}.{layer}.{kind}.o"], [part.out if part else None], 16)
            at = f"{at}.{2 if stack.decoder else 1}"
            assert not side or torch.equal(side.norm.weight, named[f"{at}.layer_norm.weight"][kept])
            step([f"{at}.DenseReluDense.wi"], [side.fc1 if side else None], 32)
            step([f"{at}.DenseReluDense.wo"], [side.fc2 if side else None], 16)
        assert torch.equal(stack.norm.weight, named[f"{name}.final_layer_norm.weight"][kept])


# --- how many numbers, and where it works ----------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def built(arch: Architecture, **options: Any) -> Body:
    method = LST(Config(init="random", **options))
    return method.build(arch, dict.fromkeys(method.layers(arch), arch.width), lambda: pytest.fail("no weights needed"))


def test_an_eighth_of_t5_base_with_nine_of_twelve_blocks_is_the_share_that_is_reported() -> None:
    arch = config_backbone("t5-base", tower="both").arch
    assert LST().refusal(arch) is None
    assert count(built(arch, keep="1,2,3,5,6,7,9,10,11")) == 3_878_712
    assert round(100 * 3_878_712 / 222_903_552, 2) == 1.74


def test_the_docstring_formula_counts_the_parameters() -> None:
    d, s, f, h = ARCH.width, SIDE, HIDDEN, 2
    for keep, k, k_dec in (("all", 4, 3), ("1,2", 2, 2), ("0", 1, 1)):
        encoder = (k + 1) * (d * s + s) + 4 + k * (4 * s**2 + 2 * s * f + 2 * s) + 32 * h + s
        decoder = (k_dec + 1) * (d * s + s) + 3 + k_dec * (8 * s**2 + 2 * s * f + 3 * s) + 32 * h + s
        formula = encoder + decoder + s * d + d
        assert count(built(ARCH, reduction=2, keep=keep)) == formula
        assert count(built(ARCH, reduction=2, keep=keep, merge_last=True)) == formula + 1
        assert count(built(ARCH, reduction=2, keep=keep, gate="none")) == formula - 4 - 3


def test_it_reads_the_kept_blocks_of_both_stacks() -> None:
    assert LST().layers(ARCH) == LAYERS[:-1]
    assert LST(Config(keep="1", merge_last=True)).layers(ARCH) == (
        *("embeddings", "blocks.1", "decoder.embeddings", "decoder.blocks.1"),
        "norm",
    )


@pytest.mark.parametrize(
    ("arch", "options", "said"),
    [
        (dataclasses.replace(ARCH, t5_blocks=False), {}, "the blocks of the first T5 alone"),
        (ARCH, {"keep": "3"}, "lst.keep=3 is neither all nor numbers from 0 to 2"),
        (ARCH, {"reduction": 16}, "does not split into 2 heads; try --set lst.reduction=8"),
    ],
    ids=["blocks", "keep", "reduction"],
)
def test_what_cannot_be_built_gets_a_sentence(arch: Architecture, options: dict[str, Any], said: str) -> None:
    assert said in str(refusal(LST(Config(**options)), arch, Form()))


@pytest.mark.parametrize(
    "changes",
    [{"feed_forward_proj": "gated-gelu"}, {"d_kv": 16}, {"relative_attention_num_buckets": 16}],
    ids=["gated", "wide heads", "buckets"],
)
def test_blocks_that_are_not_the_first_t5s_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    arch = load(save_t5(tmp_path, **changes), tower="both").arch
    assert arch.decoder_blocks == 2
    assert not arch.t5_blocks
    assert "the blocks of the first T5 alone" in str(refusal(LST(), arch, Form()))


@pytest.mark.parametrize("name", ["lst", "vqt", "qst", "adaptformer", "vpt"])
def test_t5s_encoder_alone_is_refused_as_before(models: Path, name: str) -> None:
    arch = load(models / "t5").arch
    assert not arch.t5_blocks
    assert refusal(find_method(name).configured({}), arch, Form()) is not None


@pytest.mark.parametrize("name", ["vqt", "qst", "adaptformer", "vpt"])
def test_others_that_copy_blocks_do_not_take_t5s_for_theirs(tiny_t5: Backbone, name: str) -> None:
    assert tiny_t5.arch.t5_blocks
    assert find_method(name).configured({}).refusal(tiny_t5.arch) is not None


# --- on T5 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1600, 26], ids=["one slice", "slices of an example"])
def test_lean_and_plain_have_the_same_gradients(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recompute, "TOKENS_AT_A_TIME", tokens)
    batch = states()
    slices = 1 if tokens == 1600 else 3
    found = []
    for lean in (True, False):
        body = shaken(lean=lean, merge_last=True)
        heights: list[int] = []
        body.encoder.register_forward_hook(lambda _, __, out, heights=heights: heights.append(len(out)))
        (body(batch) * torch.arange(ARCH.width)).sum().backward()
        assert heights == ([3 // slices] * slices if lean else [3])
        found.append({name: p.grad for name, p in body.named_parameters()})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, atol=1e-9, rtol=1e-9)
        assert gradient is not None
        assert gradient.abs().max() > 1e-8, name


def test_lean_keeps_a_fraction() -> None:
    assert 5 * numbers_kept(shaken(lean=True), states()) < numbers_kept(shaken(lean=False), states())


def test_a_cache_of_t5_trains_it_as_the_live_backbone_does(
    tiny_t5: Backbone, text_examples: ToyExamples, tmp_path: Path
) -> None:
    assert tiny_t5.arch.t5_blocks
    check_a_cache_trains_as_the_live_backbone(LST(), tiny_t5, text_examples, tmp_path)


@pytest.mark.parametrize("init", ["magnitude", "random"])
def test_the_loss_falls_on_t5_though_the_head_stands_still(
    tiny_t5: Backbone, text_examples: ToyExamples, init: Any
) -> None:
    check_the_loss_falls(LST(Config(reduction=2, init=init)), tiny_t5, text_examples, 80)


@lean_and_plain
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_t5_is_predicted(
    tiny_t5: Backbone, text_examples: ToyExamples, tmp_path: Path, lean: bool, precision: str
) -> None:
    check_a_step_is_predicted(LST(Config(lean=lean)), tiny_t5, text_examples, tmp_path, precision)


def test_a_comparison_prunes_by_squared_gradients_and_is_predicted(models: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "reviews.jsonl", 40)
    inputs = Inputs(f"hf:{models / 't5'}?tower=both", f"jsonl:{tmp_path / 'reviews.jsonl'}", device="cpu")
    settings = {"lst": {"init": "fisher", "fisher_examples": "4"}}
    request = Request(inputs, ("lst",), settings, seeds=(0,), epochs=1)
    outcome = compare(request, home=tmp_path, cache_dir=tmp_path / "caches", runs_dir=tmp_path / "runs")
    (record,) = outcome.records["lst"]
    assert record.error is None
    assert record.measured is not None
    assert record.measured["predicted_peak_bytes"] == record.measured["peak_tracked_bytes"]
