"""ResNet and ResNeXt trunks as plain torch networks with torchvision's parameter names, and no classifier.

He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385; Xie, Girshick, Dollár,
Tu, He, Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017, arXiv 1611.05431. As in torchvision, a
stage's stride lies in the 3 x 3 convolution of its first bottleneck.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EXPANSION = 4  # a bottleneck yields so many times its planes
STRIDE = 32  # pixels of the image a side, for one of the last map
STAGES = ("layer1", "layer2", "layer3", "layer4")
NormOf = Callable[[int], nn.Module]


@dataclass(frozen=True)
class ResNetShape:
    """What tells one trunk from another; `planes` are the stem's channels and those of the first stage's planes."""

    layers: tuple[int, int, int, int]
    groups: int = 1
    width_per_group: int = 64
    planes: int = 64


RESNETS = {
    "resnet50": ResNetShape((3, 4, 6, 3)),
    "resnet101": ResNetShape((3, 4, 23, 3)),
    "resnext101_32x8d": ResNetShape((3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_32x8d_wsl": ResNetShape((3, 4, 23, 3), groups=32, width_per_group=8),
}


class FrozenBatchNorm2d(nn.Module):
    """A batch norm that is four buffers and never learns, as in detectors (MDETR's `backbone.0.body`)."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class Bottleneck(nn.Module):
    """1 x 1, then 3 x 3 in groups, then 1 x 1, beside the identity or a projection of it."""

    def __init__(self, inputs: int, planes: int, width: int, stride: int, groups: int, norm: NormOf) -> None:
        super().__init__()
        outputs = planes * EXPANSION
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = norm(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
            if stride != 1 or inputs != outputs
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Stem and four stages, `layer1` … `layer4`; what a forward pass yields is the last stage's map."""

    def __init__(self, shape: ResNetShape, norm: NormOf = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, shape.planes, 7, 2, padding=3, bias=False)
        self.bn1 = norm(shape.planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = (_stage(shape, index, norm) for index in range(4))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W), ImageNet's mean and deviation taken off, -> (B, 32 planes, ceil(H / 32), ceil(W / 32))."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(pixel_values))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def _stage(shape: ResNetShape, index: int, norm: NormOf) -> nn.Sequential:
    planes = shape.planes * 2**index
    width = planes * shape.width_per_group // 64 * shape.groups
    outputs = planes * EXPANSION
    inputs = outputs // 2 if index else shape.planes
    strides = [2 if index else 1] + [1] * (shape.layers[index] - 1)
    return nn.Sequential(
        *(
            Bottleneck(outputs if i else inputs, planes, width, stride, shape.groups, norm)
            for i, stride in enumerate(strides)
        )
    )
