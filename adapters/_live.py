"""What several methods that train through the backbone share: bottleneck adapters, and peft's low-rank updates."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from ..cache.architecture import Architecture
from ..cache.backbone import Backbone
from ..cache.block_weights import attention_projections
from ._base import BackboneBody


def lacks_blocks(arch: Architecture) -> str | None:
    """Why a method of attention blocks cannot work on such a backbone; None when it may."""
    if arch.blocks and arch.mlp_width:  # a block of convolutions has no Linear, and so no MLP width
        return None
    return "it needs a backbone of attention blocks, each with an MLP"


class Bottleneck(nn.Module):
    """up(activation(down(x))), (B, T, D) -> (B, T, D). `up` alone starts at zero: with both there, neither would learn.

    So before training it adds exactly nothing, and `down` (torch's Linear: Kaiming) has a gradient after one step.
    """

    def __init__(self, width: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.activation = activation
        self.up = nn.Linear(hidden, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """What is to be added to x."""
        return self.up(self.activation(self.down(x)))

    def extend(self, module: nn.Module) -> None:
        """From now on `module` yields h + self(h) where it yielded h."""
        module.register_forward_hook(partial(_extended, self))


def _extended(adapter: Bottleneck, _: nn.Module, __: Any, out: Any) -> Any:
    if isinstance(out, tuple):  # T5's blocks: the state comes first
        return (out[0] + adapter(out[0]), *out[1:])
    return out + adapter(out)


class AdaptedBody(BackboneBody):
    """The backbone with adapters at work in it."""

    def __init__(self, backbone: Backbone, adapters: list[nn.Module]) -> None:
        super().__init__(backbone)
        self.adapters = nn.ModuleList(adapters)


def low_rank_body(backbone: Backbone, rank: int, alpha: float, *, dora: bool = False) -> BackboneBody:
    """The backbone with peft's LoRA (or DoRA) layers in place of the query and value projections, and they train.

    In bottlenecks in place of the 1 x 1 convolutions.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = [
        f"{block_path}.{path}"
        for block_path, block in zip(backbone.block_paths, backbone.blocks, strict=True)
        for path in attention_projections(block, ("query", "value"))
    ]
    for path in backbone.bottleneck_paths:
        for name, module in backbone.module.get_submodule(path).named_modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
                targets.append(f"{path}.{name}")
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, use_dora=dora), backbone.module
    )
    for name, parameter in backbone.module.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return BackboneBody(backbone)
