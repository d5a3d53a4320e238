"""A store held whole in the memory of a device, and the choice between that, the host's memory and the disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import psutil
import torch
from torch import Tensor

from .architecture import Architecture
from .encode import Stored
from .errors import SidebenchError, unknown
from .quantise import Quantised
from .store import Activations, Index, Store, activations, check_index, require_layers
from .zarr_store import ZarrStore

Tier = Literal["auto", "disk", "ram", "device"]
TIERS: tuple[Tier, ...] = get_args(Tier)
_RAM_SHARE = 0.5  # of what is available, that `auto` takes
_DEVICE_SHARE = 0.25  # of what is free on the device: the method needs the rest


class MemoryStore(Store):
    """Activations in memory: per layer (N, T, D), or the real tokens of all items (R, D), cut by `offsets` (N + 1,)."""

    def __init__(self, architecture: Architecture, layers: Mapping[str, Stored], offsets: Index | None = None) -> None:
        self.architecture = architecture
        self.layers = tuple(layers)
        self._held = dict(layers)
        self._offsets = offsets

    @classmethod
    def of(cls, store: ZarrStore, layers: Sequence[str], device: torch.device) -> "MemoryStore":
        """Load layers of a store onto a device."""
        held = {layer: store.whole(layer).to(device) for layer in layers}
        return cls(store.architecture, held, store.offsets)

    def __len__(self) -> int:
        return len(next(iter(self._held.values()))) if self._offsets is None else len(self._offsets) - 1

    def read(self, index: Index, layers: Sequence[str]) -> Activations:
        """See Store; the batch is where the store is."""
        check_index(index, len(self))
        require_layers(self.layers, layers)
        final, items = self.architecture.final_layer, torch.from_numpy(index)
        ragged = {layer for layer in layers if len(self._held[layer].shape) == 2}
        dense = {layer: _taken(self._held[layer], items) for layer in layers if layer not in ragged}
        if self._offsets is None or not ragged:
            return activations(dense, final)
        starts, lengths = self._offsets[index], np.diff(self._offsets)[index]
        within = np.arange(int(lengths.max()))  # (T,)
        real = torch.from_numpy(within < lengths[:, None])  # (B, T)
        rows = torch.from_numpy(starts[:, None] + np.minimum(within, lengths[:, None] - 1))
        found = {
            layer: _blanked(_taken(self._held[layer], rows), real) if layer in ragged else dense[layer]
            for layer in layers
        }
        return activations(found, final, real, ragged)


def _taken(held: Stored, rows: Tensor) -> Stored:
    if isinstance(held, Quantised):
        return Quantised(_gather(held.values, rows), _gather(held.scales, rows), held.channels)
    return _gather(held, rows)


def _gather(held: Tensor, rows: Tensor) -> Tensor:
    # As plain bits: fp8 has no gather of its own.
    bits = held.view(torch.uint8) if held.dtype is torch.float8_e4m3fn else held
    return bits[rows.to(held.device)].view(held.dtype)


def _blanked(batch: Stored, mask: Tensor) -> Stored:
    """The batch with zeros where `mask` (B, T) is False."""
    tensors = (batch.values, batch.scales) if isinstance(batch, Quantised) else (batch,)
    for tensor in tensors:
        bits = tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor
        bits[~mask.to(tensor.device)] = 0
    return batch


def tier_named(text: str) -> Tier:
    """The tier of this name. Raises SidebenchError for another."""
    for tier in TIERS:
        if tier == text:
            return tier
    raise unknown("tier of the cache", text, TIERS)


@dataclass(frozen=True)
class Placed:
    """A store where it is read from, and the sentence that says so."""

    store: Store
    tier: Tier
    resident_bytes: int
    why: str


def place(store: ZarrStore, layers: Sequence[str], tier: Tier, device: torch.device) -> Placed:
    """Bring the layers of a store to the tier asked for; `auto` chooses.

    Auto leaves an uncompressed store on a CPU machine on disk, which the page cache serves at nearly the speed of RAM;
    loads a compressed one into RAM, since random batches would decompress whole chunks; and holds it on a CUDA device
    where it takes at most a quarter of the free memory. Raises SidebenchError when what was asked for does not fit.
    """
    needed = store.bytes_of(layers)
    if tier == "auto":
        tier = _chosen(store, needed, device)
    if tier == "disk":
        return Placed(store, tier, 0, "read from disk")
    where = torch.device("cpu") if tier == "ram" else device
    free = free_bytes(where)
    if needed > free:
        option = "--cache-in-ram" if tier == "ram" else "--cache-on-device"
        raise SidebenchError(
            f"{option}: the layers take {needed:,} bytes and {free:,} are free on {where}. Leave it out, or keep fewer "
            "layers or tokens (--layers, --tokens), or int8 (--dtype)."
        )
    said = f"{needed / 2**20:,.0f} MiB held in {'RAM' if tier == 'ram' else f'the memory of {device}'}"
    if tier == "device":
        return Placed(MemoryStore.of(store, layers, device), tier, needed, said)
    store.hold(layers)  # its own reader gathers into recycled buffers
    return Placed(store, tier, needed, said)


def _chosen(store: ZarrStore, needed: int, device: torch.device) -> Tier:
    if device.type == "cuda" and needed <= _DEVICE_SHARE * free_bytes(device):
        return "device"
    if store.manifest.form.compression and needed <= _RAM_SHARE * free_bytes(torch.device("cpu")):
        return "ram"
    return "disk"


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, or of this host within its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available, left = int(psutil.virtual_memory().available), _group_bytes()
    return available if left is None else min(available, left)


def _group_bytes() -> int | None:
    """What the control group of a container leaves."""
    try:
        folder = Path("/sys/fs/cgroup")
        used = int((folder / "memory.current").read_text())
        kinds = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = int(kinds.get("inactive_file", 0))  # pages of files, which the kernel gives up when it must
        return int((folder / "memory.max").read_text()) - used + cached
    except (OSError, ValueError):  # no such group, or "max"
        return None
