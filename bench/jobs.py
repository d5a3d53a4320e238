"""From a request to jobs: rates to try, hashes of all that decides a result, and the folder that the runs lie in."""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

from .. import __version__
from ..adapters import _base
from ..adapters._base import Method
from ..adapters._registry import Named
from ..cache.build import BuildResult
from ..cache.errors import SidebenchError
from ..cache.manifest import Manifest, canonical_json
from .outcome import Request
from .prepare import Prepared
from .record import Job
from .tasks.base import Task
from .tasks.load import family_of

LR_SHOTS = 4  # the learning rate of all shots is chosen once, at so many and the first seed
AUTO_FACTORS = (0.3, 1.0, 3.0)  # --lr auto: the method's own default and its neighbours, equally many for every method


def job_of(
    request: Request,
    named: Named,
    lrs: tuple[float, ...],
    prepared: Prepared,
    facts: Mapping[str, str],
    built: BuildResult | None,
    device: str,
) -> Job:
    """A method's job, of the first seed."""
    store = None if named.kind == "live" else built
    data = {**facts, "method": code_sha256(named), "sidebench": __version__}
    if store is not None:
        data["store"] = store.manifest.digest
    inputs = request.inputs
    return Job(
        method=named.text,
        settings=dict(request.settings.get(named.key, {})),
        seed=request.seeds[0],
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
        family=family_of(inputs.task),
        steps=request.steps,
    )


def code_sha256(named: Named) -> str:
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


def data_facts(manifest: Manifest, task: Task) -> dict[str, str]:
    """Hashes of what the runs are about, so that a record is reused only for the same data and weights."""
    backbone = manifest.backbone
    own_parts = {} if task.parts is None else {"parts": parts_sha256(task)}  # the content's hash knows none of them
    return own_parts | {
        "dataset": str(manifest.dataset["sha256"]),
        "weights": str(backbone.get("weights_sha256") or backbone.get("features_sha256")),
        "preprocessing": hashlib.sha256(canonical_json(manifest.preprocessing).encode()).hexdigest(),
    }


def parts_sha256(task: Task) -> str:
    """Hash of the parts that a task names itself."""
    return hashlib.sha256(canonical_json(list(task.parts or ())).encode()).hexdigest()


def folder_name(request: Request, facts: Mapping[str, str]) -> str:
    """One folder per backbone, task and protocol: methods and seeds added later join their comparison."""
    about = {
        "data": facts,
        "split_seed": request.split_seed,
        "epochs": request.epochs,
        "batch_size": request.batch_size,
        "lr": request.lr,
        "precision": request.precision,
    }
    if request.steps:
        about["steps"] = request.steps
    if request.shots:
        about["few_shot"] = True
    if request.capture.views:
        about["views"] = [request.capture.views, request.capture.seed]
    digest = hashlib.sha256(canonical_json(about).encode()).hexdigest()[:8]
    return f"{_slug(request.inputs.backbone)}-{_slug(request.inputs.task)}-{digest}"


def _slug(uri: str) -> str:
    last = uri.split("?")[0].rstrip("/").replace(":", "/").rsplit("/", 1)[-1]
    return "".join(c if c.isalnum() else "-" for c in last)[:40] or "run"
