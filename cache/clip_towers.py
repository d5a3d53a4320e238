"""CLIP's two towers up to the space they share: the final layer is one projected embedding per example.

`?projected=true`: of images the class token after post_layernorm and visual_projection, of texts the end token after
final_layer_norm and text_projection (Radford et al., ICML 2021, arXiv 2103.00020). Everything before it is as without.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .errors import SidebenchError

_PROJECTIONS = {"text": "text_projection", "vision": "visual_projection"}


def projected_tower(config: Any, tower: str | None, uri: str) -> tuple[Any, Any]:
    """The configuration of one of CLIP's towers, and the transformers class that makes it with its projection.

    Raises SidebenchError where there are no such towers, and for a tower that is none of them.
    """
    import transformers

    if config.model_type != "clip":
        raise SidebenchError(f"{uri} is of type {config.model_type}; projected=true is for CLIP. Leave it out.")
    if tower not in _PROJECTIONS:
        raise SidebenchError(f"{uri} has the towers text, vision; say which: {uri}?tower=vision&projected=true")
    half = getattr(config, f"{tower}_config")
    half.projection_dim = config.projection_dim  # both towers' own entry may be a default that nobody set
    kind = "CLIPTextModelWithProjection" if tower == "text" else "CLIPVisionModelWithProjection"
    return half, getattr(transformers, kind)


def with_projection(module: nn.Module, tower: str) -> tuple[nn.Module, str]:
    """What Backbone is to run of such a tower, and the module path of its projection."""
    return EndToken(module) if tower == "text" else module, _PROJECTIONS[tower]


class EndToken(nn.Module):
    """A text tower whose end token is found by the attention mask: the last real token.

    That is where transformers finds it by token ids, whose highest is the end token's. The mask is there, too, where a
    forward restarts from a cached activation; and prompts that a method inserts move the token, not its distance from
    the end.
    """

    base_model_prefix = "text_model"  # of every module with a transformers model inside, peft wants to know it

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.config = whole.config
        self.text_model = whole.text_model
        self.text_projection = whole.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings (B, E) of texts (B, T)."""
        tokens = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        end = attention_mask.sum(1) - 1 + tokens.shape[1] - attention_mask.shape[1]
        return self.text_projection(tokens[torch.arange(len(tokens), device=tokens.device), end])
