"""Gradient checkpointing of a backbone's blocks: what enters each is kept, the rest is computed again in backward."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from ..cache.backbone import Backbone


def checkpoint_blocks(backbone: Backbone) -> None:
    """Wrap every block's forward. Transformers' own switch does nothing here: it asks for training mode."""
    for block in backbone.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
