"""SHERL's CLIP4Clip form against its formulas, written out in loops and in float64 (arXiv 2407.07523)."""

import math

import pytest
import torch
from method_cases import Exact, random_states
from torch import Tensor, nn

from sidebench.adapters._sherl import redundancy
from sidebench.adapters.sherl_single_anchor import EPS, Config, SherlSingleAnchor, TieredAnchor
from sidebench.cache.architecture import Architecture

Row = list[float]
STATES = ("embeddings", "blocks.0", "blocks.1")
WIDTHS = {"embeddings": 5, "blocks.0": 6, "blocks.1": 4, "norm": 6}
LENGTHS = (2, 5, 3)


def linear(layer: nn.Module, x: Row) -> Row:
    assert isinstance(layer, nn.Linear)
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def relu(x: Row) -> Row:
    return [max(v, 0.0) for v in x]


def times(a: Row, b: Row) -> Row:
    return [x * y for x, y in zip(a, b, strict=True)]


def plus(a: Row, b: Row) -> Row:
    return [x + y for x, y in zip(a, b, strict=True)]


def l1(x: Row) -> Row:
    return [v / (sum(x) + 1e-6) for v in x]


def norm(x: Row) -> float:
    return math.sqrt(sum(times(x, x))) + 1e-6


def cosine(a: Row, b: Row) -> float:
    return sum(times(a, b)) / (norm(a) * norm(b))


def naive(body: TieredAnchor, states: dict[str, list[Row]], real: int) -> Row:
    """One example: the real tokens of every layer -> E numbers."""
    position = real - 1 if body.last_real else 0
    q = states[body.final][position]
    g = linear(body.guide, relu(q))
    tiers = []
    for index, name in enumerate(body.states):
        tokens = [linear(body.down[index], relu(row)) for row in states[name][:real]]
        weights = l1(relu([linear(body.of_tokens[index], times(x, g))[0] for x in tokens]))
        gate = 1.0 if body.gamma is None else 1 / (1 + math.exp(-float(body.gamma[index].detach()) / 0.1))
        tier = [gate * v for v in tokens[position]]
        for weight, x in zip(weights, tokens, strict=True):
            tier = plus(tier, [weight * v for v in x])
        tiers.append(tier)
    scores = []
    for tier in tiers:
        rho = sum(max(cosine(tier, other), 0.0) for other in tiers)
        scores.append(max(linear(body.of_layers, times(tier, g))[0], 0.0) / rho)
    z = g
    for weight, tier in zip(l1(scores), tiers, strict=True):
        z = plus(z, [weight * v for v in tier])
    return plus(q, linear(body.up, relu(z)))


def shaken(body: nn.Module) -> None:
    """In float64, every parameter moved, so that every term shows."""
    body.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            size = 0.1 if name == "gamma" else 0.4
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def made(*, last_real: bool = False, gated: bool = True, lean: bool = True) -> TieredAnchor:
    torch.manual_seed(0)
    body = TieredAnchor(STATES, "norm", WIDTHS, 4, last_real=last_real, gated=gated, lean=lean)
    shaken(body)
    return body


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])
@pytest.mark.parametrize("gated", [True, False], ids=["msr-vtt", "msvd"])
@pytest.mark.parametrize("last_real", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["usual", "faint"])
def test_it_equals_the_formula(last_real: bool, gated: bool, lean: bool, size: float) -> None:
    body = made(last_real=last_real, gated=gated, lean=lean)
    if size < 1:  # where the small numbers in the denominators count
        for parameter in (*body.down.parameters(), *body.of_tokens.parameters()):
            parameter.data *= size
    batch = random_states((*STATES, "norm"), WIDTHS, LENGTHS)
    out = body(batch)
    assert out.shape == (3, 6)
    for row, real in enumerate(LENGTHS):
        expected = naive(body, {n: batch.state(n)[row].tolist() for n in (*STATES, "norm")}, real)
        torch.testing.assert_close(out[row], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("gates", "published"), [(True, 9_598_006), (False, 9_597_980)], ids=["msr-vtt", "msvd"])
def test_clip4clip_has_as_many_parameters_as_published(gates: bool, published: int) -> None:
    def tower(width: int) -> TieredAnchor:
        states = ("embeddings", *(f"blocks.{i}" for i in range(12)))
        widths = {**dict.fromkeys(states, width), "projected": 512}
        return TieredAnchor(states, "projected", widths, 512, last_real=width == 512, gated=gates)

    towers = [tower(512), tower(768)]  # text, vision
    assert sum(p.numel() for tower in towers for p in tower.parameters()) == published


@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize("gates", [True, False])
def test_the_docstring_formula_counts_the_parameters(reduction: int, gates: bool) -> None:
    arch = Architecture("Toy", "text", blocks=4, width=8, prefix_tokens=0, final_layer="norm")
    number, d, e, m = 5, 8, 8, 8 // reduction
    formula = number * (d * m + m) + (e * m + m) + number * (m + 1) + (m + 1) + (m * e + e) + (number if gates else 0)
    method = SherlSingleAnchor(Config(reduction=reduction, gates=gates))
    body = method.build(arch, dict.fromkeys(method.layers(arch), 8), lambda: pytest.fail("starts at random"))
    assert sum(p.numel() for p in body.parameters()) == formula


def test_the_gates_start_open() -> None:
    body = TieredAnchor(STATES, "norm", WIDTHS, 4, last_real=False, gated=True)
    assert body.gamma is not None
    assert float(torch.sigmoid(body.gamma / 0.1).min().detach()) == pytest.approx(0.99995, abs=1e-5)


def test_a_layer_resembles_itself_and_layers_alike_share_their_weight() -> None:
    one, other = [1.0, 0.0, 0.0], [0.0, 2.0, 0.0]
    tiers = torch.tensor([[one, one, other], [one, other, [-1.0, 0.0, 0.0]]], dtype=torch.float64)
    expected = torch.tensor([[2.0, 2.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)  # opposites do not count
    torch.testing.assert_close(redundancy(tiers, EPS), expected, atol=1e-5, rtol=0)


def test_a_layer_that_is_zero_divides_by_nothing() -> None:
    tiers = torch.zeros(2, 3, 4, dtype=torch.float64, requires_grad=True)
    found = redundancy(tiers, EPS)
    found.sum().backward()
    assert found.tolist() == [[1.0, 1.0, 1.0]] * 2
    assert tiers.grad is not None
    assert torch.isfinite(tiers.grad).all()


def test_masked_tokens_weigh_nothing() -> None:
    body = made(last_real=True)
    batch = random_states((*STATES, "norm"), WIDTHS, LENGTHS)
    hidden = ~batch.mask[..., None]
    noisy: dict[str, Tensor] = {
        n: v + 100 * hidden * torch.randn(v.shape, dtype=v.dtype) for n, v in batch.activations.items()
    }
    torch.testing.assert_close(body(Exact(batch.mask, noisy, {})), body(batch), atol=1e-12, rtol=1e-12)


def test_images_without_a_class_token_are_refused() -> None:
    patches = Architecture("Plain", "image", blocks=2, width=8, prefix_tokens=0, final_layer="norm", norm="pre")
    assert "class token" in str(SherlSingleAnchor().refusal(patches))
