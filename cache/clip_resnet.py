"""CLIP's convolutional image towers (RN50, RN101, RN50x4) as plain torch networks with CLIP's names under `visual.`.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, arXiv 2103.00020,
section 2.4: a stem of three convolutions, strides taken by average pooling before the convolution (anti-aliased), and
attention in place of the last average. CLIP-ViL (Shen et al., ICLR 2022, arXiv 2107.06383) reads the last stage's map
and leaves the attention out.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .resnet import EXPANSION

HEAD_WIDTH = 64  # channels of an attention head of the pooling


@dataclass(frozen=True)
class ClipResNetShape:
    """`width`: the stem's channels; `output`: of the embedding; `resolution`: pixels a side it was trained at."""

    layers: tuple[int, int, int, int]
    width: int
    output: int
    resolution: int

    @property
    def channels(self) -> int:
        """Of the last stage's map."""
        return 8 * EXPANSION * self.width

    @property
    def heads(self) -> int:
        """Of the attention pooling."""
        return self.channels // HEAD_WIDTH


CLIP_RESNETS = {
    "RN50": ClipResNetShape((3, 4, 6, 3), 64, 1024, 224),
    "RN101": ClipResNetShape((3, 4, 23, 3), 64, 512, 224),
    "RN50x4": ClipResNetShape((4, 6, 10, 6), 80, 640, 288),
}


class ClipBottleneck(nn.Module):
    """A bottleneck whose convolutions have stride 1, with an average pooling where another would have a stride."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = planes * EXPANSION
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            parts = {"-1": nn.AvgPool2d(stride), "0": nn.Conv2d(inputs, outputs, 1, bias=False)}
            self.downsample = nn.Sequential(OrderedDict[str, nn.Module](**parts, **{"1": nn.BatchNorm2d(outputs)}))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    """One multi-head attention whose query is the mean over the map, with a position per pixel and for the mean."""

    def __init__(self, shape: ClipResNetShape) -> None:
        super().__init__()
        channels, side = shape.channels, shape.resolution // 32
        self.heads = shape.heads
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, channels) / channels**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, shape.output)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, C, H, W) of the resolution's grid -> (B, output)."""
        tokens = x.flatten(2).mT  # (B, H W, C)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.positional_embedding
        q, k, v = (
            linear(part).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, C / heads)
            for linear, part in ((self.q_proj, tokens[:, :1]), (self.k_proj, tokens), (self.v_proj, tokens))
        )
        summed = nn.functional.scaled_dot_product_attention(q, k, v)  # (B, heads, 1, C / heads)
        return self.c_proj(summed.flatten(1))


class ModifiedResNet(nn.Module):
    """The image tower. Without `attnpool` a forward pass yields the last map (B, 32 width, H / 32, W / 32)."""

    def __init__(self, shape: ClipResNetShape, *, attnpool: bool = True) -> None:
        super().__init__()
        width = shape.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)
        self.layer1, self.layer2, self.layer3, self.layer4 = (_stage(shape, index) for index in range(4))
        self.attnpool = AttentionPool(shape) if attnpool else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W), CLIP's mean and deviation taken off, -> the last map, or (B, output) where it is pooled."""
        x = pixel_values
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = self.relu(norm(conv(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.avgpool(x)))))
        return x if self.attnpool is None else self.attnpool(x)


def _stage(shape: ClipResNetShape, index: int) -> nn.Sequential:
    planes = shape.width * 2**index
    inputs, outputs = planes * EXPANSION // 2 if index else shape.width, planes * EXPANSION
    first = ClipBottleneck(inputs, planes, 2 if index else 1)
    return nn.Sequential(first, *(ClipBottleneck(outputs, planes, 1) for _ in range(shape.layers[index] - 1)))
