"""SHERL's form for transformers: its early route against the formula in loops and float64, and both routes against the
whole network run live (arXiv 2407.07523)."""

import copy
import math

import pytest
import torch
from loops import Row, dot, layer_norm, linear
from method_cases import Exact, build, random_states
from restarts import batch_for, bytes_kept, deep_backbones
from torch import Tensor, nn

from sidebench.adapters import _recompute
from sidebench.adapters._base import Batch, trained
from sidebench.adapters._sherl import EPS, redundancy, without_repeats
from sidebench.adapters._tokens import relu_l1
from sidebench.adapters.sherl import Config, EarlyRoute, Sherl, TwoRoutes
from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone

STATES = ("embeddings", "blocks.0", "blocks.1", "blocks.2")
WIDTHS = dict.fromkeys(STATES, 6)
LENGTHS = (2, 5, 3)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    return deep_backbones(tmp_path_factory.mktemp("deep"), 4)


def moved(module: nn.Module) -> None:
    """Every trained parameter away from its start, so that every term shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trained(module).items():
            size = 0.05 if name.endswith("gamma") else 0.4
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def route(states: tuple[str, ...] = STATES) -> EarlyRoute:
    torch.manual_seed(0)
    early = EarlyRoute(states, 6, 4).double()
    moved(early)
    return early


def cosine(a: Row, b: Row) -> float:
    def length(x: Row) -> float:
        return math.sqrt(dot(x, x)) + 1e-8

    return dot(a, b) / (length(a) * length(b))


def naive(early: EarlyRoute, states: list[Row]) -> Row:
    """One token of every layer -> what enters the last block in its place."""
    projected = []
    for down, state in zip(early.down, states, strict=True):
        assert isinstance(down, nn.Sequential)
        assert down[1].eps == 1e-5
        projected.append(layer_norm(down[1], linear(down[0], state)))
    *shallow, deep = projected
    scores = []
    for x in shallow:
        rho = sum(max(cosine(x, other), 0.0) for other in shallow)
        assert early.score is not None
        score = linear(early.score, [v * g for v, g in zip(x, deep, strict=True)])[0]
        scores.append(max(score, 0.0) / rho)
    z = list(deep)
    for score, x in zip(scores, shallow, strict=True):
        z = [total + score / (sum(scores) + 1e-8) * v for total, v in zip(z, x, strict=True)]
    assert early.up[1].eps == 1e-12
    raised = layer_norm(early.up[1], linear(early.up[0], [max(v, 0.0) for v in z]))
    gate = math.tanh(float(early.gamma.detach()) / 0.1)
    return [v + gate * h for v, h in zip(raised, states[-1], strict=True)]


def test_the_early_route_equals_the_formula() -> None:
    early, batch = route(), random_states(STATES, WIDTHS, LENGTHS)
    out = early(batch)
    for row in range(len(LENGTHS)):
        for token in range(max(LENGTHS)):
            expected = naive(early, [batch.state(state)[row, token].tolist() for state in STATES])
            torch.testing.assert_close(out[row, token], torch.tensor(expected).double(), atol=1e-6, rtol=1e-6)


def test_a_single_shallow_state_is_added_as_it_is() -> None:
    early, batch = route(STATES[:2]), random_states(STATES, WIDTHS, LENGTHS)
    assert early.score is None
    first, deep = (down(batch.state(state)) for down, state in zip(early.down, STATES[:2], strict=True))
    expected = early.up(torch.relu(first + deep)) + torch.tanh(early.gamma / 0.1) * batch.state("blocks.0")
    torch.testing.assert_close(early(batch), expected, atol=1e-12, rtol=1e-12)


def test_while_gamma_is_zero_the_last_state_comes_in_through_its_projection_alone() -> None:
    early, batch = route(), random_states(STATES, WIDTHS, LENGTHS)
    deep = batch.state(STATES[-1]).requires_grad_()
    seen = Exact(batch.mask, {**batch.activations, STATES[-1]: deep})
    with torch.no_grad():
        early.gamma.zero_()
        early.down[-1][0].weight.zero_()  # type: ignore[index]
    early(seen).sum().backward()
    assert deep.grad is not None
    assert not deep.grad.any()
    assert early.gamma.grad is not None
    assert early.gamma.grad != 0  # and yet it can open
    assert not EarlyRoute(STATES, 6, 4).gamma.any()


def test_the_weights_of_each_token_sum_to_one_or_none_does() -> None:
    early, batch = route(), random_states(STATES, WIDTHS, LENGTHS)
    *shallow, deep = (down(batch.state(state)) for down, state in zip(early.down, STATES, strict=True))
    tiers = torch.stack(shallow, -2)
    rho = redundancy(tiers, EPS)
    assert rho.shape == (3, 5, 3)
    assert (rho >= 1 - 1e-6).all()  # a layer resembles itself
    assert (rho <= 3).all()
    assert early.score is not None
    scores = torch.relu(early.score(tiers * deep[..., None, :]).squeeze(-1)) / rho
    sums = relu_l1(scores, EPS).sum(-1)
    some = (scores > 0).any(-1)
    assert some.any()
    torch.testing.assert_close(sums, some.double(), atol=1e-6, rtol=0)
    merged = without_repeats(early.score, deep, tiers, EPS)
    expected = (relu_l1(scores, EPS)[..., None] * tiers).sum(-2)
    torch.testing.assert_close(merged, expected, atol=1e-12, rtol=1e-12)


def test_layers_that_are_zero_divide_by_nothing() -> None:
    tiers = torch.zeros(2, 4, 3, 6, dtype=torch.float64, requires_grad=True)
    score = nn.Linear(6, 1).double()
    nn.init.ones_(score.bias)
    merged = without_repeats(score, torch.zeros(2, 4, 6, dtype=torch.float64), tiers, EPS)
    merged.sum().backward()
    assert not merged.any()
    assert tiers.grad is not None
    assert torch.isfinite(tiers.grad).all()


def live(whole: Backbone, early: EarlyRoute, inputs: dict[str, Tensor]) -> Tensor:
    """The whole network, with the early route put in front of its last block: nothing cached, nothing restarted."""
    states: dict[str, Tensor] = {}

    def note(_: nn.Module, args: tuple, kwargs: dict) -> tuple:
        state = args[0] if args else kwargs["hidden_states"]
        states[early.states[len(states)]] = state
        if len(states) == len(early.states):
            state = early(Batch(torch.ones(state.shape[:2], dtype=torch.bool), states))
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    for block in whole.blocks:
        block.register_forward_pre_hook(note, with_kwargs=True)
    return whole.tokens(inputs)


def backward(out: Tensor, mask: Tensor) -> None:
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    (out * weights * mask[..., None]).sum().backward()


@pytest.mark.parametrize("family", ["vit", "bert", "t5"])
def test_it_equals_the_whole_network_run_live_bit_for_bit_gradients_included(
    deep: dict[str, Backbone], family: str
) -> None:
    whole = copy.deepcopy(deep[family])
    inputs, batch = batch_for(whole, Sherl())
    torch.manual_seed(0)
    body = build(Sherl(Config(lean=False)), whole)
    assert isinstance(body, TwoRoutes)
    moved(body)
    other = copy.deepcopy(body.early)
    here, there = body(batch), live(whole, other, inputs)
    assert torch.equal(here[batch.mask], there[batch.mask])
    backward(here, batch.mask)
    backward(there, batch.mask)
    for mine, theirs in zip(body.early.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.any()
        assert torch.equal(mine.grad, theirs.grad)


def test_the_lean_form_has_the_same_gradients(deep: dict[str, Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recompute, "TOKENS_AT_A_TIME", 10)  # of the four texts one at a time
    _, batch = batch_for(deep["bert"], Sherl())
    bodies = []
    for lean in (True, False):
        torch.manual_seed(0)
        body = build(Sherl(Config(lean=lean)), deep["bert"])
        moved(body)
        backward(body(batch), batch.mask)
        bodies.append(body)
    for one, other in zip(*(trained(body).values() for body in bodies), strict=True):
        # Not bit for bit: a matrix product over fewer rows may sum in another order.
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_backward_keeps_nothing_of_the_lean_early_route(deep: dict[str, Backbone]) -> None:
    _, batch = batch_for(deep["vit"], Sherl())

    def kept(lean: bool) -> int:
        body = build(Sherl(Config(lean=lean)), deep["vit"])
        assert isinstance(body, TwoRoutes)
        body._backbone.tokens = lambda inputs: inputs["entering"]  # type: ignore[method-assign]
        assert body(batch).requires_grad
        return bytes_kept(body, batch)

    assert kept(lean=True) == 0
    assert kept(lean=False) > 5 * batch.state("embeddings").nbytes


def test_it_reads_what_enters_each_block_and_holds_the_last() -> None:
    arch = Architecture("Toy", "text", blocks=3, width=8, prefix_tokens=0, final_layer="norm", mlp_width=16)
    assert Sherl().layers(arch) == ("embeddings", "blocks.0", "blocks.1")
    assert Sherl().first_block(arch) == 2


def test_vse_has_as_many_parameters_as_its_code() -> None:
    """Both sides, each with a Linear to 1024 and GPO (a GRU of width 32 and 32 weights): 11,071,556."""
    states = ("embeddings", *(f"blocks.{i}" for i in range(11)))
    text = sum(p.numel() for p in EarlyRoute(states, 768, 512).parameters())
    stages, m = (256, 512, 1024, 2048), 512
    image = sum(d * m + m + 2 * m for d in stages) + (m + 1) + (m * 2048 + 2048 + 2 * 2048) + 1
    pooling = 2 * (3 * 32 * 32 + 3 * 32 * 32 + 2 * 3 * 32) + 32
    to_embedding = (768 * 1024 + 1024) + (2048 * 1024 + 1024)
    assert text + image + to_embedding + 2 * pooling == 11_071_556


@pytest.mark.parametrize(("blocks", "reduction"), [(2, 2), (3, 1), (6, 4)])
def test_the_docstring_formula_counts_the_parameters(blocks: int, reduction: int) -> None:
    d, m = 8, 8 // reduction
    formula = blocks * (d * m + m + 2 * m) + (m + 1) * (blocks > 2) + (m * d + d + 2 * d) + 1
    states = ("embeddings", *(f"blocks.{i}" for i in range(blocks - 1)))
    assert sum(p.numel() for p in EarlyRoute(states, d, m).parameters()) == formula


def test_what_cannot_work_is_refused() -> None:
    def arch(blocks: int, mlp_width: int | None = 16) -> Architecture:
        return Architecture("Toy", "text", blocks, 8, prefix_tokens=0, final_layer="norm", mlp_width=mlp_width)

    assert Sherl().refusal(arch(2)) is None
    assert "has 1 blocks" in str(Sherl().refusal(arch(1)))
    assert "attention blocks" in str(Sherl().refusal(arch(4, mlp_width=None)))
    assert "no side width" in str(Sherl(Config(reduction=9)).refusal(arch(4)))
