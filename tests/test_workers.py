"""Building with several processes: the same bytes, one writer per chunk, and any death leaves what resumes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from outcomes import write_texts

from sidebench.bench import build_workers
from sidebench.bench.build_workers import LocalWorkers
from sidebench.bench.prepare import Inputs, Tower, build_store, only_tower, plan_store, prepare
from sidebench.cache import layout
from sidebench.cache.backbone import Backbone
from sidebench.cache.build import BuildResult, CaptureOptions, Plan, build, plan
from sidebench.cache.errors import SidebenchError
from sidebench.cache.fidelity import examine
from sidebench.cache.fill import compute, stored_channels
from sidebench.cache.lock import builder_lock
from sidebench.cache.shares import Chunks, batches_for, share_out
from sidebench.cache.writer import StoreWriter
from sidebench.cache.zarr_store import ZarrStore

BATCH = 24  # no divisor of a chunk's 64 rows, so batches straddle chunks
SECONDS = 90.0
# The worker of the product, with the least chunk, 64 rows, so that a toy store has many.
TINY = "import sys; from sidebench.cache import layout; layout.CHUNK_BYTES = 1; "
WORKER = TINY + "from sidebench.bench.build_worker import main; sys.exit(main())"
PARENT = TINY + (
    f"from sidebench.bench import build_workers; build_workers.COMMAND = (sys.executable, '-c', {WORKER!r}); "
    "from sidebench.cli import app; app()"
)
SLOW = """
import time
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, pixels):
        time.sleep(SECONDS)
        tokens = self.patch(pixels).flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

def make():
    return Slow()
"""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 1)
    monkeypatch.setattr(build_workers, "COMMAND", (sys.executable, "-c", WORKER))


def _bytes(folder: Path) -> dict[str, bytes]:
    return toys.files_of(folder, without=["notes.json"])


# Shares


QUANTISED: dict[str, Any] = {"dtype": "int8", "per_channel": True}


@pytest.fixture(params=["text", "image", "text int8 channels views"])
def planned(request: pytest.FixtureRequest, tiny_bert: Backbone, tiny_vit: Backbone) -> Plan:
    if request.param == "text":
        return plan(tiny_bert, toys.make_texts(200), CaptureOptions(batch_size=BATCH))
    if request.param != "image":
        return plan(tiny_bert, toys.make_texts(100), CaptureOptions(batch_size=BATCH, **QUANTISED, views=1))
    return plan(tiny_vit, toys.make_images(300), CaptureOptions(batch_size=BATCH))


def _all_chunks(planned: Plan) -> dict[str, list[int]]:
    arrays = planned.manifest.arrays()
    return {path: list(range(a.chunks)) for path, a in arrays.items() if path.startswith(("layers/", "scales/"))}


@pytest.mark.parametrize("workers", [1, 2, 3, 1000])
def test_every_chunk_has_one_owner_and_a_border_batch_is_all_that_two_compute(planned: Plan, workers: int) -> None:
    chunks = _all_chunks(planned)
    shares = share_out(planned.manifest, chunks, planned.offsets, workers)
    owners = Counter((path, chunk) for share in shares for path, owned in share.items() for chunk in owned)
    assert owners == Counter((path, chunk) for path, owned in chunks.items() for chunk in owned)
    assert 1 <= len(shares) <= workers
    assert all(share for share in shares)
    batches = [batches_for(planned.manifest, share, planned.offsets) for share in shares]
    assert sorted({start for part in batches for start in part}) == list(range(0, planned.manifest.items, BATCH))
    if workers < 10:
        assert sum(map(len, batches)) <= len(range(0, planned.manifest.items, BATCH)) + len(shares) - 1


def test_the_shares_are_about_equal(planned: Plan) -> None:
    sizes = [sum(map(len, s.values())) for s in share_out(planned.manifest, _all_chunks(planned), planned.offsets, 2)]
    assert max(sizes) - min(sizes) <= len(_all_chunks(planned))  # one more of every array


@dataclass
class Here:
    """Workers that run one after the other in this process, the last share first; `skip` loses one of them."""

    planned: Plan
    folder: Path
    count: int
    skip: int | None = None

    def run(self, shares: Sequence[Chunks], lock: int, computed: Callable[[int], None]) -> tuple[float, float]:
        for number, share in reversed(list(enumerate(shares))):
            if number != self.skip:
                writer = StoreWriter(self.folder, self.planned.manifest, only=share)
                compute(self.planned, writer, stored_channels(self.planned.manifest, writer), lambda *_: None)
                writer.finish()
        computed(10**9)
        return 1.0, 1.0


def _build(planned: Plan, cache_dir: Path, **options: Any) -> BuildResult:
    return build(planned, cache_dir, notes={"backbone": "toy"}, **options)


@pytest.mark.parametrize("count", [2, 3, 1000])
def test_shares_written_apart_make_the_bytes_of_one_build(planned: Plan, tmp_path: Path, count: int) -> None:
    whole = _bytes(_build(planned, tmp_path / "one").folder)
    folder = tmp_path / "many" / planned.manifest.folder_name
    seen: list[tuple[int, int]] = []
    here = Here(planned, folder, count)
    result = _build(planned, tmp_path / "many", workers=here, progress=lambda *now: seen.append(now))
    assert (result.status, result.resumed_chunks) == ("built", 0)
    assert result.forward_seconds == 1.0, "the workers' own: no forward was left to this process"
    assert _bytes(folder) == whole
    assert (seen[0], seen[-1]) == ((0, planned.manifest.items), (planned.manifest.items,) * 2)


def test_a_share_that_was_never_written_is_written_by_the_parent(planned: Plan, tmp_path: Path) -> None:
    whole = _bytes(_build(planned, tmp_path / "one").folder)
    here = Here(planned, tmp_path / "many" / planned.manifest.folder_name, 3, skip=1)
    assert _bytes(_build(planned, tmp_path / "many", workers=here).folder) == whole


def test_a_worker_writes_its_share_and_nothing_else(planned: Plan, tmp_path: Path) -> None:
    share = share_out(planned.manifest, _all_chunks(planned), planned.offsets, 3)[1]
    writer = StoreWriter(tmp_path / "x.zarr", planned.manifest, only=share)
    compute(planned, writer, examine(planned).channels, lambda *_: None)
    writer.finish()
    arrays = planned.manifest.arrays()
    wanted = {f"{path}/{arrays[path].chunk_key(chunk)}" for path, owned in share.items() for chunk in owned}
    assert set(toys.files_of(tmp_path / "x.zarr")) == wanted


# Real processes


def _prepared(backbone: str, task: str, cache_dir: Path, **form: Any) -> tuple[Tower, Plan]:
    prepared = prepare(Inputs(backbone, task, device="cpu"), home=cache_dir, cache_dir=cache_dir, say=lambda _: None)
    tower = only_tower(prepared)
    return tower, plan_store(tower, CaptureOptions(batch_size=BATCH, **form))


def _with_workers(tower: Tower, planned: Plan, count: int = 2) -> BuildResult:
    workers = LocalWorkers(count, tower, planned, tower.cache_dir)
    return build_store(tower, planned, progress=lambda *_: None, say=lambda _: None, workers=workers)


def _pictures(folder: Path, count: int = 260) -> str:
    images = toys.make_images(count)
    for index, (image, target) in enumerate(zip(images.raw, images.targets, strict=True)):
        (folder / str(target)).mkdir(parents=True, exist_ok=True)
        image.save(folder / str(target) / f"{index}.png")
    return f"folder:{folder}"


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float, Path], tuple[Tower, Plan]]:
    """A backbone without transformers, so that a worker starts fast, that takes `seconds` per batch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    task = _pictures(tmp_path / "pictures")

    def made(seconds: float, cache_dir: Path, **form: Any) -> tuple[Tower, Plan]:
        (tmp_path / "slowly.py").write_text(SLOW.replace("SECONDS", str(seconds)))
        sys.modules.pop("slowly", None)
        return _prepared("module:slowly:make", task, cache_dir, **form)

    return made


@pytest.mark.parametrize("form", [{}, {**QUANTISED, "views": 1, "compression": "zstd"}], ids=["plain", "int8 views"])
def test_two_processes_make_the_bytes_of_one(slow: Any, tmp_path: Path, form: dict[str, Any]) -> None:
    one = _with_workers(*slow(0, tmp_path / "one", **form), count=1)
    two = _with_workers(*slow(0, tmp_path / "two", **form))
    assert (two.status, two.resumed_chunks) == ("built", 0)
    assert two.forward_seconds is not None
    assert _bytes(two.folder) == _bytes(one.folder)
    assert ZarrStore(two.folder).verify() == []


@pytest.mark.long
@pytest.mark.parametrize("modality", ["text", "image", "text int8 channels views"])
@pytest.mark.parametrize("count", [2, 3])
def test_processes_make_the_bytes_of_one_with_real_loaders(
    modality: str, count: int, models: Path, tmp_path: Path
) -> None:
    text = modality.startswith("text")
    form = {} if modality in ("text", "image") else {**QUANTISED, "views": 1}
    task = write_texts(tmp_path / "texts.jsonl", 300) if text else _pictures(tmp_path / "pictures", 150)
    backbone = f"hf:{models / ('bert' if text else 'vit')}"
    one = _with_workers(*_prepared(backbone, task, tmp_path / "one", **form), count=1)
    more = _with_workers(*_prepared(backbone, task, tmp_path / "more", **form), count=count)
    assert more.status == "built"
    assert _bytes(more.folder) == _bytes(one.folder)


def test_a_worker_that_is_killed_is_named_and_the_next_build_resumes(slow: Any, tmp_path: Path) -> None:
    whole = _bytes(_with_workers(*slow(0, tmp_path / "one"), count=1).folder)
    tower, planned = slow(0.3, tmp_path / "two")
    killer = threading.Thread(target=_kill_a_worker, args=(planned, tmp_path / "two"))
    killer.start()
    with pytest.raises(
        SidebenchError, match=r"build worker \d of 2 was killed by SIGKILL .*run the same command again"
    ):
        _with_workers(tower, planned)
    killer.join()
    assert not _children(os.getpid())
    result = _with_workers(*slow(0, tmp_path / "two"), count=1)
    assert result.status == "resumed"
    assert _bytes(result.folder) == whole


def test_a_worker_s_refusal_reaches_the_user_as_its_sentence(slow: Any, tmp_path: Path) -> None:
    tower, planned = slow(0, tmp_path / "two")
    (tmp_path / "slowly.py").write_text(SLOW.replace("SECONDS", "0").replace("manual_seed(0)", "manual_seed(1)"))
    with pytest.raises(SidebenchError, match="the backbone or the task changed while the build began"):
        _with_workers(tower, planned)
    assert not _children(os.getpid())


def test_a_worker_that_breaks_says_its_last_line(slow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_workers, "COMMAND", (sys.executable, "-c", "raise RuntimeError('no such luck')"))
    with pytest.raises(SidebenchError, match=r"build worker \d of 2 failed: RuntimeError: no such luck\. What is"):
        _with_workers(*slow(0, tmp_path / "two"))


@pytest.mark.long
def test_workers_stop_when_their_parent_is_killed_and_the_lock_is_theirs_until_then(slow: Any, tmp_path: Path) -> None:
    whole = _bytes(_with_workers(*slow(0, tmp_path / "one"), count=1).folder)
    _, planned = slow(0.3, tmp_path / "two")
    parent = _start_parent(tmp_path)
    folder = tmp_path / "two" / planned.manifest.folder_name
    _wait_for(lambda: _layer_chunks(folder) > 0)
    workers = _children(parent.pid)
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    with builder_lock(folder):  # waits for them to be gone
        assert not any(_runs(pid) for pid in workers)
    result = _with_workers(*slow(0, tmp_path / "two"), count=1)
    assert result.status == "resumed"
    assert _bytes(result.folder) == whole


@pytest.mark.long
def test_a_build_of_two_processes_killed_at_random_moments_ends_byte_identical(slow: Any, tmp_path: Path) -> None:
    whole = _bytes(_with_workers(*slow(0, tmp_path / "one"), count=1).folder)
    _, planned = slow(0.05, tmp_path / "two")
    folder = tmp_path / "two" / planned.manifest.folder_name
    draw = np.random.default_rng(int(time.time()))
    for _ in range(8):
        parent = _start_parent(tmp_path)
        _wait_for(lambda: len(_children(parent.pid)) == 2 or parent.poll() is not None)  # noqa: B023
        time.sleep(draw.uniform(2, 6))
        for pid in [*draw.permutation(_children(parent.pid))[: draw.integers(0, 2)].tolist(), parent.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        parent.wait()
    result = _with_workers(*slow(0, tmp_path / "two"))
    assert result.status in ("built", "resumed", "exists")
    assert _bytes(folder) == whole


def _start_parent(tmp_path: Path) -> subprocess.Popen[bytes]:
    words = ["cache", "build", "--backbone", "module:slowly:make", "--task", f"folder:{tmp_path / 'pictures'}"]
    words += ["--batch-size", str(BATCH), "--cache-dir", str(tmp_path / "two"), "--workers", "2", "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, *words], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )


def _kill_a_worker(planned: Plan, cache_dir: Path) -> None:
    _wait_for(lambda: _layer_chunks(cache_dir / planned.manifest.folder_name) > 0)
    os.kill(_children(os.getpid())[0], signal.SIGKILL)


def _layer_chunks(folder: Path) -> int:
    return sum(not p.name.endswith(".partial") for p in folder.glob("layers/*/c/*/0/0"))


def _children(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children() if child.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []


def _runs(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, "it never happens"
        time.sleep(0.02)
