"""Convolutions, batch norms and poolings pixel by pixel in float64, and a network tiny enough for that."""

import math

import torch
from torch import Tensor, nn

from sidebench.cache.backbone import Backbone
from sidebench.cache.preprocess import ImagePreprocess, PlainImageProcessor
from sidebench.cache.resnet import STAGES, STRIDE, ResNet, ResNetShape

EPS = 1e-5  # of every batch norm here
TINY = ResNetShape((2, 1, 2, 3), groups=2, width_per_group=32, planes=4)  # maps of 16, 32, 64 and 128 channels
Weights = dict[str, Tensor]


def shake(module: nn.Module, seed: int = 0) -> None:
    """Batch norms whose statistics and weights are not those of fresh ones, and outputs of the size of inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith(("running_var", "norm.weight")) or (value.ndim == 1 and name.endswith(".weight")):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.ndim == 1:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
            elif value.ndim == 4:
                value.copy_(torch.randn(value.shape, generator=generator) / math.sqrt(value[0].numel()))


def tiny_resnet(seed: int = 0, side: int = 64, shape: ResNetShape = TINY) -> Backbone:
    """Maps of side / 4, / 8, / 16 and / 32 pixels a side."""
    trunk = ResNet(shape)
    shake(trunk, seed)
    with torch.no_grad():
        for name, weight in trunk.named_parameters():
            if name.endswith("bn3.weight"):
                weight *= 0.3  # so that a sum of bottlenecks stays of the size of one
    return Backbone(trunk, ImagePreprocess(PlainImageProcessor(side), side, STRIDE), stages=STAGES)


def conv(weight: Tensor, x: Tensor, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    """(C, H, W) -> (C', H', W'): each output pixel is a window times a kernel."""
    outputs, inputs, kernel, _ = weight.shape
    rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in x.shape[1:])
    padded = torch.zeros(x.shape[0], x.shape[1] + 2 * padding, x.shape[2] + 2 * padding, dtype=x.dtype)
    padded[:, padding : padding + x.shape[1], padding : padding + x.shape[2]] = x
    out = torch.zeros(outputs, rows, columns, dtype=x.dtype)
    for channel in range(outputs):
        first = channel // (outputs // groups) * inputs
        for i in range(rows):
            for j in range(columns):
                top, left = stride * i, stride * j
                window = padded[first : first + inputs, top : top + kernel, left : left + kernel]
                out[channel, i, j] = (window * weight[channel]).sum()
    return out


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Each channel by its running statistics."""
    out = torch.zeros_like(x)
    for channel in range(x.shape[0]):
        mean, variance, gain, shift = (
            float(weights[f"{name}.{part}"][channel]) for part in ("running_mean", "running_var", "weight", "bias")
        )
        out[channel] = (x[channel] - mean) / math.sqrt(variance + EPS) * gain + shift
    return out


def pool(x: Tensor, kernel: int, *, largest: bool = False) -> Tensor:
    """The mean, or the largest, of each kernel x kernel cell."""
    out = torch.zeros(x.shape[0], x.shape[1] // kernel, x.shape[2] // kernel, dtype=x.dtype)
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            cell = x[:, i * kernel : (i + 1) * kernel, j * kernel : (j + 1) * kernel].flatten(1)
            out[:, i, j] = cell.max(1).values if largest else cell.mean(1)
    return out
