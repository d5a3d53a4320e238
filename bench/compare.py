"""Several methods, one backbone, one task: plan the runs, run each in its own interpreter, gather what they say."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters._base import CachedMethod, FittedMethod, LiveMethod, Method, PrefixMethod
from ..adapters._registry import Named
from ..cache.build import BuildResult, CaptureOptions, Plan
from ..cache.catalog import read_notes
from ..cache.errors import SidebenchError
from ..cache.manifest import Manifest, missing_layers
from ..cache.views import DESCRIPTION
from .choice import chosen_methods, family_options, layers_read, refusal
from .goals.known import Labels, layers_of
from .goals.labels import goal_facts, labels_of, write_labels
from .jobs import LR_SHOTS, compared_job, data_facts, folder_name, learning_rates
from .launch import Listener, chosen_lr, failed, run_all
from .outcome import Outcome, Request, Runs
from .prepare import Prepared, Tower, plan_store, prepare, store_for
from .pretrained import initialisations
from .record import Job, split_name, write_split
from .tasks.base import AnswerTask, AnyTask, BoxTask, PairTask, Split, Task
from .tasks.few_shot import few_shot
from .tasks.load import family_of
from .tasks.split import split as split_task

_NO_NETWORK = "it trains inside the backbone, and imported features have no network behind them"


def compare(
    request: Request, *, home: Path, cache_dir: Path, runs_dir: Path, listener: Listener | None = None
) -> Outcome:
    """Run the comparison, reusing every finished run of equal facts.

    Raises SidebenchError before anything runs when a method, option, task or backbone is wrong. A run that fails later
    keeps its place with its error.
    """
    listener = listener or Listener()
    if request.shots and min(request.shots) < 1:
        raise SidebenchError(f"--shots wants numbers of 1 or more; found {min(request.shots)}.")
    if request.shots and request.lr is None:
        request = replace(request, lr="auto")  # what starts elsewhere wants another rate; few shots make trials cheap
    family = family_of(request.inputs.task)
    asked = chosen_methods(request.methods, request.settings, family)
    named = [n for n, _ in asked]
    configured = {n.text: method for n, method in asked}
    rates = {name: learning_rates(request.lr, method) for name, method in configured.items()}
    prepared = prepare(request.inputs, home=home, cache_dir=cache_dir, say=listener.say)
    task, towers = prepared.task, prepared.towers
    _check_offered(request, named, task)
    parts = split_task(task, request.split_seed)
    planned = {name: plan_store(tower, request.capture) for name, tower in towers.items() if tower.imported is None}
    manifests = {name: _source(tower, planned.get(name)).manifest for name, tower in towers.items()}
    for manifest in manifests.values():
        check_pooling(task, manifest)
    chosen, skipped = _accepted(configured, prepared, manifests, by_name=request.methods)
    initial = {}
    if isinstance(task, Task):
        initial = initialisations(
            {n: method for n, method in asked if n.text in chosen},
            task,
            parts,
            manifests[""],
            mappings=request.map_init,
            allow_overlap=request.allow_overlap,
            say=listener.say,
        )
    goal = goal_facts(task, {name: tower.arch for name, tower in towers.items()})
    labels = labels_of(task, {name: tower.backbone for name, tower in towers.items() if tower.backbone is not None})
    facts = data_facts(manifests, task, labels, goal)
    folder = runs_dir / folder_name(request, facts)
    drawn = _few_shots(request, task, parts, choosing=any(len(tried) > 1 for tried in rates.values()))
    splits = {split_name(None, 0): parts, **{split_name(*key): found for key, found in drawn.items()}}
    _begin_folder(folder, splits, labels)
    built = _stores(request, prepared, planned, chosen, goal, listener)
    jobs = {n: compared_job(request, n, rates[n.text], task, facts, built, goal) for n in named if n.text in chosen}
    jobs = {n: replace(job, init=initial.get(n.text)) for n, job in jobs.items()}
    score_name, sizes = task.score_name, parts.sizes()
    if isinstance(task, PairTask):
        sizes["test_items"] = len(np.unique(task.text.targets[parts.test]))
    view = DESCRIPTION[next(iter(task.streams.values())).modality] if request.capture.views else ""
    # The workers load what they need; this process need not hold a backbone meanwhile.
    del prepared, planned, towers, task
    runs = [found for job in jobs.values() for found in _run(request, job, folder, listener)]
    return Outcome(
        request,
        folder,
        runs,
        skipped,
        sizes,
        score_name,
        _cache_facts(built),
        view,
        family_options(list(jobs), request.settings, family, lr_typed=request.lr not in (None, "auto")),
        {shots: found.sizes() for (shots, _), found in drawn.items() if shots in request.shots},
        _twins(list(jobs)),
    )


def _twins(named: Sequence[Named]) -> dict[str, str]:
    texts = {n.text for n in named}
    return {n.text: n.twin for n in named if n.twin is not None and n.twin in texts}


def _check_offered(request: Request, named: Sequence[Named], task: AnyTask) -> None:
    """Raise SidebenchError for what is offered for tasks with classes and asked for of another."""
    if isinstance(task, Task):
        return
    starts = [n.text for n in named if n.init is not None]
    for asked, what in (
        (bool(request.shots), "--shots draws examples of each class"),
        (bool(starts), f"{', '.join(starts)}: modules are pre-trained for classes"),
        (bool(request.capture.views), "--views augments examples that have a class"),
    ):
        if asked:
            raise SidebenchError(f"{what}, and {task.uri} has none; leave it out.")


def _few_shots(request: Request, task: AnyTask, parts: Split, *, choosing: bool) -> dict[tuple[int, int], Split]:
    """The parts of each (shots, seed), and of what learning rates are chosen on, where any are."""
    if not request.shots:
        return {}
    assert isinstance(task, Task)  # see _check_offered
    wanted = [(shots, seed) for shots in request.shots for seed in request.seeds]
    found = {key: few_shot(task, parts, *key) for key in wanted}
    if choosing and (key := (LR_SHOTS, request.seeds[0])) not in found:
        try:
            found[key] = few_shot(task, parts, *key)
        except SidebenchError as error:
            raise SidebenchError(f"learning rates are chosen at {LR_SHOTS} shots: {error} Or type one --lr.") from None
    return found


def _run(request: Request, job: Job, folder: Path, listener: Listener) -> list[Runs]:
    """A method's runs: its learning rate is chosen first, then every seed has an interpreter for all its shots."""
    shots = request.shots or (None,)
    trials = [replace(job, seed=seed) for seed in request.seeds]
    if request.shots:
        trials = [replace(job, seed=request.seeds[0], shots=LR_SHOTS)]
    lr, error = chosen_lr(trials, folder, request.fresh, listener)
    lrs = job.lrs if lr is None else (lr,)
    by_seed = [[replace(job, seed=seed, shots=k, lrs=lrs) for k in shots] for seed in request.seeds]
    records = [
        run_all(jobs, folder, request.fresh, listener)
        if error is None
        else [failed(job, error, folder) for job in jobs]
        for jobs in by_seed
    ]
    return [
        Runs(job.method, k, [found[i] for found in records], [folder / f"{jobs[i].stem}.json" for jobs in by_seed])
        for i, k in enumerate(shots)
    ]


def check_pooling(task: AnyTask, manifest: Manifest) -> None:
    """Raise SidebenchError where the form does not keep the tokens that the task's head reads."""
    tokens = manifest.form.tokens
    if isinstance(task, BoxTask) and tokens != "all":
        raise SidebenchError(
            f"{task.uri} reads every token of text and queries, and --tokens {tokens} does not keep it."
        )
    if isinstance(task, AnswerTask) and tokens != "all" and not tokens.startswith(("cls", "first:")):
        raise SidebenchError(f"{task.uri} reads the first token, which --tokens {tokens} does not keep as it is.")
    if getattr(task, "pooling", None) == "cls" and manifest.form.tokens == "mean":
        raise SidebenchError(f"{task.uri} pools the class token, which --tokens mean drops; type cls+mean.")


def _source(tower: Tower, planned: Plan | None) -> Plan | BuildResult:
    found = planned or tower.imported
    assert found is not None
    return found


def _accepted(
    configured: Mapping[str, Method],
    prepared: Prepared,
    manifests: Mapping[str, Manifest],
    *,
    by_name: Sequence[str],
) -> tuple[dict[str, Method], dict[str, str]]:
    """Methods that can run and why the others cannot; one asked for by its name, not by "all", must."""
    reasons = {name: _reason(method, prepared, manifests) for name, method in configured.items()}
    skipped = {name: why for name, why in reasons.items() if why is not None}
    for name, why in skipped.items():
        if name in by_name:
            raise SidebenchError(f"{name} cannot run on {prepared.names}: {why}.")
    return {name: m for name, m in configured.items() if name not in skipped}, skipped


def _reason(method: Method, prepared: Prepared, manifests: Mapping[str, Manifest]) -> str | None:
    """Why a method cannot run; None when it can."""
    if not isinstance(prepared.task, Task):
        if isinstance(method, FittedMethod):
            return "it is solved for classes, and this task has none"
        if isinstance(method, CachedMethod) and method.gradient_examples:
            return "it weighs the backbone's weights by a loss over classes, and this task has none"
    for name, tower in prepared.towers.items():
        if isinstance(method, LiveMethod | PrefixMethod) and tower.backbone is None:
            return _NO_NETWORK
        if why := refusal(method, tower.arch, manifests[name].form):
            return f"for the {name}s {why}" if name else why
    return None


def _stores(
    request: Request,
    prepared: Prepared,
    planned: Mapping[str, Plan],
    methods: Mapping[str, Method],
    goal: Mapping[str, Any] | None,
    listener: Listener,
) -> dict[str, BuildResult]:
    """The stores that the cached methods of this comparison read, by stream; none when there are no such methods."""
    found = {}
    for name, tower in prepared.towers.items():
        wanted = layers_read(methods.values(), tower.arch)
        if not wanted:
            continue
        wanted = tuple(dict.fromkeys((*layers_of(goal), *wanted)))
        if name not in planned:
            found[name] = _imported(request, tower, wanted)
            continue
        found[name] = store_for(
            tower,
            planned[name],
            wanted,
            may_build=request.may_build,
            progress=listener.build_progress,
            say=listener.say,
        )
    return found


def _imported(request: Request, tower: Tower, wanted: Sequence[str]) -> BuildResult:
    """The store of imported features, if it covers what the methods read."""
    if request.capture != CaptureOptions():
        raise SidebenchError(
            "layers, tokens, dtype and views are chosen when features are made (`bench cache import`); leave their "
            "options out here."
        )
    assert tower.imported is not None
    manifest = tower.imported.manifest
    if lacking := missing_layers(wanted, manifest):
        raise SidebenchError(
            f"{tower.inputs.backbone} holds {', '.join(manifest.layers)}, the methods also read "
            f"{', '.join(lacking)}; import more layers, or leave the method out."
        )
    return tower.imported


def _begin_folder(folder: Path, splits: Mapping[str, Split], labels: Labels) -> None:
    """Before anything long: a folder that cannot be written is found out now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, parts in splits.items():
            write_split(folder / name, parts)
        write_labels(folder, labels)
    except OSError as error:
        raise SidebenchError(f"cannot write to {folder}: {error.strerror}. Choose another with --runs-dir.") from error


def _cache_facts(built: Mapping[str, BuildResult]) -> dict[str, Any] | None:
    """What the report says of the caches: of several streams each one's, and what they take together."""
    facts = {name: _store_facts(found) for name, found in built.items()}
    if set(facts) <= {""}:
        return facts.get("")
    seconds = [one["build_seconds"] for one in facts.values()]
    return {
        "bytes": sum(one["bytes"] for one in facts.values()),
        "build_seconds": sum(seconds) if all(isinstance(found, int | float) for found in seconds) else None,
        "streams": facts,
    }


def _store_facts(built: BuildResult) -> dict[str, Any]:
    notes = read_notes(built.folder)
    return {
        "path": str(built.folder),
        "digest": built.manifest.digest,
        "bytes": built.bytes,
        "form": asdict(built.manifest.form),
        "layers": list(built.manifest.layers),
        "build_seconds": notes.get("build_seconds"),
        "status": built.status,
        "relative_errors": notes.get("relative_errors") or {},
        "imported_keys": built.manifest.backbone.get("keys"),
    }
