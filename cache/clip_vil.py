"""CLIP-ViL as a plain torch network: a question and the grid of an image read as one sequence by BERT's blocks.

Shen, Li, Tan, Bansal, Rohrbach, Chang, Yao, Keutzer, How Much Can CLIP Benefit Vision-and-Language Tasks?, ICLR 2022,
arXiv 2107.06383; in the form that UniPT's scripts tune: CLIP's RN50x4 without its pooling, an embedding of the row and
one of the column added to its map, a Linear and a LayerNorm to BERT's width, and these tokens behind the words. No
token of the image is masked, and none has a type. BERT's pooler, without its tanh, is there for a task's head to begin
with; no forward pass reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .clip_resnet import CLIP_RESNETS, ClipResNetShape, ModifiedResNet


@dataclass(frozen=True)
class ClipVilShape:
    """What tells one CLIP-ViL from another; `text` differs from the defaults of transformers' BertConfig."""

    trunk: ClipResNetShape = CLIP_RESNETS["RN50x4"]
    text: Mapping[str, Any] = field(default_factory=dict)
    places: int = 25  # rows, and columns, that have an embedding


class Places(nn.Module):
    """An embedding per row (x in the checkpoints) and per column (y) of the map, added up."""

    def __init__(self, places: int, channels: int) -> None:
        super().__init__()
        self.x_position_embedding, self.y_position_embedding = (nn.Embedding(places, channels) for _ in range(2))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, C, h, w) -> tokens (B, h w, C), row by row."""
        height, width = maps.shape[2:]
        rows, columns = self.x_position_embedding.weight[:height], self.y_position_embedding.weight[:width]
        return maps.flatten(2).mT + (rows[:, None] + columns).flatten(0, 1)


class Projected(nn.Module):
    """The map's tokens at BERT's width."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.visn_fc = nn.Linear(channels, width)
        self.visn_layer_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, D)."""
        return self.visn_layer_norm(self.visn_fc(tokens))


class JointEmbeddings(nn.Module):
    """All that comes before the first block, in one module: the blocks can be restarted from what it yields."""

    def __init__(self, config: Any, shape: ClipVilShape) -> None:
        from transformers.models.bert.modeling_bert import BertEmbeddings

        super().__init__()
        channels = shape.trunk.channels
        self.words = BertEmbeddings(config)
        self.visual = ModifiedResNet(shape.trunk, attnpool=False)
        self.visual_pos = Places(shape.places, channels)
        self.visn_fc = Projected(channels, config.hidden_size)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, lying: Tensor | None = None, upright: Tensor | None = None
    ) -> Tensor:
        """The words' tokens, then the image's (B, T, D); see ClipVil.forward."""
        if lying is None or upright is None:
            image = self._grid(pixel_values)
        else:
            kinds = torch.cat([lying, upright], 1).int()  # (B, m + n), one 1 in a row
            wide, high = kinds.argmax(0).split([lying.shape[1], upright.shape[1]])
            image = torch.cat([self._grid(pixel_values[wide]), self._grid(pixel_values[high].mT)])[kinds.argmax(1)]
        return torch.cat([self.words(input_ids), self.visn_fc(image)], 1)

    def _grid(self, pixel_values: Tensor) -> Tensor:
        return self.visual_pos(self.visual(pixel_values))


class Encoder(nn.Module):
    """BERT's blocks."""

    def __init__(self, config: Any) -> None:
        from transformers.models.bert.modeling_bert import BertLayer

        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        for block in self.layer:
            x = block(x, seen)
        return x


class ClipVil(nn.Module):
    """The embeddings and BERT's blocks."""

    def __init__(self, shape: ClipVilShape) -> None:
        from transformers import BertConfig

        super().__init__()
        self.config = BertConfig(**shape.text)
        self.config._attn_implementation = "sdpa"
        self.embeddings = JointEmbeddings(self.config, shape)
        self.encoder = Encoder(self.config)
        self.pooler = nn.Linear(self.config.hidden_size, self.config.hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor,
        lying: Tensor | None = None,
        upright: Tensor | None = None,
    ) -> Tensor:
        """The last block's tokens (B, T, D), T = t + h w.

        input_ids (B, t), padded on the right; pixel_values (B, 3, H, W); attention_mask (B, T) of real tokens.
        Of a batch with images of both kinds, lying (B, m) and upright (B, n), bool, say in row i which of the m or n
        image i is: as shapes, so that what a step takes is known without their values. The upright ones are given with
        rows and columns exchanged. None where all images are of one kind, and as they are.
        """
        x = self.embeddings(input_ids, pixel_values, lying, upright)
        return self.encoder(x, attention_mask.bool()[:, None, None])

    def as_released(self) -> nn.Module:
        """The same parts under the names of the released checkpoints.

        The names are those that the released code builds its network with; no checkpoint could be opened to compare.
        """
        parts, tree = self.embeddings, nn.ModuleDict
        encoder = {
            "layer": self.encoder.layer,
            "visual_model": tree({"visual": parts.visual}),
            "visual_pos": parts.visual_pos,
            "visn_fc": parts.visn_fc,
        }
        pooler = tree({"dense": self.pooler})
        return tree({"bert": tree({"embeddings": parts.words, "encoder": tree(encoder), "pooler": pooler})})
