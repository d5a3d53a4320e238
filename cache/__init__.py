"""Frozen activations on disk: what they are, how they are made, stored and read back in batches."""
