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
from .record import Job, RunRecord, read_predictions, read_record, trial_path, write_json


@dataclass(frozen=True)
class Listener:
    """Who is told what happens: sentences, build progress (done, total), and the events of each run."""

    say: Say = lambda _: None
    build_progress: Progress = lambda done, total: None
    run_event: Callable[[Job, Mapping[str, Any]], None] = lambda job, event: None


def chosen_lr(trials: Sequence[Job], folder: Path, fresh: bool, listener: Listener) -> tuple[float | None, str | None]:
    """The learning rate of best mean validation score over these jobs, never one per seed.

    A rate that diverged in any of them is out. Or None, and the error of a trial that failed.
    """
    lrs = trials[0].lrs
    if len(lrs) == 1:
        return lrs[0], None
    scores: dict[float, list[float | None]] = {lr: [] for lr in lrs}
    for job in trials:
        paths = [trial_path(folder, job, lr) for lr in lrs]
        if fresh or not all(path.exists() for path in paths):
            (error,) = spawn([job], folder, listener)
            if error is not None:
                return None, error
        for path, lr in zip(paths, lrs, strict=True):
            scores[lr].append(json.loads(path.read_text("utf-8"))["val_score"])
    means = {lr: _mean(found) for lr, found in scores.items()}
    finite = {lr: mean for lr, mean in means.items() if mean is not None}
    if not finite:
        return None, f"the loss is not finite at any learning rate of {', '.join(f'{lr:g}' for lr in scores)}."
    best = max(finite, key=lambda lr: finite[lr])
    over = "mean over seeds" if trials[0].shots is None else f"{trials[0].shots} shots, seed {trials[0].seed}"
    listener.say(
        f"{trials[0].method}: learning rate {best:g} chosen on validation, {over}: "
        + ", ".join(f"{lr:g}: {'diverged' if mean is None else f'{mean:.3f}'}" for lr, mean in means.items())
    )
    return best, None


def _mean(scores: Sequence[float | None]) -> float | None:
    """None when one is."""
    known = [score for score in scores if score is not None]
    return statistics.mean(known) if len(known) == len(scores) else None


def run_all(jobs: Sequence[Job], folder: Path, fresh: bool, listener: Listener) -> list[RunRecord]:
    """The records of jobs of one method and seed: those it has, unless `fresh`, else of runs in one new interpreter."""
    found: dict[str, RunRecord] = {}
    for job in jobs:
        if not fresh and (record := _finished(folder / f"{job.stem}.json")) is not None:
            listener.run_event(job, {"event": "reused"})
            found[job.stem] = record
    left = [job for job in jobs if job.stem not in found]
    errors = spawn(left, folder, listener) if left else []
    for job, error in zip(left, errors, strict=True):
        path = folder / f"{job.stem}.json"
        found[job.stem] = read_record(path) if error is None else failed(job, error, folder)
    return [found[job.stem] for job in jobs]


def _finished(path: Path) -> RunRecord | None:
    """The record of a run that is whole; one that failed or was damaged since is run again."""
    if not path.exists():
        return None
    try:
        record = read_record(path)
        kept = ("contributions", "ids") if record.asked.get("goal") else ("logits", "targets")
        read_predictions(path.with_suffix(".npz"), kept)
    except SidebenchError:
        return None
    return record if record.error is None and record.measured is not None else None


def spawn(jobs: Sequence[Job], folder: Path, listener: Listener) -> list[str | None]:
    """Run jobs in turn in a fresh interpreter; for each None, or the sentence that says how it failed.

    Where it dies in the midst, those that it had not begun go to another one.
    """
    errors: list[str | None] = []
    while len(errors) < len(jobs):
        errors += _spawn_once(jobs[len(errors) :], folder, listener)
    return errors


def _spawn_once(jobs: Sequence[Job], folder: Path, listener: Listener) -> list[str | None]:
    """The outcome of each job that was begun, in order; of the first one at least."""
    # A name of this process's own: another comparison of the same job would remove the file before it is read.
    jobs_path = folder / f"{jobs[0].stem}.{os.getpid()}.job.json"
    write_json(jobs_path, [dataclasses.asdict(job) for job in jobs])
    log_path = folder / f"{jobs[0].stem}.log"
    ended: list[str | None] = []  # an error or None for each that ended
    begun = 0
    command = [sys.executable, "-P", "-m", f"{__package__}.worker", str(jobs_path)]
    with open(log_path, "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, encoding="utf-8", errors="replace")
        try:
            assert process.stdout is not None
            for line in process.stdout:
                event = _event_of(line)
                begun += event.get("event") == "started"
                if event.get("event") in ("ended", "failed"):
                    ended.append(event.get("message"))
                listener.run_event(jobs[max(begun - 1, 0)], event)
            code = process.wait()
        finally:
            process.kill()  # after Ctrl-C; a process that has ended does not mind
            process.wait()
            jobs_path.unlink(missing_ok=True)
    if code == 0 and len(ended) == len(jobs):
        log_path.unlink(missing_ok=True)
        return ended
    if begun != len(ended) or not ended:  # it died, and did not say why
        lines = log_path.read_text("utf-8", "replace").strip().splitlines()
        last = lines[-1] if lines else "no message"
        message = f"{_death(-code) if code < 0 else last}; see {log_path}"
        listener.run_event(jobs[len(ended)], {"event": "failed", "message": message})
        ended.append(message)
    return ended


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
