"""ResNet trunks against loops in float64, against another implementation, and weights files that do not fit."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from convolutions import TINY, Weights, conv, norm, shake
from torch import Tensor, nn

from sidebench.cache.configs import fake_mode
from sidebench.cache.errors import SidebenchError
from sidebench.cache.load import load_backbone
from sidebench.cache.preprocess import PlainImageProcessor
from sidebench.cache.resnet import RESNETS, FrozenBatchNorm2d, ResNet, ResNetShape
from sidebench.cache.resnet_load import config_resnet, load_resnet
from sidebench.cache.weights_file import fit_weights, read_weights


def shaken(shape: ResNetShape = TINY) -> ResNet:
    trunk = ResNet(shape).eval()
    shake(trunk)
    return trunk


def bottleneck(weights: Weights, path: str, x: Tensor, stride: int, groups: int) -> Tensor:
    out = torch.relu(norm(weights, f"{path}.bn1", conv(weights[f"{path}.conv1.weight"], x)))
    out = conv(weights[f"{path}.conv2.weight"], out, stride, padding=1, groups=groups)
    out = torch.relu(norm(weights, f"{path}.bn2", out))
    out = norm(weights, f"{path}.bn3", conv(weights[f"{path}.conv3.weight"], out))
    if f"{path}.downsample.0.weight" in weights:
        x = norm(weights, f"{path}.downsample.1", conv(weights[f"{path}.downsample.0.weight"], x, stride))
    return torch.relu(out + x)


def naive(weights: Weights, shape: ResNetShape, pixels: Tensor) -> list[Tensor]:
    """The four maps of one image (3, H, W)."""
    x = torch.relu(norm(weights, "bn1", conv(weights["conv1.weight"], pixels, 2, padding=3)))
    rows, columns = ((side + 2 - 3) // 2 + 1 for side in x.shape[1:])
    pooled = torch.zeros(x.shape[0], rows, columns, dtype=x.dtype)
    for i in range(rows):
        for j in range(columns):
            top, left = max(2 * i - 1, 0), max(2 * j - 1, 0)
            pooled[:, i, j] = x[:, top : 2 * i + 2, left : 2 * j + 2].flatten(1).max(1).values
    x, maps = pooled, []
    for stage, blocks in enumerate(shape.layers):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            x = bottleneck(weights, f"layer{stage + 1}.{block}", x, stride, shape.groups)
        maps.append(x)
    return maps


@pytest.mark.parametrize(
    "shape", [TINY, ResNetShape((1, 2, 1, 1), planes=2, width_per_group=64)], ids=["grouped", "plain"]
)
def test_the_maps_equal_loops_over_pixels(shape: ResNetShape) -> None:
    trunk = shaken(shape).double()
    pixels = torch.randn(2, 3, 37, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen: list[Tensor] = []
    for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        stage.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        assert trunk(pixels) is seen[-1]
    assert [tuple(one.shape[2:]) for one in seen] == [(10, 16), (5, 8), (3, 4), (2, 2)]
    for found, wanted in zip(seen, naive(trunk.state_dict(), shape, pixels[1]), strict=True):
        torch.testing.assert_close(found[1], wanted, atol=1e-10, rtol=1e-10)


def test_the_same_numbers_as_another_implementation() -> None:
    from transformers import ResNetConfig, ResNetModel

    shape = ResNetShape((2, 3, 2, 1), planes=8)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=list(shape.layers))
    theirs, ours = ResNetModel(config).eval(), ResNet(shape).eval()
    shake(theirs)
    fit_weights(ours, {_our_name(name): value for name, value in theirs.state_dict().items()}, "theirs")
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), theirs(pixels).last_hidden_state, atol=1e-5, rtol=1e-5)


def _our_name(name: str) -> str:
    """Of transformers' `encoder.stages.1.layers.0.layer.2.normalization.bias`: `layer2.0.bn3.bias`."""
    parts = name.split(".")
    kind, last = parts[-2], parts[-1]
    if parts[0] == "embedder":
        return f"{'conv1' if kind == 'convolution' else 'bn1'}.{last}"
    place = f"layer{int(parts[2]) + 1}.{parts[4]}"
    if parts[5] == "shortcut":
        return f"{place}.downsample.{0 if kind == 'convolution' else 1}.{last}"
    return f"{place}.{'conv' if kind == 'convolution' else 'bn'}{int(parts[6]) + 1}.{last}"


@pytest.mark.parametrize(
    ("name", "published"), [("resnet50", 25_557_032), ("resnet101", 44_549_160), ("resnext101_32x8d", 88_791_336)]
)
def test_with_a_classifier_of_1000_classes_the_parameters_are_the_published_ones(name: str, published: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in ResNet(RESNETS[name]).parameters()) + 2048 * 1000 + 1000 == published


def test_the_names_are_torchvisions() -> None:
    with torch.device("meta"):
        state = ResNet(RESNETS["resnext101_32x8d"]).state_dict()
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert state["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert state["layer3.22.conv2.weight"].shape == (1024, 32, 3, 3)
    assert state["layer4.0.downsample.1.running_var"].shape == (2048,)
    assert {name.split(".")[0] for name in state} == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}


def test_a_frozen_norm_is_the_norm_in_evaluation_and_has_no_parameters() -> None:
    learned, frozen = shaken(), ResNet(TINY, FrozenBatchNorm2d)
    fit_weights(frozen, learned.state_dict(), "learned")
    assert {name.rsplit(".", 1)[-1] for name, _ in frozen.bn1.named_buffers()} == {
        "weight", "bias", "running_mean", "running_var"
    }  # fmt: skip
    assert not list(frozen.bn1.parameters())
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(frozen.train()(pixels), learned(pixels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ending", ["pth", "pt", "safetensors"])
def test_a_published_file_fits(tmp_path: Path, ending: str) -> None:
    from safetensors.torch import save_file

    wanted = shaken()
    state = {**wanted.state_dict(), "fc.weight": torch.ones(5, 128), "fc.bias": torch.ones(5)}
    path = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    found = ResNet(TINY)
    fit_weights(found, read_weights(path), str(path))
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in found.state_dict().items())


def test_names_may_have_a_prefix_and_numbers_half_the_precision() -> None:
    wanted = shaken()
    state = {f"backbone.0.body.{name}": value.half() for name, value in wanted.state_dict().items()}
    found = ResNet(TINY)
    fit_weights(found, {**state, "transformer.encoder.weight": torch.ones(2)}, "file", "backbone.0.body.")
    assert found.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(found.conv1.weight, wanted.conv1.weight, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer2.0.bn1.bias": None}, r"a file lacks 1 of \d+ weights, the first is layer2\.0\.bn1\.bias\."),
        (
            {"layer4.3.bn1.weight": torch.ones(1)},
            r"holds 1 weights that .* has not, the first is layer4\.3\.bn1\.weight;",
        ),
        (
            {"conv1.weight": torch.ones(4, 3, 3, 3)},
            r"conv1\.weight is \(4, 3, 3, 3\) of torch\.float32; wanted",
        ),
        ({"bn1.bias": torch.ones(4, dtype=torch.int64)}, r"bn1\.bias is \(4,\) of torch\.int64; wanted floats \(4,\)"),
        ({"bn1.bias": "a word"}, r"bn1\.bias is str; wanted floats \(4,\)"),
    ],
)
def test_weights_of_another_network_are_refused_and_nothing_is_copied(change: dict[str, Any], said: str) -> None:
    trunk, state = ResNet(TINY), {**shaken().state_dict(), **change}
    before = trunk.conv1.weight.clone()
    with pytest.raises(SidebenchError, match=said):
        fit_weights(trunk, {name: value for name, value in state.items() if value is not None}, "a file")
    assert torch.equal(trunk.conv1.weight, before)


class Trap:
    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _spring, ()


def _spring() -> None:
    Trap.ran = True


def test_a_file_that_is_no_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(SidebenchError, match=r"no weights file at .*weights\.pth"):
        read_weights(path)
    torch.save(Trap(), path)
    with pytest.raises(SidebenchError, match=r"weights\.pth cannot be read as weights"):
        read_weights(path)
    assert not Trap.ran
    torch.save([torch.ones(1)], path)
    with pytest.raises(SidebenchError, match=r"holds no state dict .* a list"):
        read_weights(path)
    stream = io.BytesIO()
    torch.save(shaken().state_dict(), stream)
    path.write_bytes(stream.getvalue()[:5000])
    with pytest.raises(SidebenchError, match="cannot be read as weights"):
        read_weights(path)
    (tmp_path / "weights.safetensors").write_bytes(pickle.dumps({}))
    with pytest.raises(SidebenchError, match=r"weights\.safetensors cannot be read as weights"):
        read_weights(tmp_path / "weights.safetensors")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_archive_of_code_is_refused_with_how_to_convert_it(tmp_path: Path) -> None:
    path = tmp_path / "RN50x4.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(SidebenchError, match=r"RN50x4\.pt is a TorchScript archive.*torch\.jit\.load.*state_dict\(\)"):
        read_weights(path)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a tiny trunk that is known by name."""
    monkeypatch.setitem(RESNETS, "tiny", TINY)
    torch.save({**shaken().state_dict(), "fc.weight": torch.ones(5, 128)}, tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


def test_a_name_and_a_file_are_a_backbone_of_four_maps(published: Path) -> None:
    uri, home = f"resnet:tiny?weights={published}", published.parent
    backbone = load_backbone(uri, home=home, device=torch.device("cpu"), image_size=64)
    assert backbone.arch.grids == {"stages.0": (16, 16), "stages.1": (8, 8), "stages.2": (4, 4), "stages.3": (2, 2)}
    assert [width for _, width in backbone.shapes(backbone.arch.states).values()] == [16, 32, 64, 128]
    assert (backbone.arch.name, backbone.arch.modality, backbone.arch.prefix_tokens) == ("tiny", "image", 0)
    assert backbone.layers == (*backbone.arch.states[:-1], "before_last", "stages.3")
    assert not any(module.training for module in backbone.module.modules())
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = shaken()(pixels).flatten(2).mT
        torch.testing.assert_close(backbone.tokens({"pixel_values": pixels}), wanted)
    facts = backbone.preprocess.facts()
    assert facts == {"kind": "image", "image_size": 64, "processor": PlainImageProcessor(64).to_dict()}
    bare = config_resnet("tiny", 64)
    assert bare.arch == backbone.arch
    assert bare.config_facts == backbone.config_facts == {"resnet": "tiny"}
    assert fake_mode(bare) is not None


def test_images_are_of_224_pixels_unless_told_otherwise(published: Path) -> None:
    uri, cpu = f"resnet:tiny?weights={published}", torch.device("cpu")
    assert load_backbone(uri, home=published, device=cpu).arch.stages[-1] == (7, 7)
    with pytest.raises(SidebenchError, match=r"--image-size 100 is no multiple .* 32; use 96 or 128"):
        load_backbone(uri, home=published, device=cpu, image_size=100)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        (
            "resnet:resnext101_32x8d_wsl",
            r"download ig_resnext101_32x8-c38310e5\.pth of the WSL-Images release",
        ),
        ("resnet:resnet50", r"download torchvision's resnet50-0676ba61\.pth or .* resnet:resnet50\?weights=FILE"),
        ("resnet:resnet5", r"no ResNet 'resnet5'\. Did you mean 'resnet50'"),
        ("resnet-config:resnet50", "names an architecture; it has no weights to run"),
    ],
)
def test_without_weights_nothing_is_loaded(uri: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SidebenchError, match=said):
        load_backbone(uri, home=tmp_path, device=torch.device("cpu"))


def test_every_known_trunk_says_where_its_weights_are() -> None:
    for name in RESNETS:
        with pytest.raises(SidebenchError, match=r"download .*\.pth"):
            load_resnet(name, None)
