"""Prefix-Tuning: Optimizing Continuous Prompts for Generation.
Li, Liang. ACL 2021, arXiv 2101.00190.

l learned keys and values per block stand before those of the tokens, visible to every token; there are no queries for
them, so the sequence stays as it is. They train directly (ours): the paper's come out of an MLP.
Nothing is cached: the gradient crosses the whole backbone. Trained: 2 L l D.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture
from ..cache.backbone import Backbone
from ..cache.block_weights import attention_projections
from ..cache.errors import SidebenchError
from ._base import BackboneBody, Body, LiveConfig, LiveMethod, option
from ._live import lacks_blocks

ATTENTION = "sidebench_prefix"  # the name under which transformers finds `attend`


@dataclass(frozen=True)
class Config(LiveConfig):
    """Options of prefix tuning."""

    lr: float = option(1e-2, "peak learning rate (ours, not tuned; --lr auto chooses one)")
    length: int = option(30, "l: keys and values per block (the adapters library's default)")
    spread: float = option(0.02, "standard deviation of the prefixes at the start (ours)")


class PrefixTuning(LiveMethod):
    """Learned keys and values before those of the tokens, in every block."""

    Config: ClassVar[type] = Config
    paper = "Prefix-Tuning, ACL 2021, arXiv 2101.00190"

    def refusal(self, arch: Architecture) -> str | None:
        """It needs attention blocks, and a prefix."""
        if self.config.length < 1:
            return f"a prefix of {self.config.length} is none; 1 or more"
        return lacks_blocks(arch)

    def build(self, backbone: Backbone) -> Body:
        """See LiveMethod. Raises SidebenchError where attention does not go through transformers' interface."""
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, attend)
        prefixes = [self._prefixed(block, backbone.device) for block in backbone.blocks]
        used = {id(parameter) for parameter in backbone.used_parameters().values()}
        if any(id(prefix) not in used for prefix in prefixes):
            raise _no_way_in(backbone.blocks[0])
        return BackboneBody(backbone)

    def _prefixed(self, block: nn.Module, device: torch.device) -> nn.Parameter:
        """Let the block's attention alone look for `attend`: the mask is still made as for the whole model's."""
        (path, key), *more = attention_projections(block, ("key",)).items()
        attention = block.get_submodule(path.rpartition(".")[0])
        if more or not hasattr(attention, "config"):
            raise _no_way_in(block)
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = ATTENTION  # type: ignore[union-attr]
        start = torch.randn(2, self.config.length, key.out_features) * self.config.spread
        attention.prefix = nn.Parameter(start.to(device))  # (keys and values, l, D)
        return attention.prefix


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (B, H, T, D/H) each; the mask, additive or bool, is (B, 1, 1 or T, T)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = options.pop("is_causal", None)
    if causal is None:
        causal = module.is_causal
    if causal and attention_mask is None:  # CLIP's text tower without padding
        attention_mask = torch.ones((1, 1, *[key.shape[2]] * 2), dtype=torch.bool, device=key.device).tril()
    assert isinstance(module.prefix, nn.Parameter)
    length = module.prefix.shape[1]
    for name, mask in (("attention_mask", attention_mask), ("position_bias", options.get("position_bias"))):
        if mask is not None:
            visible = torch.ones if mask.dtype is torch.bool else torch.zeros
            before = visible((*mask.shape[:-1], length), dtype=mask.dtype, device=mask.device)
            options[name] = torch.cat([before, mask], dim=-1)
    options.setdefault("attention_mask", None)
    parts = module.prefix.to(key.dtype).unflatten(-1, (key.shape[1], -1)).transpose(1, 2)  # (2, H, l, D/H)
    keys, values = (
        torch.cat([part.expand(len(own), -1, -1, -1), own], dim=2)
        for part, own in zip(parts, (key, value), strict=True)
    )
    return sdpa_attention_forward(module, query, keys, values, is_causal=False, **options)


def _no_way_in(block: nn.Module) -> SidebenchError:
    return SidebenchError(
        f"prefix_tuning has no way into {type(block).__name__}: it wants one attention, which asks transformers' "
        "attention interface for the function that attends."
    )
