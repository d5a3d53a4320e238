"""LST on stage maps against a naive float64 reference, pixel by pixel; its count, its strides and what is refused."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from convolutions import conv
from method_cases import Exact
from torch import Tensor, nn

from sidebench.adapters._lst_stages import StageLadder, strides
from sidebench.adapters.lst import LST, Config
from sidebench.cache.architecture import Architecture

STAGES = ((6, 5), (3, 3), (1, 1))  # strides 2, 2 and 3, 3
WIDTHS = {"stages.0": 8, "stages.1": 18, "stages.2": 33}  # side maps of 2, 4 and 8 channels with r = 4
ARCH = Architecture("Toy", "image", blocks=0, width=33, prefix_tokens=0, final_layer="stages.2", stages=STAGES)


def maps(examples: int = 3, *, seed: int = 0) -> Exact:
    generator = torch.Generator().manual_seed(seed)
    states = {
        name: torch.randn(examples, h * w, WIDTHS[name], generator=generator, dtype=torch.float64)
        for name, (h, w) in ARCH.grids.items()
    }
    masks = {name: torch.ones(state.shape[:2], dtype=torch.bool) for name, state in states.items()}
    return Exact(masks.pop("stages.2"), states, {}, masks)


def shaken(**options: Any) -> StageLadder:
    torch.manual_seed(0)
    body = StageLadder(ARCH, WIDTHS, 4, 0.5, **options).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return body


def group_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """A whole map (C, H, W) by its one mean and variance."""
    assert isinstance(norm, nn.GroupNorm)
    values = x.flatten().tolist()
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    out = torch.zeros_like(x)
    for c in range(len(x)):
        out[c] = (x[c] - mean) / math.sqrt(variance + 1e-5) * norm.weight[c].item() + norm.bias[c].item()
    return out


def gelu(x: Tensor) -> Tensor:
    values = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.flatten().tolist()]
    return torch.tensor(values, dtype=x.dtype).view(x.shape)


def biased(layer: nn.Module, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    return conv(layer.weight.detach(), x, stride, padding) + layer.bias.detach()[:, None, None]


def naive(body: StageLadder, states: dict[str, Tensor], *, gated: bool, merge_last: bool) -> Tensor:
    """The docstring's formula for one example: maps (T, C) in, tokens (T, D) out."""
    side = torch.zeros(0)
    for index, (name, (height, width)) in enumerate(ARCH.grids.items()):
        down, block = body.down[index], body.blocks[index]
        assert isinstance(down, nn.Linear)
        rows = [down.weight.detach() @ pixel + down.bias.detach() for pixel in states[name]]
        x = torch.stack(rows, 1).reshape(-1, height, width)
        if index:
            stride = (0, 2, 3)[index]
            carried = biased(body.carry[index - 1], side, stride, padding=stride - 1)
            mu = 1 / (1 + math.exp(-body.alpha[index - 1].item() / 0.5)) if gated else 0.0  # type: ignore[index]
            x = mu * carried + (1 - mu) * x if gated else carried + x
        inner = gelu(biased(block.down, group_norm(block.norm, x)))  # type: ignore[arg-type]
        inner = gelu(biased(block.middle, inner, padding=1))  # type: ignore[arg-type]
        side = x + biased(block.up, inner)  # type: ignore[arg-type]
    top = group_norm(body.norm, side).flatten(1)
    tokens = torch.stack([body.up.weight.detach() @ pixel + body.up.bias.detach() for pixel in top.T])
    if not merge_last:
        return tokens
    mu = 1 / (1 + math.exp(-body.alpha_last.item() / 0.5))  # type: ignore[union-attr]
    return mu * tokens + (1 - mu) * states["stages.2"]


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "sum"])
@pytest.mark.parametrize("merge_last", [True, False], ids=["merged", "alone"])
def test_the_ladder_equals_the_formula(lean: bool, gated: bool, merge_last: bool) -> None:
    body, batch = shaken(gated=gated, merge_last=merge_last, lean=lean), maps()
    out = body(batch)
    assert out.shape == (3, 1, 33)
    for example in range(3):
        states = {name: state[example] for name, state in batch.activations.items()}
        wanted = naive(body, states, gated=gated, merge_last=merge_last)  # type: ignore[arg-type]
        torch.testing.assert_close(out[example], wanted, atol=1e-10, rtol=1e-10)


def test_lean_and_plain_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidebench.adapters._recompute.TOKENS_AT_A_TIME", 60)  # two examples at a time
    bodies = [shaken(merge_last=True, lean=lean) for lean in (True, False)]
    for body in bodies:
        body(maps()).square().sum().backward()
    for one, other in zip(*(body.parameters() for body in bodies), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-10, rtol=1e-10)
        assert one.grad is not None
        assert one.grad.abs().max() > 0


def test_the_docstring_formula_counts_the_parameters() -> None:
    c, s, i = (8, 18, 33), (2, 4, 8), (1, 1, 2)
    formula = sum(c[x] * s[x] + s[x] for x in range(3)) + (9 * 2 * 4 + 4) + (25 * 4 * 8 + 8) + 2
    formula += sum(2 * s[x] + 2 * s[x] * i[x] + s[x] + 9 * i[x] ** 2 + 2 * i[x] for x in range(3))
    formula += 2 * 8 + 8 * 33 + 33
    count = sum(p.numel() for p in shaken().parameters())
    assert count == formula
    assert sum(p.numel() for p in shaken(merge_last=True).parameters()) == count + 1
    assert sum(p.numel() for p in shaken(gated=False).parameters()) == count - 2


def test_it_starts_half_open_and_small() -> None:
    torch.manual_seed(0)
    body = LST(Config(init="random", reduction=1)).build(ARCH, WIDTHS, lambda: pytest.fail("nothing is copied"))
    assert isinstance(body, StageLadder)
    assert body.alpha is not None
    assert not body.alpha.any()
    assert not body.up.bias.any()
    assert float(body.up.weight.detach().std()) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("larger", "smaller", "found"),
    [
        ((112, 112), (56, 56), (2, 2)),
        ((7, 9), (4, 3), (2, 3)),
        ((4, 4), (4, 4), (1, 1)),
        ((7, 7), (1, 1), (7, 7)),
        ((5, 5), (4, 4), None),
        ((2, 2), (4, 4), None),
    ],
)
def test_a_stride_leads_from_one_map_to_the_next(larger: Any, smaller: Any, found: Any) -> None:
    assert strides(larger, smaller) == found


@pytest.mark.parametrize(
    ("settings", "stages", "said"),
    [
        ({}, STAGES, "it copies no blocks of convolutions"),
        ({"init": "fisher"}, STAGES, "--set lst.init=random"),
        ({"init": "random", "keep": "1"}, STAGES, "stage maps have none; leave it at all"),
        ({"init": "random", "temperature": 0.0}, STAGES, "temperature 0.0 is none for a gate"),
        ({"init": "random", "reduction": 0}, STAGES, "lst.reduction=0 is none"),
        ({"init": "random"}, ((5, 5), (4, 4)), "no stride leads from the 5 x 5 map stages.0 to the 4 x 4 of stages.1"),
    ],
)
def test_what_has_no_ladder_is_refused(settings: dict[str, Any], stages: Any, said: str) -> None:
    assert said in str(LST(Config(**settings)).refusal(dataclasses.replace(ARCH, stages=stages)))


def test_all_maps_are_read() -> None:
    method = LST(Config(init="random"))
    assert method.refusal(ARCH) is None
    assert method.layers(ARCH) == tuple(WIDTHS)
