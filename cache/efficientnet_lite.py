"""EfficientNet-Lite0 as a plain torch network with the published checkpoint's parameter names, and its stage maps.

Tan & Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019, arXiv 1905.11946; the
Lite form has no squeeze-and-excitation, ReLU6, and a stem and head of fixed width. Every convolution pads as
TensorFlow's "SAME" does: the odd pixel goes to the right and below.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .errors import SidebenchError
from .preprocess import ImagePreprocess, PlainImageProcessor

# Repeats, kernel, stride of the first, expansion, input and output channels.
_STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
_STEM, _HEAD, _CLASSES = 32, 1280, 1000
_EPS = 1e-3  # of the batch norms, as in TensorFlow
_SIDE, _STRIDE = 224, 32


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose output has ceil(side / stride) pixels a side."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Pad, then convolve."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:])
        if rows or columns:
            x = nn.functional.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(x)


class MBConv(nn.Module):
    """Expand, convolve each channel, project; the input is added where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self._expand_conv = SameConv2d(inputs, inner, 1) if expansion > 1 else None
        self._bn0 = nn.BatchNorm2d(inner, eps=_EPS) if expansion > 1 else None
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, eps=_EPS)
        self._project_conv = SameConv2d(inner, outputs, 1)
        self._bn2 = nn.BatchNorm2d(outputs, eps=_EPS)
        self._skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        inner = x
        if self._expand_conv is not None and self._bn0 is not None:
            inner = nn.functional.relu6(self._bn0(self._expand_conv(x)))
        inner = nn.functional.relu6(self._bn1(self._depthwise_conv(inner)))
        out = self._bn2(self._project_conv(inner))
        return x + out if self._skips else out


class EfficientNetLite0(nn.Module):
    """The classifier: stem, 16 blocks, head, 1,000 logits."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, _STEM, 3, 2)
        self._bn0 = nn.BatchNorm2d(_STEM, eps=_EPS)
        self._blocks = nn.ModuleList(_blocks())
        self._conv_head = SameConv2d(_STAGES[-1][-1], _HEAD, 1)
        self._bn1 = nn.BatchNorm2d(_HEAD, eps=_EPS)
        self._features = nn.ReLU6()  # a module of its own, so that the head's map can be read behind it
        self._fc = nn.Linear(_HEAD, _CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits (B, 1000) of pixels (B, 3, H, W) that are (x - 127) / 128 of 0 … 255."""
        x = nn.functional.relu6(self._bn0(self._conv_stem(pixel_values)))
        for block in self._blocks:
            x = block(x)
        x = self._features(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3)))


def load_efficientnet(folder: Path, image_size: int | None) -> Backbone:
    """The backbone in a converted sample's folder; its stages are the last map of each resolution, the head's last."""
    from safetensors.torch import load_file

    module = EfficientNetLite0()
    found = module.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if found.missing_keys or found.unexpected_keys:
        odd = ", ".join([*found.missing_keys, *found.unexpected_keys][:5])
        raise SidebenchError(f"{folder} holds no EfficientNet-Lite0: {odd} is missing or too many. Remove the folder.")
    side = _SIDE if image_size is None else image_size
    processor = PlainImageProcessor(side, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    return Backbone(
        module,
        ImagePreprocess(processor, side, _STRIDE),
        name="EfficientNet-Lite0",
        config_facts={"model_type": "efficientnet-lite0"},
        stages=_stage_paths(),
    )


def _blocks() -> Iterator[MBConv]:
    for repeats, kernel, stride, expansion, inputs, outputs in _STAGES:
        yield MBConv(inputs, outputs, kernel, stride, expansion)
        for _ in range(repeats - 1):
            yield MBConv(outputs, outputs, kernel, 1, expansion)


def _stage_paths() -> list[str]:
    """The blocks before each that halves the map, then the head."""
    strides = [stride if i == 0 else 1 for repeats, _, stride, *_ in _STAGES for i in range(repeats)]
    return [*(f"_blocks.{i - 1}" for i, stride in enumerate(strides) if stride == 2), "_features"]


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of the published file, by name; nothing in it is run."""
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor.contiguous() for name, tensor in state.items()}
