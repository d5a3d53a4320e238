"""SHERL on stage maps against a naive float64 reference, the published count, and the restarted last bottleneck."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from convolutions import conv, norm, tiny_resnet
from method_cases import Exact
from stages import tiny_cnn
from torch import Tensor, nn

from sidebench.adapters._base import Batch
from sidebench.adapters._sherl_stages import EarlyStages
from sidebench.adapters._stages import LinearNorm
from sidebench.adapters.sherl import Config, Sherl, TwoRoutes
from sidebench.cache.architecture import BEFORE_LAST, Architecture
from sidebench.cache.backbone import Backbone
from sidebench.cache.configs import fake_mode
from sidebench.cache.errors import SidebenchError
from sidebench.cache.resnet_load import config_resnet
from sidebench.cache.suffix import ENTERING, MASK, LastBottleneck, restarted

STAGES = ((8, 4), (4, 4), (2, 2), (2, 2))
WIDTHS = {"stages.0": 3, "stages.1": 4, "stages.2": 5, BEFORE_LAST: 6}
GRIDS = dict(zip(WIDTHS, STAGES, strict=True))
ARCH = Architecture("Toy", "image", 0, 6, 0, final_layer="stages.3", stages=STAGES, bottlenecks=True)
Rows = list[list[float]]


def maps(examples: int = 3, *, seed: int = 0) -> Exact:
    generator = torch.Generator().manual_seed(seed)
    states = {
        name: torch.randn(examples, h * w, WIDTHS[name], generator=generator, dtype=torch.float64)
        for name, (h, w) in GRIDS.items()
    }
    masks = {name: torch.ones(state.shape[:2], dtype=torch.bool) for name, state in states.items()}
    return Exact(masks[BEFORE_LAST], states, {}, masks)


def shaken() -> EarlyStages:
    torch.manual_seed(0)
    early = EarlyStages(ARCH, WIDTHS, 4).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in early.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        early.gamma.fill_(0.03)
    return early


def pooled(pixels: Rows, grid: tuple[int, int]) -> Rows:
    """Of each cell of the 2 x 2 grid and each channel the largest value plus the mean."""
    down, across = grid[0] // 2, grid[1] // 2
    found = []
    for top in (0, down):
        for left in (0, across):
            cell = [pixels[(top + i) * grid[1] + left + j] for i in range(down) for j in range(across)]
            found.append([max(values) + sum(values) / len(values) for values in zip(*cell, strict=True)])
    return found


def lin_norm(part: LinearNorm, batch: list[Rows], *, training: bool) -> list[Rows]:
    weight, bias = part.linear.weight.tolist(), part.linear.bias.tolist()
    out = [[[sum(w * x for w, x in zip(ws, row, strict=True)) + b for ws, b in zip(weight, bias, strict=True)]
            for row in rows] for rows in batch]  # fmt: skip
    for c in range(len(bias)):
        values = [row[c] for rows in out for row in rows]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        if not training:
            mean, variance = float(part.norm.running_mean[c]), float(part.norm.running_var[c])  # type: ignore[index]
        for rows in out:
            for row in rows:
                row[c] = (row[c] - mean) / math.sqrt(variance + 1e-5) * part.norm.weight[c].item()
                row[c] += part.norm.bias[c].item()
    return out


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def naive(early: EarlyStages, batch: Exact, *, training: bool) -> list[Rows]:
    """Section 3.1 of the notes on methods, position by position."""
    found = [
        lin_norm(part, [pooled(rows, GRIDS[name]) for rows in batch.state(name).tolist()], training=training)  # type: ignore[arg-type]
        for name, part in zip(WIDTHS, early.down, strict=True)
    ]
    assert early.score is not None
    fc, fc_bias = early.score.weight[0].tolist(), early.score.bias.item()
    z: list[Rows] = []
    for example in range(3):
        z.append([])
        for t in range(4):
            *shallow, deep = [x[example][t] for x in found]
            units = [[v / (math.sqrt(dot(x, x)) + 1e-8) for v in x] for x in shallow]
            raw = []
            for x, unit in zip(shallow, units, strict=True):
                score = dot(fc, [a * b for a, b in zip(x, deep, strict=True)]) + fc_bias
                raw.append(max(score, 0.0) / sum(max(dot(unit, other), 0.0) for other in units))
            weights = [w / (sum(raw) + 1e-8) for w in raw]
            merged = [sum(w * x[c] for w, x in zip(weights, shallow, strict=True)) for c in range(4)]
            z[-1].append([g + m for g, m in zip(deep, merged, strict=True)])
    gate = math.tanh(early.gamma.item() / 0.1)
    last = batch.state(BEFORE_LAST).tolist()
    return [
        [[max(u, 0.0) + gate * h for u, h in zip(*pair, strict=True)] for pair in zip(rows, heads, strict=True)]
        for rows, heads in zip(lin_norm(early.up, z, training=training), last, strict=True)
    ]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_early_route_equals_the_formula(training: bool) -> None:
    early = shaken()
    early(maps(seed=5))  # so that the running statistics are those of no batch at hand
    early.train(training)
    batch = maps()
    wanted = torch.tensor(naive(early, batch, training=training), dtype=torch.float64)
    torch.testing.assert_close(early(batch), wanted, atol=1e-6, rtol=1e-6)


def test_the_late_route_is_the_last_bottleneck() -> None:
    suffix = restarted(tiny_resnet(), -1)
    states = {name: torch.randn(2, 4, suffix.arch.width) for name in (BEFORE_LAST,)}
    body = TwoRoutes(suffix, shaken(), lean=False)
    body.early = nn.Module()
    body.early.forward = lambda batch: 2 * batch.state(BEFORE_LAST)  # type: ignore[method-assign]
    mask = torch.ones(2, 4, dtype=torch.bool)
    out = body(dataclasses.replace(Exact(mask, states), inputs={ENTERING: states[BEFORE_LAST], MASK: mask}))
    weights = {f"b.{name}": value.double() for name, value in suffix.module.state_dict().items()}
    x = 2 * states[BEFORE_LAST][1].double().T.reshape(-1, 2, 2)
    inner = torch.relu(norm(weights, "b.bn1", conv(weights["b.conv1.weight"], x)))
    inner = torch.relu(norm(weights, "b.bn2", conv(weights["b.conv2.weight"], inner, padding=1, groups=2)))
    wanted = torch.relu(norm(weights, "b.bn3", conv(weights["b.conv3.weight"], inner)) + x)
    torch.testing.assert_close(out[1].double(), wanted.flatten(1).T, atol=1e-5, rtol=1e-5)


def test_the_gate_is_closed_at_the_start() -> None:
    torch.manual_seed(0)
    early, batch = EarlyStages(ARCH, WIDTHS, 4).double(), maps()
    assert early.gamma.item() == 0
    assert (early(batch) >= 0).all()  # of the map itself nothing yet, which is negative here and there
    assert (batch.state(BEFORE_LAST) < 0).any()


def test_the_image_side_of_vse_has_3_027_458_parameters() -> None:
    backbone = config_resnet("resnext101_32x8d_wsl", 512)
    method = Sherl(Config(side_width=512))
    assert method.refusal(backbone.arch) is None
    with fake_mode(backbone) or pytest.fail("it has weights"):
        body = method.build(restarted(backbone, method.first_block(backbone.arch)))
    assert isinstance(body, TwoRoutes)
    trained = sum(p.numel() for p in body.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in body.early.parameters()) == 3_027_458


@pytest.mark.parametrize("count", [4, 2])
def test_the_docstring_formula_counts_the_parameters(count: int) -> None:
    arch = dataclasses.replace(ARCH, stages=STAGES[:1] + STAGES[5 - count :])
    channels = [3, *(4, 5)[: count - 2], 6]
    m, d = 4, 6
    formula = sum(c * m + m + 2 * m for c in channels) + (m + 1 if count > 2 else 0) + m * d + d + 2 * d + 1
    early = EarlyStages(arch, {**WIDTHS, BEFORE_LAST: 6}, m)
    assert len(early.maps) == count
    assert sum(p.numel() for p in early.parameters()) == formula


@pytest.mark.parametrize(
    ("changes", "config", "said"),
    [
        ({"bottlenecks": False}, Config(), "its late route is the last of the bottlenecks"),
        ({"stages": ((7, 7), (3, 3))}, Config(), "the 7 x 7 map stages.0 is no multiple of the last, 3 x 3"),
        ({"stages": ((2, 2), (1, 1))}, Config(), "a last map of more than one pixel"),
        ({}, Config(reduction=7), "reduction 7 leaves no side width of 6"),
        ({}, Config(side_width=-1), "side_width -1 is none"),
    ],
)
def test_what_has_no_two_routes_is_refused(changes: dict[str, Any], config: Config, said: str) -> None:
    assert said in str(Sherl(config).refusal(dataclasses.replace(ARCH, **changes)))


def test_it_reads_what_enters_the_last_bottleneck_in_place_of_the_last_map() -> None:
    assert Sherl().layers(ARCH) == ("stages.0", "stages.1", "stages.2", "before_last")
    assert Sherl(Config(reduction=7, side_width=3)).refusal(ARCH) is None


# The restart


@pytest.fixture
def whole() -> Backbone:
    return tiny_resnet()


def test_the_last_bottleneck_yields_the_last_map_bit_for_bit(whole: Backbone) -> None:
    inputs = {"pixel_values": torch.randn(5, 3, 64, 64)}
    seen = whole.capture(inputs, [BEFORE_LAST, "stages.3"])
    suffix = restarted(copy.deepcopy(whole), -1)
    assert isinstance(suffix, LastBottleneck)
    state = seen[BEFORE_LAST].clone()
    entered = {ENTERING: state, MASK: torch.ones(state.shape[:2], dtype=torch.bool)}
    with torch.no_grad():
        assert torch.equal(suffix.tokens(entered), seen["stages.3"])
    assert torch.equal(state, seen[BEFORE_LAST])
    assert suffix.arch == whole.arch
    assert suffix.widths == {"stages.0": 16, "stages.1": 32, "stages.2": 64, BEFORE_LAST: 128, "stages.3": 128}


def test_it_holds_one_bottleneck_and_lets_go_of_the_rest(whole: Backbone) -> None:
    one = whole.module.get_submodule("layer4.2")
    suffix = restarted(whole, -1)
    assert suffix.module is whole.module is one
    assert set(suffix.used_parameters()) == {name for name, _ in one.named_parameters()}
    with pytest.raises(SidebenchError, match=r"of ResNet's last bottleneck alone stages\.3 can be read"):
        suffix.capture(suffix.dummy(), ["stages.2"])


def test_a_network_of_other_blocks_is_not_restarted(whole: Backbone) -> None:
    with pytest.raises(SidebenchError, match="Trunk has no bottlenecks whose last one could be restarted"):
        restarted(tiny_cnn(), -1)
    whole.module.get_submodule("layer4").register_forward_hook(lambda _, __, out: out + 1)  # more than its blocks do
    with pytest.raises(SidebenchError, match="does not yield its last map"):
        restarted(whole, -1)


def gradients_of(body: nn.Module) -> set[str]:
    return {name for name, p in body.named_parameters() if p.grad is not None}


def test_the_gradient_goes_through_the_frozen_bottleneck(whole: Backbone) -> None:
    torch.manual_seed(0)
    inputs = {"pixel_values": torch.randn(3, 3, 64, 64)}
    method = Sherl()
    seen = whole.capture(inputs, method.layers(whole.arch))
    seen = {name: value.clone() for name, value in seen.items()}  # no inference tensors
    body = method.build(restarted(whole, method.first_block(whole.arch))).train()
    mask = torch.ones(3, 4, dtype=torch.bool)
    out: Tensor = body(Batch(mask, seen).entering(BEFORE_LAST))
    assert out.shape == (3, 4, 128)
    out.square().sum().backward()
    assert gradients_of(body) == {f"early.{name}" for name, _ in body.early.named_parameters()}  # type: ignore[union-attr,operator]
    assert not any(isinstance(m, nn.BatchNorm2d) and m.training for m in body.modules())
    ours = [m for m in body.modules() if isinstance(m, nn.BatchNorm1d)]
    assert all(m.training for m in ours)
    assert {int(m.num_batches_tracked) for m in ours if m.num_batches_tracked is not None} == {1}  # nothing ran twice
