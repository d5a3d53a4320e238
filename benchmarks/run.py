"""`make bench`: the store's speed as ratios taken within one run. Absolute times mean little on a shared machine."""

import os
import tempfile
import time
from pathlib import Path

import forms
import h5py
import lean
import numpy as np
import stores
import torch
import training
import zarr
from timing import interleaved, show
from torch.nn.utils.rnn import pad_sequence

from sidebench.cache.zarr_store import ZarrStore

BATCH = 64


def reading_dense(folder: Path) -> None:
    """Shuffled batches of 64 from a local dense store, against RAM, zarr-python and h5py."""
    for tokens, width, examples, h5_goal in ((64, 768, 2048, 5), (197, 768, 1024, 3)):
        where = folder / f"dense-{tokens}"
        store, rows = stores.make(where / "a.zarr", examples=examples, tokens=tokens, width=width)
        layer = store.layers[0]
        ram = torch.stack(rows[layer])
        with h5py.File(where / "a.h5", "w") as file:
            file["x"] = ram.numpy()
            # What a file becomes that grows while features are extracted: h5py chooses the chunks.
            file.create_dataset("grown", data=ram.numpy(), maxshape=(None, tokens, width))
        opened = h5py.File(where / "a.h5", "r")
        h5, grown = opened["x"], opened["grown"]
        array = zarr.open_array(where / "a.zarr/layers" / layer, mode="r")
        buffer = torch.empty((BATCH, tokens, width), dtype=torch.float16)

        def index(turn: int, examples: int = examples) -> np.ndarray:
            return np.random.default_rng(turn).permutation(examples)[:BATCH].astype(np.int64)

        fast = interleaved(
            {
                "ours": lambda turn: store.read(index(turn), [layer]),
                "ram": lambda turn: torch.index_select(ram, 0, torch.from_numpy(index(turn)), out=buffer),
                "ram, new tensor": lambda turn: ram[torch.from_numpy(index(turn))],
                "h5py": lambda turn: h5py_batch(h5, index(turn)),
                "h5py, row by row": lambda turn: torch.from_numpy(np.stack([h5[int(i)] for i in index(turn)])),
            },
            rounds=21,
        )
        slow = interleaved(
            {
                "ours": lambda turn: store.read(index(turn), [layer]),
                "zarr": lambda turn: array.oindex[index(turn)],
                "h5py": lambda turn: torch.from_numpy(np.stack([grown[int(i)] for i in index(turn)])),
            },
            rounds=3,
        )
        show(
            f"reading shuffled batches of {BATCH}, rows of {tokens * width * 2 / 1000:.0f} kB",
            [
                ("RAM gather into a kept buffer / ours", f"{fast['ram'] / fast['ours']:.2f}", "goal 0.7"),
                ("RAM gather into a new tensor / ours", f"{fast['ram, new tensor'] / fast['ours']:.2f}", ""),
                ("zarr-python oindex / ours", f"{slow['zarr'] / slow['ours']:.0f}", "goal 20"),
                ("h5py file that grew, row by row / ours", f"{slow['h5py'] / slow['ours']:.1f}", f"goal {h5_goal}"),
                ("h5py contiguous, sorted / ours", f"{fast['h5py'] / fast['ours']:.1f}", f"goal {h5_goal}"),
                ("h5py contiguous, row by row / ours", f"{fast['h5py, row by row'] / fast['ours']:.1f}", ""),
            ],
        )


def h5py_batch(data: h5py.Dataset, index: np.ndarray) -> torch.Tensor:
    """h5py selects in ascending order only; the batch is wanted in its own."""
    order = np.argsort(index)
    rows = data[index[order]]
    batch = np.empty_like(rows)
    batch[order] = rows
    return torch.from_numpy(batch)


def reading_ragged(folder: Path) -> None:
    """Shuffled padded batches of text, against padding the same rows in RAM."""
    store, rows = stores.make(folder / "ragged.zarr", examples=4096, tokens=64, width=384, layers=2, ragged=True)
    first = store.layers[0]

    def index(turn: int) -> np.ndarray:
        return np.random.default_rng(turn).permutation(4096)[:BATCH].astype(np.int64)

    found = interleaved(
        {
            "ours": lambda turn: store.read(index(turn), [first]),
            "both": lambda turn: store.read(index(turn), store.layers),
            "ram": lambda turn: pad_sequence([rows[first][i] for i in index(turn)], batch_first=True),
        },
        rounds=31,
    )
    show(
        f"reading ragged text, batches of {BATCH}, up to 64 tokens of 384",
        [
            ("RAM padding / ours", f"{found['ram'] / found['ours']:.2f}", "goal 0.6"),
            ("one layer of two / both", f"{found['ours'] / found['both']:.2f}", "its share: 0.5"),
        ],
    )


def writing(folder: Path) -> None:
    """The writer alone, checksums included, against a raw sequential write with fsync."""
    payload = np.random.default_rng(0).standard_normal((512, 197, 768), dtype=np.float32).astype(np.float16)

    def raw(turn: int) -> None:
        with open(folder / "raw", "wb", buffering=0) as file:
            file.write(payload.data)
            os.fsync(file.fileno())

    def ours(turn: int) -> None:
        stores.write(folder / f"w{turn}.zarr", payload)

    found = interleaved({"raw": raw, "ours": ours}, rounds=5)
    show("writing 155 MB", [("raw write with fsync / ours", f"{found['raw'] / found['ours']:.2f}", "goal 0.5")])


def growth(folder: Path) -> None:
    """How bytes and time grow with examples, layers and tokens; resident memory of reading."""
    base = {"examples": 256, "tokens": 64, "width": 384, "layers": 2}
    sizes, seconds = {}, {}
    for name, change in {
        "base": {},
        "examples": {"examples": 512},
        "layers": {"layers": 4},
        "tokens": {"tokens": 128},
    }.items():
        where = folder / f"growth-{name}.zarr"
        store, _ = stores.make(where, **{**base, **change})
        sizes[name] = store.manifest.stored_bytes
        order = np.random.default_rng(0).permutation(len(store)).astype(np.int64)

        def epoch(turn: int, store: ZarrStore = store, order: np.ndarray = order) -> None:
            for start in range(0, len(order), BATCH):
                store.read(order[start : start + BATCH], store.layers)

        seconds[name] = interleaved({"epoch": epoch}, rounds=9)["epoch"]
    show(
        "doubling one axis",
        [
            (name, f"{sizes[name] / sizes['base']:.2f} x bytes", f"{seconds[name] / seconds['base']:.2f} x time")
            for name in ("examples", "layers", "tokens")
        ],
    )


def checking(folder: Path) -> None:
    """What verifying each chunk at first touch costs: an epoch of a store just opened, against a later one."""
    store, _ = stores.make(folder / "checked.zarr", examples=2048, tokens=64, width=768)
    order = np.random.default_rng(0).permutation(len(store)).astype(np.int64)

    def epoch(opened: ZarrStore) -> None:
        for start in range(0, len(order), BATCH):
            opened.read(order[start : start + BATCH], opened.layers)

    found = interleaved(
        {"first": lambda turn: epoch(ZarrStore(store.folder)), "later": lambda turn: epoch(store)}, rounds=7
    )
    show(
        "an epoch of 201 MB, shuffled",
        [("first, with checksums / later", f"{found['first'] / found['later']:.2f}", "")],
    )


def resident(folder: Path) -> None:
    """Anonymous resident memory that reading many batches adds, in batches."""
    from sidebench.bench.host_memory import HostMeter

    store, _ = stores.make(folder / "resident.zarr", examples=2048, tokens=64, width=768)
    order = np.random.default_rng(0).permutation(len(store)).astype(np.int64)
    batch_bytes = BATCH * 64 * 768 * 2
    with HostMeter() as meter:
        for start in range(0, len(order), BATCH):
            store.read(order[start : start + BATCH], store.layers)
    peak = meter.result().peak_anonymous_bytes
    show("memory of reading", [("anonymous growth / one batch", f"{(peak or 0) / batch_bytes:.2f}", "goal below 3")])


def main() -> None:
    """Run everything."""
    with tempfile.TemporaryDirectory(prefix="sidebench-bench-") as name:
        folder = Path(name)
        begun = time.monotonic()
        cores = torch.get_num_threads()
        torch.set_num_threads(1)  # one thread reads; a gather on all cores is no fair limit beside a training thread
        for benchmark in (reading_dense, reading_ragged, writing, growth, checking, resident):
            benchmark(folder)
        lean.side_networks()
        torch.set_num_threads(cores)
        training.building(folder)
        training.epoch(folder)
        forms.forms(folder)
        print(f"\n{time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
