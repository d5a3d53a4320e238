"""Res-Tuning-Bypass against its recurrence, written out in loops and in float64 (arXiv 2310.19859)."""

import dataclasses
import math

import pytest
import torch
from method_cases import Case, random_states
from torch import Tensor, nn

from sidebench.adapters import _recompute
from sidebench.adapters._base import Batch
from sidebench.adapters.res_tuning_bypass import Bypass, Config, ResTuningBypass, Tuner
from sidebench.cache.architecture import Architecture

STATES = ("embeddings", *(f"blocks.{i}" for i in range(6)))  # more than one piece of the lean chain
LAYERS = (*STATES, "norm")
WIDTHS = {**dict.fromkeys(STATES, 6), "embeddings": 5, "norm": 6}
LENGTHS = (2, 4, 3)
lean_and_plain = pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])
Rows = list[list[float]]


@pytest.fixture(autouse=True)
def _slices_of_two_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recompute, "TOKENS_AT_A_TIME", 2 * max(LENGTHS))


def bypass(*, lean: bool = True, moved: bool = True) -> Bypass:
    """In float64; `moved`: away from the zeros it starts with, so that every term shows."""
    torch.manual_seed(0)
    body = Bypass(STATES, "norm", WIDTHS, 3, lean=lean).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in body.parameters() if moved else ():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return body


def linear(layer: nn.Linear, x: list[float]) -> list[float]:
    rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]


def naive_tuner(tuner: nn.Module, x: list[float]) -> list[float]:
    assert isinstance(tuner, Tuner)
    hidden = [h * 0.5 * (1 + math.erf(h / math.sqrt(2))) for h in linear(tuner.down, x)]
    return linear(tuner.up, hidden)


def naive(body: Bypass, states: dict[str, Rows], token: int) -> list[float]:
    chain = naive_tuner(body.horizontal[0], states[STATES[0]][token])
    for level in range(1, len(STATES)):
        across = naive_tuner(body.horizontal[level], states[STATES[level]][token])
        along = naive_tuner(body.vertical[level - 1], chain)
        chain = [a + c + v for a, c, v in zip(across, chain, along, strict=True)]
    return [f + c for f, c in zip(states["norm"][token], chain, strict=True)]


@lean_and_plain
def test_every_token_equals_the_recurrence(lean: bool) -> None:
    body, batch = bypass(lean=lean), random_states(LAYERS, WIDTHS, LENGTHS)
    out = body(batch)
    for row, real in enumerate(LENGTHS):
        states = {name: batch.state(name)[row].tolist() for name in LAYERS}
        expected = torch.tensor([naive(body, states, token) for token in range(real)], dtype=torch.float64)
        torch.testing.assert_close(out[row, :real], expected, atol=1e-10, rtol=1e-10)


@lean_and_plain
def test_before_training_the_output_is_the_final_tokens_to_the_bit(lean: bool) -> None:
    batch = random_states(LAYERS, WIDTHS, LENGTHS)
    assert torch.equal(bypass(lean=lean, moved=False)(batch), batch.state("norm"))


def test_a_backbone_without_a_final_norm_starts_as_its_last_state() -> None:
    arch = Architecture("Any", "text", blocks=2, width=6, prefix_tokens=0, final_layer="blocks.1")
    method = ResTuningBypass()
    assert method.layers(arch) == ("embeddings", "blocks.0", "blocks.1")
    widths = dict.fromkeys(method.layers(arch), 6)
    body = method.build(arch, widths, lambda: pytest.fail("it starts from no backbone weights")).double()
    batch = random_states(method.layers(arch), widths, LENGTHS)
    assert torch.equal(body(batch), batch.state("blocks.1"))


def test_the_first_step_moves_every_horizontal_tuner() -> None:
    body, batch = bypass(moved=False), random_states(LAYERS, WIDTHS, LENGTHS)
    (body(batch) ** 2).sum().backward()
    for tuner in body.horizontal:
        assert tuner.get_parameter("up.weight").grad.abs().max() > 1e-3  # type: ignore[union-attr]


def test_a_state_reaches_the_output_through_every_later_vertical_tuner() -> None:
    body, batch = bypass(), random_states(LAYERS, WIDTHS, LENGTHS)
    full = body(batch)
    for tuner in body.vertical:
        saved = {name: value.clone() for name, value in tuner.state_dict().items()}
        nn.init.zeros_(tuner.get_parameter("up.weight"))
        assert not torch.allclose(body(batch), full, atol=1e-6)
        tuner.load_state_dict(saved)
    assert torch.equal(body(batch), full)


def test_lean_and_plain_have_the_same_gradients() -> None:
    batch = random_states(LAYERS, WIDTHS, LENGTHS)
    found = []
    for lean in (True, False):
        body = bypass(lean=lean)
        out = body(batch)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        found.append({name: parameter.grad for name, parameter in body.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-12, rtol=1e-12)
    assert all(state.grad is None for state in batch.activations.values())


def saved_bytes(body: Bypass, batch: Batch) -> int:
    """What forward keeps for backward beyond parameters and the stored activations."""
    known = {t.untyped_storage().data_ptr() for t in (*body.parameters(), *batch.activations.values(), batch.mask)}  # type: ignore[union-attr]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = body(batch)
    assert out.requires_grad
    return sum(kept.values())


def test_lean_keeps_a_fraction_of_what_plain_keeps() -> None:
    widths = dict.fromkeys(LAYERS, 64)
    exact = random_states(LAYERS, widths, (40, 40, 40))
    batch = Batch(exact.mask, {name: state.half() for name, state in exact.activations.items()})
    lean, plain = (Bypass(STATES, "norm", widths, 4, lean=lean) for lean in (True, False))
    assert 6 * saved_bytes(lean, batch) < saved_bytes(plain, batch)


@pytest.mark.parametrize("bottleneck", [1, 8])
def test_the_docstring_formula_counts_the_parameters(bottleneck: int) -> None:
    number, d, b = 7, 12, bottleneck
    body = Bypass(STATES, "norm", dict.fromkeys(LAYERS, d), bottleneck)
    assert sum(p.numel() for p in body.parameters()) == (2 * number - 1) * (2 * d * b + b + d)


def test_what_cannot_be_chained_is_refused() -> None:
    usual = Architecture("Net", "image", blocks=3, width=6, prefix_tokens=0, final_layer="blocks.2")
    assert Case("res_tuning_bypass").method().refusal(usual) is None
    assert "blocks" in str(ResTuningBypass().refusal(dataclasses.replace(usual, blocks=0)))
    assert "1 or more" in str(ResTuningBypass(Config(bottleneck=0)).refusal(usual))
    maps = dataclasses.replace(usual, stages=((4, 4), (2, 2)), final_layer="stages.1")
    assert "--tokens mean" in str(ResTuningBypass().refusal(maps))
    pooled = dataclasses.replace(maps, stages=((1, 1), (1, 1)))
    assert ResTuningBypass().refusal(pooled) is None
