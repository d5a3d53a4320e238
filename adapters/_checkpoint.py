"""Gradient checkpointing of a backbone's blocks: what enters each is kept, the rest is computed again in backward."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from ..cache.backbone import Backbone
from ..cache.errors import SidebenchError


def checkpoint_blocks(backbone: Backbone) -> None:
    """Wrap every block's forward. Transformers' own switch does nothing here: it asks for training mode."""
    paths = backbone.block_paths or backbone.bottleneck_paths
    if not paths:
        raise SidebenchError(f"checkpointing=true goes by blocks, and {backbone.arch.name} has none; leave it out.")
    for block in map(backbone.module.get_submodule, paths):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
