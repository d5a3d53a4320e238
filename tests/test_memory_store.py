"""Tiers: which one is chosen, what is refused, and that a store reads the same from each of them."""

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys

from sidebench.cache import layout, memory_store, zarr_store
from sidebench.cache.backbone import Backbone
from sidebench.cache.encode import tensors_of
from sidebench.cache.errors import SidebenchError
from sidebench.cache.memory_store import MemoryStore, free_bytes, place, tier_named
from sidebench.cache.zarr_store import ZarrStore

CPU = torch.device("cpu")
EXAMPLES = 100
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"dtype": "float16"},
    "compressed": {"dtype": "float16", "compression": "lz4"},
    "quantised": {"dtype": "int8", "per_channel": True},
    "fp8": {"dtype": "fp8", "tokens": "first:3"},
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Backbone) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_BYTES", 1)
        texts = toys.make_texts(EXAMPLES)
        return {name: toys.build_store(tiny_bert, texts, folder, **form).folder for name, form in FORMS.items()}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 1)


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, stores: dict[str, Path]) -> ZarrStore:
    return ZarrStore(stores[request.param])


def _free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(memory_store, "free_bytes", lambda _: count)


# Choosing


def test_auto_on_a_cpu_reads_from_disk_but_a_compressed_store_from_ram(stores: dict[str, Path]) -> None:
    found = {name: place(ZarrStore(stores[name]), ("blocks.1",), "auto", CPU) for name in FORMS}
    assert {name: placed.tier for name, placed in found.items()} == {
        "plain": "disk",
        "compressed": "ram",
        "quantised": "disk",
        "fp8": "disk",
    }
    assert found["compressed"].resident_bytes > 0
    assert (found["plain"].resident_bytes, found["plain"].why) == (0, "read from disk")


def test_auto_leaves_a_compressed_store_on_disk_where_it_takes_more_than_half_of_what_is_free(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compressed = ZarrStore(stores["compressed"])
    needed = compressed.bytes_of(("blocks.1",))
    for free, tier in ((2 * needed, "ram"), (2 * needed - 2, "disk"), (0, "disk")):
        _free(monkeypatch, free)
        assert place(compressed, ("blocks.1",), "auto", CPU).tier == tier


@pytest.mark.parametrize("tier", ["ram", "device"])
def test_what_does_not_fit_is_refused_with_what_to_type(
    store: ZarrStore, tier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = store.bytes_of(store.layers)
    _free(monkeypatch, needed - 1)
    option = {"ram": "--cache-in-ram", "device": "--cache-on-device"}[tier]
    with pytest.raises(SidebenchError, match=rf"^{option}: the layers take {needed:,} bytes and {needed - 1:,} are"):
        place(store, store.layers, tier, CPU)
    _free(monkeypatch, needed)
    assert place(store, store.layers, tier, CPU).tier == tier


def test_the_bytes_said_are_those_of_the_layers_asked_for_and_at_most_a_chunk_more(store: ZarrStore) -> None:
    for layers in (store.layers, ("blocks.0",)):
        placed = place(store, layers, "ram", CPU)
        whole = sum(tensor.nbytes for layer in layers for tensor in tensors_of(store.whole(layer)))
        arrays = [a for path, a in store.manifest.arrays().items() if path.partition("/")[2] in layers]
        assert whole <= placed.resident_bytes <= whole + sum(a.chunk_bytes for a in arrays)
        assert "MiB held in RAM" in placed.why


def test_what_is_in_ram_touches_no_file(stores: dict[str, Path], tmp_path: Path) -> None:
    index = np.random.default_rng(0).permutation(EXAMPLES)
    for name in FORMS:
        folder = Path(shutil.copytree(stores[name], tmp_path / stores[name].name))
        placed = place(ZarrStore(folder), ("blocks.1",), "ram", CPU)
        shutil.rmtree(folder)
        read = placed.store.read(index, ["blocks.1"]).layers["blocks.1"].float()
        assert torch.equal(read, ZarrStore(stores[name]).read(index, ["blocks.1"]).layers["blocks.1"].float())


def test_what_is_held_is_not_kept_a_second_time_as_decompressed_chunks(stores: dict[str, Path]) -> None:
    store = ZarrStore(stores["compressed"])
    place(store, store.layers, "ram", CPU)
    assert store._decoded_bytes == 0


def test_an_unknown_tier_suggests_the_nearest() -> None:
    assert [tier_named(t) for t in ("auto", "disk", "ram", "device")] == ["auto", "disk", "ram", "device"]
    with pytest.raises(SidebenchError, match="no tier of the cache 'rma'"):
        tier_named("rma")


def test_free_memory_is_what_the_control_group_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = free_bytes(CPU)
    assert whole > 0
    monkeypatch.setattr(memory_store, "_group_bytes", lambda: 1234)
    assert free_bytes(CPU) == 1234
    monkeypatch.setattr(memory_store, "_group_bytes", lambda: None)
    assert free_bytes(CPU) > 1234


# Reading


@pytest.mark.parametrize("tier", ["ram", "device"])
def test_every_tier_gives_the_same_bits(store: ZarrStore, tier: Any) -> None:
    held = place(ZarrStore(store.folder), store.layers, tier, CPU).store
    draw = np.random.default_rng(0)
    for index in (*np.array_split(draw.permutation(EXAMPLES), 5), np.array([3, 3, 99, 0])):
        one, two = store.read(index, store.layers), held.read(index, store.layers)
        assert torch.equal(one.mask, two.mask)
        for layer in store.layers:
            for a, b in zip(tensors_of(one.layers[layer]), tensors_of(two.layers[layer]), strict=True):
                assert a.dtype is b.dtype
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            assert torch.equal(one.layers[layer].float(), two.layers[layer].float())
            assert not one.layers[layer].float()[~one.mask].any()


def test_a_batch_from_memory_is_the_caller_s_to_change(store: ZarrStore) -> None:
    held = MemoryStore.of(store, store.layers, CPU)
    index = np.arange(8)
    before = {layer: value.float().clone() for layer, value in held.read(index, store.layers).layers.items()}
    for value in held.read(index, store.layers).layers.values():
        first, *_ = tensors_of(value)
        first.view(torch.uint8).zero_()
    after = held.read(index, store.layers).layers
    assert all(torch.equal(before[layer], after[layer].float()) for layer in store.layers)


def test_a_damaged_chunk_is_found_when_the_store_is_brought_to_ram(stores: dict[str, Path], tmp_path: Path) -> None:
    for name in FORMS:
        folder = Path(shutil.copytree(stores[name], tmp_path / stores[name].name))
        chunk = folder / "layers" / "blocks.1" / "c" / "1" / "0"
        damaged = bytearray(chunk.read_bytes())
        damaged[-9] ^= 1
        chunk.write_bytes(damaged)
        with pytest.raises(SidebenchError, match=r"is damaged: layers/blocks\.1/c/1/0"):
            place(ZarrStore(folder), ("blocks.1",), "ram", CPU)
        assert place(ZarrStore(folder), ("blocks.0",), "ram", CPU).tier == "ram"


# Decompressed chunks


def test_decompressed_chunks_are_let_go_of_beyond_a_limit(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ZarrStore(stores["compressed"])
    chunk = store.manifest.arrays()["layers/blocks.0"].chunk_bytes
    monkeypatch.setattr(zarr_store, "_DECODED_BYTES", 3 * chunk)
    wanted = store.whole("blocks.0").clone()
    for _ in range(3):
        for layer in store.layers:
            store.read(np.arange(EXAMPLES), [layer])
        held = sum(v.nbytes for (path, _), v in store._maps.items() if store._layouts[path].compression)
        assert held == store._decoded_bytes <= 3 * chunk
    assert torch.equal(store.whole("blocks.0"), wanted)


def test_one_chunk_larger_than_the_limit_is_still_read(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zarr_store, "_DECODED_BYTES", 1)
    store, whole = ZarrStore(stores["compressed"]), ZarrStore(stores["plain"])
    index = np.random.default_rng(0).permutation(EXAMPLES)
    read = [s.read(index, ["blocks.1"]).layers["blocks.1"] for s in (store, whole)]
    assert torch.equal(*read)


def test_threads_that_decompress_the_same_chunk_count_its_bytes_once(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ZarrStore(stores["compressed"])
    meeting = threading.Barrier(4, timeout=60)
    real = layout.ArrayLayout.decode

    def decode(self: Any, payload: Any) -> Any:
        meeting.wait()
        return real(self, payload)

    monkeypatch.setattr(layout.ArrayLayout, "decode", decode)
    threads = [threading.Thread(target=store._chunk, args=("layers/blocks.0", 0)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store._decoded_bytes == store.manifest.arrays()["layers/blocks.0"].chunk_bytes


# A CUDA device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FORMS)
def test_the_device_gives_the_same_bits(name: str, stores: dict[str, Path]) -> None:
    store, cuda = ZarrStore(stores[name]), torch.device("cuda")
    placed = place(store, store.layers, "auto", cuda)
    assert placed.tier == "device"
    index = np.random.default_rng(0).permutation(EXAMPLES)
    one, two = store.read(index, store.layers), placed.store.read(index, store.layers)
    for layer in store.layers:
        assert all(tensor.device.type == "cuda" for tensor in tensors_of(two.layers[layer])[:1])
        assert torch.equal(one.layers[layer].float(), two.to(CPU).layers[layer].float())
