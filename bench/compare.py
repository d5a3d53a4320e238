"""Several methods, one backbone, one task: plan the runs, run each in its own interpreter, gather what they say."""

import dataclasses
import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters._base import CachedMethod, FittedMethod, Method
from ..adapters._registry import Named, find_method, known_methods
from ..cache.backbone import Architecture
from ..cache.build import BuildResult, CaptureOptions, Plan, Progress
from ..cache.catalog import read_notes
from ..cache.errors import SidebenchError, unknown
from ..cache.manifest import canonical_json
from .environment import environment
from .prepare import Inputs, Prepared, Say, plan_store, prepare, resolve_device, store_for
from .record import Job, RunRecord, read_record, write_json
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
    prepared = prepare(request.inputs, home=home, cache_dir=cache_dir, say=listener.say)
    parts = split_task(prepared.task, request.split_seed)
    chosen, skipped = _accepted(configured, prepared.backbone.arch, asked_for_all="all" in request.methods)
    planned = plan_store(prepared, request.capture)
    built = _store(request, prepared, planned, chosen, listener)
    facts = _data_facts(planned)
    folder = runs_dir / _folder_name(request, facts)
    folder.mkdir(parents=True, exist_ok=True)
    write_split(folder / SPLIT, parts)
    device = str(resolve_device(request.inputs.device, lambda _: None))
    jobs = {
        name: [_job(request, name, method, seed, prepared, facts, built, device) for seed in request.seeds]
        for name, method in chosen.items()
    }
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
        "accuracy",
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
    configured: Mapping[str, Method], arch: Architecture, *, asked_for_all: bool
) -> tuple[dict[str, Method], dict[str, str]]:
    skipped = {name: reason for name, m in configured.items() if (reason := m.refusal(arch)) is not None}
    if skipped and not asked_for_all:
        name, reason = next(iter(skipped.items()))
        raise SidebenchError(f"{name} cannot run on {arch.name}: {reason}.")
    return {name: m for name, m in configured.items() if name not in skipped}, skipped


def _store(
    request: Request, prepared: Prepared, planned: Plan, methods: Mapping[str, Method], listener: Listener
) -> BuildResult | None:
    """The store that the cached methods of this comparison read; None when there are none."""
    arch = prepared.backbone.arch
    wanted: set[str] = set()
    for method in methods.values():
        if isinstance(method, CachedMethod):
            wanted.update(method.layers(arch))
        elif isinstance(method, FittedMethod):
            wanted.add(arch.final_layer)
    if not wanted:
        return None
    ordered = tuple(layer for layer in prepared.backbone.layers if layer in wanted)
    return store_for(
        prepared,
        planned,
        ordered,
        may_build=request.may_build,
        progress=listener.build_progress,
        say=listener.say,
    )


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
    name: str,
    method: Method,
    seed: int,
    prepared: Prepared,
    facts: Mapping[str, str],
    built: BuildResult | None,
    device: str,
) -> Job:
    from_store = built is not None and method.kind == "cached"
    data = {**facts, "store": built.manifest.digest} if from_store and built is not None else dict(facts)
    inputs = request.inputs
    return Job(
        method=name,
        settings=dict(request.settings.get(find_method(name).key, {})),
        seed=seed,
        kind=method.kind,
        backbone=inputs.backbone,
        task=inputs.task,
        image_size=inputs.image_size,
        max_length=inputs.max_length,
        limit=inputs.limit,
        split_seed=request.split_seed,
        epochs=request.epochs,
        batch_size=request.batch_size,
        lrs=learning_rates(request.lr, method),
        precision=request.precision,
        device=device,
        data=data,
        num_outputs=len(prepared.task.classes),
        pooling=prepared.task.pooling,
        store=str(built.folder.absolute()) if from_store and built is not None else None,
    )


def learning_rates(lr: str | None, method: Method) -> tuple[float, ...]:
    """The rates a method tries: its default; three around it for "auto"; or those given."""
    default = getattr(method.config, "lr", None)
    if default is None:
        return (0.0,)  # solved, not stepped
    if lr is None:
        return (float(default),)
    if lr == "auto":
        return tuple(float(f"{default * factor:.3g}") for factor in AUTO_FACTORS)
    try:
        rates = tuple(float(text) for text in lr.split(","))
    except ValueError:
        raise SidebenchError(f"--lr wants auto, a number, or numbers with commas; found {lr!r}.") from None
    if not rates or any(not 0 < rate < float("inf") for rate in rates):
        raise SidebenchError(f"--lr wants positive numbers; found {lr!r}.")
    return tuple(dict.fromkeys(rates))


def _with_chosen_lr(
    jobs: Sequence[Job], folder: Path, fresh: bool, listener: Listener
) -> tuple[Sequence[Job], str | None]:
    """Jobs with one learning rate each: the one of best mean validation score over all seeds, never per seed.

    With them the error of a trial that failed, or None.
    """
    if len(jobs[0].lrs) == 1:
        return jobs, None
    scores: dict[float, list[float]] = {lr: [] for lr in jobs[0].lrs}
    for job in jobs:
        trials = [trial_path(folder, job, lr) for lr in job.lrs]
        if fresh or not all(path.exists() for path in trials):
            error = _spawn(job, folder, listener)
            if error is not None:
                return jobs, error
        for path, lr in zip(trials, job.lrs, strict=True):
            scores[lr].append(float(json.loads(path.read_text("utf-8"))["val_score"]))
    best = max(scores, key=lambda lr: statistics.mean(scores[lr]))
    listener.say(
        f"{jobs[0].method}: learning rate {best:g} chosen on validation, mean over seeds "
        + ", ".join(f"{lr:g}: {statistics.mean(values):.3f}" for lr, values in scores.items())
    )
    return [dataclasses.replace(job, lrs=(best,)) for job in jobs], None


def _run(job: Job, folder: Path, fresh: bool, listener: Listener) -> RunRecord:
    path = folder / f"{job.stem}.json"
    if path.exists() and not fresh:
        try:
            record = read_record(path)
        except SidebenchError:
            record = None  # damaged: run it again
        if record is not None and record.error is None:
            listener.run_event(job, {"event": "reused"})
            return record
    error = _spawn(job, folder, listener)
    return read_record(path) if error is None else _failed(job, error, folder)


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
        death = f"killed by signal {-code} (9 is often: out of memory)" if code < 0 else last
        message = f"{death}; see {log_path}"
    listener.run_event(job, {"event": "failed", "message": message})
    return message


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
