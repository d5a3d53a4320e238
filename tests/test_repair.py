"""Repair: every kind of damage ends in the bytes of the build, or is refused in a sentence."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
from outcomes import write_texts
from typer.testing import CliRunner

from sidebench.bench.repair import inputs_from
from sidebench.cache import layout
from sidebench.cache.backbone import Backbone
from sidebench.cache.build import CaptureOptions, Plan, build, plan
from sidebench.cache.errors import SidebenchError
from sidebench.cache.lock import builder_lock
from sidebench.cache.manifest import Manifest
from sidebench.cache.planning import options_of
from sidebench.cache.repair import Repair, repair
from sidebench.cache.zarr_store import verify
from sidebench.cli import app

BATCH = 24
Damage = Callable[[Path], object]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 1)


@pytest.fixture(params=["text", "image"])
def planned(request: pytest.FixtureRequest, tiny_bert: Backbone, tiny_vit: Backbone) -> Plan:
    if request.param == "text":
        return plan(tiny_bert, toys.make_texts(200), CaptureOptions(batch_size=BATCH))
    return plan(tiny_vit, toys.make_images(200), CaptureOptions(batch_size=BATCH))


@pytest.fixture
def folder(planned: Plan, tmp_path: Path) -> Path:
    return build(planned, tmp_path, notes={"backbone": "toy"}).folder


def _mend(folder: Path, planned: Plan) -> Repair:
    """Repair with a plan made anew from what the manifest says."""

    def replan(manifest: Manifest) -> Plan:
        return plan(planned.backbone, planned.examples, options_of(manifest))

    return repair(folder, replan)


def _needs_nothing(_: Manifest) -> Plan:
    pytest.fail("it asked for the backbone")


def _flip(file: Path, position: int = 7) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[position] ^= 4
    file.write_bytes(damaged)


def _swap(one: Path, two: Path) -> None:
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def _chunks(folder: Path, array: str) -> list[Path]:
    return sorted(p for p in (folder / array / "c").rglob("*") if p.is_file())


def _make_folder(file: Path) -> None:
    file.unlink()
    (file / "deep").mkdir(parents=True)
    (file / "deep" / "x").write_text("x")


def _link_away(array: Path) -> None:
    """The array's folder is elsewhere and a link leads there."""
    elsewhere = array.parents[2] / "elsewhere"
    shutil.move(array, elsewhere)
    array.symlink_to(elsewhere)


def _keep_manifest_only(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("manifest.json", "notes.json"):
            path.unlink()


DAMAGE: dict[str, Damage] = {
    "a flipped bit in a layer": lambda f: _flip(_chunks(f, "layers/blocks.0")[1]),
    "a flipped bit in a checksum": lambda f: _flip(_chunks(f, "layers/blocks.1")[0], -1),
    "a truncated chunk": lambda f: os.truncate(_chunks(f, "layers/blocks.1")[-1], 100),
    "an empty chunk": lambda f: os.truncate(_chunks(f, "layers/blocks.1")[0], 0),
    "a missing chunk": lambda f: _chunks(f, "layers/embeddings")[2].unlink(),
    "a layer that is gone": lambda f: shutil.rmtree(f / "layers/blocks.0"),
    "swapped chunks": lambda f: _swap(*_chunks(f, "layers/blocks.0")[:2]),
    "swapped layers": lambda f: _swap(_chunks(f, "layers/blocks.0")[0], _chunks(f, "layers/blocks.1")[0]),
    "a chunk that became a folder": lambda f: _make_folder(_chunks(f, "layers/blocks.0")[0]),
    "pooled rows": lambda f: _flip(_chunks(f, "pooled/blocks.1")[1]),
    "pooled rows and their layer": lambda f: [_flip(_chunks(f, f"{a}/blocks.1")[0]) for a in ("pooled", "layers")],
    "targets": lambda f: _flip(_chunks(f, "targets")[0]),
    "ids": lambda f: (f / "ids.json").write_text("[]"),
    "no ids": lambda f: (f / "ids.json").unlink(),
    "metadata": lambda f: (f / "layers/blocks.1/zarr.json").write_text("{}"),
    "no group": lambda f: (f / "zarr.json").unlink(),
    "an extra file": lambda f: (f / "layers/blocks.0/surplus.txt").write_text("?"),
    "an extra chunk": lambda f: (f / "layers/blocks.0/c/99").mkdir() or (f / "layers/blocks.0/c/99/0").write_text("?"),
    "a leftover": lambda f: (f / "layers/blocks.0/zarr.json.partial").write_text("?"),
    "an extra link": lambda f: (f / "passwd").symlink_to("/etc/passwd"),
    "a layer that is a link": lambda f: _link_away(f / "layers/blocks.0"),
    "everything but the manifest": _keep_manifest_only,
}
NO_BACKBONE = {"pooled rows", "metadata", "no group", "an extra file", "an extra chunk", "a leftover", "an extra link"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_kind_of_damage_ends_in_the_bytes_of_the_build(planned: Plan, folder: Path, damage: str) -> None:
    whole = toys.files_of(folder)
    DAMAGE[damage](folder)
    bad = verify(folder)
    assert bad, "the damage is seen"
    result = repair(folder, _needs_nothing) if damage in NO_BACKBONE else _mend(folder, planned)
    assert result.bad == []
    assert result.repaired >= len(bad)
    assert toys.files_of(folder) == whole
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert verify(folder) == []


def test_offsets_are_mended(tiny_bert: Backbone, tmp_path: Path) -> None:
    planned = plan(tiny_bert, toys.make_texts(200), CaptureOptions(batch_size=BATCH))
    folder = build(planned, tmp_path, notes={}).folder
    whole = toys.files_of(folder)
    for damaged in (["offsets"], ["offsets", "pooled/blocks.0"]):
        for array in damaged:
            _flip(_chunks(folder, array)[0])
        assert _mend(folder, planned) == Repair([], len(damaged))
        assert toys.files_of(folder) == whole


def test_a_whole_store_needs_no_repair_and_no_backbone(folder: Path) -> None:
    assert repair(folder, _needs_nothing) == Repair([], 0)


def test_what_is_removed_is_never_what_a_link_leads_to(planned: Plan, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (folder / "layers" / "mine").symlink_to(tmp_path / "mine")
    assert repair(folder, _needs_nothing).bad == []
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_only_the_batches_of_bad_chunks_are_computed(
    planned: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    real = planned.backbone.preprocess.collate
    _flip(_chunks(folder, "layers/blocks.0")[1])
    replanned = plan(planned.backbone, planned.examples, options_of(planned.manifest))
    monkeypatch.setattr(
        planned.backbone.preprocess, "collate", lambda prepared: batches.append(len(prepared)) or real(prepared)
    )
    assert repair(folder, lambda _: replanned).bad == []
    overlapping = 64 // 2 // BATCH + 2 if planned.lengths is not None else 64 // BATCH + 2
    assert 1 <= len(batches) <= overlapping
    assert len(batches) < len(planned.examples) // BATCH


def test_a_chunk_that_comes_out_differently_is_not_written(planned: Plan, folder: Path, tiny_vit: Backbone) -> None:
    """As on a machine that rounds differently: the same facts, other bits."""
    damaged = _chunks(folder, "layers/blocks.1")[1]
    _flip(damaged)
    _flip(_chunks(folder, "layers/embeddings")[0])
    before = damaged.read_bytes()
    shifted = planned.backbone.blocks[1].register_forward_hook(
        lambda _, args, out: tuple(o * (1 + 2**-9) for o in out) if isinstance(out, tuple) else out * (1 + 2**-9)
    )
    try:
        result = _mend(folder, planned)
    finally:
        shifted.remove()
    assert [(b.layer, b.chunk.partition("/")[0]) for b in result.bad] == [("blocks.1", "1")]
    assert "other bytes than the manifest states" in result.bad[0].reason
    assert result.repaired == 1
    assert damaged.read_bytes() == before


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_repair_that_is_killed_is_gone_on_with(planned: Plan, folder: Path, moment: str) -> None:
    whole = toys.files_of(folder)
    for file in [*_chunks(folder, "layers/blocks.0"), folder / "zarr.json"]:
        _flip(file)
    pid = os.fork()
    if not pid:
        real = os.replace

        def last(source: Any, target: Any) -> None:
            if moment == "after":
                real(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

        os.replace = last
        _mend(folder, planned)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert _mend(folder, planned).bad == []
    assert toys.files_of(folder) == whole


def test_a_store_that_is_being_built_or_repaired_is_left_alone(folder: Path) -> None:
    with builder_lock(folder), pytest.raises(SidebenchError, match="is building this cache right now"):
        repair(folder, _needs_nothing)


def test_a_store_that_was_never_finished_is_not_repaired(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(SidebenchError, match="not a complete activation cache"):
        repair(folder, _needs_nothing)


def test_other_weights_and_other_data_are_named(planned: Plan, folder: Path) -> None:
    _flip(_chunks(folder, "layers/blocks.0")[0])
    examples = toys.make_texts(200, seed=1) if planned.lengths is not None else toys.make_images(200, seed=1)
    with pytest.raises(SidebenchError, match=r"cannot be repaired .* dataset\.sha256: wanted [0-9a-f]{60}"):
        repair(folder, lambda m: plan(planned.backbone, examples, options_of(m)))


# Notes are untrusted


@pytest.mark.parametrize(
    "notes",
    [
        {},
        {"backbone": "hf:x"},
        {"backbone": ["hf:x"], "task": "csv:y"},
        {"backbone": "hf:x", "task": 3},
        {"backbone": "hf:x", "task": ""},
        {"backbone": "hf:x", "task": "csv:y", "limit": "many"},
        {"backbone": "hf:x", "task": "csv:y", "limit": -1},
        {"backbone": "hf:x", "task": "csv:y", "image_size": True},
        {"backbone": "hf:x", "task": "csv:y", "max_length": 1.5},
    ],
)
def test_notes_that_do_not_say_what_it_was_built_from_are_refused(notes: dict[str, Any]) -> None:
    with pytest.raises(SidebenchError, match=r"notes\.json does not say which backbone and task"):
        inputs_from(notes, Path("x.zarr"), own=True)


def test_a_store_from_elsewhere_names_no_code_to_run() -> None:
    notes = {"backbone": "module:evil:make", "task": "csv:y", "device": "rm -rf"}
    with pytest.raises(SidebenchError, match="which would run code"):
        inputs_from(notes, Path("x.zarr"), own=False)
    assert inputs_from(notes, Path("x.zarr"), own=True).device == "auto"


# The command


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("SIDEBENCH_HOME", str(tmp_path / "home"))
    return lambda *words: CliRunner().invoke(app, words)


@pytest.fixture
def built(bench: Any, models: Path, tmp_path: Path) -> Path:
    words = ["--task", write_texts(tmp_path / "texts.jsonl", 300), "--limit", "200", "--max-length", "9"]
    result = bench("cache", "build", "--backbone", f"hf:{models / 'bert'}", *words, "--json", "--batch-size", "24")
    assert result.exit_code == 0, result.stderr
    return Path(json.loads(result.stdout)["path"])


def test_the_command_repairs_from_the_notes_alone(bench: Any, built: Path) -> None:
    whole = toys.files_of(built)
    assert json.loads(bench("cache", "verify", str(built), "--repair", "--json").stdout)["repaired"] == 0
    _flip(_chunks(built, "layers/blocks.0")[1])
    (built / "ids.json").unlink()
    plain = bench("cache", "verify", str(built), "--json")
    assert (plain.exit_code, len(json.loads(plain.stdout)["bad"])) == (1, 2)
    result = bench("cache", "verify", str(built), "--repair", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 0, result.stderr
    assert (document["ok"], document["bad"], document["repaired"]) == (True, [], 2)
    assert toys.files_of(built) == whole


def test_the_command_names_what_has_changed_since(bench: Any, built: Path, tmp_path: Path) -> None:
    _flip(_chunks(built, "layers/blocks.0")[1])
    before = toys.files_of(built)
    write_texts(tmp_path / "texts.jsonl", 299)
    result = bench("cache", "verify", str(built), "--repair")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "dataset.sha256: wanted" in result.stderr.splitlines()[-1]
    (tmp_path / "texts.jsonl").unlink()
    result = bench("cache", "verify", str(built), "--repair")
    assert result.exit_code == 2
    assert "was built from what is not at hand now: " in result.stderr.splitlines()[-1]
    assert toys.files_of(built) == before
