"""Records on a disk that is full, and beside another comparison that writes into the same folder."""

import dataclasses
import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from sidebench.bench import launch, record
from sidebench.bench.launch import Listener
from sidebench.bench.record import Job, write_json
from sidebench.cache.errors import SidebenchError


@pytest.fixture
def job() -> Job:
    return Job(
        method="unipt",
        settings={},
        seed=0,
        kind="cached",
        backbone="hf:b",
        task="csv:t",
        image_size=None,
        max_length=None,
        limit=None,
        split_seed=0,
        epochs=1,
        batch_size=2,
        lrs=(0.1,),
        precision="fp32",
        device="cpu",
        data={},
        num_outputs=2,
        pooling="mean",
    )


ENDS = """#!/bin/sh
echo '{"event": "started"}'
echo '{"event": "ended"}'
"""


@pytest.fixture
def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for Python when a run is started; write a shell script there."""
    path = tmp_path / "interpreter"
    path.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def test_a_full_disk_is_a_sentence_and_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "a.json", 1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record.os, "replace", full)
    with pytest.raises(
        SidebenchError, match=r"cannot write .*a\.json \(No space left on device\); make room.*--runs-dir"
    ):
        write_json(tmp_path / "a.json", 2)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "1\n")]


def test_two_processes_do_not_write_the_same_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with record.replacing(tmp_path / "a.json") as mine:
        monkeypatch.setattr(record.os, "getpid", lambda: 1)
        with record.replacing(tmp_path / "a.json") as theirs:
            assert mine != theirs
            mine.write_text("mine")
            theirs.write_text("theirs")
    assert (tmp_path / "a.json").read_text() == "mine"


def test_a_finished_run_leaves_the_job_of_another_comparison_where_its_worker_will_look(
    tmp_path: Path, job: Job, interpreter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter.write_text(ENDS)
    waiting: list[Path] = []

    def started(_: Job, event: Any) -> None:  # while this process starts its run, another one writes the same job
        if event["event"] == "started" and not waiting:
            waiting.extend(tmp_path.glob("*.job.json"))
            with monkeypatch.context() as patch:
                patch.setattr(launch.os, "getpid", lambda: 1)
                assert launch.spawn([job], tmp_path, Listener()) == [None]
            assert waiting[0].exists()

    assert launch.spawn([job], tmp_path, Listener(run_event=started)) == [None]
    assert not list(tmp_path.glob("*.job.json"))


def test_a_library_that_prints_what_is_not_utf8_does_not_end_the_comparison(
    tmp_path: Path, job: Job, interpreter: Path
) -> None:
    interpreter.write_text(ENDS.replace("\n", "\nprintf '\\377\\n'\n", 1))
    heard: list[Any] = []
    told = Listener(run_event=lambda _, event: heard.append(event.get("event")))
    assert launch.spawn([job], tmp_path, told) == [None]
    assert heard[-2:] == ["started", "ended"]


def test_an_interpreter_that_leaves_early_without_an_error_has_failed(
    tmp_path: Path, job: Job, interpreter: Path
) -> None:
    interpreter.write_text("#!/bin/sh\n")
    others = [dataclasses.replace(job, seed=seed) for seed in (0, 1)]
    errors = launch.spawn(others, tmp_path, Listener())
    assert len(errors) == 2
    assert all(error is not None and "no message" in error for error in errors)


@pytest.mark.parametrize(
    ("method", "changes", "stem"),
    [
        ("unipt", {}, "unipt-seed0-"),
        ("./my methods/mine.py", {}, "mine-seed0-"),
        ("lora@last4", {"shots": 2}, "lora-last4-2shot-seed0-"),
        ("vpt@runs/pre.safetensors", {"shots": 1, "init": {"sha256": "x"}}, "vpt-pretrained-1shot-seed0-"),
        ("lora@last4@a/b.safetensors", {"init": {"sha256": "x"}}, "lora-last4-pretrained-seed0-"),
    ],
)
def test_a_record_is_named_after_the_method_and_not_after_its_file(
    job: Job, method: str, changes: dict[str, Any], stem: str
) -> None:
    assert dataclasses.replace(job, method=method, **changes).stem.startswith(stem)
