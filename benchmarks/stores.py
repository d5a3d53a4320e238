"""Stores made for the benchmarks: the real writer, random activations of real shapes."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sidebench.cache.architecture import Architecture
from sidebench.cache.form import Form
from sidebench.cache.manifest import ActivationSpec, Manifest
from sidebench.cache.writer import StoreWriter
from sidebench.cache.zarr_store import ZarrStore


def make(
    folder: Path, *, examples: int, tokens: int, width: int, layers: int = 1, ragged: bool = False
) -> tuple[ZarrStore, dict[str, list[torch.Tensor]]]:
    """A committed store, and the same activations in RAM: per layer one (T_i, D) tensor per example."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(tokens // 4, tokens + 1, examples) if ragged else np.full(examples, tokens)
    names = [f"blocks.{i}" for i in range(layers)]
    manifest = _manifest(names, examples, None if ragged else tokens, width, int(lengths.sum()) if ragged else examples)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    writer = StoreWriter(folder, manifest)
    kept: dict[str, list[torch.Tensor]] = {}
    writer.append("targets", np.zeros(examples, dtype=np.int64))
    if ragged:
        writer.append("offsets", offsets)
    for name in names:
        rows: Any = rng.standard_normal((int(lengths.sum()), width), dtype=np.float32).astype(np.float16)
        writer.append(f"layers/{name}", rows if ragged else rows.reshape(examples, tokens, width))
        writer.append(f"pooled/{name}", np.zeros((examples, 2, width), dtype=np.float16))
        kept[name] = [torch.from_numpy(rows[a:b]) for a, b in pairwise(offsets.tolist())]
    writer.commit({}, tuple(str(i) for i in range(examples)))
    writer.close()
    return ZarrStore(folder), kept


def write(folder: Path, rows: Any) -> None:
    """One layer of dense rows (N, T, D) through the writer, committed."""
    examples, tokens, width = rows.shape
    manifest = _manifest(["blocks.0"], examples, tokens, width, examples)
    writer = StoreWriter(folder, manifest)
    writer.append("targets", np.zeros(examples, dtype=np.int64))
    writer.append("pooled/blocks.0", np.zeros((examples, 2, width), dtype=np.float16))
    for start in range(0, examples, 64):
        writer.append("layers/blocks.0", rows[start : start + 64])
    writer.commit({}, tuple(str(i) for i in range(examples)))
    writer.close()


def _manifest(names: list[str], examples: int, tokens: int | None, width: int, rows: int) -> Manifest:
    return Manifest(
        architecture=Architecture("Random", "text" if tokens is None else "image", len(names), width, 0, names[-1]),
        backbone={},
        preprocessing={},
        dataset={"sha256": "", "examples": examples, "limit": None},
        forward={"batch_size": 64},
        form=Form(),
        specs=tuple(ActivationSpec(name, tokens, width) for name in names),
        rows=rows,
    )
