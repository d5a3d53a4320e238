"""MDETR as a plain torch network with the public checkpoints' parameter names.

Kamath, Singh, LeCun, Synnaeve, Misra, Carion, MDETR - Modulated Detection for End-to-End Multi-Modal Understanding,
ICCV 2021, arXiv 2104.12763: a ResNet-101 with frozen batch norms and RoBERTa, each projected to 256 channels, one
transformer encoder over the image's tokens and the text's, and a decoder of 100 queries. Layers normalise behind the
sum, as in DETR (arXiv 2005.12872); positions are added to queries and keys in every layer, and texts have none there.

The trunk sees every image without the padding of its batch: convolutions would carry the padding into what lies beside
it, and what is known of an example would depend on its neighbours (the reference pads; at batch size 1 both agree).
A checkpoint's fused `in_proj_weight` is three matrices here, so that queries and values can be adapted on their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import Architecture
from .block_weights import BackboneWeights
from .resnet import EXPANSION, RESNETS, FrozenBatchNorm2d, ResNet, ResNetShape

TEMPERATURE = 10_000.0  # of the positions' wavelengths
ROBERTA_BASE: dict[str, int | float] = {
    "vocab_size": 50265,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class MdetrShape:
    """What tells one MDETR from another; `text` is what transformers' RobertaConfig is given."""

    trunk: ResNetShape = RESNETS["resnet101"]
    text: Mapping[str, Any] = field(default_factory=lambda: dict(ROBERTA_BASE))
    width: int = 256
    heads: int = 8
    mlp_width: int = 2048
    encoder_blocks: int = 6
    decoder_blocks: int = 6
    queries: int = 100
    classes: int = 256  # places in a text that a box may refer to, and none
    aligned: int = 64  # channels in which a query and a token are compared


class Attention(nn.Module):
    """Multi-head attention whose queries and keys have positions added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, Q, D) of (B, Q, D), (B, K, D), (B, K, D); seen: keys that count, to broadcast over (B, H, Q, K)."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D / H)
            for linear, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Self-attention and an MLP, each with a norm behind the sum."""

    def __init__(self, shape: MdetrShape) -> None:
        super().__init__()
        self.self_attn = Attention(shape.width, shape.heads)
        self.linear1, self.linear2 = nn.Linear(shape.width, shape.mlp_width), nn.Linear(shape.mlp_width, shape.width)
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)

    def forward(self, x: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        placed = x + positions
        x = self.norm1(x + self.self_attn(placed, placed, x, seen))
        return self.norm2(x + self.linear2(torch.relu(self.linear1(x))))


class DecoderLayer(nn.Module):
    """The same of the queries, with cross-attention to the encoder's tokens between (there never was a `norm2`)."""

    def __init__(self, shape: MdetrShape) -> None:
        super().__init__()
        self.self_attn, self.cross_attn_image = (Attention(shape.width, shape.heads) for _ in range(2))
        self.linear1, self.linear2 = nn.Linear(shape.width, shape.mlp_width), nn.Linear(shape.mlp_width, shape.width)
        self.norm1, self.norm3, self.norm4 = (nn.LayerNorm(shape.width) for _ in range(3))

    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """(B, Q, D) -> (B, Q, D)."""
        placed = x + queries
        x = self.norm1(x + self.self_attn(placed, placed, x))
        x = self.norm3(x + self.cross_attn_image(x + queries, memory + positions, memory, seen))
        return self.norm4(x + self.linear2(torch.relu(self.linear1(x))))


class Encoder(nn.Module):
    """Its layers; no norm behind the last."""

    def __init__(self, shape: MdetrShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(shape) for _ in range(shape.encoder_blocks))

    def forward(self, x: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        for layer in self.layers:
            x = layer(x, positions, seen)
        return x


class Decoder(nn.Module):
    """Its layers, and the norm behind the last."""

    def __init__(self, shape: MdetrShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.decoder_blocks))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, queries: Tensor, memory: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """(B, Q, D): it begins with zeros, and `queries` are positions to it."""
        x = torch.zeros_like(queries)
        for layer in self.layers:
            x = layer(x, queries, memory, positions, seen)
        return self.norm(x)


class Resizer(nn.Module):
    """RoBERTa's tokens at the transformer's width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, outputs)
        self.layer_norm = nn.LayerNorm(outputs, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, inputs) -> (B, T, outputs)."""
        return self.layer_norm(self.fc(x))


class Transformer(nn.Module):
    """Text encoder (without its pooler, which nothing reads), encoder and decoder: `transformer.` in checkpoints."""

    def __init__(self, shape: MdetrShape) -> None:
        from transformers import RobertaConfig, RobertaModel

        super().__init__()
        config = RobertaConfig(**shape.text)
        config._attn_implementation = "sdpa"
        self.encoder, self.decoder = Encoder(shape), Decoder(shape)
        self.text_encoder = RobertaModel(config, add_pooling_layer=False)
        self.resizer = Resizer(config.hidden_size, shape.width)


class Trunk(nn.Module):
    """The convolutional network, under the checkpoints' `backbone.0.body`."""

    def __init__(self, shape: ResNetShape) -> None:
        super().__init__()
        self.body = ResNet(shape, FrozenBatchNorm2d)

    def forward(self, pixel_values: Tensor, sizes: Tensor | None) -> Tensor:
        """Maps (B, C, h, w), of smaller images with zeros to the right and below; see Mdetr.forward."""
        if sizes is None:
            return self.body(pixel_values)
        each = [self.body(one[None, :, :h, :w])[0] for one, (h, w) in zip(pixel_values, sizes.tolist(), strict=True)]
        rows, columns = (max(one.shape[axis] for one in each) for axis in (1, 2))
        return torch.stack([nn.functional.pad(o, (0, columns - o.shape[2], 0, rows - o.shape[1])) for o in each])


class Mdetr(nn.Module):
    """The whole network; its heads are there for those who begin with them, and no forward pass reads them."""

    def __init__(self, shape: MdetrShape) -> None:
        super().__init__()
        width = shape.width
        self.transformer = Transformer(shape)
        self.class_embed = nn.Linear(width, shape.classes)
        self.bbox_embed = BoxMlp(width)
        self.query_embed = nn.Embedding(shape.queries, width)
        self.input_proj = nn.Conv2d(8 * EXPANSION * shape.trunk.planes, width, 1)
        self.backbone = nn.ModuleList([Trunk(shape.trunk)])
        self.contrastive_align_projection_image = nn.Linear(width, shape.aligned)
        self.contrastive_align_projection_text = nn.Linear(width, shape.aligned)
        self.positions = nn.Identity()  # gives what the layers add to their keys a name to be cached by

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, sizes: Tensor | None = None
    ) -> Tensor:
        """The queries' final states (B, Q, D), normed.

        pixel_values (B, 3, H, W), padded to the right and below; sizes (B, 2): height and width of each image, None
        where none is padded; input_ids (B, T), padded on the right; attention_mask (B, h w + T): what is real of the
        images' tokens, row by row of the grid of H / 32 x W / 32, and of the texts'.
        """
        maps = self.input_proj(self.backbone[0](pixel_values, sizes))  # (B, D, h, w)
        places, words = attention_mask.bool().split([maps[0, 0].numel(), input_ids.shape[1]], 1)
        # Of four axes it is used as it stands; of two it would be dropped where all is real, and memory would differ.
        read = self.transformer.text_encoder(input_ids=input_ids, attention_mask=words[:, None, None])
        text = self.transformer.resizer(read.last_hidden_state)  # (B, T, D)
        sines = sine_positions(places.unflatten(1, maps.shape[2:]), text.shape[2])
        positions = self.positions(torch.cat([sines, torch.zeros_like(text)], 1))
        seen = attention_mask.bool()[:, None, None]  # (B, 1, 1, K)
        memory = self.transformer.encoder(torch.cat([maps.flatten(2).mT, text], 1), positions, seen)
        queries = self.query_embed.weight.expand(len(text), -1, -1)
        return self.transformer.decoder(queries, memory, positions, seen)


def decoder_layer(arch: Architecture, weights: BackboneWeights) -> tuple[DecoderLayer, nn.LayerNorm, nn.Embedding]:
    """A frozen copy of the last layer, of the norm behind it, and of the queries (Q, D)."""
    assert arch.heads is not None
    assert arch.mlp_width is not None
    assert weights.queries is not None
    assert weights.norm is not None
    held = weights.blocks[-1]
    assert held.across is not None
    layer = DecoderLayer(MdetrShape(width=arch.width, heads=arch.heads, mlp_width=arch.mlp_width))
    parts = {"linear1": held.fc1, "linear2": held.fc2, "norm1": held.norm1, "norm3": held.across.norm1}
    parts["norm4"] = held.norm2
    for name, own in (("self_attn", held), ("cross_attn_image", held.across)):
        pairs = {"q_proj": own.query, "k_proj": own.key, "v_proj": own.value, "out_proj": own.out}
        parts |= {f"{name}.{part}": pair for part, pair in pairs.items()}
    norm, queries = nn.LayerNorm(arch.width, arch.norm_eps), nn.Embedding(*weights.queries.shape)
    filled = [(norm, weights.norm), *((layer.get_submodule(path), pair) for path, pair in parts.items())]
    for module, pair in filled:
        module.load_state_dict(dict(zip(("weight", "bias"), pair, strict=True)))
    queries.load_state_dict({"weight": weights.queries})
    return layer.requires_grad_(False), norm.requires_grad_(False), queries.requires_grad_(False)


class BoxMlp(nn.Module):
    """A query's state to its box (centre, width, height), before the sigmoid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, outputs) for outputs in (width, width, 4))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., 4)."""
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


def sine_positions(real: Tensor, width: int) -> Tensor:
    """Positions (B, H W, width) of a grid's real places (B, H, W): sines of the row, then those of the column.

    Rows and columns are counted from 1 and divided by how many the example has, times 2 pi.
    """
    half = width // 2
    pairs = torch.arange(0, half, 2, device=real.device, dtype=torch.float32)
    wavelengths = TEMPERATURE ** (pairs / half)  # one for a sine and its cosine
    found = []
    for axis in (1, 2):
        counted = real.cumsum(axis, dtype=torch.float32)
        angle = counted / (counted.narrow(axis, -1, 1) + 1e-6) * 2 * torch.pi
        waves = angle[..., None] / wavelengths  # (B, H, W, half / 2)
        found.append(torch.stack([waves.sin(), waves.cos()], -1).flatten(-2))
    return torch.cat(found, -1).flatten(1, 2)
