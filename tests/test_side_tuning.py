"""Side-tuning against its formula, written out in loops and in float64."""

import math
from dataclasses import replace

import pytest
import torch
from loops import Row, dot, layer_norm, linear, plus
from method_cases import random_states

from sidebench.adapters.side_tuning import Blend, Block, Config, SideNetwork, SideTuning
from sidebench.cache.architecture import Architecture
from sidebench.cache.errors import SidebenchError

Rows = list[Row]
ARCH = Architecture("Toy", "text", blocks=2, width=16, prefix_tokens=0, final_layer="norm", heads=4)
STATES, WIDTHS = ("embeddings", "norm"), {"embeddings": 5, "norm": 6}
LENGTHS = (2, 5, 3)


def shaken(depth: int = 2) -> Blend:
    """In float64, with every parameter away from its start so that every term shows."""
    torch.manual_seed(0)
    body = Blend(SideNetwork(5, 4, 6, depth, 2), "norm", 6).double()
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return body


def gelu(x: Row) -> Row:
    return [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]


def naive_block(block: Block, x: Rows) -> Rows:
    width, size = len(x[0]), len(x[0]) // block.heads
    qkv = [linear(block.qkv, layer_norm(block.norm1, row)) for row in x]
    out = []
    for i, row in enumerate(x):
        gathered: Row = []
        for head in range(block.heads):
            query, key, value = (slice(p * width + head * size, p * width + (head + 1) * size) for p in range(3))
            exps = [math.exp(dot(qkv[i][query], other[key]) / math.sqrt(size)) for other in qkv]
            columns = zip(*(other[value] for other in qkv), strict=True)
            gathered += [dot(exps, list(column)) / sum(exps) for column in columns]
        row = plus(row, linear(block.out, gathered))
        fc1, _, fc2 = block.mlp
        out.append(plus(row, linear(fc2, gelu(linear(fc1, layer_norm(block.norm2, row))))))
    return out


def naive(body: Blend, embeddings: Rows, final: Rows) -> Rows:
    """The real tokens of one example."""
    x = [linear(body.side.down, row) for row in embeddings]
    for block in body.side.blocks:
        assert isinstance(block, Block)
        x = naive_block(block, x)
    beside = [linear(body.side.up, layer_norm(body.side.norm, row)) for row in x]
    share = 1 / (1 + math.exp(-float(body.alpha.detach())))
    return [
        [share * f + (1 - share) * s for f, s in zip(a, b, strict=True)] for a, b in zip(final, beside, strict=True)
    ]


@pytest.mark.parametrize("depth", [1, 2])
def test_the_output_equals_the_formula(depth: int) -> None:
    body = shaken(depth)
    batch = random_states(STATES, WIDTHS, LENGTHS)
    out = body(batch)
    assert out.shape == (3, 5, 6)
    for row, real in enumerate(LENGTHS):
        embeddings, final = (batch.state(name)[row, :real].tolist() for name in STATES)
        wanted = torch.tensor(naive(body, embeddings, final), dtype=torch.float64)
        torch.testing.assert_close(out[row, :real], wanted, atol=1e-6, rtol=1e-6)


def test_the_blend_is_even_at_the_start() -> None:
    body = SideTuning().build(replace(ARCH, width=64), dict.fromkeys(STATES, 64), lambda: pytest.fail("no weights"))
    assert isinstance(body, Blend)
    assert float(body.alpha.detach()) == 0.0
    batch = random_states(STATES, dict.fromkeys(STATES, 64), LENGTHS)
    body.double()
    beside = body.side(batch.state("embeddings"), batch.mask)
    torch.testing.assert_close(body(batch), (batch.state("norm") + beside) / 2)


@pytest.mark.parametrize(("alpha", "only"), [(50.0, "norm"), (-800.0, "side")])
def test_the_scalar_closes_either_side(alpha: float, only: str) -> None:
    body = shaken()
    with torch.no_grad():
        body.alpha.fill_(alpha)
    batch = random_states(STATES, WIDTHS, LENGTHS)
    beside = body.side(batch.state("embeddings"), batch.mask)
    torch.testing.assert_close(body(batch), batch.state("norm") if only == "norm" else beside)


def test_a_slice_of_the_batch_is_the_whole_of_its_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    body, batch = shaken(), random_states(STATES, WIDTHS, LENGTHS)
    loss = body(batch).square().sum()
    whole = torch.autograd.grad(loss, list(body.parameters()))
    monkeypatch.setattr("sidebench.adapters._recompute.TOKENS_AT_A_TIME", 5)  # one example at a time
    sliced = torch.autograd.grad(body(batch).square().sum(), list(body.parameters()))
    plain = torch.autograd.grad(body.blend(batch).square().sum(), list(body.parameters()))
    for one, other, third in zip(whole, sliced, plain, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one, third)


@pytest.mark.parametrize(("width", "reduction", "depth"), [(16, 2, 1), (64, 8, 2), (768, 8, 2)])
def test_the_count_is_that_of_the_formula(width: int, reduction: int, depth: int) -> None:
    method = SideTuning(Config(reduction=reduction, depth=depth))
    body = method.build(replace(ARCH, width=width), dict.fromkeys(STATES, width), lambda: pytest.fail("no weights"))
    s = width // reduction
    formula = width * s + s + depth * (12 * s * s + 13 * s) + 2 * s + s * width + width + 1
    assert sum(p.numel() for p in body.parameters()) == formula


def test_it_reads_the_embeddings_and_the_final_layer() -> None:
    assert SideTuning().layers(ARCH) == ("embeddings", "norm")
    assert SideTuning().layers(replace(ARCH, final_layer="embeddings")) == ("embeddings",)


def test_layers_of_different_token_counts_get_a_sentence() -> None:
    body, batch = shaken(), random_states(STATES, WIDTHS, (5, 5))
    pooled = {**batch.activations, "norm": batch.state("norm")[:, :3]}
    with pytest.raises(SidebenchError, match="norm has 3 tokens where embeddings has 5"):
        body(replace(batch, activations=pooled))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Config(reduction=17), "reduction=17"),
        (Config(reduction=0), "reduction=0"),
        (Config(reduction=2, heads=3), "3 heads"),
        (Config(reduction=2, heads=0), "0 heads"),
        (Config(reduction=2, depth=0), "depth 0"),
    ],
)
def test_a_side_network_that_cannot_be_is_refused(config: Config, said: str) -> None:
    assert said in str(SideTuning(config).refusal(ARCH))
    assert SideTuning(Config(reduction=2)).refusal(ARCH) is None
