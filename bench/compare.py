"""Several methods, one backbone, one task: plan the runs, run each in its own interpreter, gather what they say."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..adapters import _base
from ..adapters._base import CachedMethod, FittedMethod, LiveMethod, Method, PrefixMethod
from ..adapters._registry import Named
from ..cache.build import BuildResult, CaptureOptions, Plan
from ..cache.catalog import read_notes
from ..cache.errors import SidebenchError
from ..cache.form import Form
from ..cache.manifest import Manifest, canonical_json, missing_layers
from ..cache.memory_store import Tier
from ..cache.views import DESCRIPTION
from .choice import chosen_methods, refusal
from .launch import Listener, failed, run_once, with_chosen_lr
from .prepare import Inputs, Prepared, plan_store, prepare, resolve_device, store_for
from .record import Job, RunRecord
from .tasks.base import Split
from .tasks.split import split as split_task
from .worker import SPLIT, write_split

_NO_NETWORK = "it trains inside the backbone, and imported features have no network behind them"
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
    tier: Tier = "auto"
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
    view: str = ""  # what an augmented view is, where there are any


def compare(
    request: Request, *, home: Path, cache_dir: Path, runs_dir: Path, listener: Listener | None = None
) -> Outcome:
    """Run the comparison, reusing every finished run of equal facts.

    Raises SidebenchError before anything runs when a method, option, task or backbone is wrong. A run that fails later
    keeps its place with its error.
    """
    listener = listener or Listener()
    asked = chosen_methods(request.methods, request.settings)
    named = [n for n, _ in asked]
    configured = {n.text: method for n, method in asked}
    rates = {name: learning_rates(request.lr, method) for name, method in configured.items()}
    prepared = prepare(request.inputs, home=home, cache_dir=cache_dir, say=listener.say)
    parts = split_task(prepared.task, request.split_seed)
    planned = None if prepared.imported else plan_store(prepared, request.capture)
    source = planned or prepared.imported
    assert source is not None
    _check_pooling(prepared, source.manifest)
    chosen, skipped = _accepted(configured, prepared, source.manifest.form, by_name=request.methods)
    facts = _data_facts(source.manifest)
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
    view = DESCRIPTION[prepared.task.examples.modality] if request.capture.views else ""
    del prepared, planned  # the workers load what they need; this process need not hold a backbone meanwhile
    records: dict[str, list[RunRecord]] = {}
    files: list[Path] = []
    for name, method_jobs in jobs.items():
        final, failure = with_chosen_lr(method_jobs, folder, request.fresh, listener)
        records[name] = [
            run_once(job, folder, request.fresh, listener) if failure is None else failed(job, failure, folder)
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
        view,
    )


def _check_pooling(prepared: Prepared, manifest: Manifest) -> None:
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
    arch = prepared.arch
    wanted: list[str] = []
    for method in methods.values():
        if isinstance(method, CachedMethod | FittedMethod | PrefixMethod):
            wanted += method.layers(arch)
    if not wanted:
        return None
    if planned is None:
        return _imported(request, prepared, wanted)
    return store_for(
        prepared,
        planned,
        tuple(dict.fromkeys(wanted)),
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


def _begin_folder(folder: Path, parts: Split) -> None:
    """Before anything long: a folder that cannot be written is found out now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_split(folder / SPLIT, parts)
    except OSError as error:
        raise SidebenchError(f"cannot write to {folder}: {error.strerror}. Choose another with --runs-dir.") from error


def _data_facts(manifest: Manifest) -> dict[str, str]:
    """Hashes of what the runs are about, so that a record is reused only for the same data and weights."""
    backbone = manifest.backbone
    return {
        "dataset": str(manifest.dataset["sha256"]),
        "weights": str(backbone.get("weights_sha256") or backbone.get("features_sha256")),
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
    if request.capture.views:
        about["views"] = [request.capture.views, request.capture.seed]
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
    store = None if named.kind == "live" else built
    data = {**facts, "method": _code_sha256(named), "sidebench": __version__}
    if store is not None:
        data["store"] = store.manifest.digest
    inputs = request.inputs
    return Job(
        method=named.text,
        settings=dict(request.settings.get(named.key, {})),
        seed=seed,
        kind=named.kind,
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
        num_outputs=prepared.task.num_outputs,
        pooling=prepared.task.pooling,
        store=None if store is None else str(store.folder.absolute()),
        tier=request.tier,
        views=request.capture.views,
        view_seed=request.capture.form().seed if request.capture.views else None,
        score=prepared.task.score_name,
        values=prepared.task.values or (),
    )


def _code_sha256(named: Named) -> str:
    """Hash of the method's file and the plumbing of all: once they are edited, finished runs are another method's."""
    own = getattr(sys.modules[named.cls.__module__], "__file__", None)
    plumbing = sorted(Path(_base.__file__).parent.glob("_*.py"))
    digest = hashlib.sha256()
    for path in (*([Path(own)] if own else []), *plumbing):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


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
