"""UniPT against its formulas, written out in loops and in float64 (arXiv 2308.14316)."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from method_cases import Exact, random_states
from torch import Tensor, nn

from sidebench.adapters._registry import find_method
from sidebench.adapters._tokens import relu_l1, relu_l1_clamped
from sidebench.adapters._unipt_parallel import confidences
from sidebench.adapters._unipt_single import SingleAnchor
from sidebench.adapters.unipt import Config, MlpAnchor, TokenAnchor, UniPT
from sidebench.cache.architecture import Architecture
from sidebench.cache.configs import config_backbone, fake_mode
from sidebench.cache.resnet_load import config_resnet

Rows = list[list[float]]
STATES = ("embeddings", "blocks.0", "blocks.1", "blocks.2")
WIDTHS = {"embeddings": 5, "blocks.0": 6, "blocks.1": 4, "blocks.2": 6, "norm": 6}
LENGTHS = (2, 5, 3)
lean_and_plain = pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])


def linear(layer: nn.Linear, x: list[float]) -> list[float]:
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def layer_norm(norm: nn.LayerNorm, x: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + norm.eps)
    scale, shift = norm.weight.tolist(), norm.bias.tolist()
    return [(v - mean) / deviation * s + b for v, s, b in zip(x, scale, shift, strict=True)]


def relu(x: list[float]) -> list[float]:
    return [max(v, 0.0) for v in x]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean_of(rows: Rows) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def softmax(x: list[float]) -> list[float]:
    exps = [math.exp(v - max(x)) for v in x]
    return [e / sum(exps) for e in exps]


def weighted(weights: list[float], rows: Rows) -> list[float]:
    return [dot(weights, list(column)) for column in zip(*rows, strict=True)]


def added(a: list[float], b: list[float]) -> list[float]:
    return [x + y for x, y in zip(a, b, strict=True)]


def project_and_close(body: TokenAnchor, anchor: list[float], merged: list[float]) -> list[float]:
    """The last step of one token: the sum of the guides projected, the anchor added, then up to the output width."""
    modules = list(body.project)
    if isinstance(body, MlpAnchor):
        inner, _, outer, norm = modules
        hidden = relu(linear(inner, merged))  # type: ignore[arg-type]
        return linear(body.up, added(anchor, layer_norm(norm, linear(outer, hidden))))  # type: ignore[arg-type]
    outer, norm = modules
    return linear(body.up, relu(added(anchor, layer_norm(norm, linear(outer, merged)))))  # type: ignore[arg-type]


def naive_tokens(body: TokenAnchor, states: dict[str, Rows], real: int, eps: float) -> Rows:
    """One example: H_0 … H_(L-1) of T rows, the first `real` of them tokens -> T rows of E."""
    projected = []
    for (project, norm), name in zip(body.down, body.states, strict=True):  # type: ignore[misc]
        projected.append([layer_norm(norm, linear(project, row)) for row in states[name]])
    *guides, anchor = projected
    summary = mean_of(anchor[:real])
    logits, results = [], []
    for guide in guides:
        pooled = mean_of(guide[:real])
        logits.append(linear(body.gate, [a * t for a, t in zip(summary, pooled, strict=True)])[0])
        rows = []
        for i, query in enumerate(anchor):
            scores = [max(dot(query, key), 0.0) if j < real else 0.0 for j, key in enumerate(guide)]
            row = [s / (sum(scores) + eps) + (1.0 if i == j else 0.0) for j, s in enumerate(scores)]
            rows.append(weighted(row, guide))
        results.append(rows)
    alpha = softmax(logits)
    out = []
    for i, query in enumerate(anchor):
        merged = weighted(alpha, [rows[i] for rows in results])
        out.append(project_and_close(body, query, merged))
    return out


def naive_single(body: SingleAnchor, states: dict[str, Rows], real: int) -> list[float]:
    """One example -> E numbers: the final layer's summary token as the only query, every state a guide."""
    position = real - 1 if body.last_real else 0
    embedding = states[body.final][position]
    anchor = linear(body.anchor, relu(embedding))
    logits, results = [], []
    for project, name in zip(body.down, body.states, strict=True):
        assert isinstance(project, nn.Linear)
        guide = [linear(project, relu(row)) for row in states[name]]
        scores = [max(dot(anchor, key), 0.0) for key in guide[:real]]
        total = max(sum(scores), 1e-6)
        mixed = weighted([s / total for s in scores], guide[:real])
        results.append(added(mixed, guide[position]))
        logits.append(linear(body.gate, [a * t for a, t in zip(anchor, mean_of(guide[:real]), strict=True)])[0])
    merged = weighted(softmax(logits), results)
    return added(embedding, linear(body.up, relu(merged)))


def shaken(body: nn.Module) -> nn.Module:
    """In float64, with norms away from 1 and 0 so that every term shows."""
    body.double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return body


token_forms = pytest.mark.parametrize(("form", "eps"), [(TokenAnchor, 1e-8), (MlpAnchor, 1e-6)], ids=["tokens", "mlp"])


@lean_and_plain
@token_forms
def test_the_token_forms_equal_the_formula(form: type[TokenAnchor], eps: float, lean: bool) -> None:
    torch.manual_seed(0)
    body = form(STATES, WIDTHS, 4, 6, lean=lean)
    shaken(body)
    batch = random_states(STATES, WIDTHS, LENGTHS)
    faint = {name: state * 1e-3 for name, state in batch.activations.items()}  # where eps counts
    for states in (batch.activations, faint):
        for parameter in body.down.parameters() if states is faint else ():
            parameter.data *= 1e-3
        out = body(Exact(batch.mask, states, {}))
        for row, real in enumerate(LENGTHS):
            naive = naive_tokens(body, {n: states[n][row].tolist() for n in STATES}, real, eps)
            torch.testing.assert_close(out[row], torch.tensor(naive, dtype=torch.float64), atol=1e-9, rtol=1e-9)


@lean_and_plain
@pytest.mark.parametrize("last_real", [False, True])
def test_the_single_anchor_form_equals_the_formula(last_real: bool, lean: bool) -> None:
    torch.manual_seed(0)
    body = SingleAnchor(STATES, "norm", WIDTHS, 4, last_real=last_real, lean=lean)
    shaken(body)
    batch = random_states((*STATES, "norm"), WIDTHS, LENGTHS)
    out = body(batch)
    assert out.shape == (3, 6)
    for row, real in enumerate(LENGTHS):
        naive = naive_single(body, {n: batch.state(n)[row].tolist() for n in (*STATES, "norm")}, real)
        torch.testing.assert_close(out[row], torch.tensor(naive, dtype=torch.float64), atol=1e-6, rtol=1e-6)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def thirteen(width: int) -> tuple[tuple[str, ...], dict[str, int]]:
    states = ("embeddings", *(f"blocks.{i}" for i in range(12)))
    return states, dict.fromkeys(states, width)


def test_the_text_side_of_vse_has_5_921_281_parameters() -> None:
    states, widths = thirteen(768)
    assert count(TokenAnchor(states, widths, 512, 1024)) == 5_921_281


@pytest.mark.parametrize(("stream", "expected"), [("text", 5_921_281), ("image", 6_433_537)])
def test_vse_infinity_is_a_width_of_1024(stream: str, expected: int) -> None:
    backbone = config_backbone("bert-base") if stream == "text" else config_resnet("resnext101_32x8d_wsl", 512)
    method = find_method("unipt").configured({"width": "1024"})
    assert isinstance(method, UniPT)
    assert method.refusal(backbone.arch) is None
    with fake_mode(backbone) or pytest.fail("it has weights"):
        widths = {layer: width for layer, (_, width) in backbone.shapes(method.layers(backbone.arch)).items()}
        body = method.build(backbone.arch, widths, lambda: pytest.fail("unipt starts from no backbone weights"))
    assert (body.width, count(body)) == (1024, expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"width": 4, "form": "single_anchor"}, "yield the backbone's width; leave unipt.width out"),
        ({"width": -1}, "width -1 is none; 1 or more"),
        ({"width": 2, "reduction": 3}, "reduction 3 leaves no side width of 2"),
    ],
)
def test_a_width_that_no_form_yields_is_refused(settings: dict[str, Any], said: str) -> None:
    arch = Architecture("Toy", "text", blocks=2, width=6, prefix_tokens=0, final_layer="norm")
    assert said in str(UniPT(Config(**settings)).refusal(arch))
    two = dataclasses.replace(arch, decoder_blocks=2)
    assert "for two stacks" in str(UniPT(Config(width=4)).refusal(two))
    assert UniPT(Config(width=4)).refusal(arch) is None


def test_the_side_of_clip_vil_has_4_736_641_parameters() -> None:
    states, widths = thirteen(768)
    assert count(MlpAnchor(states, widths, 384, 768)) == 4_736_641


def test_the_mlp_form_starts_as_bert_does() -> None:
    torch.manual_seed(0)
    states, widths = thirteen(64)
    body = MlpAnchor(states, widths, 32, 64)
    for module in body.modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
            if module.weight.numel() > 1000:
                assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        if isinstance(module, nn.LayerNorm):
            assert (module.eps, set(module.weight.tolist()), set(module.bias.tolist())) == (1e-5, {1.0}, {0.0})


@pytest.mark.parametrize(("width", "expected"), [(512, 3_940_353), (768, 5_644_289)], ids=["text", "image"])
def test_clip4clip_has_as_many_parameters_as_published(width: int, expected: int) -> None:
    states, widths = thirteen(width)
    body = SingleAnchor(states, "projected", {**widths, "projected": 512}, 512, last_real=width == 512)
    assert count(body) == expected


def test_a_vit_b_with_a_head_of_100_classes_has_4_370_405_parameters() -> None:
    _, widths = thirteen(768)
    arch = Architecture("ViT-B", "image", blocks=12, width=768, prefix_tokens=1, final_layer="norm")
    body = UniPT().build(arch, widths, lambda: pytest.fail("unipt starts from no backbone weights"))
    assert count(body) + count(nn.Linear(body.width, 100)) == 4_370_405


@pytest.mark.parametrize("form", ["tokens", "mlp", "single"])
def test_the_docstring_formula_counts_the_parameters(form: str) -> None:
    states, d, m, e = STATES, 6, 4, 6
    widths = {**dict.fromkeys(states, d), "norm": e}
    number = len(states)
    if form == "mlp":
        formula = number * (d * m + m + 2 * m) + (m * e + e + e * m + m + 2 * m) + (m * e + e) + (m + 1)
        assert count(MlpAnchor(states, widths, m, e)) == formula
    elif form == "single":
        formula = number * (d * m + m) + (e * m + m) + (m + 1) + (m * e + e)
        assert count(SingleAnchor(states, "norm", widths, m, last_real=False)) == formula
    else:
        formula = number * (d * m + m + 2 * m) + (m * m + m + 2 * m) + (m * e + e) + (m + 1)
        assert count(TokenAnchor(states, widths, m, e)) == formula


@pytest.mark.parametrize("normalise", [relu_l1, relu_l1_clamped])
def test_rows_of_the_map_sum_to_zero_or_one(normalise: object) -> None:
    scores = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = normalise(scores)  # type: ignore[operator]
    dead = (scores <= 0).all(1)
    assert dead.any()
    assert (rows >= 0).all()
    torch.testing.assert_close(rows.sum(1), (~dead).double(), atol=1e-5, rtol=0)
    assert (rows[dead] == 0).all()


def test_masked_keys_weigh_nothing() -> None:
    torch.manual_seed(0)
    single = SingleAnchor(STATES, "norm", WIDTHS, 4, last_real=False)
    for body in (TokenAnchor(STATES, WIDTHS, 4, 6), MlpAnchor(STATES, WIDTHS, 4, 6), single):
        shaken(body)
        batch = random_states((*STATES, "norm"), WIDTHS, LENGTHS)
        hidden = ~batch.mask[..., None]
        noisy = {n: v + 100 * hidden * torch.randn(v.shape, dtype=v.dtype) for n, v in batch.activations.items()}
        other = Exact(batch.mask, noisy, {})
        kept = batch.mask if body(batch).ndim == 3 else slice(None)
        torch.testing.assert_close(body(other)[kept], body(batch)[kept], atol=1e-12, rtol=1e-12)


def test_confidences_sum_to_one_per_example() -> None:
    logits = [torch.randn(5, 1) for _ in range(4)]
    alpha = confidences(logits)
    assert alpha.shape == (5, 4)
    torch.testing.assert_close(alpha.sum(1), torch.ones(5))
    torch.testing.assert_close(alpha[2], torch.tensor(softmax([float(v[2]) for v in logits])))


def test_guides_in_another_order_with_their_weights_change_nothing() -> None:
    torch.manual_seed(0)
    body = TokenAnchor(STATES, WIDTHS, 4, 6)
    shaken(body)
    order = [2, 0, 1, 3]  # the anchor stays last
    names = tuple(STATES[i] for i in order)
    other = TokenAnchor(names, WIDTHS, 4, 6).double()
    other.load_state_dict({k: v for k, v in body.state_dict().items() if not k.startswith("down.")}, strict=False)
    for place, index in enumerate(order):
        other.down[place].load_state_dict(body.down[index].state_dict())
    batch = random_states(STATES, WIDTHS, LENGTHS)
    torch.testing.assert_close(other(batch), body(batch), atol=1e-12, rtol=1e-12)


def test_the_gate_bias_cancels() -> None:
    torch.manual_seed(0)
    body = TokenAnchor(STATES, WIDTHS, 4, 6)
    shaken(body)
    batch = random_states(STATES, WIDTHS, LENGTHS)
    out: Tensor = body(batch)
    with torch.no_grad():
        body.gate.bias += 3
    torch.testing.assert_close(body(batch), out, atol=1e-12, rtol=1e-12)


def test_no_gradient_reaches_the_states() -> None:
    body = TokenAnchor(STATES, WIDTHS, 4, 6).double()
    batch = random_states(STATES, WIDTHS, LENGTHS)
    body(batch).sum().backward()
    assert all(v.grad is None and not v.requires_grad for v in batch.activations.values())


def test_the_single_anchor_reads_the_end_token_of_causal_texts_and_the_first_token_of_others() -> None:
    def last_real(causal: bool) -> bool:
        arch = Architecture("Any", "text", blocks=2, width=8, prefix_tokens=0, final_layer="norm", causal=causal)
        method = UniPT(Config(form="single_anchor"))
        body = method.build(arch, dict.fromkeys(method.layers(arch), 8), lambda: pytest.fail("no weights needed"))
        assert isinstance(body, SingleAnchor)
        return body.last_real

    assert last_real(causal=True)
    assert not last_real(causal=False)


def test_the_single_anchor_needs_a_summary_token() -> None:
    patches_only = Architecture("Plain", "image", blocks=2, width=8, prefix_tokens=0, final_layer="norm", norm="pre")
    assert UniPT().refusal(patches_only) is None
    assert "class token" in str(UniPT(Config(form="single_anchor")).refusal(patches_only))
