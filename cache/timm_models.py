"""Backbones of the timm library, by its names: stage maps of convolutional networks, blocks of others.

An optional extra, since timm needs a torchvision that belongs to the installed torch.
"""

import inspect
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .errors import SidebenchError, unknown
from .load import said
from .preprocess import ImagePreprocess, PlainImageProcessor


def load_timm(name: str, image_size: int | None, checkpoint: str | None) -> Backbone:
    """The named network: with the weights of a local `checkpoint` file, else with those that timm fetches.

    Raises SidebenchError where timm does not import, does not know the name, or the weights do not fit.
    """
    timm = _timm()
    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    own = {} if image_size is None or not _takes_size(timm, name) else {"img_size": image_size}
    try:
        module = timm.create_model(name, pretrained=checkpoint is None, **own)
        if checkpoint is not None:
            module.load_state_dict(_read(Path(checkpoint).expanduser()))
    except Exception as error:  # whatever timm, a hub or a file raises
        hint = "" if checkpoint else f" Without a hub, give the weights as a file: timm:{name}?checkpoint=FILE"
        raise SidebenchError(f"cannot load timm:{name}: {said(error)}.{hint}") from error
    return _backbone(name, module, image_size)


def _timm() -> Any:
    try:
        import timm
    except Exception as error:  # a torchvision of another torch raises RuntimeError
        raise SidebenchError(
            "timm: backbones need the extra sidebench[timm] and a torchvision made for this torch "
            f"({torch.__version__}): {said(error)}."
        ) from error
    return timm


def _takes_size(timm: Any, name: str) -> bool:
    """Whether the network is built for one image size: those with position tables."""
    return bool(timm.models.get_pretrained_cfg(name).fixed_input_size)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file; nothing in it is run."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _backbone(name: str, module: nn.Module, image_size: int | None) -> Backbone:
    config: Any = module.pretrained_cfg
    stages = _stages(module)
    side = int(config["input_size"][-1]) if image_size is None else image_size
    patch = stages[-1]["reduction"] if stages else _patch(module)
    input_name = next(iter(inspect.signature(module.forward).parameters))
    processor = PlainImageProcessor(side, config["mean"], config["std"])
    backbone = Backbone(
        module,
        ImagePreprocess(processor, side, patch, input_name),
        name=name,
        config_facts={"timm": name},
        stages=[stage["module"] for stage in stages],
    )
    widths = [width for _, width in backbone.shapes(backbone.arch.states).values()]
    if stages and widths != [stage["num_chs"] for stage in stages]:
        raise SidebenchError(f"timm:{name} yields maps with channels last, which are not read; choose another network.")
    return backbone


def _stages(module: nn.Module) -> Sequence[dict[str, Any]]:
    """What timm states of the last map of each resolution; nothing where the resolution stays, as in a ViT."""
    info: Any = getattr(module, "feature_info", [])
    stated: Sequence[dict[str, Any]] = info if isinstance(info, list) else info.info
    shrinks = all(one["reduction"] < next_one["reduction"] for one, next_one in pairwise(stated))
    return stated if len(stated) > 1 and shrinks else []


def _patch(module: nn.Module) -> int | None:
    size: Any = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    return int(size[0]) if size else None
