"""The format as docs/format.md states it: a reader written from that page alone, and two other zarr libraries."""

import hashlib
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import toys
import zarr
from google_crc32c import value as crc32c

from sidebench.cache import layout
from sidebench.cache.backbone import Backbone
from sidebench.cache.build import CaptureOptions, build, plan
from sidebench.cache.manifest import canonical_json
from sidebench.cache.zarr_store import ZarrStore

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "format.md").read_text("utf-8")
EXAMPLES, BATCH = 150, 24
NUMPY = {"float16": "<f2", "float32": "<f4", "bfloat16": "<u2", "int64": "<i8"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 1)


def _block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```\w*\n(.*?)\n```", PAGE, re.DOTALL)
    assert found
    return found[1]


def test_the_worked_example_of_the_digest_is_right() -> None:
    assert canonical_json(json.loads(_block("canonical"))) == _block("spelled")
    assert hashlib.sha256(_block("spelled").encode()).hexdigest() == _block("digest")


def test_the_numbers_of_the_page_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert f"row_bytes / {layout.CHUNK_BYTES})" in PAGE
    assert f"/ {layout.ROWS_MULTIPLE}) * {layout.ROWS_MULTIPLE}" in PAGE
    assert str(layout._BFLOAT16_NAN) in PAGE
    assert crc32c(b"123456789") == 0xE3069283
    for rows in (1, 64, 65, 800, 5_000, 123_457):
        array = layout.ArrayLayout((rows, 197, 768), "float16", ("item", "token", "width"))
        chunks = max(round(rows * 197 * 768 * 2 / 16_000_000), 1)
        assert array.chunk_rows == math.ceil(rows / chunks / 64) * 64


@pytest.fixture(params=[(m, d) for m in ("text", "image") for d in ("float16", "bfloat16", "float32")], ids="-".join)
def store(request: pytest.FixtureRequest, tiny_bert: Backbone, tiny_vit: Backbone, tmp_path: Path) -> Any:
    """A store, and what the backbone yields for it: per layer (N, T, D), or (R, D) of the real tokens."""
    import torch

    modality, dtype = request.param
    backbone = tiny_bert if modality == "text" else tiny_vit
    examples = toys.make_texts(EXAMPLES) if modality == "text" else toys.make_images(EXAMPLES)
    result = build(plan(backbone, examples, CaptureOptions(None, dtype, BATCH)), tmp_path, notes={})
    prepared = toys.prepare(backbone, examples)
    kept: dict[str, list[Any]] = {}
    for start in range(0, EXAMPLES, BATCH):
        inputs, mask = backbone.preprocess.collate(prepared[start : start + BATCH])
        for layer, rows in backbone.capture(inputs, backbone.layers).items():
            kept.setdefault(layer, []).append((rows if mask is None else rows[mask]).to(getattr(torch, dtype)))
    captured = {name: torch.cat(rows) for name, rows in kept.items()}
    if dtype == "bfloat16":
        captured = {name: rows.view(torch.uint16) for name, rows in captured.items()}
    return result.folder, {name: rows.numpy() for name, rows in captured.items()}, examples


def test_tensorstore_reads_every_array_equal_to_what_was_captured(store: Any) -> None:
    folder, captured, examples = store

    def read(path: str) -> Any:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / path}/"}}
        return tensorstore.open(spec, open=True, read=True).result().read().result()

    for layer, rows in captured.items():
        assert np.array_equal(read(f"layers/{layer}"), rows)
        assert np.array_equal(read(f"pooled/{layer}"), zarr.open_group(folder, mode="r")[f"pooled/{layer}"][:])
    assert np.array_equal(read("targets"), examples.targets)


def test_zarr_python_reads_every_array_equal_to_what_was_captured(store: Any) -> None:
    folder, captured, examples = store
    group = zarr.open_group(folder, mode="r")
    for layer, rows in captured.items():
        assert np.array_equal(group[f"layers/{layer}"][:], rows)
    assert np.array_equal(group["targets"][:], examples.targets)


def test_a_reader_written_from_the_page_reads_every_array_and_knows_every_file(store: Any) -> None:
    """json, struct and a checksum; no zarr library and nothing of ours."""
    folder, captured, examples = store
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = manifest["facts"]
    spelled = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert hashlib.sha256(spelled.encode()).hexdigest() == manifest["digest"]
    assert folder.name == manifest["digest"][:16] + ".zarr"
    examples_count, rows = facts["dataset"]["examples"], facts["rows"]
    arrays = {"targets": ((examples_count,), "int64")}
    for spec in facts["specs"]:
        tokens, width = spec["tokens"], spec["width"]
        shape = (rows, width) if tokens is None else (examples_count, tokens, width)
        arrays[f"layers/{spec['layer']}"] = (shape, facts["form"]["dtype"])
        arrays[f"pooled/{spec['layer']}"] = ((examples_count, 2, width), facts["form"]["dtype"])
    if facts["specs"][0]["tokens"] is None:
        arrays["offsets"] = ((examples_count + 1,), "int64")
    implied = {"zarr.json", "layers/zarr.json", "pooled/zarr.json", "ids.json"}
    values = {}
    for path, (shape, dtype) in arrays.items():
        chunk_rows = json.loads((folder / path / "zarr.json").read_text())["chunk_grid"]["configuration"][
            "chunk_shape"
        ][0]
        pieces = []
        for chunk in range(math.ceil(shape[0] / chunk_rows)):
            key = "/".join([path, "c", str(chunk), *["0"] * (len(shape) - 1)])
            data = (folder / key).read_bytes()
            length, stated = manifest["objects"][key]
            assert (len(data), crc32c(data[:-4]), struct.unpack("<I", data[-4:])[0]) == (length, stated, stated)
            pieces.append(np.frombuffer(data[:-4], NUMPY[dtype]).reshape(chunk_rows, *shape[1:]))
            implied.add(key)
        implied.add(f"{path}/zarr.json")
        values[path] = np.concatenate(pieces)[: shape[0]]
    assert implied == set(manifest["objects"]) == set(toys.files_of(folder)) - {"manifest.json", "notes.json"}
    assert all(np.array_equal(values[f"layers/{layer}"], wanted) for layer, wanted in captured.items())
    assert json.loads((folder / "ids.json").read_text("ascii")) == list(examples.ids)
    if "offsets" in values:
        assert np.array_equal(np.diff(values["offsets"]), ZarrStore(folder).lengths())
