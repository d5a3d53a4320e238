"""A tiny CLIP-ViL as its authors save it: random weights under the released names, with BERT's config and tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
import toys
from torch import Tensor

WIDTH, HEADS, BLOCKS, MLP = 32, 4, 2, 64
TRUNK, CHANNELS = 4, 128  # the stem's channels, and the last map's
STAGES = (1, 2, 1, 2)  # as long as BERT is: blocks are not to be sought in the trunk
SIDE = 96  # pixels of the shorter side: 3 x 5 tokens
VISUAL = 15
VISUAL_NAME = "bert.encoder.visual_model.visual"


def released_weights() -> dict[str, Tensor]:
    """Every tensor that the pre-training of such a network saves, also those that nobody reads here."""
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (4 + len(toys.WORDS), WIDTH),
        "bert.embeddings.position_embeddings.weight": (40, WIDTH),
        "bert.embeddings.token_type_embeddings.weight": (2, WIDTH),
        "bert.encoder.visual_pos.x_position_embedding.weight": (6, CHANNELS),
        "bert.encoder.visual_pos.y_position_embedding.weight": (6, CHANNELS),
        "bert.encoder.visual_model.logit_scale": (),
        "bert.encoder.visual_model.transformer.resblocks.0.ln_1.weight": (8,),
        f"{VISUAL_NAME}.attnpool.positional_embedding": (5, CHANNELS),
        "cls.predictions.bias": (4 + len(toys.WORDS),),
        **_linear("bert.encoder.visn_fc.visn_fc", CHANNELS, WIDTH),
        **_norm("bert.encoder.visn_fc.visn_layer_norm", WIDTH),
        **_linear("bert.encoder.visn_fc.box_fc", 4, WIDTH),
        **_norm("bert.encoder.visn_fc.box_layer_norm", WIDTH),
        **_norm("bert.embeddings.LayerNorm", WIDTH),
        **_linear("bert.pooler.dense", WIDTH, WIDTH),
        **_linear("answer_head.logit_fc.0", WIDTH, 2 * WIDTH),
        **_trunk(),
    }
    for block in range(BLOCKS):
        stem = f"bert.encoder.layer.{block}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _linear(f"{stem}.attention.{name}", WIDTH, WIDTH)
        shapes |= _norm(f"{stem}.attention.output.LayerNorm", WIDTH) | _norm(f"{stem}.output.LayerNorm", WIDTH)
        shapes |= _linear(f"{stem}.intermediate.dense", WIDTH, MLP) | _linear(f"{stem}.output.dense", MLP, WIDTH)
    draw = torch.Generator().manual_seed(0)
    return {name: _drawn(name, shape, draw) for name, shape in shapes.items()}


def save_clip_vil(folder: Path, **changes: Any) -> str:
    """A checkpoint and the folder of its tokenizer; `changes` by name replace tensors, or with None leave them out."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {**released_weights(), **changes}
    torch.save({f"module.{name}": value for name, value in weights.items() if value is not None}, folder / "vil.pth")
    text = folder / "bert"
    toys.tokenizer().save_pretrained(text)
    (text / "config.json").write_text(json.dumps({"model_type": "bert", "num_attention_heads": HEADS}))
    return f"clipvil:{folder / 'vil.pth'}?text={text}"


def _trunk() -> dict[str, tuple[int, ...]]:
    half, shapes = TRUNK // 2, {}
    for number, (inputs, outputs) in enumerate(((3, half), (half, half), (half, TRUNK)), 1):
        shapes |= {f"{VISUAL_NAME}.conv{number}.weight": (outputs, inputs, 3, 3)}
        shapes |= _batch_norm(f"{VISUAL_NAME}.bn{number}", outputs)
    inputs = TRUNK
    for stage, blocks in enumerate(STAGES):
        planes = TRUNK * 2**stage
        for block in range(blocks):
            stem = f"{VISUAL_NAME}.layer{stage + 1}.{block}"
            sizes = ((planes, inputs, 1), (planes, planes, 3), (4 * planes, planes, 1))
            for number, (outputs, channels, side) in enumerate(sizes, 1):
                shapes |= {f"{stem}.conv{number}.weight": (outputs, channels, side, side)}
                shapes |= _batch_norm(f"{stem}.bn{number}", outputs)
            if not block:
                shapes |= {f"{stem}.downsample.0.weight": (4 * planes, inputs, 1, 1)}
                shapes |= _batch_norm(f"{stem}.downsample.1", 4 * planes)
            inputs = 4 * planes
    return shapes


def _linear(stem: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{stem}.weight": (outputs, inputs), f"{stem}.bias": (outputs,)}


def _norm(stem: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{stem}.weight": (width,), f"{stem}.bias": (width,)}


def _batch_norm(stem: str, channels: int) -> dict[str, tuple[int, ...]]:
    counts: dict[str, tuple[int, ...]] = {f"{stem}.num_batches_tracked": ()}
    return counts | {f"{stem}.{n}": (channels,) for n in ("weight", "bias", "running_mean", "running_var")}


def _drawn(name: str, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Wide enough that every layer shows in what comes out."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    drawn = 0.2 * torch.randn(shape, generator=draw)
    if name.endswith("running_var"):
        return 1 + drawn.abs()
    is_norm = "LayerNorm" in name or "_norm" in name or ".bn" in name or "downsample.1" in name
    return drawn + 1 if is_norm and name.endswith("weight") else drawn
