"""Storage forms end to end: what is built reads back as it should, from every reader, and no damage passes unseen.

A selection of forms in which every pair of dtype, channels, tokens, compression, views and modality occurs that can.
"""

import hashlib
import json
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import by_hand
import numcodecs
import numpy as np
import pytest
import tensorstore
import torch
import toys
import zarr
from hypothesis import given
from hypothesis import strategies as st
from outcomes import spawning, write_texts
from typer.testing import CliRunner

from sidebench.bench import launch as launching
from sidebench.bench.compare import compare
from sidebench.bench.importing import import_hdf5
from sidebench.bench.outcome import Outcome, Request
from sidebench.bench.prepare import Inputs
from sidebench.bench.record import read_predictions
from sidebench.bench.report import markdown
from sidebench.bench.table import comparisons, rows
from sidebench.cache import layout, memory_store, planning
from sidebench.cache.backbone import Backbone
from sidebench.cache.build import CaptureOptions, Plan, build, plan
from sidebench.cache.catalog import nearest_mismatch, read_notes
from sidebench.cache.encode import tensors_of, to_numpy
from sidebench.cache.errors import SidebenchError
from sidebench.cache.export import export_store
from sidebench.cache.features import ImportOptions
from sidebench.cache.layout import ArrayLayout
from sidebench.cache.memory_store import MemoryStore
from sidebench.cache.planning import options_of
from sidebench.cache.repair import Repair, repair
from sidebench.cache.views import prepare_items
from sidebench.cache.zarr_store import ZarrStore, verify
from sidebench.cli import app

BATCH = 24  # no divisor of a chunk's 64 rows, so batches straddle chunks
COUNTS = {"text": 60, "image": 80}
FORMS: dict[str, dict[str, Any]] = {
    "text int8": {"dtype": "int8"},
    "text int8 channels views": {"dtype": "int8", "per_channel": True, "views": 2},
    "text fp8 first zstd": {"dtype": "fp8", "tokens": "first:3", "compression": "zstd"},
    "text int8 mean lz4": {"dtype": "int8", "tokens": "mean", "compression": "lz4"},
    "text fp8 channels cls+mean view": {"dtype": "fp8", "per_channel": True, "tokens": "cls+mean", "views": 1},
    "text bfloat16 proj zstd view": {
        "dtype": "bfloat16", "tokens": "proj:8", "compression": "zstd", "views": 1, "seed": 3,
    },
    "text float16 cls": {"dtype": "float16", "tokens": "cls"},
    "image int8 channels grid zstd": {"dtype": "int8", "per_channel": True, "tokens": "grid:1", "compression": "zstd"},
    "image fp8 mean views lz4": {"dtype": "fp8", "tokens": "mean", "compression": "lz4", "views": 2},
    "image float32 cls view lz4": {"dtype": "float32", "tokens": "cls", "compression": "lz4", "views": 1},
    "image int8 channels proj": {"dtype": "int8", "per_channel": True, "tokens": "proj:8"},
    "image bfloat16 first": {"dtype": "bfloat16", "tokens": "first:2"},
    "image fp8 channels zstd": {"dtype": "fp8", "per_channel": True, "compression": "zstd"},
    "image float16 cls+mean": {"dtype": "float16", "tokens": "cls+mean"},
    "image int8 channels views zstd": {"dtype": "int8", "per_channel": True, "compression": "zstd", "views": 2},
}  # fmt: skip
DAMAGED = ("text int8 channels views", "image int8 channels views zstd", "text fp8 first zstd")
STEPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
Bench = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """The least chunk, 64 rows, so that a toy store has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_BYTES", 1)
        yield


@dataclass(frozen=True)
class Built:
    """A store and what it was made of: per layer and item the tokens that are kept, in float64."""

    planned: Plan
    folder: Path
    wanted: dict[str, list[Any]]


@pytest.fixture(scope="module")
def backbones(tiny_bert: Backbone, tiny_vit: Backbone) -> dict[str, Backbone]:
    return {"text": tiny_bert, "image": tiny_vit}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, backbones: dict[str, Backbone]) -> dict[str, Built]:
    return {name: _built(name, backbones, tmp_path_factory.mktemp("forms")) for name in FORMS}


def _built(name: str, backbones: dict[str, Backbone], cache_dir: Path) -> Built:
    modality = name.partition(" ")[0]
    backbone, count = backbones[modality], COUNTS[modality]
    examples = toys.make_texts(count) if modality == "text" else toys.make_images(count)
    planned = plan(backbone, examples, CaptureOptions(batch_size=BATCH, **FORMS[name]))
    folder = build(planned, cache_dir, notes={"backbone": "toy"}).folder
    form = planned.manifest.form
    prepared = prepare_items(backbone.preprocess, examples, range(planned.manifest.items), form.seed)
    wanted: dict[str, list[Any]] = {layer: [] for layer in backbone.layers}
    for start in range(0, len(prepared), BATCH):
        inputs, mask = backbone.preprocess.collate(prepared[start : start + BATCH])
        for layer, value in backbone.capture(inputs, backbone.layers).items():
            for row, tokens in enumerate(value.double().numpy()):
                real = tokens if mask is None else tokens[mask[row].numpy()]
                wanted[layer].append(by_hand.kept(form.tokens, backbone.arch, real, form.seed or 0))
    return Built(planned, folder, wanted)


@pytest.fixture(params=FORMS)
def one(request: pytest.FixtureRequest, built: dict[str, Built]) -> Built:
    return built[request.param]


@pytest.fixture(params=DAMAGED)
def copied(request: pytest.FixtureRequest, built: dict[str, Built], tmp_path: Path) -> Built:
    """A store to be damaged."""
    whole = built[request.param]
    return Built(whole.planned, Path(shutil.copytree(whole.folder, tmp_path / whole.folder.name)), whole.wanted)


# What is read back


def test_every_item_reads_back_within_half_a_step_of_what_the_backbone_yields(one: Built) -> None:
    store, form = ZarrStore(one.folder), one.planned.manifest.form
    order = np.random.default_rng(0).permutation(len(store))
    for index in np.array_split(order, 5):
        read = store.read(index, store.layers)
        for layer in store.layers:
            values = read.layers[layer].float().double().numpy()
            for row, item in enumerate(index):
                wanted = one.wanted[layer][item]
                assert read.mask[row].tolist() == [t < len(wanted) for t in range(read.mask.shape[1])]
                found = values[row, : len(wanted)]
                assert not values[row, len(wanted) :].any(), "padding is zero"
                assert (abs(found - wanted) <= _allowed(store, layer, wanted)).all(), (layer, form)


def _allowed(store: ZarrStore, layer: str, wanted: Any) -> Any:
    """Half a step of each element, and the difference of a forward in float32 from the reference."""
    form = store.manifest.form
    if not form.quantised:
        return abs(wanted) * STEPS[form.dtype] + 1e-4
    channels = store.channels(layer)
    centre, spread = (0.0, 1.0) if channels is None else channels.double().numpy().T
    y = abs((wanted - centre) / spread)
    scale = y.max(1, keepdims=True) / (127 if form.dtype == "int8" else 448)
    half = scale / 2 if form.dtype == "int8" else np.maximum(y * 2.0**-4, scale * 2.0**-10)
    return half * spread * 1.001 + 2e-4


def test_pooled_rows_are_the_first_and_the_mean_of_what_is_stored(one: Built) -> None:
    store = ZarrStore(one.folder)
    prefix = store.architecture.prefix_tokens
    read = store.read(np.arange(len(store)), store.layers)
    for layer in store.layers:
        pooled, values = store.pooled(layer), read.layers[layer].float().double()
        assert pooled.dtype is (
            torch.float32 if store.manifest.form.quantised else tensors_of(store.whole(layer))[0].dtype
        )
        for item in range(len(store)):
            tokens = values[item][read.mask[item]]
            rest = tokens[prefix:] if len(tokens) > prefix else tokens
            wanted = torch.stack([tokens[0], rest.mean(0)])
            eps = max(torch.finfo(pooled.dtype).eps, 1e-5)
            torch.testing.assert_close(pooled[item].double(), wanted, rtol=eps, atol=eps)


def test_channels_are_those_of_a_sample_of_plain_examples(one: Built) -> None:
    store, count = ZarrStore(one.folder), one.planned.manifest.examples
    sample = np.linspace(0, count - 1, 32).astype(int)
    for layer in store.layers:
        channels = store.channels(layer)
        assert (channels is not None) == one.planned.manifest.form.per_channel
        if channels is not None:
            tokens = np.concatenate([one.wanted[layer][i] for i in sample])
            spread = np.maximum(tokens.std(0), tokens.std(0).mean() / 100)
            wanted = torch.from_numpy(np.stack([tokens.mean(0), spread], 1))
            torch.testing.assert_close(channels.double(), wanted, rtol=1e-3, atol=1e-3)


def test_the_notes_hold_the_relative_error_of_every_layer_where_something_is_lost(one: Built) -> None:
    errors = read_notes(one.folder)["relative_errors"]
    assert tuple(errors) == (one.planned.manifest.layers if one.planned.manifest.form.lossy else ())
    if one.planned.manifest.form.tokens == "all":
        assert all(1e-3 < error < 6e-2 for error in errors.values())
    else:
        assert all(1e-3 < error <= 1 + 1e-6 for error in errors.values())


def test_a_store_in_memory_gives_the_same_bits(one: Built) -> None:
    store = ZarrStore(one.folder)
    held = MemoryStore.of(store, store.layers, torch.device("cpu"))
    for index in (np.random.default_rng(1).permutation(len(store)), np.array([5, 5, 0])):
        a, b = store.read(index, store.layers), held.read(index, store.layers)
        assert torch.equal(a.mask, b.mask)
        for layer in store.layers:
            for x, y in zip(tensors_of(a.layers[layer]), tensors_of(b.layers[layer]), strict=True):
                assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def test_other_zarr_libraries_read_every_array_equal(one: Built) -> None:
    store, group = ZarrStore(one.folder), zarr.open_group(one.folder, mode="r")
    for path, array in store.manifest.arrays().items():
        ours = to_numpy(store._whole(path))
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{one.folder / path}/"}}
        for theirs in (group[path][:], tensorstore.open(spec, open=True, read=True).result().read().result()):
            assert theirs.dtype == ours.dtype
            assert theirs.tobytes() == ours.tobytes()
        assert group[path].attrs["sidebench_dtype"] == array.dtype
        assert group[path].shape == array.shape


def test_what_was_never_written_cannot_pass_for_an_activation(built: dict[str, Built], tmp_path: Path) -> None:
    """In int8 and fp8 too, a chunk that is missing reads as its fill value in other libraries."""
    for name, fill in (("text int8", -128), ("text fp8 first zstd", 0x7F)):
        folder = Path(shutil.copytree(built[name].folder, tmp_path / built[name].folder.name))
        shutil.rmtree(folder / "layers" / "blocks.0" / "c" / "0")
        read = zarr.open_group(folder, mode="r")["layers/blocks.0"][:64]
        assert (read == fill).all()
        assert not (to_numpy(tensors_of(ZarrStore(built[name].folder).whole("blocks.0"))[0])[:64] == fill).any()


def test_an_export_comes_back_byte_for_byte(one: Built, tmp_path: Path) -> None:
    export_store(one.folder, tmp_path / "out.h5")
    back = import_hdf5(
        tmp_path / "out.h5",
        None,
        ImportOptions(name=None),
        home=tmp_path,
        cache_dir=tmp_path / "back",
        progress=lambda *_: None,
        say=lambda _: None,
    )
    assert back.folder.name == one.folder.name
    assert toys.files_of(back.folder, without=["notes.json"]) == toys.files_of(one.folder, without=["notes.json"])


@pytest.mark.parametrize("size", [1, 2_000, 16_000_000])
def test_scales_are_cut_where_their_layer_is(one: Built, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a batch that is computed for the one has the rows of the other."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", size)
    arrays = one.planned.manifest.arrays()
    scales = {path: a for path, a in arrays.items() if path.startswith("scales/")}
    assert bool(scales) == one.planned.manifest.form.quantised
    for path, array in scales.items():
        assert array.chunk_rows == arrays[path.replace("scales/", "layers/")].chunk_rows


def test_a_plan_made_from_a_manifest_is_the_same_plan(one: Built) -> None:
    again = plan(one.planned.backbone, one.planned.examples, options_of(ZarrStore(one.folder).manifest))
    assert again.manifest == one.planned.manifest


def test_a_form_that_is_not_there_is_named_with_the_nearest(built: dict[str, Built], backbones: Any) -> None:
    one = built["text int8"]
    wanted = plan(one.planned.backbone, one.planned.examples, CaptureOptions(batch_size=BATCH, dtype="fp8"))
    assert "form.dtype: wanted fp8, found int8" in nearest_mismatch(one.folder.parent, wanted.manifest)


def test_a_convolution_s_rows_are_pooled_to_the_same_bits_when_a_build_is_resumed(tmp_path: Path) -> None:
    from test_build import _Convolution

    from sidebench.cache.preprocess import ImagePreprocess, PlainImageProcessor

    backbone = Backbone(_Convolution(), ImagePreprocess(PlainImageProcessor(64), 64, None, input_name="pixels"))
    for form in ({"dtype": "int8"}, {"dtype": "int8", "per_channel": True}):
        planned = plan(backbone, toys.make_images(100), CaptureOptions(batch_size=BATCH, **form))
        folder = build(planned, tmp_path, notes={}).folder
        whole = toys.files_of(folder, without=["notes.json"])
        (folder / "manifest.json").unlink()
        shutil.rmtree(folder / "pooled")
        build(planned, tmp_path, notes={})
        assert toys.files_of(folder, without=["notes.json"]) == whole


# Damage


def _one_chunk_per_array(folder: Path) -> list[Path]:
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "/c/" in p.as_posix()):
        found[path.as_posix().partition("/c/")[0]] = path
    return list(found.values())


def _read_array(folder: Path, file: Path) -> None:
    """Every value of the array that `file` belongs to, in a reader that has seen nothing yet."""
    store = ZarrStore(folder)
    store._whole(file.relative_to(folder).as_posix().partition("/c/")[0])


def _assert_found(folder: Path, file: Path) -> None:
    path, _, chunk = file.relative_to(folder).as_posix().removeprefix("layers/").partition("/c/")
    assert [(bad.layer, bad.chunk) for bad in verify(folder)] == [(path, chunk)]
    with pytest.raises(SidebenchError, match=r"is damaged: .*bench cache verify"):
        _read_array(folder, file)


def _flipped(payload: bytes, seed: int) -> bytes:
    draw, damaged = np.random.default_rng(seed), bytearray(payload)
    damaged[int(draw.integers(len(damaged)))] ^= 1 << int(draw.integers(8))
    return bytes(damaged)


def test_every_damage_to_every_kind_of_array_is_found_by_verify_and_by_the_reader(copied: Built) -> None:
    files = _one_chunk_per_array(copied.folder)
    groups = {"layers", "scales", "pooled", "targets"} | (
        {"channels"} if copied.planned.manifest.form.per_channel else set()
    )
    assert {f.relative_to(copied.folder).parts[0] for f in files} >= groups
    for number, file in enumerate(files):
        whole = file.read_bytes()
        for damaged in (_flipped(whole, number), whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b""):
            file.write_bytes(damaged)
            _assert_found(copied.folder, file)
        file.unlink()
        _assert_found(copied.folder, file)
        file.write_bytes(whole)
    assert verify(copied.folder) == []


def test_every_chunk_with_a_flipped_bit_is_found_at_first_touch(copied: Built) -> None:
    for number, file in enumerate(sorted(p for p in copied.folder.rglob("*") if "/c/" in p.as_posix() and p.is_file())):
        whole = file.read_bytes()
        file.write_bytes(_flipped(whole, number))
        with pytest.raises(SidebenchError, match="is damaged"):
            _read_array(copied.folder, file)
        file.write_bytes(whole)


def test_swapped_chunks_are_found_though_each_is_whole(copied: Built) -> None:
    for group in ("layers", "scales", "pooled"):
        a, b = (copied.folder / group / f"blocks.{i}" / "c" / "0" for i in (0, 1))
        one, two = (next(p for p in c.rglob("*") if p.is_file()) if c.is_dir() else c for c in (a, b))
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
        assert len(verify(copied.folder)) == 2
        for file in (one, two):
            with pytest.raises(SidebenchError, match="is damaged"):
                _read_array(copied.folder, file)
        one.write_bytes(first)
        two.write_bytes(second)


def _mend(one: Built) -> Repair:
    planned = one.planned
    return repair(one.folder, lambda m: plan(planned.backbone, planned.examples, options_of(m)))


@pytest.mark.parametrize("group", ["layers", "scales", "channels", "pooled", "all of them"])
@pytest.mark.parametrize("harm", ["flipped", "gone"])
def test_every_kind_of_array_is_mended_to_the_bytes_of_the_build(copied: Built, group: str, harm: str) -> None:
    whole = toys.files_of(copied.folder)
    files = [
        f
        for f in _one_chunk_per_array(copied.folder)
        if group in ("all of them", f.relative_to(copied.folder).parts[0])
    ]
    for file in files:
        if harm == "gone":
            file.unlink()
        else:
            file.write_bytes(_flipped(file.read_bytes(), 3))
    assert len(verify(copied.folder)) == len(files)
    assert _mend(copied) == Repair([], len(files))
    assert toys.files_of(copied.folder) == whole


def test_damaged_channels_that_come_out_otherwise_are_not_written(built: dict[str, Built], tmp_path: Path) -> None:
    """Every row depends on them, so nothing else can be mended either."""
    whole = built["text int8 channels views"]
    folder = Path(shutil.copytree(whole.folder, tmp_path / whole.folder.name))
    target = folder / "channels" / "blocks.1" / "c" / "0" / "0"
    target.write_bytes(_flipped(target.read_bytes(), 0))
    before = toys.files_of(folder)
    hook = whole.planned.backbone.blocks[1].register_forward_hook(
        lambda _, args, out: tuple(o * (1 + 2**-9) for o in out) if isinstance(out, tuple) else out * (1 + 2**-9)
    )
    try:
        with pytest.raises(SidebenchError, match=r"the channels of .* come out otherwise here; remove the cache"):
            _mend(Built(whole.planned, folder, {}))
    finally:
        hook.remove()
    assert toys.files_of(folder) == before


# Hostile stores


def _forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the facts and sign them again, as somebody would who wants them believed."""

    def forged(document: dict[str, Any]) -> dict[str, Any]:
        change(document)
        facts = json.dumps(document["facts"], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return {**document, "digest": hashlib.sha256(facts.encode()).hexdigest()}

    toys.edit_json(folder / "manifest.json", forged)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"dtype": "float16", "per_channel": False},
        {"dtype": "fp8", "per_channel": 1},
        {"per_channel": False},
        {"per_channel": None},
        {"views": 999},
        {"views": 0},
        {"views": True},
        {"views": 2.0},
        {"seed": -1},
        {"seed": 1.5},
        {"tokens": "first:0"},
        {"tokens": "grid:2"},
        {"tokens": "x" * 10**6},
        {"tokens": None},
        {"compression": "blosc"},
        {"compression": ""},
    ],
    ids=lambda change: " ".join(f"{k}={str(v)[:10]}" for k, v in change.items()),
)
def test_a_forged_form_is_refused_before_anything_is_allocated(
    built: dict[str, Built], tmp_path: Path, change: dict[str, Any]
) -> None:
    whole = built["text int8 channels views"]
    folder = Path(shutil.copytree(whole.folder, tmp_path / "forged.zarr"))
    _forge(folder, lambda d: d["facts"]["form"].update(change))
    tracemalloc.start()
    try:
        with pytest.raises(SidebenchError, match=r"manifest\.json") as caught:
            ZarrStore(folder)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000


def _put_chunk(folder: Path, payload: bytes, key: str = "layers/blocks.0/c/0/0") -> None:
    """A chunk of an attacker's own, its checksums right everywhere."""
    crc = layout.checksum(payload)
    (folder / key).write_bytes(payload + layout.trailer(crc))
    _forge(folder, lambda d: d["objects"].update({key: [len(payload) + 4, crc]}))


@pytest.fixture
def hostile(built: dict[str, Built], tmp_path: Path) -> Path:
    """A copy of a compressed store."""
    return Path(shutil.copytree(built["text fp8 first zstd"].folder, tmp_path / "hostile.zarr"))


def _header(length: int, content: int, block: int = 2048) -> bytes:
    """What blosc begins with: versions, flags, type size, then bytes out, bytes per block, bytes in."""
    return bytes([2, 1, 0x91, 1]) + b"".join(n.to_bytes(4, "little") for n in (content, block, length))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0",
        _header(16, 2**32 - 1)[:15],
        _header(2**32 - 1, 2**32 - 1),
        _header(16, 2**31 - 1),
        _header(2**31 - 1, 64 * 32),
        _header(100, 64 * 32),
        _header(16, 64 * 32),
        _header(16, 64 * 32, 2**31 - 1),
        _header(16, 0),
    ],
    ids=lambda p: p[4:16].hex() or "empty",
)
def test_a_compressed_chunk_that_claims_what_it_is_not_is_refused_before_it_is_believed(
    hostile: Path, payload: bytes
) -> None:
    _put_chunk(hostile, payload)
    store = ZarrStore(hostile)
    tracemalloc.start()
    try:
        with pytest.raises(SidebenchError, match=r"is damaged: layers/blocks\.0/c/0/0"):
            store.whole("blocks.0")
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    with pytest.raises(SidebenchError, match="is damaged"):
        export_store(hostile, hostile.parent / "out.h5")


def test_a_chunk_that_is_right_but_for_the_sizes_it_states_is_refused() -> None:
    """blosc would read as far as it is told, and leave the rest of a chunk as it found the memory."""
    whole = ArrayLayout((64, 32), "float16", ("token", "width"), "zstd")
    half = ArrayLayout((64, 16), "float16", ("token", "width"), "zstd")
    draw = np.random.default_rng(0)
    right = bytes(whole.encode(draw.normal(size=(64, 32)).astype(np.float16)))
    short = bytes(half.encode(draw.normal(size=(64, 16)).astype(np.float16)))
    for length in (len(right) - 1, len(right) + 1, 2**31 - 1):
        with pytest.raises(ValueError, match=f"states a length of {length} bytes and has {len(right)}"):
            whole.decode(np.frombuffer(right[:12] + length.to_bytes(4, "little") + right[16:], dtype=np.uint8))
    with pytest.raises(ValueError, match="takes 2048 bytes, a chunk 4096"):
        whole.decode(np.frombuffer(short, dtype=np.uint8))


@given(cut=st.integers(1, 500), flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), max_size=4))
def test_any_bytes_in_place_of_a_compressed_chunk_are_a_chunk_or_a_value_error(
    cut: int, flips: list[tuple[int, int]]
) -> None:
    array = ArrayLayout((64, 32), "float16", ("token", "width"), "zstd")
    draw = np.random.default_rng(0)
    payload = bytearray(array.encode(draw.normal(size=(64, 32)).astype(np.float16)))
    for position, bit in flips:
        payload[position % len(payload)] ^= 1 << bit
    for given_ in (payload, payload[:-cut]):
        with suppress(ValueError):
            assert array.decode(np.frombuffer(bytes(given_), dtype=np.uint8)).shape == (64, 32)


def test_a_chunk_is_compressed_to_the_same_bytes_in_whatever_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """blosc's own threads would put blocks where they happen to finish."""
    monkeypatch.setattr(numcodecs.blosc, "use_threads", None)  # as it is found where nobody has imported zarr
    array = ArrayLayout((64, 197, 768), "float16", ("item", "token", "width"), "zstd")
    chunk = np.random.default_rng(0).normal(size=array.chunk_shape).astype(np.float16)
    before = numcodecs.blosc.set_nthreads(4)
    try:
        made = [bytes(array.encode(chunk)) for _ in range(4)]
        thread = threading.Thread(target=lambda: made.append(bytes(array.encode(chunk))))
        thread.start()
        thread.join()
    finally:
        numcodecs.blosc.set_nthreads(before)
    assert len(set(made)) == 1


def test_chunks_that_cannot_be_compressed_are_refused_before_the_build(
    tiny_vit: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CaptureOptions(compression="lz4")
    largest = 64 * 5 * toys.WIDTH * 2
    monkeypatch.setattr(planning, "LARGEST_COMPRESSED", largest)
    plan(tiny_vit, toys.make_images(3), options)
    monkeypatch.setattr(planning, "LARGEST_COMPRESSED", largest - 1)
    with pytest.raises(SidebenchError, match=rf"--compression takes .* 64 rows of layers/embeddings are {largest:,} "):
        plan(tiny_vit, toys.make_images(3), options)
    assert layout.LARGEST_COMPRESSED == numcodecs.blosc.MAX_BUFFERSIZE


# The command


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("SIDEBENCH_HOME", str(tmp_path / "home"))
    return lambda *words: CliRunner().invoke(app, words)


@pytest.fixture
def inputs(models: Path, tmp_path: Path) -> list[str]:
    task = write_texts(tmp_path / "texts.jsonl", 60)
    return ["--backbone", f"hf:{models / 'bert'}", "--task", task, "--device", "cpu"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--dtype int9", "no storage dtype 'int9'. Did you mean 'int8'?"),
        ("--per-channel", "--per-channel is for --dtype int8 or fp8; float16 has no scales."),
        ("--per-channel --dtype bfloat16", "--per-channel is for --dtype int8 or fp8; bfloat16 has no scales."),
        ("--compression gzip", "no compression 'gzip'."),
        ("--views 1001", "--views wants 0 to 1000; found 1001."),
        ("--tokens grid:2", "--tokens grid:2 is for images; BertModel reads text. Type first:N or mean."),
        ("--tokens proj:32", "--tokens proj:32 keeps no less than this layer's width 32."),
        ("--tokens average", "no tokens 'average'; wanted all, cls, mean, cls+mean, grid:K, first:N, proj:M"),
    ],
)
def test_a_form_that_cannot_be_is_one_sentence(words: str, said: str, bench: Bench, inputs: list[str]) -> None:
    result = bench("cache", "build", *inputs, *words.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith(f"error: {said}")
    assert "Traceback" not in result.stderr


def test_a_build_prints_its_relative_errors_and_its_bytes_on_disk(bench: Bench, inputs: list[str]) -> None:
    words = "--dtype int8 --per-channel --compression zstd --views 2 --seed 5 --tokens first:4 --json"
    result = bench("cache", "build", *inputs, *words.split())
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert list(document["relative_errors"]) == document["layers"]
    assert all(0 < error < 1 for error in document["relative_errors"].values())
    assert "relative error on a sample: embeddings 0." in result.stderr
    assert "60 examples, each plain and in 2 views" in result.stderr
    assert "before compression" in result.stderr
    info = json.loads(bench("cache", "info", document["digest"], "--json").stdout)
    assert info["facts"]["form"] == {
        "tokens": "first:4",
        "dtype": "int8",
        "per_channel": True,
        "compression": "zstd",
        "views": 2,
        "seed": 5,
    }
    on_disk = sum(p.stat().st_size for p in Path(document["path"]).rglob("*") if p.is_file() and "/c/" in p.as_posix())
    assert document["bytes"] == on_disk
    again = json.loads(bench("cache", "build", *inputs, *words.split()).stdout)
    assert (again["status"], again["relative_errors"]) == ("exists", document["relative_errors"])
    assert json.loads(bench("cache", "verify", document["digest"], "--json").stdout)["ok"]


# Comparisons


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms-compared")
    write_texts(folder / "texts.jsonl", 60)
    return folder


@pytest.fixture
def compared(place: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Compares in this process; the options are those of the capture and, by their names, of the request."""

    monkeypatch.setattr(launching, "spawn", spawning())

    def run(*methods: str, tier: Any = "auto", **capture: Any) -> Outcome:
        inputs = Inputs(f"hf:{models / 'bert'}", f"jsonl:{place / 'texts.jsonl'}", device="cpu")
        settings = {"linear_probe": {"candidates": "2", "max_iterations": "60"}} if "linear_probe" in methods else {}
        request = Request(inputs, methods, settings, seeds=(0,), epochs=2, capture=CaptureOptions(**capture), tier=tier)
        return compare(request, home=place, cache_dir=place / "caches", runs_dir=place / "runs")

    return run


def _report(outcome: Outcome) -> str:
    table = rows(outcome)
    assert [row["error"] for row in table] == [None] * len(table)
    return markdown(outcome, table, comparisons(outcome))


def test_a_comparison_reads_means_in_int8_and_says_what_that_loses(compared: Callable[..., Outcome]) -> None:
    outcome = compared("linear_probe", "unipt", "bitfit", tokens="mean", dtype="int8")
    text = _report(outcome)
    assert "int8, tokens mean" in text
    assert "Relative error against the full activations, on a sample of the task: " in text
    assert "there is no augmentation" in text
    measured = outcome.records["unipt"][0].measured
    assert measured is not None
    assert (measured["cache_tier"], measured["cache_resident_bytes"]) == ("disk", 0)


def test_a_comparison_on_views_trains_live_and_cached_methods_and_says_what_deviates(
    compared: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = compared("linear_probe", "unipt", "bitfit", views=2, seed=3)
    text = _report(outcome)
    assert "Trained on 2 fixed augmented views of each example (seed 3; a view: each token dropped with" in text
    assert "Validation and test are on the plain examples." in text
    assert "there is no augmentation" not in text
    asked = {name: found[0].asked for name, found in outcome.records.items()}
    assert {name: (a["views"], a["view_seed"]) for name, a in asked.items()} == dict.fromkeys(asked, (2, 3))
    plain = compared("unipt")
    assert plain.folder != outcome.folder
    assert plain.records["unipt"][0].measured["losses"] != outcome.records["unipt"][0].measured["losses"]  # type: ignore[index]


def test_every_tier_gives_the_same_scores_to_the_digit_and_is_named_in_the_record(
    compared: Callable[..., Outcome],
) -> None:
    found = {}
    for tier, form in (("disk", {}), ("ram", {}), ("device", {}), ("auto", {"compression": "lz4"})):
        outcome = compared("unipt", tier=tier, **form)
        record = outcome.records["unipt"][0]
        assert record.error is None
        found[tier] = (record.measured, read_predictions(outcome.files[0].with_suffix(".npz"))[0])
    disk, logits = found["disk"]
    for tier, held in (("disk", "disk"), ("ram", "ram"), ("device", "device"), ("auto", "ram")):
        measured, predicted = found[tier]
        assert np.array_equal(predicted, logits)
        assert (measured["score"], measured["losses"]) == (disk["score"], disk["losses"])
        assert measured["cache_tier"] == held
        assert (measured["cache_resident_bytes"] > 0) == (held != "disk")


def test_a_tier_that_does_not_fit_is_a_failed_row_with_what_to_type(
    compared: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_store, "free_bytes", lambda _: 1000)
    outcome = compared("unipt", tier="ram", dtype="bfloat16")
    (row,) = rows(outcome)
    assert row["error"].startswith("--cache-in-ram: the layers take ")
    assert "1,000 are free on cpu. Leave it out, or keep fewer layers or tokens" in row["error"]


def test_notes_that_were_tampered_with_do_not_break_the_report(compared: Callable[..., Outcome]) -> None:
    outcome = compared("linear_probe", dtype="int8")
    assert outcome.store is not None
    for errors in ([1], {"a": "<b>"}, {"a": 10**400}, "x", 3, {"<script>": 0.25}):
        assert "<script>" not in markdown(
            Outcome(**{**outcome.__dict__, "store": {**outcome.store, "relative_errors": errors}}), rows(outcome), []
        )
