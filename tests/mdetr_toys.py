"""A tiny MDETR as its authors' checkpoints are: random weights under the official names, and examples for it."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import toys
from joint_toys import JointToyExamples
from PIL import Image
from torch import Tensor, nn

from sidebench.cache.examples import ImageText
from sidebench.cache.mdetr import Mdetr, MdetrShape
from sidebench.cache.resnet import ResNetShape

WIDTH, HEADS, QUERIES, SIDE = 16, 2, 5, 64
TEXT = {
    "vocab_size": 4 + len(toys.WORDS),
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "type_vocab_size": 1,
    "pad_token_id": 0,
    "layer_norm_eps": 1e-5,
}
SHAPE = MdetrShape(
    trunk=ResNetShape((1, 2, 1, 1), planes=4),
    text=TEXT,
    width=WIDTH,
    heads=HEADS,
    mlp_width=32,
    encoder_blocks=4,
    decoder_blocks=3,
    queries=QUERIES,
    classes=256,
    aligned=64,
)
UNREAD = {  # in the checkpoints, and read by nothing
    "transformer.text_encoder.embeddings.position_ids": (1, 40),
    "transformer.text_encoder.pooler.dense.weight": (24, 24),
    "transformer.text_encoder.pooler.dense.bias": (24,),
}
ARGS = {"nheads": HEADS, "pass_pos_and_query": True, "pre_norm": False, "output_dir": "", "lr": 1e-4}
PIXELS = ((90, 60), (64, 64), (40, 100), (130, 65), (64, 64), (50, 80))  # width and height, in turn


def official_weights(seed: int = 0) -> dict[str, Tensor]:
    """Wide enough that every layer, bias and norm shows in the outputs; attention fused as torch has it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = Mdetr(SHAPE).state_dict()
        for name, tensor in state.items():
            norm = "norm" in name.lower() or ".bn" in name or "downsample.1" in name
            if name.endswith("running_var"):
                nn.init.uniform_(tensor, 0.5, 1.5)
            elif tensor.is_floating_point():
                scale = 0.1 if ".body." in name else 0.2
                nn.init.normal_(tensor, 1.0 if norm and name.endswith("weight") else 0.0, scale)
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace(".q_", f".{part}_")) for part in "qkv"]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    state |= {name: torch.zeros(shape) for name, shape in UNREAD.items()}
    return state


def save_text_folder(folder: Path) -> Path:
    """What stands for roberta-base's folder."""
    toys.tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "roberta", **TEXT}), "utf-8")
    return folder


def save_mdetr(folder: Path, **changes: Any) -> str:
    """Write a checkpoint and a text encoder's folder; the URI. `changes` are to the checkpoint's parts."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {
        "model": official_weights(1),
        "model_ema": official_weights(),
        "args": argparse.Namespace(**ARGS),
        "epoch": 4,
    }
    held = {name: part for name, part in {**held, **changes}.items() if part is not None}
    torch.save(held, folder / "mdetr.pth")
    return f"mdetr:{folder / 'mdetr.pth'}?text={save_text_folder(folder / 'roberta')}"


def make_scenes(count: int, *, seed: int = 0) -> JointToyExamples:
    """Noise of several sizes, and texts of several lengths."""
    generator = np.random.Generator(np.random.PCG64(seed))
    texts = toys.make_texts(count, seed=seed, longest=6).raw
    images = [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in (PIXELS[i % len(PIXELS)] for i in range(count))
    ]
    raw = tuple(ImageText(image, text) for image, text in zip(images, texts, strict=True))
    return JointToyExamples(raw, np.arange(count, dtype=np.int64) % 2)
