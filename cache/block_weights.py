"""The matrices of a backbone's blocks under one set of names, for methods that copy or prune them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .errors import SidebenchError

_QUERY = ("query", "q_proj", "q_lin", "q")
_KEY = ("key", "k_proj", "k_lin", "k")
_VALUE = ("value", "v_proj", "v_lin", "v")


@dataclass(frozen=True)
class CrossWeights:
    """What a decoder's block reads the encoder with, named and shaped as in BlockWeights."""

    query: tuple[Tensor, Tensor | None]
    key: tuple[Tensor, Tensor | None]
    value: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]
    norm1: tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class BlockWeights:
    """One transformer block: (weight, bias) pairs on the host; a weight is (rows = outputs, columns = inputs)."""

    query: tuple[Tensor, Tensor | None]
    key: tuple[Tensor, Tensor | None]
    value: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]
    fc1: tuple[Tensor, Tensor | None]
    fc2: tuple[Tensor, Tensor | None]
    norm1: tuple[Tensor, Tensor | None]
    norm2: tuple[Tensor, Tensor | None]
    scales: tuple[Tensor, Tensor] | None  # layer scale after attention and after the MLP
    across: CrossWeights | None = None
    positions: Tensor | None = None  # T5's table of relative positions (buckets, heads), where a block has it


@dataclass(frozen=True)
class BackboneWeights:
    """Embedding (anything, D), the blocks, and the final norm where there is one.

    Of an encoder-decoder the decoder's blocks stand behind the encoder's, and the final norm is the decoder's.

    importance: squared gradients summed over examples, under the same names, where a method asked for them.
    """

    embedding: Tensor
    blocks: tuple[BlockWeights, ...]
    norm: tuple[Tensor, Tensor | None] | None
    importance: "BackboneWeights | None" = None
    encoder_norm: tuple[Tensor, Tensor | None] | None = None
    queries: Tensor | None = None  # (Q, D) what DETR's decoder adds to its states in every block


@dataclass(frozen=True)
class BlockModules:
    """The parts of one transformer block: attention, and an MLP of two layers, or gated: then two read its input."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    mlp_in: tuple[nn.Linear, ...]
    mlp_out: nn.Linear
    norm1: nn.Module
    norm2: nn.Module
    scales: tuple[nn.Module, nn.Module] | None  # layer scale after attention and after the MLP

    @property
    def after_attention(self) -> nn.Module:
        """The module whose output attention adds to the residual stream."""
        return self.scales[0] if self.scales else self.out

    @property
    def after_mlp(self) -> nn.Module:
        """The module whose output the MLP adds to the residual stream."""
        return self.scales[1] if self.scales else self.mlp_out


def block_modules(block: nn.Module) -> BlockModules:
    """The parts of a block. Raises SidebenchError when it is not one attention and one MLP, each with a norm."""
    projections = attention_projections(block, ("query", "key", "value"))
    norms = [m for m in block.modules() if type(m).__name__.endswith("Norm")]
    others = [m for m in block.modules() if isinstance(m, nn.Linear) and m not in projections.values()]
    if len(projections) != 3 or len(others) not in (3, 4) or len(norms) != 2:
        raise SidebenchError(
            f"{type(block).__name__} is not one attention and one MLP (found {len(projections)} projections, "
            f"{len(others)} other Linears, {len(norms)} norms), so there is no telling its parts."
        )
    scales = [m for path, m in block.named_modules() if path.rsplit(".", 1)[-1].startswith("layer_scale")]
    query, key, value = projections.values()
    norm1, norm2 = norms
    out, *mlp_in, mlp_out = others  # registered in forward order in every family
    pair = (scales[0], scales[1]) if len(scales) == 2 else None
    return BlockModules(query, key, value, out, tuple(mlp_in), mlp_out, norm1, norm2, pair)


def attention_projections(block: nn.Module, which: Sequence[str] = ("query", "value")) -> dict[str, nn.Linear]:
    """Dotted paths inside `block` of the wanted attention projections ("query", "key", "value").

    They are found by the last part of their name, because families differ and no table keeps up. Raises SidebenchError
    when one is missing.
    """
    names = {"query": _QUERY, "key": _KEY, "value": _VALUE}
    linears = {path: m for path, m in block.named_modules() if isinstance(m, nn.Linear)}
    found: dict[str, nn.Linear] = {}
    for role in which:
        hits = {path: m for path, m in linears.items() if path.rsplit(".", 1)[-1] in names[role]}
        if not hits:
            raise SidebenchError(
                f"no {role} projection in {type(block).__name__}: looked for a Linear called {', '.join(names[role])}, "
                f"found {', '.join(linears) or 'no Linear at all'}."
            )
        found.update(hits)
    return found


def read_weights(backbone: Backbone) -> BackboneWeights:
    """Copies of the weights on the host. Raises SidebenchError when a block is not the usual attention and MLP."""
    tables = [m.weight for m in backbone.module.modules() if isinstance(m, nn.Embedding)]
    patches = [m.weight.flatten(1).T for m in backbone.module.modules() if isinstance(m, nn.Conv2d)]
    embedding = max(tables, key=torch.numel) if backbone.arch.modality != "image" else patches[0]
    if backbone.arch.detr_blocks:
        embedding = _detr_embedding(backbone.module)
    norm, encoder_norm = (
        _pair(backbone.module.get_submodule(backbone.tap_path(layer))) if layer in backbone.layers else None
        for layer in ("norm", "encoder_norm")
    )
    read = _read_t5_block if backbone.arch.t5_blocks else _read_detr_block if backbone.arch.detr_blocks else _read_block
    blocks = tuple(read(block) for block in backbone.blocks)
    queries = _host(backbone.module.get_parameter("query_embed.weight")) if backbone.arch.detr_blocks else None
    return BackboneWeights(_host(embedding), blocks, norm, encoder_norm=encoder_norm, queries=queries)


def _read_block(block: nn.Module) -> BlockWeights:
    named = attention_projections(block, ("query", "key", "value"))
    norms = [m for m in block.modules() if isinstance(m, nn.LayerNorm)]
    others = [m for m in block.modules() if isinstance(m, nn.Linear) and m not in named.values()]
    if len(named) != 3 or len(others) != 3 or len(norms) != 2:
        raise SidebenchError(
            f"{type(block).__name__} is not one attention and one two-layer MLP (found {len(named)} projections, "
            f"{len(others)} other Linears, {len(norms)} LayerNorms), so its weights cannot be pruned."
        )
    scales = [p for name, p in block.named_parameters() if "layer_scale" in name]
    query, key, value = (_pair(m) for m in named.values())
    out, fc1, fc2 = (_pair(m) for m in others)  # registered in forward order in every family
    first, second = (_pair(m) for m in norms)
    pair = (_host(scales[0]), _host(scales[1])) if len(scales) == 2 else None
    return BlockWeights(query, key, value, out, fc1, fc2, first, second, pair)


def _read_t5_block(block: nn.Module) -> BlockWeights:
    own, *across, mlp = block.get_submodule("layer").children()
    query, key, value, out, norm1 = _read_t5_attention(own, "SelfAttention")
    table = dict(own.named_modules()).get("SelfAttention.relative_attention_bias")
    return BlockWeights(
        query,
        key,
        value,
        out,
        fc1=_pair(mlp.get_submodule("DenseReluDense.wi")),
        fc2=_pair(mlp.get_submodule("DenseReluDense.wo")),
        norm1=norm1,
        norm2=_pair(mlp.get_submodule("layer_norm")),
        scales=None,
        across=CrossWeights(*_read_t5_attention(across[0], "EncDecAttention")) if across else None,
        positions=None if table is None else _pair(table)[0],
    )


def _read_t5_attention(layer: nn.Module, name: str) -> list[tuple[Tensor, Tensor | None]]:
    return [_pair(layer.get_submodule(path)) for path in (*(f"{name}.{part}" for part in "qkvo"), "layer_norm")]


def _detr_embedding(module: nn.Module) -> Tensor:
    """What brings the image's tokens to the blocks' width."""
    projection = dict(module.named_modules()).get("input_proj")
    if not isinstance(projection, nn.Conv2d):
        raise SidebenchError(
            f"{type(module).__name__} has no input_proj as MDETR has, so its weights cannot be pruned."
        )
    return projection.weight.flatten(1).T


def _read_detr_block(block: nn.Module) -> BlockWeights:
    """By MDETR's names, where a decoder's third norm is the MLP's and the second none."""
    own, across = (dict(block.named_children()).get(name) for name in ("self_attn", "cross_attn_image"))
    assert own is not None
    norms = [_pair(m) for m in block.children() if isinstance(m, nn.LayerNorm)]
    query, key, value, out = _read_detr_attention(own)
    return BlockWeights(
        query,
        key,
        value,
        out,
        fc1=_pair(block.get_submodule("linear1")),
        fc2=_pair(block.get_submodule("linear2")),
        norm1=norms[0],
        norm2=norms[-1],
        scales=None,
        across=None if across is None else CrossWeights(*[*_read_detr_attention(across), norms[1]]),
    )


def _read_detr_attention(module: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
    return [_pair(module.get_submodule(path)) for path in ("q_proj", "k_proj", "v_proj", "out_proj")]


def _pair(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    bias = getattr(module, "bias", None)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return _host(weight), _host(bias) if isinstance(bias, Tensor) else None


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
