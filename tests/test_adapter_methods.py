"""Adapters, DoRA, prefixes and scales against the formulas of their papers, written out in float64 and in loops."""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import TEXT_FAMILIES, Case, batch_of, build
from torch import Tensor, nn
from toys import load, make_images, save_t5

from sidebench.adapters._base import Batch, Body, LiveMethod, trained
from sidebench.adapters._registry import find_method
from sidebench.bench.choice import refusal
from sidebench.bench.fake_building import building
from sidebench.cache.backbone import Backbone
from sidebench.cache.block_weights import block_modules
from sidebench.cache.configs import config_backbone, fake_mode, without_weights
from sidebench.cache.errors import SidebenchError
from sidebench.cache.form import Form
from sidebench.cache.suffix import Suffix

WIDTH, HEADS, BLOCKS, MLP = 32, 4, 2, 64
ADAPTERS = ("houlsby", "pfeiffer", "adaptformer", "prefix_tuning", "ssf", "dora")
BERT = "attention.self.query attention.self.key attention.self.value attention.output.dense intermediate.dense "
VIT = "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1 mlp.fc2 "
CLIP = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj mlp.fc1 mlp.fc2 layer_norm1 layer_norm2"
ROLES = ("query", "key", "value", "out", "fc1", "fc2", "norm1", "norm2")
PLACES = {
    "bert": BERT + "output.dense attention.output.LayerNorm output.LayerNorm",
    "vit": VIT + "layernorm_before layernorm_after",
    "dinov2": VIT + "norm1 norm2",
    "clip_vision": CLIP,
    "clip_text": CLIP,
}


@pytest.fixture(params=PLACES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backbone(request: pytest.FixtureRequest, family: str) -> Backbone:
    found = copy.deepcopy(request.getfixturevalue(f"tiny_{family}"))
    found.module.double()
    return found


TEXTS = {"padded": ["good", "the film was very dull and not good", "a plot"], "even": ["good film", "bad film"]}


def inputs_of(backbone: Backbone, texts: str = "padded") -> tuple[dict[str, Tensor], list[int]]:
    """What the backbone takes, images in float64, and how many real tokens each example has."""
    if backbone.arch.modality == "image":
        pixels, _ = backbone.preprocess.collate(backbone.preprocess.prepare(list(make_images(2).raw)))
        return {name: value.double() for name, value in pixels.items()}, [5, 5]
    inputs, mask = backbone.preprocess.collate(backbone.preprocess.prepare(TEXTS[texts]))
    assert mask is not None
    return inputs, mask.sum(1).tolist()


def built(name: str, backbone: Backbone, **settings: Any) -> Body:
    """In float64, everything that trains moved, so that every term shows."""
    method = find_method(name).configured({key: str(value) for key, value in settings.items()})
    assert isinstance(method, LiveMethod)
    torch.manual_seed(0)
    body = method.network(backbone).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(body).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return body


# --- one transformer block, by hand ----------------------------------------------------------------------------------

On = Callable[[str, Tensor], Tensor]


def unchanged(_: str, x: Tensor) -> Tensor:
    return x


class HandBlock:
    """A block's frozen numbers and its formula for one example, with a place to step in at every operation."""

    def __init__(self, block: nn.Module, family: str, arch: Any) -> None:
        self.parts: dict[str, Any] = {
            role: block.get_submodule(path) for role, path in zip(ROLES, PLACES[family].split(), strict=True)
        }
        self.scales = [s.detach() for name, s in block.named_parameters() if "layer_scale" in name]
        self.arch = arch
        self.prefix: Tensor | None = None

    def __call__(self, x: Tensor, on: On = unchanged, beside: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """x: the (T, D) real tokens. `on(role, y)` replaces what an operation yields, `beside(x)` adds to the MLP."""

        def attention(y: Tensor) -> Tensor:
            return on("attention", self.layer_scaled(0, self.attend(y, on)))

        def mlp(y: Tensor, stream: Tensor) -> Tensor:
            hidden = self.activation(on("fc1", self.linear("fc1", y)))
            out = on("mlp", self.layer_scaled(1, on("fc2", self.linear("fc2", hidden))))
            return out if beside is None else out + beside(stream)

        if self.arch.norm == "pre":
            x = x + attention(on("norm1", self.norm("norm1", x)))
            x = x + mlp(on("norm2", self.norm("norm2", x)), x)
        else:
            x = on("norm1", self.norm("norm1", x + attention(x)))
            x = on("norm2", self.norm("norm2", x + mlp(x, x)))
        return on("block", x)

    def attend(self, x: Tensor, on: On) -> Tensor:
        query, key, value = (on(role, self.linear(role, x)) for role in ("query", "key", "value"))
        ahead = 0
        if self.prefix is not None:
            ahead = self.prefix.shape[1]
            key, value = torch.cat([self.prefix[0], key]), torch.cat([self.prefix[1], value])
        size = x.shape[1] // HEADS
        rows = []
        for i in range(len(x)):
            seen = [j for j in range(len(key)) if not self.arch.causal or j < ahead or j - ahead <= i]
            heads = []
            for head in range(HEADS):
                part = slice(head * size, (head + 1) * size)
                scores = torch.stack([(query[i, part] * key[j, part]).sum() / math.sqrt(size) for j in seen])
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                heads.append(torch.stack([w * value[j, part] for w, j in zip(weights, seen, strict=True)]).sum(0))
            rows.append(torch.cat(heads))
        return on("out", self.linear("out", torch.stack(rows)))

    def linear(self, role: str, x: Tensor) -> Tensor:
        module = self.parts[role]
        return torch.stack([torch.stack([(row * v).sum() for row in module.weight]) + module.bias for v in x])

    def norm(self, role: str, x: Tensor) -> Tensor:
        return hand_norm(self.parts[role], x)

    def activation(self, x: Tensor) -> Tensor:
        if self.arch.activation == "quick_gelu":
            return x / (1 + torch.exp(-1.702 * x))
        assert self.arch.activation == "gelu"
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def layer_scaled(self, which: int, x: Tensor) -> Tensor:
        return x * self.scales[which] if self.scales else x


def hand_norm(norm: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias


def hand_tokens(
    backbone: Backbone,
    family: str,
    inputs: dict[str, Tensor],
    real: Sequence[int],
    step: Callable[[int, HandBlock, Tensor], Tensor] = lambda _, block, x: block(x),
    start: Callable[[Tensor], Tensor] = lambda x: x,
    end: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Tensor]:
    """Final tokens of each example's real positions."""
    with torch.no_grad():
        entering = start(backbone.capture(inputs, ["embeddings"])["embeddings"])
        found = []
        for x, length in zip(entering, real, strict=True):
            x = x[:length]
            for index, block in enumerate(backbone.blocks):
                x = step(index, HandBlock(block, family, backbone.arch), x)
            if backbone.final_layer == "norm":
                x = hand_norm(backbone.module.get_submodule(backbone.tap_path("norm")), x)
            found.append(end(x))
        return found


def assert_equal(body: Body, inputs: dict[str, Tensor], real: Sequence[int], expected: list[Tensor]) -> None:
    with torch.no_grad():
        out = body(Batch(torch.ones(len(real), 1), {}, inputs))
    for row, length, wanted in zip(out, real, expected, strict=True):
        torch.testing.assert_close(row[:length], wanted, atol=1e-9, rtol=1e-9)


def test_the_hand_is_right(family: str, backbone: Backbone) -> None:
    inputs, real = inputs_of(backbone)
    with torch.no_grad():
        out = backbone.tokens(inputs)
    for row, length, wanted in zip(out, real, hand_tokens(backbone, family, inputs, real), strict=True):
        torch.testing.assert_close(row[:length], wanted, atol=1e-9, rtol=1e-9)


def test_the_parts_of_a_block_are_found_in_every_family(family: str, backbone: Backbone) -> None:
    for block in backbone.blocks:
        parts = block_modules(block)
        found = (parts.query, parts.key, parts.value, parts.out, *parts.mlp_in, parts.mlp_out, parts.norm1, parts.norm2)
        assert [block.get_submodule(path) for path in PLACES[family].split()] == list(found)
        assert (parts.scales is None) is (family != "dinov2")
        assert parts.after_attention is (getattr(block, "layer_scale1", None) or parts.out)
        assert parts.after_mlp is (getattr(block, "layer_scale2", None) or parts.mlp_out)


# --- against the formulas --------------------------------------------------------------------------------------------


def bottleneck(p: dict[str, nn.Parameter], prefix: str, activation: Callable[[float], float], x: Tensor) -> Tensor:
    down, down_bias, up, up_bias = (p[f"{prefix}.{n}"] for n in ("down.weight", "down.bias", "up.weight", "up.bias"))
    rows = []
    for v in x:
        hidden = [activation(float((row * v).sum() + b)) for row, b in zip(down, down_bias, strict=True)]
        rows.append((up * torch.tensor(hidden, dtype=torch.float64)).sum(1) + up_bias)
    return torch.stack(rows)


def swish(x: float) -> float:
    return x / (1 + math.exp(-x))


def relu(x: float) -> float:
    return max(x, 0.0)


def test_houlsby_adds_a_bottleneck_of_each_branch(family: str, backbone: Backbone) -> None:
    inputs, real = inputs_of(backbone)
    plain = copy.deepcopy(backbone)
    body = built("houlsby", backbone, reduction=8)
    p = trained(body)

    def step(index: int, block: HandBlock, x: Tensor) -> Tensor:
        which = {"attention": 2 * index, "mlp": 2 * index + 1}
        return block(x, lambda role, y: y + bottleneck(p, f"adapters.{which[role]}", swish, y) if role in which else y)

    assert_equal(body, inputs, real, hand_tokens(plain, family, inputs, real, step))


@pytest.mark.parametrize("residual", ["before", "after"])
def test_pfeiffer_adds_a_bottleneck_behind_the_mlp(family: str, backbone: Backbone, residual: str) -> None:
    inputs, real = inputs_of(backbone)
    plain = copy.deepcopy(backbone)
    body = built("pfeiffer", backbone, reduction=4, residual=residual)
    p = trained(body)
    place = "mlp" if residual == "before" else "block"

    def step(index: int, block: HandBlock, x: Tensor) -> Tensor:
        return block(x, lambda role, y: y + bottleneck(p, f"adapters.{index}", relu, y) if role == place else y)

    assert_equal(body, inputs, real, hand_tokens(plain, family, inputs, real, step))


def test_adaptformer_adds_a_scaled_bottleneck_of_the_stream(family: str, backbone: Backbone) -> None:
    inputs, real = inputs_of(backbone)
    plain = copy.deepcopy(backbone)
    body = built("adaptformer", backbone, bottleneck=3, scale=0.7)
    p = trained(body)

    def step(index: int, block: HandBlock, x: Tensor) -> Tensor:
        return block(x, beside=lambda stream: 0.7 * bottleneck(p, f"adapters.{index}", relu, stream))

    assert_equal(body, inputs, real, hand_tokens(plain, family, inputs, real, step))


@pytest.mark.parametrize("texts", TEXTS)
def test_prefixes_are_keys_and_values_that_every_token_sees(family: str, backbone: Backbone, texts: str) -> None:
    if texts == "even" and family not in TEXT_FAMILIES:
        pytest.skip("images are all of one length")
    inputs, real = inputs_of(backbone, texts)
    plain = copy.deepcopy(backbone)
    body = built("prefix_tuning", backbone, length=3)
    prefixes = list(trained(body).values())
    assert [tuple(prefix.shape) for prefix in prefixes] == [(2, 3, WIDTH)] * BLOCKS

    def step(index: int, block: HandBlock, x: Tensor) -> Tensor:
        block.prefix = prefixes[index]
        return block(x)

    assert_equal(body, inputs, real, hand_tokens(plain, family, inputs, real, step))


def test_prefixes_go_with_relative_positions(tmp_path: Path) -> None:
    """T5 adds a position bias to its scores, which prefixes do not have: keys and values of zero only dilute."""
    backbone = load(save_t5(tmp_path / "t5"))
    attention: Any = backbone.blocks[0].get_submodule("layer.0.SelfAttention")
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    attention.register_forward_hook(lambda _, args, out: seen.append((args[0], out[0], out[1])))
    inputs, real = inputs_of(backbone)
    body = build(Case("prefix_tuning", (("length", "2"), ("spread", "0"))).method(), backbone)
    seen.clear()
    body(Batch(torch.ones(1, 1), {}, inputs))
    ((x, out, bias),) = seen
    for row in range(len(real)):
        tokens, shape = x[row, : real[row]], (real[row], HEADS, WIDTH // HEADS)
        query, key, value = (m(tokens).view(shape) for m in (attention.q, attention.k, attention.v))
        for i in range(real[row]):
            heads = []
            for head in range(HEADS):
                scores = [(query[i, head] * key[j, head]).sum() + bias[0, head, i, j] for j in range(real[row])]
                total = sum(torch.exp(score) for score in scores) + 2  # e^0 of either prefix
                mixed = [torch.exp(score) / total * value[j, head] for j, score in enumerate(scores)]
                heads.append(torch.stack(mixed).sum(0))
            torch.testing.assert_close(out[row, i], attention.o(torch.cat(heads)), atol=1e-6, rtol=1e-5)


def test_ssf_scales_and_shifts_what_every_operation_yields(family: str, backbone: Backbone) -> None:
    inputs, real = inputs_of(backbone)
    plain = copy.deepcopy(backbone)
    body = built("ssf", backbone)
    p = trained(body)
    names = {role: role for role in ROLES} | {"fc1": "mlp0", "fc2": "mlp1"}
    if family not in ("vit", "bert"):  # their embeddings do more than add positions
        with torch.no_grad():
            for name, value in (("weight", 1.0), ("bias", 0.0)):
                if f"patches.0.{name}" in p:
                    p[f"patches.0.{name}"].fill_(value)

    def scaled(prefix: str, x: Tensor) -> Tensor:
        return torch.stack([v * p[f"{prefix}.weight"] + p[f"{prefix}.bias"] for v in x])

    def step(index: int, block: HandBlock, x: Tensor) -> Tensor:
        return block(x, lambda role, y: scaled(f"blocks.{index}.{names[role]}", y) if role in names else y)

    def start(x: Tensor) -> Tensor:
        if family != "vit":
            return x
        module: Any = plain.module
        positions = module.embeddings.position_embeddings[0, 1:]
        patches = [scaled("patches.0", one[1:] - positions) + positions for one in x]
        return torch.cat([x[:, :1], torch.stack(patches)], dim=1)

    def end(x: Tensor) -> Tensor:
        return scaled("norm", x) if plain.final_layer == "norm" else x

    assert_equal(body, inputs, real, hand_tokens(plain, family, inputs, real, step, start, end))


def test_dora_turns_and_stretches_the_rows_of_query_and_value(family: str, backbone: Backbone) -> None:
    inputs, real = inputs_of(backbone)
    plain = copy.deepcopy(backbone)
    body = built("dora", backbone, rank=3, alpha=6)
    p = trained(body)
    places = PLACES[family].split()
    for index, block in enumerate(plain.blocks):
        for path in (places[0], places[2]):
            prefix = f"module.{plain.blocks_path}.{index}.{path}.lora_"
            a, b = (p[f"{prefix}{which}.default.weight"] for which in "AB")
            length = p[f"{prefix}magnitude_vector.default.weight"]
            linear: Any = block.get_submodule(path)
            with torch.no_grad():
                for row in range(WIDTH):
                    turned = linear.weight[row] + 6 / 3 * sum(b[row, k] * a[k] for k in range(3))
                    linear.weight[row] = length[row] * turned / math.sqrt(float((turned**2).sum()))
    assert_equal(body, inputs, real, hand_tokens(plain, family, inputs, real))


# --- at the start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "dora", "houlsby", "pfeiffer", "adaptformer"])
def test_nothing_is_added_before_training(name: str, family: str, request: pytest.FixtureRequest) -> None:
    backbone = copy.deepcopy(request.getfixturevalue(f"tiny_{family}"))
    prepared = backbone.preprocess.prepare(
        list(make_images(3).raw) if backbone.arch.modality == "image" else TEXTS["padded"]
    )
    with torch.no_grad():
        expected = backbone.tokens(backbone.preprocess.collate(prepared)[0])
    method = Case(name).method()
    out = build(method, backbone)(batch_of(method, backbone, prepared))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "adaptformer"])
def test_only_the_up_side_starts_at_zero(name: str, tiny_vit: Backbone) -> None:
    """With both there, no weight would ever have a gradient."""
    for key, parameter in trained(build(Case(name).method(), copy.deepcopy(tiny_vit))).items():
        assert bool(parameter.any()) is (".down." in key), key


def test_ssf_starts_near_the_pretrained_function(tiny_vit: Backbone) -> None:
    inputs, _ = tiny_vit.preprocess.collate(tiny_vit.preprocess.prepare(list(make_images(3).raw)))
    with torch.no_grad():
        frozen = tiny_vit.tokens(inputs)
        off = [started(tiny_vit, spread, inputs) - frozen for spread in ("0", "0.02")]
    assert not off[0].any()
    assert 0.01 < float(off[1].norm() / frozen.norm()) < 0.3
    torch.manual_seed(0)
    parameters = trained(build(Case("ssf").method(), copy.deepcopy(tiny_vit)))
    for end, centre in ((".weight", 1.0), (".bias", 0.0)):
        values = torch.cat([p.detach() for name, p in parameters.items() if name.endswith(end)])
        assert float(values.mean()) == pytest.approx(centre, abs=0.005)
        assert float(values.std()) == pytest.approx(0.02, rel=0.1)


def started(original: Backbone, spread: str, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)
    return build(Case("ssf", (("spread", spread),)).method(), copy.deepcopy(original))(
        Batch(torch.ones(3, 1), {}, inputs)
    )


def test_prefixes_start_with_the_stated_spread(tiny_vit: Backbone) -> None:
    torch.manual_seed(0)
    body = build(Case("prefix_tuning", (("length", "100"), ("spread", "0.5"))).method(), copy.deepcopy(tiny_vit))
    values = torch.cat([p.detach().flatten() for p in trained(body).values()])
    assert float(values.std()) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("name", ADAPTERS)
def test_frozen_dropout_stays_off_while_training(name: str, request: pytest.FixtureRequest) -> None:
    backbone = copy.deepcopy(request.getfixturevalue("tiny_bert"))
    for module in backbone.module.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    method = Case(name).method()
    body = build(method, backbone)
    batch = batch_of(method, backbone, backbone.preprocess.prepare(TEXTS["padded"]))
    assert torch.equal(body.train()(batch), body.eval()(batch))


# --- how many train --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit_base() -> Backbone:
    return config_backbone("vit-base")


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("lora", {}, 12 * 2 * 2 * 768 * 8),
        ("dora", {}, 12 * 2 * (2 * 768 * 8 + 768)),
        ("houlsby", {}, 12 * 2 * (2 * 768 * 48 + 48 + 768)),
        ("pfeiffer", {"reduction": "8"}, 12 * (2 * 768 * 96 + 96 + 768)),
        ("pfeiffer", {"residual": "after"}, 12 * (2 * 768 * 48 + 48 + 768)),
        ("adaptformer", {}, 12 * (2 * 768 * 64 + 64 + 768)),
        ("adaptformer", {"bottleneck": "8"}, 12 * (2 * 768 * 8 + 8 + 768)),
        ("prefix_tuning", {"length": "20"}, 2 * 12 * 20 * 768),
        ("ssf", {}, 22 * 12 * 768 + 4 * 768),
    ],
)
def test_vit_base_trains_as_many_as_the_formula(
    vit_base: Backbone, name: str, settings: dict[str, str], count: int
) -> None:
    backbone = without_weights(vit_base)
    mode = fake_mode(backbone)
    assert mode is not None
    method = find_method(name).configured(settings)
    assert isinstance(method, LiveMethod)
    with mode, building():
        body = method.network(backbone)
    assert sum(p.numel() for p in trained(body).values()) == count


def test_the_counts_are_those_that_are_printed() -> None:
    """In millions, as tables of these methods print them."""
    assert round(24 * (2 * 768 * 48 + 48 + 768) / 1e6, 2) == 1.79
    assert round(12 * (2 * 768 * 96 + 96 + 768) / 1e6, 2) == 1.78
    assert round(12 * (2 * 768 * 64 + 64 + 768) / 1e6, 2) == 1.19
    assert round(12 * (2 * 768 * 8 + 8 + 768) / 1e6, 3) == 0.157
    assert round(2 * 12 * 20 * 768 / 1e6, 2) == 0.37
    assert round((22 * 12 * 768 + 4 * 768) / 1e6, 3) == 0.206


# --- on other backbones ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_on_the_last_block_alone_it_is_the_same_method(name: str, tiny_vit: Backbone, tiny_bert: Backbone) -> None:
    for original in (tiny_vit, tiny_bert):
        suffix = Suffix(copy.deepcopy(original), 1)
        body = build(Case(name).method(), suffix)
        grads = torch.autograd.grad(body(Batch(torch.ones(1, 1), {}, suffix.dummy())).sum(), trained(body).values())
        whole = trained(build(Case(name).method(), copy.deepcopy(original)))
        per_block = sum(p.numel() for n, p in whole.items() if not n.startswith(("patches", "norm"))) // BLOCKS
        kept = sum(p.numel() for n, p in whole.items() if n.startswith("norm"))
        assert sum(g.numel() for g in grads) == per_block + kept


class Odd(nn.Module):
    """A block with a third norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.fc1, self.fc2 = (nn.Linear(4, 4) for _ in range(6))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))


def test_a_block_of_another_make_gets_a_sentence() -> None:
    with pytest.raises(SidebenchError, match=r"Odd is not one attention and one MLP .*3 norms"):
        block_modules(Odd())


def test_attention_that_asks_nobody_gets_a_sentence(tiny_vit: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.vit import modeling_vit

    class Deaf:
        @staticmethod
        def get_interface(*_: Any) -> Any:
            return sdpa_attention_forward

    monkeypatch.setattr(modeling_vit, "ALL_ATTENTION_FUNCTIONS", Deaf)
    with pytest.raises(SidebenchError, match="prefix_tuning has no way into ViTLayer"):
        build(Case("prefix_tuning").method(), copy.deepcopy(tiny_vit))


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_has_no_place_for_it_is_refused_before_anything_runs(name: str, tiny_vit: Backbone) -> None:
    method, arch = Case(name).method(), tiny_vit.arch
    assert method.refusal(arch) is None
    assert "attention blocks" in str(method.refusal(dataclasses.replace(arch, mlp_width=None)))
    assert "attention blocks" in str(method.refusal(dataclasses.replace(arch, blocks=0)))
    with_decoder = refusal(method, dataclasses.replace(arch, decoder_blocks=2), Form())
    assert with_decoder is None if name == "dora" else "the encoder alone" in str(with_decoder)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("houlsby", {"reduction": "0"}, "reduction is 1 to 32"),
        ("houlsby", {"reduction": "33"}, "reduction is 1 to 32"),
        ("pfeiffer", {"reduction": "33"}, "reduction is 1 to 32"),
        ("adaptformer", {"bottleneck": "0"}, "adds nothing"),
        ("prefix_tuning", {"length": "0"}, "1 or more"),
        ("dora", {"rank": "0"}, "no rank"),
    ],
)
def test_a_size_of_nothing_is_refused(tiny_vit: Backbone, name: str, settings: dict[str, str], said: str) -> None:
    assert said in str(find_method(name).configured(settings).refusal(tiny_vit.arch))
