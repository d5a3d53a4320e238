"""HDF5 both ways: an exported store comes back byte for byte, features from elsewhere become a store to compare on."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from outcomes import spawning, write_texts
from typer.testing import CliRunner

from sidebench.bench import launch as launching
from sidebench.bench.compare import compare
from sidebench.bench.importing import import_hdf5
from sidebench.bench.outcome import Outcome, Request
from sidebench.bench.prepare import Inputs, only_tower, plan_store, prepare
from sidebench.bench.report import markdown
from sidebench.bench.table import comparisons
from sidebench.bench.table import rows as table_rows
from sidebench.cache import features as importing
from sidebench.cache import layout
from sidebench.cache.backbone import Backbone
from sidebench.cache.build import BuildResult, CaptureOptions
from sidebench.cache.errors import SidebenchError
from sidebench.cache.export import export_store
from sidebench.cache.feature_file import describe, natural
from sidebench.cache.features import ImportOptions, import_features
from sidebench.cache.hdf5 import opened
from sidebench.cache.manifest import read_manifest
from sidebench.cache.zarr_store import ZarrStore
from sidebench.cli import app

EXAMPLES = 60
Write = Callable[..., Path]
Import = Callable[..., BuildResult]


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """The least chunk, 64 rows, so that a toy store has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_BYTES", 1)
        yield


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Backbone, tiny_vit: Backbone) -> dict[Any, Path]:
    folder = tmp_path_factory.mktemp("stores")
    made = {}
    for dtype in ("float16", "bfloat16", "float32"):
        made["text", dtype] = toys.build_store(tiny_bert, toys.make_texts(100), folder, dtype=dtype).folder
        made["image", dtype] = toys.build_store(tiny_vit, toys.make_images(70), folder, dtype=dtype).folder
    return made


@pytest.fixture(scope="module")
def exported(stores: dict[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "store.h5"
    export_store(stores["text", "bfloat16"], path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imports")
    write_texts(folder / "reviews.jsonl", EXAMPLES)
    return folder


@pytest.fixture
def task(place: Path) -> str:
    return f"jsonl:{place / 'reviews.jsonl'}"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of these datasets."""

    def make(name: str = "features.h5", **arrays: Any) -> Path:
        with h5py.File(tmp_path / name, "w") as file:
            for key, value in arrays.items():
                file[key.replace("__", "/")] = value
        return tmp_path / name

    return make


@pytest.fixture
def bring(task: str, tmp_path: Path) -> Import:
    """Imports a file for the toy task."""

    def run(path: Path, said: list[str] | None = None, **changes: Any) -> BuildResult:
        cache_dir = changes.pop("cache_dir", tmp_path / "caches")
        uri = changes.pop("task", task)
        options = ImportOptions(**{"name": "mine", **changes})
        say = [] if said is None else said
        return import_hdf5(
            path, uri, options, home=tmp_path, cache_dir=cache_dir, progress=lambda *_: None, say=say.append
        )

    return run


def _draw(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def _everything(store: ZarrStore, layer: str) -> torch.Tensor:
    return store.read(np.arange(len(store)), [layer]).layers[layer]


# A store, out and back


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_store_comes_back_byte_for_byte(
    stores: dict[Any, Path], modality: str, dtype: str, tmp_path: Path, bring: Import
) -> None:
    store = stores[modality, dtype]
    size = export_store(store, tmp_path / "out.h5")
    assert size == (tmp_path / "out.h5").stat().st_size
    assert not (tmp_path / "out.h5.partial").exists()
    back = bring(tmp_path / "out.h5", task=None, name=None)
    assert back.status == "imported"
    assert back.folder.name == store.name
    without = ("notes.json",)
    assert toys.files_of(back.folder, without=without) == toys.files_of(store, without=without)
    assert json.loads((back.folder / "notes.json").read_text())["backbone"] == "toy"
    assert bring(tmp_path / "out.h5", task=None, name=None).status == "exists"


def test_an_export_holds_every_array_for_anybody_to_read(stores: dict[Any, Path], exported: Path) -> None:
    store = ZarrStore(stores["text", "bfloat16"])
    with h5py.File(exported) as file:
        for path, array in store.manifest.arrays().items():
            assert file[path].shape == array.shape
            assert file[path].attrs["sidebench_dtype"] == array.dtype
        rows = torch.from_numpy(file["layers/blocks.0"][:]).view(torch.bfloat16)
        assert file["layers/blocks.0"].dtype == np.uint16
        offsets = file["offsets"][:]
        assert file["ids"].asstr()[:].tolist() == list(store.ids)
        assert json.loads(file.attrs["sidebench_manifest"])["digest"] == store.manifest.digest
    first = store.read(np.array([0]), ["blocks.0"]).layers["blocks.0"][0]
    assert torch.equal(rows[: offsets[1]], first)


def test_ids_that_hdf5_cannot_spell_come_back_too(tiny_bert: Backbone, tmp_path: Path, bring: Import) -> None:
    names = ("a\0b", "half \udc80", "é", *map(str, range(9)))

    class Odd(toys.ToyExamples):
        @property
        def ids(self) -> tuple[str, ...]:
            return names

        @property
        def content_sha256(self) -> str:
            return "0" * 64

    examples = toys.make_texts(12)
    store = toys.build_store(tiny_bert, Odd("text", examples.raw, examples.targets), tmp_path / "stores")
    export_store(store.folder, tmp_path / "out.h5")
    assert ZarrStore(bring(tmp_path / "out.h5", task=None).folder).ids == names


def test_an_export_does_not_hold_a_layer_in_memory(stores: dict[Any, Path], tmp_path: Path) -> None:
    import tracemalloc

    store = stores["image", "float32"]
    largest = max(array.stored_bytes for array in read_manifest(store)[0].arrays().values())
    export_store(store, tmp_path / "warm.h5")
    written: list[int] = []
    tracemalloc.start()
    try:
        export_store(store, tmp_path / "out.h5", progress=lambda *_: written.append(tracemalloc.get_traced_memory()[0]))
    finally:
        tracemalloc.stop()
    assert len(written) > 6
    assert max(written) - min(written) < largest


def test_a_file_is_replaced_only_by_force(stores: dict[Any, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    out.write_text("precious")
    with pytest.raises(SidebenchError, match="there already; --force"):
        export_store(stores["text", "float16"], out)
    assert out.read_text() == "precious"
    export_store(stores["text", "float16"], out, force=True)
    assert h5py.is_hdf5(out)
    for target, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "out.h5", "make it first")):
        with pytest.raises(SidebenchError, match=words):
            export_store(stores["text", "float16"], target, force=True)


def test_an_export_that_fails_leaves_nothing(
    stores: dict[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.h5"
    copy = tmp_path / "copy.zarr"
    shutil.copytree(stores["text", "float16"], copy)
    chunk = copy / "layers" / "blocks.1" / "c" / "0" / "0"
    payload = bytearray(chunk.read_bytes())
    payload[5] ^= 1
    chunk.write_bytes(payload)
    with pytest.raises(SidebenchError, match=r"layers/blocks\.1/c/0/0: its length or checksum"):
        export_store(copy, out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    with pytest.raises(SidebenchError, match="has 5 free"):
        export_store(stores["text", "float16"], out)
    monkeypatch.undo()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_store(stores["text", "float16"], out, progress=interrupt)
    monkeypatch.setattr(os, "replace", _raise(OSError(28, "No space left on device")))
    with pytest.raises(SidebenchError, match="No space left"):
        export_store(stores["text", "float16"], out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.zarr"]


def _raise(error: Exception) -> Callable[..., Any]:
    def run(*_: Any, **__: Any) -> Any:
        raise error

    return run


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f["layers/blocks.0"].__setitem__((7, 3), 1), "layers/blocks.0, rows 0 to 64, are not what"),
        (lambda f: f["targets"].__setitem__(0, 1 - f["targets"][0]), "targets, rows 0 to 64"),
        (lambda f: f["ids_json"].__setitem__(3, 65), "its ids are not what was exported"),
        (lambda f: f.__delitem__("pooled/blocks.1"), "its manifest names pooled/blocks.1"),
        (lambda f: f["offsets"].attrs.__setitem__("sidebench_dtype", "int32"), "its manifest implies"),
        (lambda f: f.attrs.__setitem__("sidebench_manifest", "{}"), "is no manifest of format"),
        (lambda f: f.attrs.__setitem__("sidebench_manifest", 3), "is no manifest of format"),
        (lambda f: f.__setitem__("more", h5py.ExternalLink("/etc/passwd", "/")), "more is an external link"),
    ],
)
def test_an_altered_export_is_refused(
    exported: Path, tmp_path: Path, bring: Import, change: Callable[[Any], Any], words: str
) -> None:
    copy = tmp_path / "copy.h5"
    shutil.copy(exported, copy)
    with h5py.File(copy, "r+") as file:
        change(file)
    with pytest.raises(SidebenchError, match=words):
        bring(copy, task=None)
    caches = tmp_path / "caches"
    assert not [p for p in caches.glob("*.zarr")]


def test_an_export_of_other_data_than_the_task_s_is_refused(exported: Path, bring: Import) -> None:
    with pytest.raises(SidebenchError, match=r"other data \(100 examples\)"):
        bring(exported)


# Features from elsewhere


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_dense_features_are_stored_as_they_are(write: Write, bring: Import, dtype: Any) -> None:
    a, b = _draw(EXAMPLES, 5, 8, dtype=dtype), _draw(EXAMPLES, 5, 6, dtype=dtype, seed=1)
    said: list[str] = []
    result = bring(write(net__layer10=b, net__layer2=a), said)
    store = ZarrStore(result.folder)
    stored = torch.float16 if dtype is np.float16 else torch.float32
    assert store.layers == store.architecture.states == ("embeddings", "blocks.0")
    assert store.architecture.final_layer == "blocks.0"
    assert (store.architecture.width, store.architecture.heads) == (6, None)
    assert result.manifest.backbone["keys"] == ["net.layer2", "net.layer10"]
    for layer, array in (("embeddings", a), ("blocks.0", b)):
        wanted = torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).to(stored)
        assert torch.equal(_everything(store, layer), wanted)
        pooled = store.pooled(layer).float()
        assert torch.equal(pooled[:, 0], wanted[:, 0].float())
        torch.testing.assert_close(pooled[:, 1], wanted.float().mean(1), atol=2e-3, rtol=2e-3)
    assert any("float64 is stored as float32" in line for line in said) == (dtype is np.float64)
    assert store.verify() == []


def test_vectors_are_one_token_each_and_mixed_dtypes_become_float32(write: Write, bring: Import) -> None:
    said: list[str] = []
    half, full = _draw(EXAMPLES, 8, dtype=np.float16), _draw(EXAMPLES, 8, seed=1)
    store = ZarrStore(bring(write(a=half, b=full, labels=np.arange(EXAMPLES)), said).folder)
    assert torch.equal(_everything(store, "embeddings")[:, 0], torch.from_numpy(half).float())
    assert store.manifest.form.dtype == "float32"
    assert any("differ in dtype" in line for line in said)
    assert any("left out" in line and "labels" in line for line in said)


def test_prefix_tokens_stay_out_of_the_mean(write: Write, bring: Import) -> None:
    array = _draw(EXAMPLES, 4, 8)
    store = ZarrStore(bring(write(a=array), prefix_tokens=1).folder)
    torch.testing.assert_close(store.pooled("embeddings")[:, 1], torch.from_numpy(array[:, 1:].mean(1)))
    with pytest.raises(SidebenchError, match="--prefix-tokens 4 leaves none of the 4"):
        bring(write(a=array), prefix_tokens=4)


def test_rows_follow_the_ids_whatever_their_order(write: Write, bring: Import) -> None:
    order = np.random.default_rng(3).permutation(EXAMPLES)
    names = [f"example-{i}" for i in range(EXAMPLES)]
    array = _draw(EXAMPLES, 3, 8)
    plain = bring(write("plain.h5", a=array))
    mixed = bring(write("mixed.h5", a=array[order], ids=[names[i] for i in order]))
    assert plain.manifest.digest == mixed.manifest.digest  # contents decide, neither path nor order of the file
    assert (plain.status, mixed.status) == ("imported", "exists")
    fixed = write("fixed.h5", a=array[order] + 1, ids=np.array([names[i].encode() for i in order]))
    assert torch.equal(_everything(ZarrStore(bring(fixed).folder), "embeddings"), torch.from_numpy(array + 1))


def test_compression_and_chunks_do_not_change_the_digest(write: Write, bring: Import, tmp_path: Path) -> None:
    array = _draw(EXAMPLES, 3, 8)
    plain = bring(write("plain.h5", a=array))
    with h5py.File(tmp_path / "packed.h5", "w") as file:
        file.create_dataset("a", data=array, chunks=(7, 2, 8), compression="gzip", shuffle=True, fletcher32=True)
    assert bring(tmp_path / "packed.h5").manifest.digest == plain.manifest.digest
    assert bring(write("more.h5", a=array * 2)).manifest.digest != plain.manifest.digest
    assert bring(write("plain.h5", a=array), name="other").manifest.digest != plain.manifest.digest


def test_layers_are_those_asked_for_in_that_order(write: Write, bring: Import) -> None:
    path = write(a=_draw(EXAMPLES, 8), b__c=_draw(EXAMPLES, 8, seed=1), z=_draw(EXAMPLES, 3, 8))
    assert bring(path, layers=("b/c", "a")).manifest.backbone["keys"] == ["b.c", "a"]
    with pytest.raises(SidebenchError, match=r"no layer in .* 'b.d'. Did you mean 'b.c'"):
        bring(path, layers=("b.d",))
    with pytest.raises(SidebenchError, match="each layer once"):
        bring(path, layers=("a", "a"))
    with pytest.raises(SidebenchError, match=r"differ in tokens per example: b.c has 1, z has 3|a has 1, z has 3"):
        bring(path)


def test_natural_order_counts() -> None:
    names = ["layer.10", "layer.2", "embeddings", "layer.2b", "0"]
    assert sorted(names, key=natural) == ["0", "embeddings", "layer.2", "layer.2b", "layer.10"]


@settings(max_examples=25)
@given(data=st.data())
def test_ragged_features_of_any_shape_are_stored_as_they_are(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ragged")
    count = data.draw(st.integers(1, 30))
    lengths = np.array(data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)))
    widths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    order = np.array(data.draw(st.permutations(range(count))))
    half = data.draw(st.booleans())
    arrays = [_draw(int(lengths.sum()), w, dtype=np.float16 if half else np.float32, seed=w) for w in widths]
    examples = toys.make_texts(count)
    with h5py.File(folder / "f.h5", "w") as file:
        file["offsets"] = np.concatenate([[0], np.cumsum(lengths)])
        file["ids"] = [examples.ids[i] for i in order]
        for i, array in enumerate(arrays):
            file[f"l{i}"] = array
    with pytest.MonkeyPatch.context() as patch, opened(folder / "f.h5") as file:
        patch.setattr(importing, "_BLOCK_BYTES", data.draw(st.integers(1, 500)))
        found = describe(file, folder / "f.h5", examples.ids, layers=None, prefix_tokens=0, say=lambda _: None)
        result = import_features(found, examples, ImportOptions("mine"), folder, notes={})
    store = ZarrStore(result.folder)
    starts = np.cumsum(lengths) - lengths
    for i, (layer, array) in enumerate(zip(store.layers, arrays, strict=True)):
        for place, example in enumerate(order):
            read = store.read(np.array([example]), [layer])
            piece = array[starts[place] : starts[place] + lengths[place]]
            assert torch.equal(read.layers[layer][0], torch.from_numpy(piece)), (i, example)
            mean = store.pooled(layer)[example, 1].float()
            torch.testing.assert_close(mean, torch.from_numpy(piece.astype(np.float32).mean(0)), atol=2e-3, rtol=2e-3)


# What is refused


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "'example-41': a value is NaN"), (np.inf, "infinite"), (1e300, "beyond float32")]
)
def test_what_is_not_finite_is_refused_by_layer_and_example(
    write: Write, bring: Import, value: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "_BLOCK_BYTES", 500)
    array = _draw(EXAMPLES, 3, 8, dtype=np.float64)
    array[41, 1, 5] = value
    with pytest.raises(SidebenchError, match=f"layer bad, .*{words}"):
        bring(write(a=_draw(EXAMPLES, 3, 8), bad=array))


IDS = [f"example-{i}" for i in range(EXAMPLES)]
GOOD = _draw(EXAMPLES, 3, 8)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": GOOD[:50]}, "holds 50 examples, the task 60"),
        ({"a": GOOD, "ids": [*IDS[:-1], "x"]}, "1 missing from the file, as 'example-59'; 1 not in the task, as 'x'"),
        ({"a": GOOD, "ids": [*IDS[:-1], IDS[0]]}, "1 twice in the file, as 'example-0'"),
        ({"a": GOOD, "ids": IDS[:-1]}, "ids names 59 examples, the layers hold 60"),
        ({"a": GOOD, "ids": GOOD[:, 0, 0]}, "one string per example"),
        ({"a": GOOD, "ids": np.arange(20_000)}, "ids has 20,000 entries"),
        ({"a": GOOD, "b": GOOD[:, :2]}, "differ in tokens"),
        ({"a": GOOD[:, 0], "b": GOOD[:9, 0]}, "differ in length"),
        ({"a": GOOD, "offsets": np.arange(61)}, r"wanted \(rows, D\) beside offsets"),
        ({"a": GOOD[:, 0], "offsets": np.arange(60)}, "offsets end at 59, a has 60"),
        ({"a": GOOD[:, 0], "offsets": np.zeros(61, int)}, "must begin with 0 and rise"),
        ({"a": GOOD[:, 0], "offsets": GOOD[:, 0]}, "N \\+ 1 whole numbers"),
        ({"a": np.arange(60)}, "holds no layers"),
        ({}, "holds no layers.*found nothing"),
        ({"a": np.zeros((60, 0))}, "none of them 0|is empty"),
        ({"a": ["x"] * 60}, "holds no layers"),
        ({"x__y": GOOD, "x.y": GOOD}, "both be called x.y"),
    ],
)
def test_features_that_do_not_fit_the_task_are_refused(
    write: Write, bring: Import, tmp_path: Path, arrays: dict[str, Any], words: str
) -> None:
    with pytest.raises(SidebenchError, match=words):
        bring(write(**arrays))
    assert not list((tmp_path / "caches").glob("*"))


def _soft(file: Any, folder: Path) -> None:
    file["b"] = h5py.SoftLink("/a")


def _external_link(file: Any, folder: Path) -> None:
    file["b"] = h5py.ExternalLink(str(folder / "other.h5"), "/a")


def _external_storage(file: Any, folder: Path) -> None:
    (folder / "raw").write_bytes(b"\0" * GOOD.nbytes)
    file.create_dataset("b", GOOD.shape, "f4", external=[(str(folder / "raw"), 0, GOOD.nbytes)])


def _virtual(file: Any, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["a"] = GOOD
    made = h5py.VirtualLayout(GOOD.shape, "f4")
    made[:] = h5py.VirtualSource(folder / "other.h5", "a", GOOD.shape)
    file.create_virtual_dataset("b", made)


def _objects(file: Any, folder: Path) -> None:
    file.create_dataset("b", (60,), dtype=h5py.vlen_dtype(np.float32))


def _references(file: Any, folder: Path) -> None:
    file.create_dataset("b", data=[file["a"].ref] * 60, dtype=h5py.ref_dtype)


def _unwritten(file: Any, folder: Path) -> None:
    file.create_dataset("b", GOOD.shape, "f4")


def _half_written(file: Any, folder: Path) -> None:
    file.create_dataset("b", GOOD.shape, "f4", chunks=(10, 3, 8))[:30] = 1


def _huge(file: Any, folder: Path) -> None:
    file.create_dataset("b", (60, 2**24, 2**20), "f4", chunks=(1, 64, 64))


def _huge_chunks(file: Any, folder: Path) -> None:
    file.create_dataset("b", (60, 2**15, 2**14), "f4", chunks=(1, 2**14, 2**14 + 0), compression="gzip")


def _loop(file: Any, folder: Path) -> None:
    file["group/again"] = file


def _empty(file: Any, folder: Path) -> None:
    file["b"] = h5py.Empty("f4")


def _type(file: Any, folder: Path) -> None:
    file["b"] = np.dtype("f4")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_soft, "b is a soft link"),
        (_external_link, "b is an external link"),
        (_external_storage, "b keeps its data in an external file"),
        (_virtual, "b is virtual"),
        (_objects, "b holds objects"),
        (_references, "b holds objects"),
        (_unwritten, "b claims 5,760 bytes and 0 are there"),
        (_half_written, "b has 3 of its 6 chunks"),
        (_huge, "b has 0 of its"),
        (_huge_chunks, "b has 0 of its|chunks of more than"),
        (_loop, "reached twice"),
        (_empty, "b is empty"),
        (_type, "neither a group nor a dataset"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_hostile_file_is_refused_in_a_sentence(
    write: Write, bring: Import, tmp_path: Path, spoil: Callable[[Any, Path], None], words: str
) -> None:
    path = write(a=GOOD)
    with h5py.File(path, "r+") as file:
        spoil(file, tmp_path)
    with pytest.raises(SidebenchError, match=words):
        bring(path)
    assert not list((tmp_path / "caches").glob("*"))


def test_a_plugin_s_filter_is_not_loaded(bring: Import, write: Write) -> None:
    path = write(a=GOOD)
    space = h5py.h5s.create_simple((60, 8))
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((60, 8))
    properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
    with h5py.File(path, "r+") as file:
        h5py.h5d.create(file.id, b"b", h5py.h5t.IEEE_F32LE, space, properties)
    with pytest.raises(SidebenchError, match="plugin filter 32015"):
        bring(path)


@pytest.mark.parametrize("kept", [0, 100, 1000, 0.5, 0.99])
def test_a_truncated_file_is_a_sentence(write: Write, bring: Import, exported: Path, tmp_path: Path, kept: Any) -> None:
    for source in (write(a=GOOD), exported):
        data = source.read_bytes()
        (tmp_path / "cut.h5").write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
        with pytest.raises(SidebenchError, match=r"cannot be read as HDF5: .*(truncated|file)|is no HDF5 file"):
            bring(tmp_path / "cut.h5")


def test_no_file_no_task_no_name(write: Write, bring: Import, tmp_path: Path) -> None:
    with pytest.raises(SidebenchError, match="there is no file"):
        bring(tmp_path / "nothing.h5")
    for changes in ({"task": None}, {"name": None}):
        with pytest.raises(SidebenchError, match="--task, --backbone-name"):
            bring(write(a=GOOD), **changes)
    with pytest.raises(SidebenchError, match="--backbone-name wants letters"):
        bring(write(a=GOOD), name="../x")


# Comparing on imported features


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs happen in this process."""

    monkeypatch.setattr(launching, "spawn", spawning())


def _compare(place: Path, task: str, *methods: str, **changes: Any) -> Outcome:
    inputs = Inputs("imported:mine", task, device="cpu", **changes.pop("inputs", {}))
    quick = {"linear_probe": {"candidates": "2", "max_iterations": "60"}}
    usual = {
        "settings": {name: options for name, options in quick.items() if {name, "all"} & set(methods)},
        "epochs": 1,
        "seeds": (0,),
    }
    request = Request(**{"inputs": inputs, "methods": methods, **usual, **changes})
    return compare(request, home=place, cache_dir=place / "caches", runs_dir=place / "runs")


@pytest.fixture
def features(place: Path, task: str) -> Path:
    """Three layers of which the last knows the label, beside ids."""
    path = place / "features.h5"
    if not path.exists():
        toy = toys.make_texts(EXAMPLES)
        with h5py.File(path, "w") as file:
            for number in (0, 1, 10):
                array = _draw(EXAMPLES, 4, 8, seed=number)
                array[..., 0] += 8.0 * (number == 10) * toy.targets[:, None]
                file[f"hidden/{number}"] = array
            file["ids"] = list(toy.ids)
        options = ImportOptions("mine")
        import_hdf5(
            path,
            task,
            options,
            home=place,
            cache_dir=place / "caches",
            progress=lambda *_: None,
            say=lambda _: None,
        )
    return path


@pytest.mark.usefixtures("here", "features")
def test_methods_are_compared_on_imported_features(place: Path, task: str) -> None:
    outcome = _compare(place, task, "unipt", "linear_probe")
    unipt, probe = table_rows(outcome)
    assert unipt["error"] is probe["error"] is None
    assert probe["score"]["mean"] == 1.0  # the last layer knows
    # D = 8, m = 4, L = 3: L(Dm + m + 2m) + (m² + m + 2m) + (mE + E) + (m + 1), and the head 2(8 + 1)
    assert unipt["trainable_params"] == 3 * (32 + 4 + 8) + (16 + 4 + 8) + (32 + 8) + 5 + 18
    assert probe["cache_bytes"] > 0
    assert outcome.store is not None
    report = markdown(outcome, table_rows(outcome), comparisons(outcome))
    assert "imported from features called hidden.0, hidden.1, hidden.10, made elsewhere" in report
    assert outcome.folder.name.startswith("mine-")


@pytest.mark.usefixtures("here", "features")
def test_methods_that_need_the_network_say_why(place: Path, task: str) -> None:
    for name in ("lora", "full"):
        with pytest.raises(SidebenchError, match=f"{name} cannot run on mine: .*no network behind them"):
            _compare(place, task, name)
    for init in ("magnitude", "random"):
        with pytest.raises(SidebenchError, match="lst cannot run on mine: it copies the backbone's block"):
            _compare(place, task, "lst", settings={"lst": {"init": init}})
    outcome = _compare(place, task, "all")
    probes = {"linear_probe", "attentive_probe", "head2toe"}
    assert set(outcome.records) == {*probes, "unipt", "res_tuning_bypass", "sherl_single_anchor"}
    assert all(record.error is None for records in outcome.records.values() for record in records)
    assert "no network behind them" in outcome.skipped["vpt"]


@pytest.mark.usefixtures("features")
def test_imported_features_are_named_and_of_one_task(place: Path, task: str, tmp_path: Path) -> None:
    inputs = Inputs("imported:mnie", task, device="cpu")
    options: dict[str, Any] = {"home": place, "cache_dir": place / "caches", "say": lambda _: None}
    with pytest.raises(SidebenchError, match=r"no imported features .* 'mnie'\. Did you mean 'mine'"):
        prepare(inputs, **options)
    other = write_texts(tmp_path / "other.jsonl", 30)
    with pytest.raises(SidebenchError, match=r"were imported for jsonl:.*\(60 examples\), not for the data"):
        prepare(dataclasses.replace(inputs, backbone="imported:mine", task=other), **options)
    with pytest.raises(SidebenchError, match="--image-size and --max-length"):
        prepare(dataclasses.replace(inputs, backbone="imported:mine", max_length=9), **options)
    prepared = prepare(dataclasses.replace(inputs, backbone="imported:mine"), **options)
    with pytest.raises(SidebenchError, match="no network behind it"):
        plan_store(only_tower(prepared), CaptureOptions())
    with pytest.raises(SidebenchError, match="are chosen when features are made"):
        _compare(place, task, "unipt", capture=CaptureOptions(("blocks.0",)))


def test_two_imports_of_one_name_and_task_are_told_apart(write: Write, bring: Import, task: str, place: Path) -> None:
    caches = bring(write(a=GOOD)).folder.parent
    bring(write(a=GOOD + 1))
    with pytest.raises(SidebenchError, match="2 caches hold features called 'mine'"):
        prepare(Inputs("imported:mine", task, device="cpu"), home=place, cache_dir=caches, say=lambda _: None)


def test_imported_features_go_out_and_back_as_any_store(write: Write, bring: Import, tmp_path: Path) -> None:
    made = bring(write(a=GOOD, b=GOOD + 1))
    export_store(made.folder, tmp_path / "out.h5")
    back = bring(tmp_path / "out.h5", cache_dir=tmp_path / "elsewhere")
    without = ("notes.json",)
    assert toys.files_of(back.folder, without=without) == toys.files_of(made.folder, without=without)


def test_the_commands_go_there_and_back(
    write: Write, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDEBENCH_HOME", str(tmp_path / "home"))

    def bench(*words: str) -> Any:
        return CliRunner().invoke(app, ["cache", *words])

    path = str(write(b=GOOD, a=GOOD))
    made = json.loads(bench("import", path, "--task", task, "--backbone-name", "mine", "--json").stdout)
    assert (made["status"], made["examples"], made["keys"]) == ("imported", EXAMPLES, ["a", "b"])
    assert made["layers"] == ["embeddings", "blocks.0"]
    again = json.loads(
        bench("import", path, "--task", task, "--backbone-name", "mine", "--layers", "b", "--json").stdout
    )
    assert (again["keys"], again["digest"] == made["digest"]) == (["b"], False)
    out = str(tmp_path / "out.h5")
    sent = json.loads(bench("export", made["digest"], "--to", out, "--json").stdout)
    assert (sent["file"], sent["bytes"]) == (out, Path(out).stat().st_size)
    refused = bench("export", made["digest"], "--to", out)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "--force" in refused.stderr
    assert bench("export", made["digest"], "--to", out, "--force", "--quiet").exit_code == 0
    assert bench("rm", made["digest"], "--yes").exit_code == 0
    assert json.loads(bench("import", out, "--json").stdout)["digest"] == made["digest"]
    for words in (("import", path), ("build", "--backbone", "imported:mine", "--task", task)):
        refused = bench(*words)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert refused.stderr.splitlines()[-1].startswith("error: ")
