"""Backbones to restart at a block, and what is fed to methods that do: for the tests of suffixes and such methods."""

from pathlib import Path

import torch
from torch import Tensor, nn
from toys import load, make_images, save_bert, save_vit
from transformers import T5Config, T5EncoderModel

from sidebench.adapters._base import Batch, PrefixMethod
from sidebench.cache.backbone import Backbone
from sidebench.cache.configs import TextShapes
from sidebench.cache.preprocess import Inputs
from sidebench.cache.suffix import entering_layer

TEXTS = ["good", *["the film is very bad and dull"] * 3]


def t5_encoder() -> Backbone:
    torch.manual_seed(0)
    config = T5Config(vocab_size=20, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, dropout_rate=0.0)
    return Backbone(T5EncoderModel(config), TextShapes(16))


def deep_backbones(folder: Path, blocks: int) -> dict[str, Backbone]:
    """A ViT and a BERT of so many blocks, and T5's three."""
    vit = load(save_vit(folder / "vit", num_hidden_layers=blocks))
    bert = load(save_bert(folder / "bert", num_hidden_layers=blocks))
    return {"vit": vit, "bert": bert, "t5": t5_encoder()}


def inputs_of(backbone: Backbone) -> tuple[Inputs, Tensor | None]:
    """Four examples; the first text is short, so that its row is padded."""
    if isinstance(backbone.preprocess, TextShapes):
        mask = torch.arange(7) < torch.tensor([3, 7, 7, 6])[:, None]
        return {"input_ids": torch.arange(28).reshape(4, 7) % 20, "attention_mask": mask.long()}, mask
    raw = TEXTS if backbone.arch.modality == "text" else list(make_images(4).raw)
    return backbone.preprocess.collate(backbone.preprocess.prepare(raw))


def batch_for(whole: Backbone, method: PrefixMethod) -> tuple[Inputs, Batch]:
    """Inputs of the whole network, and what the method sees of them."""
    inputs, mask = inputs_of(whole)
    states = whole.capture(inputs, method.layers(whole.arch))
    real = torch.ones(next(iter(states.values())).shape[:2], dtype=torch.bool) if mask is None else mask
    states = {layer: (state * real[..., None]).clone() for layer, state in states.items()}
    return inputs, Batch(real, states).entering(entering_layer(method.first_block(whole.arch)))


def bytes_kept(body: nn.Module, batch: Batch) -> int:
    """Of every storage that autograd keeps for backward, the body's own and the batch's left out."""
    own = {t.untyped_storage().data_ptr() for t in (*body.parameters(), *batch.activations.values(), batch.mask)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        body(batch)
    return sum(kept.values())
