"""Stores: one contract for all of them, bytes that any zarr library reads, and damage that never passes unseen."""

import copy
import dataclasses
import hashlib
import json
import shutil
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import toys
import zarr
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sidebench.cache import layout
from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone
from sidebench.cache.build import CaptureOptions, plan
from sidebench.cache.errors import SidebenchError
from sidebench.cache.form import Form
from sidebench.cache.layout import ArrayLayout
from sidebench.cache.manifest import ActivationSpec, Manifest, canonical_json, read_manifest
from sidebench.cache.store import LiveStore, Store
from sidebench.cache.zarr_store import ZarrStore

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
KINDS = [(modality, dtype) for modality in ("text", "image") for dtype in DTYPES]
EXAMPLES = 150
BATCH = 16


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """The least chunk, 64 rows, so that a toy store has many: a layout follows from its facts and this constant."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_BYTES", 1)
        yield


@dataclass(frozen=True)
class Toy:
    """A backbone, its examples, a store of them, and what the store must hold: per layer one (T_i, D) per example."""

    backbone: Backbone
    examples: toys.ToyExamples
    folder: Path
    wanted: dict[str, list[Tensor]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Backbone, tiny_vit: Backbone) -> dict[Any, Toy]:
    cache_dir = tmp_path_factory.mktemp("cache")
    made = {}
    for modality, dtype in KINDS:
        backbone = tiny_bert if modality == "text" else tiny_vit
        examples = toys.make_texts(EXAMPLES) if modality == "text" else toys.make_images(EXAMPLES)
        result = toys.build_store(backbone, examples, cache_dir, dtype=dtype, batch_size=BATCH)
        wanted: dict[str, list[Tensor]] = {layer: [] for layer in backbone.layers}
        prepared = toys.prepare(backbone, examples)
        for start in range(0, EXAMPLES, BATCH):
            inputs, mask = backbone.preprocess.collate(prepared[start : start + BATCH])
            for layer, value in backbone.capture(inputs, backbone.layers).items():
                rows = list(value) if mask is None else [v[m] for v, m in zip(value, mask, strict=True)]
                wanted[layer].extend(row.to(DTYPES[dtype]) for row in rows)
        made[modality, dtype] = Toy(backbone, examples, result.folder, wanted)
    return made


@pytest.fixture
def toy(built: dict[Any, Toy], tmp_path: Path) -> Toy:
    """A copy of the float16 text store, to be damaged."""
    return _copied(built["text", "float16"], tmp_path)


def _copied(toy: Toy, folder: Path) -> Toy:
    target = folder / toy.folder.name
    shutil.copytree(toy.folder, target)
    return dataclasses.replace(toy, folder=target)


def _index(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


class StoreContract:
    """What holds for every Store. A subclass gives `store`, and `wanted`: per layer one (T_i, D) tensor per example."""

    tolerance: ClassVar[float] = 0.0

    def test_it_knows_its_length_layers_and_backbone(self, store: Store, wanted: dict[str, list[Tensor]]) -> None:
        assert len(store) == EXAMPLES
        assert store.layers == tuple(wanted)
        assert store.architecture.width == toys.WIDTH

    def test_it_gives_every_example_as_captured_in_the_order_asked_for(
        self, store: Store, wanted: dict[str, list[Tensor]]
    ) -> None:
        order = np.random.default_rng(0).permutation(EXAMPLES)
        for start in range(0, EXAMPLES, 32):
            index = order[start : start + 32]
            self._check(store, index, wanted, store.layers)

    def test_it_repeats_what_is_asked_for_twice(self, store: Store, wanted: dict[str, list[Tensor]]) -> None:
        self._check(store, _index(3, 149, 3, 3, 0), wanted, store.layers)

    def test_it_gives_only_the_layers_asked_for_in_that_order(
        self, store: Store, wanted: dict[str, list[Tensor]]
    ) -> None:
        self._check(store, _index(1, 2), wanted, ("blocks.1", "embeddings"))

    def test_a_batch_is_the_caller_s_to_change(self, store: Store, wanted: dict[str, list[Tensor]]) -> None:
        for value in store.read(_index(5, 6), store.layers).layers.values():
            value.zero_()
        self._check(store, _index(5, 6), wanted, store.layers)

    def test_an_unknown_layer_suggests_the_nearest(self, store: Store) -> None:
        with pytest.raises(SidebenchError, match=r"no layer in this store 'block\.1'\. Did you mean 'blocks\.1'\?"):
            store.read(_index(0), ["block.1"])

    def test_no_layer_is_refused(self, store: Store) -> None:
        with pytest.raises(SidebenchError, match="no layer was asked for"):
            store.read(_index(0), [])

    @pytest.mark.parametrize("index", [(-1,), (EXAMPLES,), (0, 10**9), ()])
    def test_an_index_outside_is_refused(self, store: Store, index: tuple[int, ...]) -> None:
        with pytest.raises(IndexError):
            store.read(_index(*index), store.layers)

    def test_threads_may_read_at_once(self, store: Store, wanted: dict[str, list[Tensor]]) -> None:
        errors: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                for index in np.random.default_rng(seed).integers(0, EXAMPLES, (10, 8)):
                    self._check(store, index, wanted, store.layers[-1:])
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors

    def _check(self, store: Store, index: Any, wanted: dict[str, list[Tensor]], layers: tuple[str, ...]) -> None:
        found = store.read(index, layers)
        assert tuple(found.layers) == layers
        lengths = [len(wanted[layers[0]][i]) for i in index]
        assert found.mask.dtype is torch.bool
        assert found.mask.tolist() == [[t < length for t in range(max(lengths))] for length in lengths]
        for layer in layers:
            value = found.layers[layer]
            assert value.shape == (len(index), max(lengths), toys.WIDTH)
            assert value.dtype is wanted[layer][0].dtype
            for row, i in enumerate(index):
                torch.testing.assert_close(
                    value[row, : lengths[row]], wanted[layer][i], rtol=self.tolerance, atol=self.tolerance
                )
                assert not value[row, lengths[row] :].any(), "padding is zero"


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
class TestZarrStore(StoreContract):
    @pytest.fixture
    def wanted(self, built: dict[Any, Toy], kind: Any) -> dict[str, list[Tensor]]:
        return built[kind].wanted

    @pytest.fixture
    def store(self, built: dict[Any, Toy], kind: Any) -> Store:
        return ZarrStore(built[kind].folder)

    def test_it_spans_many_chunks(self, store: ZarrStore) -> None:
        assert store.manifest.arrays()["layers/blocks.0"].chunks >= 3

    def test_it_is_whole(self, store: ZarrStore) -> None:
        assert store.verify() == []

    def test_it_holds_ids_targets_and_lengths(self, store: ZarrStore, built: dict[Any, Toy], kind: Any) -> None:
        examples = built[kind].examples
        assert store.ids == examples.ids
        assert store.targets.tolist() == examples.targets.tolist()
        assert store.lengths().tolist() == [len(rows) for rows in built[kind].wanted["blocks.0"]]

    def test_its_pooled_rows_are_the_first_token_and_the_mean_without_prefix(
        self, store: ZarrStore, wanted: dict[str, list[Tensor]]
    ) -> None:
        prefix = store.architecture.prefix_tokens
        for layer in store.layers:
            pooled = store.pooled(layer)
            mean = torch.stack([rows[prefix:].double().mean(0) for rows in wanted[layer]])
            first = torch.stack([rows[0] for rows in wanted[layer]])
            assert pooled.shape == (EXAMPLES, 2, toys.WIDTH)
            assert torch.equal(pooled[:, 0], first)
            eps = max(torch.finfo(pooled.dtype).eps, 1e-6)  # float32 sums in float32
            torch.testing.assert_close(pooled[:, 1].double(), mean, rtol=eps, atol=eps)

    def test_zarr_python_reads_every_array_equal(
        self, store: ZarrStore, wanted: dict[str, list[Tensor]], kind: Any
    ) -> None:
        group = zarr.open_group(store.folder, mode="r")
        offsets = np.concatenate([[0], np.cumsum(store.lengths())])
        for layer in store.layers:
            array = group[f"layers/{layer}"]
            rows = array[:]
            if kind[1] == "bfloat16":
                assert array.attrs["sidebench_dtype"] == "bfloat16"
                assert rows.dtype == np.uint16
            found = torch.from_numpy(rows).view(DTYPES[kind[1]])
            if kind[0] == "text":
                assert torch.equal(found, torch.cat(wanted[layer]))
            else:
                assert torch.equal(found, torch.stack(wanted[layer]))
            pooled = torch.from_numpy(group[f"pooled/{layer}"][:]).view(DTYPES[kind[1]])
            assert torch.equal(pooled, store.pooled(layer))
        assert group["targets"][:].tolist() == store.targets.tolist()
        if kind[0] == "text":
            assert group["offsets"][:].tolist() == offsets.tolist()

    def test_its_metadata_is_what_the_format_promises(self, store: ZarrStore, kind: Any) -> None:
        array = zarr.open_group(store.folder, mode="r")["layers/blocks.0"]
        assert array.chunks == (64, *array.shape[1:])
        assert [type(codec).__name__ for codec in array.metadata.codecs] == ["BytesCodec", "Crc32cCodec"]
        assert array.metadata.dimension_names == (
            ("token", "width") if kind[0] == "text" else ("item", "token", "width")
        )
        fill = np.array([array.metadata.fill_value])
        assert torch.from_numpy(fill).view(DTYPES[kind[1]]).isnan().all()

    def test_a_chunk_object_is_the_raw_array_and_four_bytes(self, store: ZarrStore) -> None:
        first = next(p for p in sorted((store.folder / "layers" / "blocks.0" / "c").rglob("*")) if p.is_file())
        shape = store.manifest.arrays()["layers/blocks.0"].chunk_shape
        raw = np.frombuffer(first.read_bytes()[:-4], dtype=store.manifest.arrays()["layers/blocks.0"].numpy_dtype)
        wanted = zarr.open_group(store.folder, mode="r")["layers/blocks.0"][: shape[0]]
        assert np.array_equal(raw.reshape(shape), wanted)


@pytest.mark.parametrize("kind", [("text", "float16"), ("image", "float32")], ids="-".join)
class TestMemoryStore(StoreContract):
    @pytest.fixture
    def wanted(self, built: dict[Any, Toy], kind: Any) -> dict[str, list[Tensor]]:
        return built[kind].wanted

    @pytest.fixture
    def store(self, built: dict[Any, Toy], kind: Any) -> Store:
        return toys.in_memory(built[kind].backbone.arch, built[kind].wanted)


@pytest.mark.parametrize("kind", [("text", "float32"), ("image", "float32")], ids="-".join)
class TestLiveStore(StoreContract):
    tolerance = 1e-4  # the same examples meet in other batches, where a matrix product sums in another order

    @pytest.fixture
    def wanted(self, built: dict[Any, Toy], kind: Any) -> dict[str, list[Tensor]]:
        return built[kind].wanted

    @pytest.fixture
    def store(self, built: dict[Any, Toy], kind: Any) -> Store:
        toy = built[kind]
        return LiveStore(toy.backbone, toys.prepare(toy.backbone, toy.examples))


# What cannot be opened


def test_a_cache_without_commit_cannot_be_opened(toy: Toy) -> None:
    (toy.folder / "manifest.json").unlink()
    with pytest.raises(SidebenchError, match=r"not a complete activation cache.*again to resume it"):
        ZarrStore(toy.folder)


@pytest.mark.parametrize("content", [None, "", "hello", "{}", "[]", "null", '{"facts": {}, "objects": {}}'])
def test_a_foreign_folder_cannot_be_opened(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(SidebenchError, match=r"not a complete activation cache|is no manifest|is refused"):
        ZarrStore(tmp_path)


def test_a_plain_zarr_group_of_somebody_else_cannot_be_opened(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "x.zarr").create_array("layers", shape=(3,), dtype="f4")
    with pytest.raises(SidebenchError, match="not a complete activation cache"):
        ZarrStore(tmp_path / "x.zarr")


def test_a_missing_folder_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(SidebenchError, match="not a complete activation cache"):
        ZarrStore(tmp_path / "nothing.zarr")


# Damage


def _chunk_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and "/c/" in p.as_posix())


def _touch(folder: Path, file: Path) -> None:
    """Read every value of the array that `file` belongs to, in a reader that has seen nothing yet."""
    store = ZarrStore(folder)
    kind, _, layer = file.relative_to(folder).as_posix().partition("/c/")[0].partition("/")
    if kind == "pooled":
        store.pooled(layer)
    elif kind == "layers":
        store.read(np.arange(len(store)), [layer])
    else:
        assert store.targets.size


def _named(folder: Path, file: Path) -> set[tuple[str, str]]:
    path, _, chunk = file.relative_to(folder).as_posix().removeprefix("layers/").partition("/c/")
    return {(path, chunk)}


def _assert_found(folder: Path, *files: Path) -> None:
    wanted = set().union(*(_named(folder, file) for file in files))
    if not any(file.is_relative_to(folder / "offsets") for file in files):  # without offsets nothing can be opened
        assert {(bad.layer, bad.chunk) for bad in ZarrStore(folder).verify()} == wanted
    for file in files:
        with pytest.raises(SidebenchError, match=r"is damaged: .*bench cache verify"):
            _touch(folder, file)


def test_a_flipped_bit_in_any_chunk_is_found_by_verify_and_by_the_reader(toy: Toy) -> None:
    draw = np.random.default_rng(0)
    for file in _chunk_files(toy.folder):
        whole = file.read_bytes()
        for position in (int(draw.integers(len(whole))), len(whole) - 1):  # the last lies in the chunk's checksum
            damaged = bytearray(whole)
            damaged[position] ^= 1 << int(draw.integers(8))
            file.write_bytes(damaged)
            _assert_found(toy.folder, file)
        file.write_bytes(whole)
    assert ZarrStore(toy.folder).verify() == []


@pytest.mark.parametrize("kept", [0, 1, 4, -1])
def test_a_truncated_chunk_is_found(toy: Toy, kept: int) -> None:
    for file in _chunk_files(toy.folder):
        whole = file.read_bytes()
        file.write_bytes(whole[:kept])
        _assert_found(toy.folder, file)
        file.write_bytes(whole)


def test_a_missing_chunk_is_found(toy: Toy) -> None:
    for file in _chunk_files(toy.folder):
        whole = file.read_bytes()
        file.unlink()
        _assert_found(toy.folder, file)
        file.write_bytes(whole)


def test_a_longer_chunk_is_found(toy: Toy) -> None:
    file = _chunk_files(toy.folder)[0]
    file.write_bytes(file.read_bytes() + b"\0")
    _assert_found(toy.folder, file)


def test_two_swapped_chunks_are_found_though_each_is_whole(toy: Toy) -> None:
    one, two = sorted((toy.folder / "layers" / "blocks.0" / "c").glob("*/*"))[:2]
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    _assert_found(toy.folder, one, two)


def test_a_chunk_that_became_a_folder_is_found(toy: Toy) -> None:
    file = sorted((toy.folder / "layers" / "blocks.0" / "c").glob("*/*"))[0]
    file.unlink()
    file.mkdir()
    _assert_found(toy.folder, file)


@pytest.mark.parametrize("name", ["layers/blocks.0/c/99/0", "surplus.txt", "layers/blocks.7/zarr.json", ".hidden"])
def test_an_extra_file_is_found(toy: Toy, name: str) -> None:
    (toy.folder / name).parent.mkdir(parents=True, exist_ok=True)
    (toy.folder / name).write_bytes(b"?")
    assert [bad.reason for bad in ZarrStore(toy.folder).verify()] == ["not part of this store"]


@pytest.mark.parametrize("name", ["zarr.json", "layers/zarr.json", "layers/blocks.1/zarr.json", "ids.json"])
@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_damaged_metadata_is_found(toy: Toy, name: str, damage: str) -> None:
    file = toy.folder / name
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-2] + b" \n")
    store = ZarrStore(toy.folder)
    assert [bad.chunk for bad in store.verify()] == [name]
    if name == "ids.json":
        with pytest.raises(SidebenchError, match=r"is damaged: ids\.json"):
            _ = store.ids


def test_a_chunk_is_checked_once_and_then_trusted(toy: Toy) -> None:
    store = ZarrStore(toy.folder)
    store.read(_index(0), ["blocks.0"])
    assert ("layers/blocks.0", 0) in store._checked
    assert ("layers/blocks.0", 2) not in store._checked


# Altered and invented manifests


def _forge(folder: Path, change: Any) -> None:
    """Change the facts and sign them again, as somebody would who wants them believed."""

    def forged(document: dict[str, Any]) -> dict[str, Any]:
        change(document)
        facts = json.dumps(document["facts"], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        document["digest"] = hashlib.sha256(facts.encode()).hexdigest()
        return document

    toys.edit_json(folder / "manifest.json", forged)


def test_an_altered_fact_is_noticed(toy: Toy) -> None:
    toys.edit_json(toy.folder / "manifest.json", lambda d: d["facts"]["dataset"].update(sha256="0" * 64))
    with pytest.raises(SidebenchError, match="was altered: its facts hash to"):
        ZarrStore(toy.folder)


@pytest.mark.parametrize(
    "name",
    ["../../etc/x", "..", "a/b", "/etc", "", ".", "a..b", "\u00e9", "a\0b", "a\n", "x" * 300, 3, None, ["a"]],
)
def test_a_layer_whose_name_is_no_folder_is_refused(toy: Toy, name: Any) -> None:
    _forge(toy.folder, lambda d: d["facts"]["specs"][0].update(layer=name))
    with pytest.raises(SidebenchError):
        ZarrStore(toy.folder)


@pytest.mark.parametrize("key", ["../outside", "/etc/passwd", "layers/blocks.0/c/0/../../x", "layers/blocks.0/c/99/0"])
def test_a_manifest_that_lists_files_of_its_own_choosing_is_refused(toy: Toy, key: str) -> None:
    def move(document: dict[str, Any]) -> None:
        document["objects"][key] = document["objects"].pop("layers/blocks.0/c/0/0")

    _forge(toy.folder, move)
    with pytest.raises(SidebenchError, match=r"does not list layers/blocks\.0/c/0/0"):
        ZarrStore(toy.folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.update(rows=2**47),
        lambda f: f["dataset"].update(examples=2**47),
        lambda f: f["specs"][0].update(width=2**47),
        lambda f: f.update(rows=2**47, specs=[{"layer": "a", "tokens": None, "width": 2**47}]),
        lambda f: f["specs"][0].update(width=0),
        lambda f: f["dataset"].update(examples=0),
        lambda f: f.update(rows=10**400),
        lambda f: f.update(rows=-1),
        lambda f: f.update(rows=1.5),
        lambda f: f.update(rows=True),
        lambda f: f.update(rows=float("nan")),
        lambda f: f["architecture"].update(blocks=2**40),
        lambda f: f["architecture"].update(width="wide"),
        lambda f: f["architecture"].update(modality="sound"),
        lambda f: f["architecture"].update(surprise=1),
        lambda f: f.update(forward=[1]),
        lambda f: f.update(specs=[]),
        lambda f: f["form"].update(dtype=["float16"]),
        lambda f: f["form"].update(dtype="float64"),
        lambda f: f["form"].update(tokens="grid"),
        lambda f: f["form"].update(tokens=["all"]),
        lambda f: f["form"].update(per_channel=True),
        lambda f: f["form"].update(compression="gzip"),
        lambda f: f["form"].update(views=-1),
        lambda f: f["form"].update(views=1),
        lambda f: f["form"].update(views=2**60),
        lambda f: f["form"].update(seed="0"),
        lambda f: f["form"].update(surprise=1),
        lambda f: f.update(form=None),
        lambda f: f.update(format="sidebench-activations/1"),
        lambda f: f.update(surprise=1),
    ],
)
def test_facts_that_cannot_be_are_refused_before_anything_is_allocated(toy: Toy, change: Any) -> None:
    _forge(toy.folder, lambda d: change(d["facts"]))
    tracemalloc.start()
    try:
        with pytest.raises(SidebenchError, match=r"manifest\.json"):
            ZarrStore(toy.folder)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_deeply_nested_facts_are_refused(toy: Toy) -> None:
    text = (toy.folder / "manifest.json").read_text()
    for depth in (500, 3_000, 100_000):
        nested = text.replace('"config": {', '"config": {"x": ' + "[" * depth + "]" * depth + ", ", 1)
        assert nested != text
        (toy.folder / "manifest.json").write_text(nested)
        with pytest.raises(SidebenchError):
            ZarrStore(toy.folder)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=8)
    | st.sampled_from(["..", "../x", "/", "float16", "text", "blocks.0", "c/0/0", 2**63, 10**300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))


@given(document=_JSON)
def test_arbitrary_json_is_refused_in_a_sentence(document: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(SidebenchError):
        ZarrStore(folder)


@given(data=st.data())
def test_a_forged_manifest_is_read_as_a_store_or_refused_in_a_sentence(built: dict[Any, Toy], data: Any) -> None:
    """One value anywhere is replaced and the facts are signed again: never anything but a SidebenchError."""
    folder = data.draw(st.sampled_from([built["text", "float16"].folder, built["image", "float32"].folder]))
    original = (folder / "manifest.json").read_text("utf-8")
    document = json.loads(original)
    places = [p for p in _places(document["facts"]) if p]
    *parents, last = data.draw(st.sampled_from(places))
    inside = document["facts"]
    for key in parents:
        inside = inside[key]
    if data.draw(st.booleans()):
        inside[last] = data.draw(_JSON)
    elif isinstance(inside, dict):
        inside[data.draw(st.text(max_size=5))] = inside.pop(last)
    try:
        facts = json.dumps(document["facts"], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        document["digest"] = hashlib.sha256(facts.encode()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(document))
        try:
            store = ZarrStore(folder)
            store.verify()
            store.read(np.arange(len(store)), store.layers)
            _ = store.ids, store.targets, store.architecture.states
        except SidebenchError as error:
            str(error).encode()
    finally:
        (folder / "manifest.json").write_text(original, "utf-8")


# Layout


@given(
    rows=st.integers(1, 10**9),
    inner=st.lists(st.integers(1, 10**4), max_size=2),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "int64"]),
)
def test_chunks_cover_the_rows_and_are_multiples_of_64(rows: int, inner: list[int], dtype: str) -> None:
    for size in (1, 16_000_000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "CHUNK_BYTES", size)
            array = ArrayLayout((rows, *inner), dtype, ("item", "token", "width")[: 1 + len(inner)])
            assert array.chunk_rows % 64 == 0
            assert (array.chunks - 1) * array.chunk_rows < rows <= array.chunks * array.chunk_rows
            assert size == 1 or array.chunk_rows == 64 or array.object_bytes < 3 * size


# The digest


def _manifest() -> Manifest:
    architecture = Architecture("ViTModel", "image", 2, 4, 1, "norm", 2, 8, "pre", "gelu", 1e-12, False)
    return Manifest(
        architecture=architecture,
        backbone={"weights_sha256": "ab", "config": {"b": 1, "a": "\u00e9"}},
        preprocessing={"kind": "image", "image_size": 16},
        dataset={"sha256": "cd", "examples": 3, "limit": None},
        forward={"precision": "float32", "attention": "sdpa", "batch_size": 64},
        form=Form(),
        specs=(ActivationSpec("embeddings", 5, 4), ActivationSpec("norm", 5, 4)),
        rows=3,
    )


CANONICAL = (
    '{"architecture":{"activation":"gelu","blocks":2,"causal":false,"final_layer":"norm","heads":2,"layer_scale":false,'
    '"mlp_width":8,"modality":"image","name":"ViTModel","norm":"pre","norm_eps":1e-12,"prefix_tokens":1,"width":4},'
    '"backbone":{"config":{"a":"\\u00e9","b":1},"weights_sha256":"ab"},'
    '"dataset":{"examples":3,"limit":null,"sha256":"cd"},'
    '"form":{"compression":null,"dtype":"float16","per_channel":false,"seed":null,"tokens":"all","views":0},'
    '"format":"sidebench-activations/2","forward":{"attention":"sdpa","batch_size":64,"precision":"float32"},'
    '"preprocessing":{"image_size":16,"kind":"image"},"rows":3,'
    '"specs":[{"layer":"embeddings","tokens":5,"width":4},{"layer":"norm","tokens":5,"width":4}]}'
)


def test_the_digest_is_the_sha256_of_one_spelling_of_the_facts() -> None:
    assert canonical_json(_manifest().facts()) == CANONICAL
    assert _manifest().digest == hashlib.sha256(CANONICAL.encode()).hexdigest()
    assert _manifest().folder_name == f"{hashlib.sha256(CANONICAL.encode()).hexdigest()[:16]}.zarr"


def test_the_order_in_which_facts_were_put_together_does_not_matter() -> None:
    turned = dataclasses.replace(_manifest(), forward=dict(reversed(_manifest().forward.items())))
    assert turned.digest == _manifest().digest


@pytest.fixture(scope="module")
def digests(tiny_bert: Backbone, tiny_vit: Backbone, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    texts, images = toys.make_texts(20), toys.make_images(10)

    def digest(backbone: Backbone = tiny_bert, examples: Any = None, limit: int | None = None, **options: Any) -> str:
        task = examples or (texts if backbone.arch.modality == "text" else images)
        return plan(backbone, task, CaptureOptions(**options), limit=limit).manifest.digest

    changed = copy.deepcopy(tiny_bert)
    with torch.no_grad():
        changed.module.encoder.layer[1].output.dense.weight[0, 0] += 1e-3
    other_words = toys.save_bert(tmp_path_factory.mktemp("words"))
    toys.edit_json(other_words / "tokenizer.json", lambda t: t["model"]["vocab"].update(good=10, bad=9))
    order = np.arange(20)[::-1]
    turned = dataclasses.replace(texts, raw=tuple(texts.raw[i] for i in order), targets=texts.targets[order])
    one_word = dataclasses.replace(texts, raw=("good", *texts.raw[1:]))
    one_label = dataclasses.replace(texts, targets=np.array([1 - texts.targets[0], *texts.targets[1:]]))
    moved = Path(shutil.copytree(models / "bert", tmp_path_factory.mktemp("moved") / "elsewhere"))
    return {
        "base": digest(),
        "again": digest(),
        "a seed of nothing": digest(seed=7),
        "another folder": digest(toys.load(moved)),
        "weights": digest(changed),
        "tokenizer": digest(toys.load(other_words)),
        "length": digest(toys.load(models / "bert", max_length=20)),
        "order": digest(examples=turned),
        "a row": digest(examples=one_word),
        "a label": digest(examples=one_label),
        "limit": digest(limit=20),
        "dtype": digest(dtype="bfloat16"),
        "quantised": digest(dtype="int8"),
        "per channel": digest(dtype="int8", per_channel=True),
        "tokens": digest(tokens="mean"),
        "compression": digest(compression="zstd"),
        "views": digest(views=2),
        "other views": digest(views=2, seed=1),
        "projection": digest(tokens="proj:8"),
        "another projection": digest(tokens="proj:8", seed=1),
        "batch size": digest(batch_size=32),
        "layers": digest(layers=("blocks.1",)),
        "image": digest(tiny_vit),
        "image size": digest(toys.load(models / "vit", image_size=32)),
    }


UNCHANGED = ("again", "another folder", "a seed of nothing")


def test_the_digest_changes_with_every_fact(digests: dict[str, str]) -> None:
    different = {name: value for name, value in digests.items() if name not in UNCHANGED}
    assert len(set(different.values())) == len(different), different


@pytest.mark.parametrize("same", UNCHANGED)
def test_the_digest_does_not_change_with_what_is_no_fact(digests: dict[str, str], same: str) -> None:
    assert digests[same] == digests["base"]


def test_uris_and_dates_live_in_the_notes_alone(toy: Toy) -> None:
    assert json.loads((toy.folder / "notes.json").read_text())["backbone"] == "toy"
    everything_else = b"".join(toys.files_of(toy.folder, without=["notes.json"]).values())
    assert b"created" not in everything_else
    assert str(toy.folder).encode() not in everything_else


def test_a_manifest_survives_being_written_and_read(built: dict[Any, Toy]) -> None:
    for toy in built.values():
        manifest, objects = read_manifest(toy.folder)
        assert f"{manifest.digest[:16]}.zarr" == toy.folder.name
        on_disk = set(toys.files_of(toy.folder, without=["manifest.json", "notes.json"]))
        assert set(objects) == on_disk
