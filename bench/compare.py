"""Several methods, one backbone, one task: plan the runs, run each in its own interpreter, gather what they say."""

import dataclasses
import hashlib
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..adapters._base import CachedMethod, FittedMethod, Method
from ..adapters._registry import Named, find_method, known_methods
from ..cache.backbone import Architecture
from ..cache.build import BuildResult, CaptureOptions, Plan, Progress
from ..cache.catalog import read_notes
from ..cache.errors import SidebenchError, unknown
from ..cache.manifest import canonical_json
from .environment import environment
from .prepare import Inputs, Prepared, Say, plan_store, prepare, resolve_device, store_for
from .record import Job, RunRecord, read_predictions, read_record, write_json
from .tasks.base import Split
from .tasks.split import split as split_task
from .worker import SPLIT, trial_path, write_split

AUTO_FACTORS = (0.3, 1.0, 3.0)  # --lr auto: the method's own default and its neighbours, equally many for every method


@dataclass(frozen=True)
class Request:
    """What `bench compare` was asked for."""

    inputs: Inputs
    methods: tuple[str, ...]
    settings: Mapping[str, Mapping[str, str]]  # method key -> option -> value as typed
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 10
    batch_size: int = 32
    lr: str | None = None  # None: each method's default; "auto"; or "X,Y,Z"
    split_seed: int = 0
    precision: str = "fp32"
    capture: CaptureOptions = field(default_factory=CaptureOptions)
    may_build: bool = True
    fresh: bool = False


@dataclass(frozen=True)
class Outcome:
    """Everything a report is made of: records by method in the order asked, and what could not run."""

    request: Request
    folder: Path
    records: Mapping[str, Sequence[RunRecord]]
    files: Sequence[Path]
    skipped: Mapping[str, str]
    sizes: Mapping[str, int]
    score_name: str
    store: Mapping[str, Any] | None


@dataclass(frozen=True)
class Listener:
    """Who is told what happens: sentences, build progress (done, total), and the events of each run."""

    say: Say = lambda _: None
    build_progress: Progress = lambda done, total: None
    run_event: Callable[[Job, Mapping[str, Any]], None] = lambda job, event: None


def compare(
    request: Request, *, home: Path, cache_dir: Path, runs_dir: Path, listener: Listener | None = None
) -> Outcome:
    """Run the comparison, reusing every finished run of equal facts.

    Raises SidebenchError before anything runs when a method, option, task or backbone is wrong. A run that fails later
    keeps its place with its error.
    """
    listener = listener or Listener()
    named = [find_method(text) for text in _expanded(request.methods)]
    _check_settings(request.settings, named)
    configured = {n.text: n.configured(request.settings.get(n.key, {})) for n in named}
    rates = {name: learning_rates(request.lr, method) for name, method in configured.items()}
    prepared = prepare(request.inputs, home=home, cache_dir=cache_dir, say=listener.say)
    parts = split_task(prepared.task, request.split_seed)
    chosen, skipped = _accepted(configured, prepared.backbone.arch, by_name=request.methods)
    planned = plan_store(prepared, request.capture)
    facts = _data_facts(planned)
    folder = runs_dir / _folder_name(request, facts)
    _begin_folder(folder, parts)
    built = _store(request, prepared, planned, chosen, listener)
    device = str(resolve_device(request.inputs.device, lambda _: None))
    jobs = {
        n.text: [_job(request, n, rates[n.text], seed, prepared, facts, built, device) for seed in request.seeds]
        for n in named
        if n.text in chosen
    }
    score_name = prepared.task.score_name
    del prepared, planned  # the workers load what they need; this process need not hold a backbone meanwhile
    records: dict[str, list[RunRecord]] = {}
    files: list[Path] = []
    for name, method_jobs in jobs.items():
        final, failure = _with_chosen_lr(method_jobs, folder, request.fresh, listener)
        records[name] = [
            _run(job, folder, request.fresh, listener) if failure is None else _failed(job, failure, folder)
            for job in final
        ]
        files += [folder / f"{job.stem}.json" for job in final]
    return Outcome(
        request,
        folder,
        records,
        files,
        skipped,
        parts.sizes(),
        score_name,
        None if built is None else _store_facts(built),
    )


def _expanded(methods: Sequence[str]) -> tuple[str, ...]:
    if not methods:
        raise SidebenchError(f"no methods given; name some of {', '.join(known_methods())}, or all.")
    return tuple(dict.fromkeys(name for text in methods for name in (known_methods() if text == "all" else (text,))))


def _check_settings(settings: Mapping[str, Mapping[str, str]], named: Sequence[Named]) -> None:
    keys = {n.key for n in named}
    for key in settings:
        if key not in keys:
            raise unknown("compared method in --set", key, keys)


def _accepted(
    configured: Mapping[str, Method], arch: Architecture, *, by_name: Sequence[str]
) -> tuple[dict[str, Method], dict[str, str]]:
    """Methods that can run and why the others cannot; one asked for by its name, not by "all", must."""
    skipped = {name: reason for name, m in configured.items() if (reason := m.refusal(arch)) is not None}
    for name, reason in skipped.items():
        if name in by_name:
            raise SidebenchError(f"{name} cannot run on {arch.name}: {reason}.")
    return {name: m for name, m in configured.items() if name not in skipped}, skipped


def _store(
    request: Request, prepared: Prepared, planned: Plan, methods: Mapping[str, Method], listener: Listener
) -> BuildResult | None:
    """The store that the cached methods of this comparison read; None when there are none."""
    arch = prepared.backbone.arch
    wanted: list[str] = []
    for method in methods.values():
        if isinstance(method, CachedMethod):
            wanted += method.layers(arch)
        elif isinstance(method, FittedMethod):
            wanted.append(arch.final_layer)
    if not wanted:
        return None
    return store_for(
        prepared,
        planned,
        tuple(dict.fromkeys(wanted)),
        may_build=request.may_build,
        progress=listener.build_progress,
        say=listener.say,
    )


def _begin_folder(folder: Path, parts: Split) -> None:
    """Before anything long: a folder that cannot be written is found out now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_split(folder / SPLIT, parts)
    except OSError as error:
        raise SidebenchError(f"cannot write to {folder}: {error.strerror}. Choose another with --runs-dir.") from error


def _data_facts(planned: Plan) -> dict[str, str]:
    """Hashes of what the runs are about, so that a record is reused only for the same data and weights."""
    manifest = planned.manifest
    return {
        "dataset": str(manifest.dataset["sha256"]),
        "weights": str(manifest.backbone["weights_sha256"]),
        "preprocessing": hashlib.sha256(canonical_json(manifest.preprocessing).encode()).hexdigest(),
    }


def _folder_name(request: Request, facts: Mapping[str, str]) -> str:
    """One folder per backbone, task and protocol: methods and seeds added later join their comparison."""
    about = {
        "data": facts,
        "split_seed": request.split_seed,
        "epochs": request.epochs,
        "batch_size": request.batch_size,
        "lr": request.lr,
        "precision": request.precision,
    }
    digest = hashlib.sha256(canonical_json(about).encode()).hexdigest()[:8]
    return f"{_slug(request.inputs.backbone)}-{_slug(request.inputs.task)}-{digest}"


def _slug(uri: str) -> str:
    last = uri.split("?")[0].rstrip("/").replace(":", "/").rsplit("/", 1)[-1]
    return "".join(c if c.isalnum() else "-" for c in last)[:40] or "run"


def _job(
    request: Request,
    named: Named,
    lrs: tuple[float, ...],
    seed: int,
    prepared: Prepared,
    facts: Mapping[str, str],
    built: BuildResult | None,
    device: str,
) -> Job:
    store = built if named.cls.kind == "cached" else None
    data = {**facts, "method": _code_sha256(named), "sidebench": __version__}
    if store is not None:
        data["store"] = store.manifest.digest
    inputs = request.inputs
    return Job(
        method=named.text,
        settings=dict(request.settings.get(named.key, {})),
        seed=seed,
        kind=named.cls.kind,
        backbone=inputs.backbone,
        task=inputs.task,
        image_size=inputs.image_size,
        max_length=inputs.max_length,
        limit=inputs.limit,
        split_seed=request.split_seed,
        epochs=request.epochs,
        batch_size=request.batch_size,
        lrs=lrs,
        precision=request.precision,
        device=device,
        data=data,
        num_outputs=len(prepared.task.classes),
        pooling=prepared.task.pooling,
        store=None if store is None else str(store.folder.absolute()),
    )


def _code_sha256(named: Named) -> str:
    """Hash of the method's file: once it is edited, its finished runs are those of another method."""
    path = getattr(sys.modules[named.cls.__module__], "__file__", None)
    return hashlib.sha256(Path(path).read_bytes() if path else b"").hexdigest()


def learning_rates(lr: str | None, method: Method) -> tuple[float, ...]:
    """The rates a method tries: its default; three around it for "auto"; or those given."""
    given = _typed_rates(lr) if lr not in (None, "auto") else ()
    default = getattr(method.config, "lr", None)
    if default is None:
        return (0.0,)  # solved, not stepped
    if lr == "auto":
        return tuple(float(f"{default * factor:.3g}") for factor in AUTO_FACTORS)
    return given or (float(default),)


def _typed_rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(dict.fromkeys(float(rate) for rate in text.split(",")))
    except ValueError:
        raise SidebenchError(f"--lr wants auto, a number, or numbers with commas; found {text!r}.") from None
    if any(not 0 < rate < float("inf") for rate in rates):
        raise SidebenchError(f"--lr wants positive numbers; found {text!r}.")
    return rates


def _with_chosen_lr(
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
            error = _spawn(job, folder, listener)
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


def _run(job: Job, folder: Path, fresh: bool, listener: Listener) -> RunRecord:
    path = folder / f"{job.stem}.json"
    if not fresh and (record := _finished(path)) is not None:
        listener.run_event(job, {"event": "reused"})
        return record
    error = _spawn(job, folder, listener)
    return read_record(path) if error is None else _failed(job, error, folder)


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


def _spawn(job: Job, folder: Path, listener: Listener) -> str | None:
    """Run a job in a fresh interpreter; returns None, or the sentence that says how it failed."""
    job_path = folder / f"{job.stem}.job.json"
    write_json(job_path, dataclasses.asdict(job))
    log_path = folder / f"{job.stem}.log"
    listener.run_event(job, {"event": "started"})
    message: str | None = None
    command = [sys.executable, "-m", f"{__package__}.worker", str(job_path)]
    with open(log_path, "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
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


def _failed(job: Job, error: str, folder: Path) -> RunRecord:
    record = RunRecord(dataclasses.asdict(job), None, environment(), error)
    write_json(folder / f"{job.stem}.json", dataclasses.asdict(record))
    return record


def _store_facts(built: BuildResult) -> dict[str, Any]:
    notes = read_notes(built.folder)
    return {
        "path": str(built.folder),
        "digest": built.manifest.digest,
        "bytes": built.manifest.stored_bytes,
        "dtype": built.manifest.dtype,
        "layers": list(built.manifest.layers),
        "build_seconds": notes.get("build_seconds"),
        "status": built.status,
    }
