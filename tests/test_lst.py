"""LST against its formulas, written out in loops and in float64 (arXiv 2206.06522)."""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from loops import layer_norms, linears, side_block
from method_cases import Case, random_states
from torch import Tensor, nn

from sidebench.adapters._base import Batch
from sidebench.adapters._blocks import SideBlock
from sidebench.adapters.lst import LST, Config, Ladder, kept_blocks
from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone
from sidebench.cache.block_weights import BackboneWeights, BlockWeights, read_weights
from sidebench.cache.errors import SidebenchError

Pair = tuple[Tensor, Tensor | None]
PRE = Architecture(
    "Toy",
    "text",
    blocks=2,
    width=8,
    prefix_tokens=0,
    final_layer="norm",
    heads=2,
    mlp_width=12,
    norm="pre",
    activation="gelu",
    layer_scale=True,
)
POST = dataclasses.replace(PRE, norm="post", layer_scale=False, final_layer="blocks.1", norm_eps=1e-12)
WIDTHS = dict.fromkeys(PRE.states, 8)
LENGTHS = (2, 4, 3)
both_norms = pytest.mark.parametrize("arch", [PRE, POST], ids=["pre", "post"])


def ladder(arch: Architecture, reduction: int = 2, **options: Any) -> Ladder:
    """In float64, every parameter moved, so that every term shows."""
    torch.manual_seed(0)
    widths = dict.fromkeys((*arch.states, arch.final_layer), arch.width)
    body = Ladder(arch, widths, reduction, 0.1, **options).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            size = 0.05 if name.startswith("alpha") else 0.4
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return body


def gate(alpha: Tensor) -> float:
    return 1 / (1 + math.exp(-float(alpha.detach()) / 0.1))


def naive(body: Ladder, states: dict[str, Tensor], arch: Architecture, kept: Sequence[int]) -> Tensor:
    """One example's real tokens. A block that is not kept does nothing to the side state; its gate is not looked at."""
    assert arch.heads is not None
    side = linears(body.down[0], states["embeddings"])
    modules = iter(zip(body.down[1:], body.blocks, strict=True))
    for i in range(arch.blocks):
        if i not in kept:
            continue
        down, block = next(modules)
        step = linears(down, states[f"blocks.{i}"])
        mu = None if body.alpha is None else gate(body.alpha[i])
        mixed = side + step if mu is None else mu * side + (1 - mu) * step
        side = side_block(block, mixed, arch, arch.heads)
    out = linears(body.up, layer_norms(body.norm, side))
    if body.alpha_last is None:
        return out
    mu = gate(body.alpha_last)
    return mu * out + (1 - mu) * states[arch.final_layer]


lean_and_plain = pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])


@lean_and_plain
@both_norms
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "no_gate"])
@pytest.mark.parametrize("merge_last", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("kept", [(0, 1, 2, 3, 4), (1, 2, 4), (0, 3), (2,)], ids=str)
def test_the_ladder_equals_the_formula_at_every_real_token(
    arch: Architecture, kept: tuple[int, ...], merge_last: bool, gated: bool, lean: bool
) -> None:
    deep = dataclasses.replace(arch, blocks=5, final_layer="norm" if arch.norm == "pre" else "blocks.4")
    layers = tuple(dict.fromkeys((*deep.states, deep.final_layer)))
    body = ladder(deep, kept=kept, merge_last=merge_last, gated=gated, lean=lean)
    batch = random_states(layers, dict.fromkeys(layers, 8), LENGTHS)
    out = body(batch)
    for row, real in enumerate(LENGTHS):
        expected = naive(body, {s: batch.state(s)[row, :real] for s in layers}, deep, kept)
        torch.testing.assert_close(out[row, :real], expected, atol=1e-9, rtol=1e-9)


@both_norms
def test_the_gates_start_half_open(arch: Architecture) -> None:
    body = Ladder(arch, WIDTHS, 2, 0.1)
    assert body.alpha is not None
    assert torch.sigmoid(body.alpha / body.temperature).tolist() == [0.5, 0.5]
    seen = inputs_of_blocks(body, batch := float_states(arch))
    first = 0.5 * body.down[0](batch.state("embeddings")) + 0.5 * body.down[1](batch.state("blocks.0"))
    torch.testing.assert_close(seen[0], first)


def float_states(arch: Architecture, seed: int = 0) -> Batch:
    exact = random_states(arch.states, WIDTHS, LENGTHS, seed=seed)
    return Batch(exact.mask, {n: v.float() for n, v in exact.activations.items()})


def inputs_of_blocks(body: Ladder, batch: Batch) -> list[Tensor]:
    seen: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for b in body.blocks]
    body(batch)
    for hook in hooks:
        hook.remove()
    return seen


@both_norms
def test_a_high_alpha_closes_the_ladders(arch: Architecture) -> None:
    body = ladder(arch)
    assert body.alpha is not None
    nn.init.constant_(body.alpha, 100.0)
    batch, other = (random_states(arch.states, WIDTHS, LENGTHS, seed=seed) for seed in (0, 1))
    same_start = {**other.activations, "embeddings": batch.activations["embeddings"]}
    torch.testing.assert_close(body(dataclasses.replace(other, activations=same_start)), body(batch))
    assert not torch.allclose(body(other), body(batch))


@both_norms
def test_a_low_alpha_leaves_each_block_its_own_ladder(arch: Architecture) -> None:
    body = ladder(arch)
    assert body.alpha is not None
    nn.init.constant_(body.alpha, -100.0)
    batch, other = (random_states(arch.states, WIDTHS, LENGTHS, seed=seed) for seed in (0, 1))
    for seen, down, state in zip(inputs_of_blocks(body, batch), body.down[1:], arch.states[1:], strict=True):
        torch.testing.assert_close(seen, down(batch.state(state)))
    same_end = {**other.activations, "blocks.1": batch.activations["blocks.1"]}
    torch.testing.assert_close(body(dataclasses.replace(other, activations=same_end)), body(batch))


@pytest.mark.parametrize(
    "arch", [PRE, POST, dataclasses.replace(PRE, layer_scale=False)], ids=["scaled", "post", "pre"]
)
@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_the_docstring_formula_counts_the_parameters(arch: Architecture, reduction: int) -> None:
    deep = dataclasses.replace(arch, blocks=5)
    number, d, s, f = deep.blocks, deep.width, deep.width // reduction, 12 // reduction
    block = 4 * (s * s + s) + 2 * s * f + f + s + 4 * s + (2 * s if deep.layer_scale else 0)
    for kept in ((0, 1, 2, 3, 4), (1, 3, 4), (2,)):
        k = len(kept)
        formula = (k + 1) * (d * s + s) + number + k * block + 2 * s + s * d + d
        assert count(ladder(deep, reduction, kept=kept)) == formula
        assert count(ladder(deep, reduction, kept=kept, merge_last=True)) == formula + 1
        assert count(ladder(deep, reduction, kept=kept, gated=False)) == formula - number


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_a_dropped_block_is_not_read_and_its_gate_does_not_learn() -> None:
    deep = dataclasses.replace(PRE, blocks=4)
    method = LST(Config(reduction=2, init="random", keep="1, 3"))
    assert method.layers(deep) == ("embeddings", "blocks.1", "blocks.3")
    body = method.build(deep, dict.fromkeys(method.layers(deep), 8), lambda: pytest.fail("random"))
    batch = random_states(method.layers(deep), dict.fromkeys(deep.states, 8), LENGTHS)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    out = body(Batch(batch.mask, {n: v.float() for n, v in batch.activations.items()}))
    out.square().sum().backward()
    gradient = body.get_parameter("alpha").grad
    assert gradient is not None
    assert [float(g) != 0 for g in gradient] == [False, True, False, True]


def test_merging_reads_the_final_layer() -> None:
    layers = LST(Config(reduction=2, keep="0", merge_last=True)).layers
    assert layers(PRE) == ("embeddings", "blocks.0", "norm")
    assert layers(POST) == ("embeddings", "blocks.0", "blocks.1")


@pytest.mark.parametrize("keep", ["", "2", "0,2", "0,,1", "-1", "1.5", "first", "0 1", "99999999999999999999"])
def test_blocks_to_keep_that_are_none_get_a_sentence(keep: str) -> None:
    refused = str(LST(Config(reduction=2, keep=keep)).refusal(PRE))
    assert f"lst.keep={keep} is neither all nor numbers from 0 to 1" in refused


@pytest.mark.parametrize(("keep", "kept"), [("all", (0, 1)), ("1", (1,)), ("1,0", (0, 1)), (" 0 , 0,1 ", (0, 1))])
def test_blocks_to_keep_may_be_named_in_any_order(keep: str, kept: tuple[int, ...]) -> None:
    assert LST(Config(reduction=2, keep=keep)).refusal(PRE) is None
    assert kept_blocks(keep, 2) == kept


def test_the_projections_start_small_and_without_bias() -> None:
    body = Ladder(dataclasses.replace(PRE, width=256), dict.fromkeys(PRE.states, 256), 2, 0.1)
    for projection in (*body.down, body.up):
        assert isinstance(projection, nn.Linear)
        assert float(projection.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert not projection.bias.any()


# --- pruning ---------------------------------------------------------------------------------------------------------


def drawn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


MATRICES = ("query", "key", "value", "out", "fc1", "fc2")


def squares(weights: BackboneWeights) -> BackboneWeights:
    """As small as squared gradients are: the product of three of them is no float32 any more."""

    def square(value: Any) -> Any:
        return tuple(map(square, value)) if isinstance(value, tuple) else 1e-16 * value.square()

    blocks = tuple(
        dataclasses.replace(block, **{name: square(getattr(block, name)) for name in MATRICES})
        for block in weights.blocks
    )
    return BackboneWeights(square(weights.embedding), blocks, weights.norm)


def weights_of(arch: Architecture, seed: int = 3) -> BackboneWeights:
    generator = torch.Generator().manual_seed(seed)
    width, hidden = arch.width, arch.mlp_width
    assert hidden is not None

    def pair(rows: int, columns: int) -> Pair:
        return drawn(rows, columns, generator=generator), drawn(rows, generator=generator)

    def vector() -> Pair:
        return drawn(width, generator=generator), drawn(width, generator=generator)

    def block() -> BlockWeights:
        square = [pair(width, width) for _ in range(4)]
        scales = (drawn(width, generator=generator), drawn(width, generator=generator)) if arch.layer_scale else None
        return BlockWeights(*square, pair(hidden, width), pair(width, hidden), vector(), vector(), scales)

    blocks = tuple(block() for _ in range(arch.blocks))
    return BackboneWeights(drawn(20, width, generator=generator), blocks, vector() if arch.norm == "pre" else None)


def largest(importance: list[float], keep: int) -> list[int]:
    ranked = sorted(range(len(importance)), key=lambda i: importance[i], reverse=True)
    return sorted(ranked[:keep])


def rows_to_keep(group: list[Tensor], columns: list[int], keep: int) -> list[int]:
    """Importances |w| of a group multiplied entry by entry, summed over the columns that are left."""
    importance = []
    for row in range(len(group[0])):
        importance.append(sum(math.prod(abs(float(m[row, c])) for m in group) for c in columns))
    return largest(importance, keep)


def picked(pair: Pair, rows: list[int], columns: list[int]) -> tuple[Tensor, Tensor]:
    weight, bias = pair
    assert bias is not None
    return torch.tensor([[float(weight[r, c]) for c in columns] for r in rows]), bias[rows]


@both_norms
@pytest.mark.parametrize("kept_blocks", [(0, 1, 2), (0, 2), (1,)], ids=str)
@pytest.mark.parametrize("fisher", [False, True], ids=["magnitude", "fisher"])
def test_pruning_keeps_the_rows_and_columns_of_a_naive_walk(
    arch: Architecture, kept_blocks: tuple[int, ...], fisher: bool
) -> None:
    arch = dataclasses.replace(arch, blocks=3)
    weights = weights_of(arch)
    importance = squares(weights_of(arch, seed=4)) if fisher else weights
    body = ladder(arch, kept=kept_blocks).float()
    body.begin_as(weights, importance)
    table = importance.embedding
    kept = largest([sum(abs(float(v)) for v in table[:, c]) for c in range(8)], 4)
    for index, (source, measure) in enumerate(zip(weights.blocks, importance.blocks, strict=True)):
        entering = kept
        attended = rows_to_keep([measure.query[0], measure.key[0], measure.value[0]], entering, 4)
        after_attention = rows_to_keep([measure.out[0]], attended, 4)
        inner = rows_to_keep([measure.fc1[0]], after_attention, 6)
        kept = rows_to_keep([measure.fc2[0]], inner, 4)
        if index not in kept_blocks:
            continue
        block = body.blocks[kept_blocks.index(index)]
        assert isinstance(block, SideBlock)
        for layer, pair, rows, columns in (
            (block.query, source.query, attended, entering),
            (block.key, source.key, attended, entering),
            (block.value, source.value, attended, entering),
            (block.out, source.out, after_attention, attended),
            (block.fc1, source.fc1, inner, after_attention),
            (block.fc2, source.fc2, kept, inner),
        ):
            weight, bias = picked(pair, rows, columns)
            assert torch.equal(layer.weight, weight)
            assert torch.equal(layer.bias, bias)
        # A norm keeps what reaches it: the block's input and the attention's rows, or, behind the sums, those rows.
        reaching = (entering, after_attention) if arch.norm == "pre" else (after_attention, kept)
        for norm, pair, rows in zip((block.norm1, block.norm2), (source.norm1, source.norm2), reaching, strict=True):
            assert torch.equal(norm.weight, pair[0][rows])
            assert pair[1] is not None
            assert torch.equal(norm.bias, pair[1][rows])
        if source.scales is not None:
            assert block.scale1 is not None
            assert block.scale2 is not None
            assert torch.equal(block.scale1, source.scales[0][after_attention])
            assert torch.equal(block.scale2, source.scales[1][kept])
    if weights.norm is not None:
        assert torch.equal(body.norm.weight, weights.norm[0][kept])


def test_pruning_leaves_ladders_and_gates_as_they_were() -> None:
    torch.manual_seed(0)
    random = Ladder(PRE, WIDTHS, 2, 0.1)
    pruned = copy.deepcopy(random)
    pruned.begin_as(weights_of(PRE), weights_of(PRE))
    for name in ("down.0.weight", "down.2.bias", "up.weight", "up.bias", "alpha"):
        assert torch.equal(random.get_parameter(name), pruned.get_parameter(name))


def test_a_block_that_is_no_plain_mlp_gets_a_sentence() -> None:
    weights = weights_of(PRE)
    gated = dataclasses.replace(
        weights.blocks[0], fc2=(torch.randn(8, 6), torch.randn(8))
    )  # SwiGLU halves what fc1 yields
    weights = dataclasses.replace(weights, blocks=(gated, weights.blocks[1]))
    with pytest.raises(SidebenchError, match=r"lst\.init=random"):
        Ladder(PRE, WIDTHS, 2, 0.1).begin_as(weights, weights)


def test_embeddings_of_another_width_get_a_sentence() -> None:
    weights = dataclasses.replace(weights_of(PRE), embedding=torch.randn(20, 3))  # ELECTRA's table is narrower
    with pytest.raises(SidebenchError, match=r"lst\.init=random"):
        Ladder(PRE, WIDTHS, 2, 0.1).begin_as(weights, weights)


@pytest.mark.parametrize("family", ["bert", "vit", "dinov2", "clip_vision", "clip_text"])
def test_every_family_can_be_pruned(family: str, request: pytest.FixtureRequest) -> None:
    backbone: Backbone = request.getfixturevalue(f"tiny_{family}")
    body = LST(Config(reduction=2)).build(
        backbone.arch, dict.fromkeys(backbone.arch.states, 32), lambda: read_weights(backbone)
    )
    source = {float(v) for p in backbone.module.parameters() for v in p.flatten()}
    block = body.get_submodule("blocks.0")
    assert {float(v) for p in block.parameters() for v in p.detach().flatten()} <= source
    assert block.get_parameter("query.weight").shape == (16, 16)
    assert block.get_parameter("fc1.weight").shape == (32, 16)


# --- what it reads ---------------------------------------------------------------------------------------------------


def test_it_reads_raw_block_outputs_before_the_final_norm(tiny_vit: Backbone) -> None:
    wanted = LST().layers(tiny_vit.arch)
    assert wanted == ("embeddings", "blocks.0", "blocks.1")
    pixels = tiny_vit.preprocess.dummy(tiny_vit.device)
    pixels["pixel_values"] = torch.randn(pixels["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _a, out: seen.append(out)) for b in tiny_vit.blocks]
    with torch.no_grad():
        states = tiny_vit.capture(pixels, (*wanted, "norm"))
    for hook in hooks:
        hook.remove()
    assert torch.equal(states["blocks.0"], seen[0])
    assert torch.equal(states["blocks.1"], seen[1])
    assert not torch.allclose(states["blocks.1"], states["norm"])
    norm = tiny_vit.module.get_submodule(tiny_vit.tap_path("norm"))
    torch.testing.assert_close(norm(states["blocks.1"].clone()), states["norm"].clone())


@pytest.mark.parametrize(("width", "heads", "mlp_width"), [(36, 6, 30), (36, 6, 33), (64, 2, 12), (48, 12, 192)])
def test_a_refusal_suggests_a_reduction_that_works(width: int, heads: int, mlp_width: int) -> None:
    arch = dataclasses.replace(PRE, width=width, heads=heads, mlp_width=mlp_width)
    refused = str(Case("lst").method().refusal(arch))
    suggested = int(refused.rsplit("lst.reduction=", 1)[1])
    assert Case("lst", (("reduction", str(suggested)),)).method().refusal(arch) is None


def test_the_ladder_of_a_causal_backbone_is_causal(tiny_clip_text: Backbone, tiny_bert: Backbone) -> None:
    for backbone in (tiny_clip_text, tiny_bert):
        widths = dict.fromkeys(backbone.arch.states, backbone.arch.width)
        ladder = LST(Config(reduction=2, init="random")).build(backbone.arch, widths, lambda: pytest.fail("random"))
        generator = torch.Generator().manual_seed(0)
        states = {s: torch.randn(1, 5, backbone.arch.width, generator=generator) for s in backbone.arch.states}
        changed = {s: torch.cat([v[:, :4], v[:, 4:] + 1], dim=1) for s, v in states.items()}
        mask = torch.ones(1, 5, dtype=torch.bool)
        same = torch.equal(ladder(Batch(mask, states))[:, :4], ladder(Batch(mask, changed))[:, :4])
        assert same == backbone.arch.causal
