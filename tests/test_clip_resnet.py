"""CLIP's convolutional towers against loops in float64; their names, counts and files."""

import math

import pytest
import torch
from convolutions import Weights, conv, norm, pool, shake
from torch import Tensor

from sidebench.cache.clip_resnet import CLIP_RESNETS, AttentionPool, ClipResNetShape, ModifiedResNet
from sidebench.cache.errors import SidebenchError
from sidebench.cache.weights_file import fit_weights

TINY = ClipResNetShape((2, 1, 1, 2), width=4, output=5, resolution=64)  # two heads, a last map of 2 x 2


def shaken(*, attnpool: bool = True) -> ModifiedResNet:
    tower = ModifiedResNet(TINY, attnpool=attnpool).eval()
    shake(tower)
    return tower


def bottleneck(weights: Weights, path: str, x: Tensor, stride: int) -> Tensor:
    out = torch.relu(norm(weights, f"{path}.bn1", conv(weights[f"{path}.conv1.weight"], x)))
    out = torch.relu(norm(weights, f"{path}.bn2", conv(weights[f"{path}.conv2.weight"], out, padding=1)))
    out = norm(weights, f"{path}.bn3", conv(weights[f"{path}.conv3.weight"], pool(out, stride)))
    if f"{path}.downsample.0.weight" in weights:
        x = norm(weights, f"{path}.downsample.1", conv(weights[f"{path}.downsample.0.weight"], pool(x, stride)))
    return torch.relu(out + x)


def naive(weights: Weights, pixels: Tensor) -> Tensor:
    """The last map of one image (3, H, W)."""
    x = torch.relu(norm(weights, "bn1", conv(weights["conv1.weight"], pixels, 2, padding=1)))
    for name in "23":
        x = torch.relu(norm(weights, f"bn{name}", conv(weights[f"conv{name}.weight"], x, padding=1)))
    x = pool(x, 2)
    for stage, blocks in enumerate(TINY.layers):
        for block in range(blocks):
            x = bottleneck(weights, f"layer{stage + 1}.{block}", x, 2 if stage and not block else 1)
    return x


def attended(weights: Weights, x: Tensor, heads: int) -> list[float]:
    """The attention pooling of one map (C, H, W), number by number."""
    columns = x.flatten(1).T.tolist()
    mean = [sum(column) / len(columns) for column in zip(*columns, strict=True)]
    positions = weights["positional_embedding"].tolist()
    tokens = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip([mean, *columns], positions, strict=True)]

    def linear(name: str, row: list[float]) -> list[float]:
        matrix, bias = weights[f"{name}.weight"].tolist(), weights[f"{name}.bias"].tolist()
        return [sum(w * v for w, v in zip(ws, row, strict=True)) + b for ws, b in zip(matrix, bias, strict=True)]

    query, keys = linear("q_proj", tokens[0]), [linear("k_proj", t) for t in tokens]
    values = [linear("v_proj", t) for t in tokens]
    size, summed = len(mean) // heads, []
    for head in range(heads):
        part = range(head * size, (head + 1) * size)
        scores = [math.exp(sum(query[c] * key[c] for c in part) / math.sqrt(size)) for key in keys]
        summed += [sum(s * value[c] for s, value in zip(scores, values, strict=True)) / sum(scores) for c in part]
    return linear("c_proj", summed)


def test_the_last_map_equals_loops_over_pixels() -> None:
    tower = shaken(attnpool=False).double()
    pixels = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        found = tower(pixels)
    assert found.shape == (2, 128, 1, 2)
    torch.testing.assert_close(found[1], naive(tower.state_dict(), pixels[1]), atol=1e-10, rtol=1e-10)


def test_the_pooling_equals_attention_number_by_number() -> None:
    torch.manual_seed(0)
    pooling = AttentionPool(TINY).double()
    maps = 3 * torch.randn(2, 128, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        found = pooling(maps)
    assert found.shape == (2, 5)
    wanted = torch.tensor([attended(pooling.state_dict(), one, heads=2) for one in maps], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


def test_the_embedding_is_the_pooled_map() -> None:
    tower, pixels = shaken(), torch.randn(1, 3, 64, 64)
    trunk = ModifiedResNet(TINY, attnpool=False).eval()
    fit_weights(trunk, {f"visual.{name}": value for name, value in tower.state_dict().items()}, "file", "visual.")
    assert tower.attnpool is not None
    with torch.no_grad():
        assert torch.equal(tower(pixels), tower.attnpool(trunk(pixels)))


@pytest.mark.parametrize(("name", "published"), [("RN50", 38.32), ("RN50x4", 87.14)])
def test_the_towers_have_the_published_millions_of_parameters(name: str, published: float) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in ModifiedResNet(CLIP_RESNETS[name]).parameters())
    assert round(count / 1e6, 2) == published


def test_the_names_and_shapes_are_those_of_rn50x4() -> None:
    shape = CLIP_RESNETS["RN50x4"]
    assert (shape.channels, shape.heads) == (2560, 40)
    with torch.device("meta"):
        state = ModifiedResNet(shape).state_dict()
    assert state["conv1.weight"].shape == (40, 3, 3, 3)
    assert state["conv3.weight"].shape == (80, 40, 3, 3)
    assert state["layer1.0.downsample.0.weight"].shape == (320, 80, 1, 1)
    assert state["layer3.9.bn3.running_mean"].shape == (1280,)
    assert state["attnpool.positional_embedding"].shape == (82, 2560)
    assert state["attnpool.c_proj.weight"].shape == (640, 2560)
    assert {n.split(".")[1] for n in state if n.startswith("attnpool")} == {
        "positional_embedding", "q_proj", "k_proj", "v_proj", "c_proj"
    }  # fmt: skip


def test_a_file_without_the_pooling_does_not_fit_a_tower_that_pools() -> None:
    state = {name: value for name, value in shaken().state_dict().items() if not name.startswith("attnpool.k_proj")}
    with pytest.raises(SidebenchError, match=r"lacks 2 of \d+ weights, the first is attnpool\.k_proj\.weight"):
        fit_weights(ModifiedResNet(TINY), state, "file")
