"""Run jobs, each in a fresh interpreter, and choose learning rates from their trials."""

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.errors import SidebenchError
from ..cache.fill import Progress
from .environment import environment
from .prepare import Say
from .record import Job, RunRecord, read_predictions, read_record, write_json
from .worker import trial_path


@dataclass(frozen=True)
class Listener:
    """Who is told what happens: sentences, build progress (done, total), and the events of each run."""

    say: Say = lambda _: None
    build_progress: Progress = lambda done, total: None
    run_event: Callable[[Job, Mapping[str, Any]], None] = lambda job, event: None


def with_chosen_lr(
    jobs: Sequence[Job], folder: Path, fresh: bool, listener: Listener
) -> tuple[Sequence[Job], str | None]:
    """Jobs with one learning rate each: the one of best mean validation score over all seeds, never per seed.

    A rate that diverged with any seed is out. With the jobs the error of a trial that failed, or None.
    """
    if len(jobs[0].lrs) == 1:
        return jobs, None
    scores: dict[float, list[float | None]] = {lr: [] for lr in jobs[0].lrs}
    for job in jobs:
        trials = [trial_path(folder, job, lr) for lr in job.lrs]
        if fresh or not all(path.exists() for path in trials):
            error = spawn(job, folder, listener)
            if error is not None:
                return jobs, error
        for path, lr in zip(trials, job.lrs, strict=True):
            scores[lr].append(json.loads(path.read_text("utf-8"))["val_score"])
    means = {lr: _mean(found) for lr, found in scores.items()}
    finite = {lr: mean for lr, mean in means.items() if mean is not None}
    if not finite:
        return jobs, f"the loss is not finite at any learning rate of {', '.join(f'{lr:g}' for lr in scores)}."
    best = max(finite, key=lambda lr: finite[lr])
    listener.say(
        f"{jobs[0].method}: learning rate {best:g} chosen on validation, mean over seeds "
        + ", ".join(f"{lr:g}: {'diverged' if mean is None else f'{mean:.3f}'}" for lr, mean in means.items())
    )
    return [dataclasses.replace(job, lrs=(best,)) for job in jobs], None


def _mean(scores: Sequence[float | None]) -> float | None:
    """None when one is."""
    known = [score for score in scores if score is not None]
    return statistics.mean(known) if len(known) == len(scores) else None


def run_once(job: Job, folder: Path, fresh: bool, listener: Listener) -> RunRecord:
    """The record of a job: the one it has, unless `fresh`, else of a run in a new interpreter."""
    path = folder / f"{job.stem}.json"
    if not fresh and (record := _finished(path)) is not None:
        listener.run_event(job, {"event": "reused"})
        return record
    error = spawn(job, folder, listener)
    return read_record(path) if error is None else failed(job, error, folder)


def _finished(path: Path) -> RunRecord | None:
    """The record of a run that is whole; one that failed or was damaged since is run again."""
    if not path.exists():
        return None
    try:
        record = read_record(path)
        read_predictions(path.with_suffix(".npz"))
    except SidebenchError:
        return None
    return record if record.error is None and record.measured is not None else None


def spawn(job: Job, folder: Path, listener: Listener) -> str | None:
    """Run a job in a fresh interpreter; returns None, or the sentence that says how it failed."""
    # A name of this process's own: another comparison of the same job would remove the file before it is read.
    job_path = folder / f"{job.stem}.{os.getpid()}.job.json"
    write_json(job_path, dataclasses.asdict(job))
    log_path = folder / f"{job.stem}.log"
    listener.run_event(job, {"event": "started"})
    message: str | None = None
    command = [sys.executable, "-P", "-m", f"{__package__}.worker", str(job_path)]
    with open(log_path, "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, encoding="utf-8", errors="replace")
        try:
            assert process.stdout is not None
            for line in process.stdout:
                event = _event_of(line)
                if event.get("event") == "error":
                    message = str(event.get("message"))
                else:
                    listener.run_event(job, event)
            code = process.wait()
        finally:
            process.kill()  # after Ctrl-C; a process that has ended does not mind
            process.wait()
            job_path.unlink(missing_ok=True)
    if code == 0:
        log_path.unlink(missing_ok=True)
        return None
    if message is None:
        lines = log_path.read_text("utf-8", "replace").strip().splitlines()
        last = lines[-1] if lines else "no message"
        message = f"{_death(-code) if code < 0 else last}; see {log_path}"
    listener.run_event(job, {"event": "failed", "message": message})
    return message


def _death(number: int) -> str:
    why = " (often for want of memory)" if number == signal.SIGKILL else ""
    return f"killed by {signal.Signals(number).name}{why}"


def _event_of(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}  # a library that prints
    return event if isinstance(event, dict) else {}


def failed(job: Job, error: str, folder: Path) -> RunRecord:
    """Keep the place of a run that failed, with its error."""
    record = RunRecord(dataclasses.asdict(job), None, environment(), error)
    write_json(folder / f"{job.stem}.json", dataclasses.asdict(record))
    return record
