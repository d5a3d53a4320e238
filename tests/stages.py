"""A tiny convolutional backbone whose blocks shrink the map."""

import torch
from torch import Tensor, nn

from sidebench.cache.backbone import Backbone
from sidebench.cache.preprocess import ImagePreprocess, PlainImageProcessor

SIDE = 16
GRIDS = {"stages.0": (8, 8), "stages.1": (4, 4), "stages.2": (2, 2)}
WIDTHS = {"stages.0": 4, "stages.1": 6, "stages.2": 8}


class Shrinking(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Trunk(nn.Module):
    """A stem to 8 x 8 pixels, then maps of 8, 4, 4 and 2 pixels a side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, padding=1)
        steps = [(4, 4, 1), (4, 6, 2), (6, 6, 1), (6, 8, 2)]
        self.blocks = nn.ModuleList(Shrinking(*step) for step in steps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


def tiny_cnn(seed: int = 0) -> Backbone:
    """Random weights, and batch norms whose statistics are not those of a fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trunk = Trunk()
        for module in trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean = 0.1 * torch.randn(module.num_features)
                module.running_var = torch.rand(module.num_features) + 0.5
                nn.init.normal_(module.bias, 0.3, 0.2)
    return Backbone(trunk, ImagePreprocess(PlainImageProcessor(SIDE), SIDE, None, input_name="pixels"))
