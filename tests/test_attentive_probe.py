"""The attentive probe against its formula, written out in loops and in float64, token by token and unfolded."""

import math
from dataclasses import replace

import pytest
import torch
from loops import Row, dot, layer_norm, linear
from method_cases import random_states
from torch import Tensor

from sidebench.adapters._base import Batch
from sidebench.adapters.attentive_probe import AttentiveProbe, Config, Queries
from sidebench.cache.architecture import Architecture

ARCH = Architecture("Toy", "text", blocks=2, width=8, prefix_tokens=0, final_layer="norm", heads=4)
WIDTH, HEADS = 8, 4
LENGTHS = (2, 5, 3)
looks = pytest.mark.parametrize("queries", [1, 3])


def shaken(queries: int, heads: int = HEADS) -> Queries:
    """In float64, far enough from the start that every term shows."""
    torch.manual_seed(0)
    body = Queries("norm", WIDTH, queries, heads).double()
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return body


def naive(body: Queries, tokens: list[Row]) -> Row:
    """The real tokens of one example, T rows of D -> k D numbers."""
    keys, values = ([linear(layer, token) for token in tokens] for layer in (body.key, body.value))
    size = WIDTH // body.heads
    out: Row = []
    for query in body.query.tolist():
        gathered: Row = []
        for head in range(body.heads):
            own = slice(head * size, (head + 1) * size)
            exps = [math.exp(dot(query[own], key[own]) / math.sqrt(size)) for key in keys]
            columns = zip(*(value[own] for value in values), strict=True)
            gathered += [dot([e / sum(exps) for e in exps], list(column)) for column in columns]
        out += layer_norm(body.norm, gathered)
    return out


@looks
@pytest.mark.parametrize("heads", [1, 4])
def test_the_output_equals_the_formula(queries: int, heads: int) -> None:
    body = shaken(queries, heads)
    batch = random_states(("norm",), {"norm": WIDTH}, LENGTHS)
    out = body(batch)
    assert out.shape == (3, queries * WIDTH) == (3, body.width)
    for row, real in enumerate(LENGTHS):
        wanted = torch.tensor(naive(body, batch.state("norm")[row, :real].tolist()), dtype=torch.float64)
        torch.testing.assert_close(out[row], wanted, atol=1e-6, rtol=1e-6)


@looks
def test_padding_weighs_nothing_whatever_is_in_it(queries: int) -> None:
    body = shaken(queries)
    batch = random_states(("norm",), {"norm": WIDTH}, LENGTHS)
    weights: Tensor = body.weights(batch.state("norm"), batch.mask)
    assert weights.shape == (3, queries * HEADS, 5)
    assert (weights[~batch.mask[:, None, :].expand_as(weights)] == 0).all()
    assert (weights[batch.mask[:, None, :].expand_as(weights)] > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, queries * HEADS, dtype=torch.float64))
    noise = torch.where(batch.mask[..., None], batch.activations["norm"], torch.tensor(1e3, dtype=torch.float64))
    assert torch.equal(body(replace(batch, activations={"norm": noise})), body(batch))


def test_queries_look_elsewhere() -> None:
    first, second = shaken(2)(random_states(("norm",), {"norm": WIDTH}, LENGTHS)).split(WIDTH, dim=1)
    assert (first - second).abs().min(1).values.max() > 1e-3


@pytest.mark.parametrize(("width", "queries"), [(8, 1), (8, 3), (768, 1)])
def test_the_count_is_that_of_the_formula(width: int, queries: int) -> None:
    body = AttentiveProbe(Config(queries=queries)).build(
        replace(ARCH, width=width), {"norm": width}, lambda: pytest.fail("no weights needed")
    )
    assert sum(p.numel() for p in body.parameters()) == queries * width + 2 * width**2 + 2 * width


def test_it_reads_the_final_layer_alone_and_leaves_it_without_a_gradient() -> None:
    assert AttentiveProbe().layers(ARCH) == ("norm",)
    batch = random_states(("norm",), {"norm": WIDTH}, LENGTHS)
    shaken(1)(batch).sum().backward()
    assert not batch.activations["norm"].requires_grad


def test_the_heads_are_the_backbones_unless_asked_otherwise() -> None:
    def heads(config: Config, arch: Architecture = ARCH) -> int:
        body = AttentiveProbe(config).build(arch, {"norm": WIDTH}, lambda: pytest.fail("no weights needed"))
        assert isinstance(body, Queries)
        return body.heads

    assert heads(Config()) == 4
    assert heads(Config(heads=2)) == 2
    assert heads(Config(), replace(ARCH, heads=None)) == 1


def test_a_width_that_does_not_split_and_no_query_are_refused() -> None:
    assert AttentiveProbe().refusal(ARCH) is None
    assert "3 heads" in str(AttentiveProbe(Config(heads=3)).refusal(ARCH))
    assert "queries" in str(AttentiveProbe(Config(queries=0)).refusal(ARCH))


def test_no_projected_copy_of_the_tokens_is_kept_for_backward() -> None:
    """What makes the folding worth it: of the size of the tokens autograd keeps the tokens themselves."""
    body = Queries("norm", 64, 1, 4)
    tokens = torch.randn(4, 50, 64)
    kept: dict[int, int] = {}

    def seen(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        body(Batch(torch.ones(4, 50, dtype=torch.bool), {"norm": tokens}))
    assert tokens.data_ptr() in kept
    assert [size for place, size in kept.items() if size >= tokens.nbytes and place != tokens.data_ptr()] == []
