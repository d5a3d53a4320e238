"""The catalog: what a cache folder holds, how a store is named, and what may be removed."""

import dataclasses
import threading
from pathlib import Path

import pytest
import toys

from sidebench.cache import catalog
from sidebench.cache.backbone import Backbone
from sidebench.cache.build import BuildResult, CaptureOptions, plan
from sidebench.cache.errors import SidebenchError
from sidebench.cache.lock import builder_lock
from sidebench.cache.zarr_store import ZarrStore


@pytest.fixture
def store(tiny_bert: Backbone, tmp_path: Path) -> BuildResult:
    return toys.build_store(tiny_bert, toys.make_texts(20), tmp_path)


@pytest.fixture
def another(tiny_bert: Backbone, tmp_path: Path) -> BuildResult:
    return toys.build_store(tiny_bert, toys.make_texts(20), tmp_path, dtype="float16")


def test_every_store_of_a_folder_is_listed_with_its_facts_and_size(store: BuildResult, another: BuildResult) -> None:
    listed = catalog.entries(store.folder.parent)
    assert [e.folder for e in listed] == sorted([store.folder, another.folder])
    for entry in listed:
        assert entry.manifest is not None
        assert entry.notes["backbone"] == "toy"
        assert entry.bytes == sum(len(payload) for payload in toys.files_of(entry.folder).values())
        assert entry.problem is None


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert catalog.entries(tmp_path / "nothing") == []


def test_an_unfinished_store_is_listed_without_facts(store: BuildResult) -> None:
    (store.folder / "manifest.json").unlink()
    (entry,) = catalog.entries(store.folder.parent)
    assert (entry.manifest, entry.problem) == (None, None)
    assert entry.bytes > 0


def test_a_store_with_a_broken_manifest_is_listed_with_its_problem(store: BuildResult) -> None:
    (store.folder / "manifest.json").write_text("{")
    (entry,) = catalog.entries(store.folder.parent)
    assert entry.manifest is None
    assert "is no manifest" in str(entry.problem)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_broken_notes_are_no_notes(store: BuildResult, text: str) -> None:
    (store.folder / "notes.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert catalog.entry(store.folder).notes == {}


def test_listing_while_files_come_and_go_does_not_fail(store: BuildResult) -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            (store.folder / "x.partial").write_text("")
            (store.folder / "x.partial").unlink()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(50):
            assert catalog.entries(store.folder.parent)
    finally:
        stop.set()
        thread.join()


# Naming


@pytest.mark.parametrize("length", [4, 16, 64])
def test_a_store_is_found_by_any_prefix_of_its_digest(store: BuildResult, another: BuildResult, length: int) -> None:
    assert catalog.locate(store.manifest.digest[:length], store.folder.parent) == store.folder


def test_a_store_is_found_by_the_name_of_its_folder_and_by_path(store: BuildResult) -> None:
    assert catalog.locate(store.folder.name, store.folder.parent) == store.folder
    assert catalog.locate(str(store.folder), Path("elsewhere")) == store.folder


def test_a_prefix_of_several_names_all_of_them(tmp_path: Path) -> None:
    for name in ("abcd0001", "abcd0002", "ffff0000"):
        (tmp_path / f"{name}.zarr").mkdir()
    with pytest.raises(SidebenchError, match=r"'abcd' matches 2 caches: abcd0001\.zarr, abcd0002\.zarr"):
        catalog.locate("abcd", tmp_path)


def test_an_unknown_name_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "abcd0001.zarr").mkdir()
    with pytest.raises(SidebenchError, match=r"no cache in .* 'abdc0001'\. Did you mean 'abcd0001'\?"):
        catalog.locate("abdc0001", tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "nothing/at/all", "\0"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "abcd0001.zarr").mkdir()
    with pytest.raises(SidebenchError, match="no cache in"):
        catalog.locate(name, tmp_path / ".")


# Finding by facts


def test_the_nearest_store_is_named_with_every_field_wanted_and_found(
    tiny_bert: Backbone, store: BuildResult, tmp_path: Path
) -> None:
    wanted = plan(tiny_bert, toys.make_texts(20), CaptureOptions(dtype="bfloat16", batch_size=4)).manifest
    assert catalog.find_store(tmp_path, wanted) is None
    said = catalog.nearest_mismatch(tmp_path, wanted)
    assert said == (
        f"the nearest is {store.folder.name}, which differs in "
        "forward.batch_size: wanted 4, found 8; form.dtype: wanted bfloat16, found float32"
    )


def test_layers_that_the_nearest_store_lacks_are_named(tiny_bert: Backbone, tmp_path: Path) -> None:
    toys.build_store(tiny_bert, toys.make_texts(20), tmp_path, layers=("embeddings", "blocks.1"))
    wanted = plan(tiny_bert, toys.make_texts(20), CaptureOptions(dtype="float32", batch_size=8)).manifest
    assert "layers: wanted blocks.0 as well, found embeddings, blocks.1" in catalog.nearest_mismatch(tmp_path, wanted)


def test_the_closer_of_two_stores_is_the_nearest(
    tiny_bert: Backbone, store: BuildResult, another: BuildResult, tmp_path: Path
) -> None:
    for nearest in (store, another):
        options = CaptureOptions(dtype=nearest.manifest.form.dtype, batch_size=4)
        wanted = plan(tiny_bert, toys.make_texts(20), options).manifest
        assert f"the nearest is {nearest.folder.name}" in catalog.nearest_mismatch(tmp_path, wanted)


def test_an_empty_folder_says_so(store: BuildResult, tmp_path: Path) -> None:
    assert "holds no complete cache" in catalog.nearest_mismatch(tmp_path / "empty", store.manifest)


def test_a_broken_neighbour_does_not_keep_the_right_store_from_being_found(
    tiny_bert: Backbone, store: BuildResult, another: BuildResult, tmp_path: Path
) -> None:
    (another.folder / "manifest.json").write_text("{")
    found = catalog.find_store(tmp_path, store.manifest)
    assert found is not None
    assert found.folder == store.folder


def test_other_examples_are_another_store(store: BuildResult, tmp_path: Path) -> None:
    other = dataclasses.replace(store.manifest, dataset={**store.manifest.dataset, "sha256": "0" * 64})
    assert catalog.find_store(tmp_path, other) is None


# Removing


def test_removing_takes_the_store_and_nothing_beside_it(store: BuildResult, another: BuildResult) -> None:
    catalog.remove(store.folder)
    assert not store.folder.exists()
    assert ZarrStore(another.folder).verify() == []


def test_an_unfinished_store_may_be_removed(store: BuildResult) -> None:
    (store.folder / "manifest.json").unlink()
    catalog.remove(store.folder)
    assert not store.folder.exists()


@pytest.mark.parametrize("name", ["photos", "photos.zarr"])
def test_a_foreign_folder_is_not_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "holiday.jpg").write_bytes(b"dear")
    with pytest.raises(SidebenchError, match="does not look like an activation cache; nothing was removed"):
        catalog.remove(tmp_path / name)
    assert (tmp_path / name / "holiday.jpg").read_bytes() == b"dear"


def test_a_link_to_a_store_is_not_removed(store: BuildResult, tmp_path: Path) -> None:
    link = tmp_path / "link.zarr"
    link.symlink_to(store.folder)
    with pytest.raises(SidebenchError, match="nothing was removed"):
        catalog.remove(link)
    assert ZarrStore(store.folder).verify() == []


def test_a_store_that_is_being_built_is_not_removed(store: BuildResult) -> None:
    with builder_lock(store.folder), pytest.raises(SidebenchError, match="is building this cache right now"):
        catalog.remove(store.folder)
    assert ZarrStore(store.folder).verify() == []


def test_a_removal_that_is_cut_short_leaves_an_unfinished_store(
    store: BuildResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog.shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        catalog.remove(store.folder)
    with pytest.raises(SidebenchError, match="not a complete activation cache"):
        ZarrStore(store.folder)
