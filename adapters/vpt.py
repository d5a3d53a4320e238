"""VPT: Visual Prompt Tuning.
Jia, Tang, Chen, Cardie, Belongie, Hariharan, Lim. ECCV 2022, arXiv 2203.12119.

p learned tokens stand after the class token. Shallow: inserted once, at the input of block 0. Deep: fresh ones replace
them at the input of every block. On a text backbone the same happens behind the first token, visible to every token.
Nothing is cached: the gradient crosses the whole backbone. Trained: p D (shallow) or L p D (deep).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture
from ..cache.backbone import Backbone
from ._base import BackboneBody, Batch, Body, LiveConfig, LiveMethod, option


@dataclass(frozen=True)
class Config(LiveConfig):
    """VPT's options."""

    lr: float = option(
        5e-3, "peak learning rate under AdamW (ours: VPT's own recipe is SGD with lr 0.1-50 x batch/256)"
    )
    prompts: int = option(10, "p: number of prompt tokens")
    deep: bool = option(True, "fresh prompts at every block (VPT-deep) instead of at the first alone (VPT-shallow)")


class VPT(LiveMethod):
    """Learned prompt tokens at the input of the first block or of every block."""

    Config: ClassVar[type] = Config
    paper = "VPT, ECCV 2022, arXiv 2203.12119"

    def refusal(self, arch: Architecture) -> str | None:
        """It needs blocks that take tokens and, for text, an attention mask this file knows how to widen."""
        if self.config.prompts < 1:
            return f"{self.config.prompts} prompts are none; 1 or more"
        return None if arch.norm else "it needs a backbone of plain attention blocks, to put tokens between them"

    def build(self, backbone: Backbone) -> Body:
        """See LiveMethod."""
        return PromptedBody(backbone, self.config.prompts, deep=self.config.deep)


class PromptedBody(BackboneBody):
    """The backbone with prompt tokens; the prompts are taken out again, so the output has the usual positions."""

    def __init__(self, backbone: Backbone, prompts: int, *, deep: bool) -> None:
        super().__init__(backbone)
        arch = backbone.arch
        blocks = backbone.blocks
        # Uniform within sqrt(6 / (3 P² + D)), Xavier's bound for the patch embedding (VPT's released code); a text
        # backbone has no patches, so its token embedding's own fan, D, stands in for 3 P².
        patch_size = getattr(backbone.preprocess, "patch_size", None)
        width = arch.state_width
        fan_in = 3 * patch_size**2 if patch_size else width
        bound = (6 / (fan_in + width)) ** 0.5
        self.prompts = nn.Parameter(torch.empty(len(blocks) if deep else 1, prompts, width))  # (L or 1, p, D)
        nn.init.uniform_(self.prompts, -bound, bound)
        self.start = 1 if arch.modality == "text" or arch.prefix_tokens else 0  # behind the first (class) token
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._hook(block, index), with_kwargs=True)

    def forward(self, batch: Batch) -> Tensor:
        """Final tokens (B, T, D), prompts left out."""
        tokens = super().forward(batch)  # (B, T + p, D)
        return torch.cat([tokens[:, : self.start], tokens[:, self.start + self.prompts.shape[1] :]], dim=1)

    def _hook(self, block: nn.Module, index: int) -> Callable[..., Any]:
        names = list(inspect.signature(block.forward).parameters)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            first = names[0]
            mask = given.get("attention_mask")
            if mask is None and given.get("is_causal"):  # CLIP's text tower without padding: causal, but no mask given
                length = given[first].shape[1] - (self.prompts.shape[1] if index else 0)
                mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=given[first].device).tril()
            given[first] = self._with_prompts(given[first], index)
            if mask is not None:
                given["attention_mask"] = self._widened(mask)
            positional = tuple(given.pop(name) for name in names[: len(args)])
            return positional, given

        return before

    def _with_prompts(self, tokens: Tensor, index: int) -> Tensor:
        deep = len(self.prompts) > 1
        if index and not deep:
            return tokens
        behind = self.start + (self.prompts.shape[1] if index else 0)  # deep: the last block's prompts are dropped
        prompts = self.prompts[index if deep else 0].expand(len(tokens), -1, -1)  # (B, p, D)
        return torch.cat([tokens[:, : self.start], prompts, tokens[:, behind:]], dim=1)

    def _widened(self, mask: Tensor) -> Tensor:
        """The block's attention mask (B, 1, 1 or T, T), additive or bool, with p visible keys (and p queries) more."""
        prompts, start = self.prompts.shape[1], self.start
        visible = torch.ones if mask.dtype is torch.bool else torch.zeros
        keys = visible((*mask.shape[:-1], prompts), dtype=mask.dtype, device=mask.device)
        mask = torch.cat([mask[..., :start], keys, mask[..., start:]], dim=-1)
        if mask.shape[-2] == 1:
            return mask
        queries = mask[..., :1, :].expand(*mask.shape[:-2], prompts, mask.shape[-1])  # they see what the first sees
        return torch.cat([mask[..., :start, :], queries, mask[..., start:, :]], dim=-2)
