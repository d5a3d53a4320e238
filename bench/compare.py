"""Several methods, one backbone, one task: plan the runs, run each in its own interpreter, gather what they say."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..adapters._base import LiveMethod, Method, PrefixMethod
from ..adapters._registry import Named
from ..cache.build import BuildResult, CaptureOptions, Plan
from ..cache.catalog import read_notes
from ..cache.errors import SidebenchError
from ..cache.form import Form
from ..cache.manifest import Manifest, missing_layers
from ..cache.views import DESCRIPTION
from .choice import chosen_methods, family_options, layers_read, refusal
from .jobs import LR_SHOTS, compared_job, data_facts, folder_name, learning_rates
from .launch import Listener, chosen_lr, failed, run_all
from .outcome import Outcome, Request, Runs
from .prepare import Prepared, plan_store, prepare, store_for
from .pretrained import initialisations
from .record import Job, split_name, write_split
from .tasks.base import Split, Task
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
    parts = split_task(prepared.task, request.split_seed)
    planned = None if prepared.imported else plan_store(prepared, request.capture)
    source = planned or prepared.imported
    assert source is not None
    check_pooling(prepared, source.manifest)
    chosen, skipped = _accepted(configured, prepared, source.manifest.form, by_name=request.methods)
    initial = initialisations(
        {n: method for n, method in asked if n.text in chosen},
        prepared.task,
        parts,
        source.manifest,
        mappings=request.map_init,
        allow_overlap=request.allow_overlap,
        say=listener.say,
    )
    facts = data_facts(source.manifest, prepared.task)
    folder = runs_dir / folder_name(request, facts)
    drawn = _few_shots(request, prepared.task, parts, choosing=any(len(tried) > 1 for tried in rates.values()))
    _begin_folder(folder, {split_name(None, 0): parts, **{split_name(*key): found for key, found in drawn.items()}})
    built = _store(request, prepared, planned, chosen, listener)
    jobs = {n: compared_job(request, n, rates[n.text], prepared.task, facts, built) for n in named if n.text in chosen}
    jobs = {n: replace(job, init=initial.get(n.text)) for n, job in jobs.items()}
    score_name = prepared.task.score_name
    view = DESCRIPTION[prepared.task.examples.modality] if request.capture.views else ""
    del prepared, planned  # the workers load what they need; this process need not hold a backbone meanwhile
    runs = [found for job in jobs.values() for found in _run(request, job, folder, listener)]
    return Outcome(
        request,
        folder,
        runs,
        skipped,
        parts.sizes(),
        score_name,
        None if built is None else _store_facts(built),
        view,
        family_options(list(jobs), request.settings, family, lr_typed=request.lr not in (None, "auto")),
        {shots: found.sizes() for (shots, _), found in drawn.items() if shots in request.shots},
        _twins(list(jobs)),
    )


def _twins(named: Sequence[Named]) -> dict[str, str]:
    texts = {n.text for n in named}
    return {n.text: n.twin for n in named if n.twin is not None and n.twin in texts}


def _few_shots(request: Request, task: Task, parts: Split, *, choosing: bool) -> dict[tuple[int, int], Split]:
    """The parts of each (shots, seed), and of what learning rates are chosen on, where any are."""
    if not request.shots:
        return {}
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


def check_pooling(prepared: Prepared, manifest: Manifest) -> None:
    """Raise SidebenchError where the form keeps no token that the task pools."""
    if prepared.task.pooling == "cls" and manifest.form.tokens == "mean":
        raise SidebenchError(f"{prepared.task.uri} pools the class token, which --tokens mean drops; type cls+mean.")


def _accepted(
    configured: Mapping[str, Method], prepared: Prepared, form: Form, *, by_name: Sequence[str]
) -> tuple[dict[str, Method], dict[str, str]]:
    """Methods that can run and why the others cannot; one asked for by its name, not by "all", must."""
    arch = prepared.arch

    def reason(method: Method) -> str | None:
        if isinstance(method, LiveMethod | PrefixMethod) and prepared.backbone is None:
            return _NO_NETWORK
        return refusal(method, arch, form)

    reasons = {name: reason(method) for name, method in configured.items()}
    skipped = {name: why for name, why in reasons.items() if why is not None}
    for name, why in skipped.items():
        if name in by_name:
            raise SidebenchError(f"{name} cannot run on {arch.name}: {why}.")
    return {name: m for name, m in configured.items() if name not in skipped}, skipped


def _store(
    request: Request, prepared: Prepared, planned: Plan | None, methods: Mapping[str, Method], listener: Listener
) -> BuildResult | None:
    """The store that the cached methods of this comparison read; None when there are none."""
    wanted = layers_read(methods.values(), prepared.arch)
    if not wanted:
        return None
    if planned is None:
        return _imported(request, prepared, wanted)
    return store_for(
        prepared,
        planned,
        wanted,
        may_build=request.may_build,
        progress=listener.build_progress,
        say=listener.say,
    )


def _imported(request: Request, prepared: Prepared, wanted: Sequence[str]) -> BuildResult:
    """The store of imported features, if it covers what the methods read."""
    if request.capture != CaptureOptions():
        raise SidebenchError(
            "layers, tokens, dtype and views are chosen when features are made (`bench cache import`); leave their "
            "options out here."
        )
    assert prepared.imported is not None
    manifest = prepared.imported.manifest
    if lacking := missing_layers(wanted, manifest):
        raise SidebenchError(
            f"{prepared.inputs.backbone} holds {', '.join(manifest.layers)}, the methods also read "
            f"{', '.join(lacking)}; import more layers, or leave the method out."
        )
    return prepared.imported


def _begin_folder(folder: Path, splits: Mapping[str, Split]) -> None:
    """Before anything long: a folder that cannot be written is found out now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, parts in splits.items():
            write_split(folder / name, parts)
    except OSError as error:
        raise SidebenchError(f"cannot write to {folder}: {error.strerror}. Choose another with --runs-dir.") from error


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
