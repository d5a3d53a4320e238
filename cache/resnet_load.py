"""ResNet trunks as backbones: their weights in a file, or none."""

from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .backbone import Backbone
from .configs import emptied
from .errors import SidebenchError, unknown
from .preprocess import ImagePreprocess, PlainImageProcessor
from .resnet import RESNETS, STAGES, STRIDE, ResNet
from .weights_file import fit_weights, read_weights

_SIDE = 224
_PUBLIC = {
    "resnet50": "torchvision's resnet50-0676ba61.pth or resnet50-11ad3fa6.pth",
    "resnet101": "torchvision's resnet101-63fe2227.pth",
    "resnext101_32x8d": "torchvision's resnext101_32x8d-8ba56ff5.pth",
    "resnext101_32x8d_wsl": "ig_resnext101_32x8-c38310e5.pth of the WSL-Images release",
}


def load_resnet(name: str, weights: str | None, image_size: int | None = None) -> Backbone:
    """A trunk whose layers are its four stage maps; `weights`: a file with torchvision's names.

    Raises SidebenchError for an unknown name, a size that is no multiple of 32, and weights that are not given or do
    not fit.
    """
    preprocess = _images(name, image_size)
    if weights is None:
        raise SidebenchError(
            f"resnet:{name} needs its weights in a file: download {_PUBLIC[name]} and write resnet:{name}?weights=FILE."
        )
    module = ResNet(RESNETS[name])
    fit_weights(module, read_weights(Path(weights).expanduser()), weights)
    return _backbone(name, module, preprocess)


def config_resnet(name: str, image_size: int | None = None) -> Backbone:
    """The same on fake tensors, without weights."""
    preprocess = _images(name, image_size)
    with torch.device("meta"):
        module = ResNet(RESNETS[name])
    with FakeTensorMode():
        return _backbone(name, emptied(module, {}), preprocess)


def _backbone(name: str, module: nn.Module, preprocess: ImagePreprocess) -> Backbone:
    return Backbone(module, preprocess, name=name, config_facts={"resnet": name}, stages=STAGES)


def _images(name: str, image_size: int | None) -> ImagePreprocess:
    """Squashed to a square, with ImageNet's mean and deviation."""
    if name not in RESNETS:
        raise unknown("ResNet", name, RESNETS)
    side = _SIDE if image_size is None else image_size
    return ImagePreprocess(PlainImageProcessor(side), side, STRIDE)
