"""From a request to jobs: rates to try, hashes of all that decides a result, and the folder that the runs lie in."""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..adapters import _base
from ..adapters._base import Method
from ..adapters._registry import Named
from ..cache.build import BuildResult, CaptureOptions
from ..cache.errors import SidebenchError
from ..cache.manifest import Manifest, canonical_json
from .outcome import Request
from .prepare import Inputs, resolve_device
from .record import Job
from .tasks.base import Task
from .tasks.load import family_of

LR_SHOTS = 4  # the learning rate of all shots is chosen once, at so many and the first seed
AUTO_FACTORS = (0.3, 1.0, 3.0)  # --lr auto: the method's own default and its neighbours, equally many for every method


def job_of(
    named: Named,
    settings: Mapping[str, Mapping[str, str]],
    inputs: Inputs,
    task: Task,
    capture: CaptureOptions,
    built: BuildResult | None,
    **protocol: Any,
) -> Job:
    """A method on a backbone and a task; `protocol`: the other fields, how it trains and for what."""
    return Job(
        method=named.text,
        settings=dict(settings.get(named.key, {})),
        kind=named.kind,
        backbone=inputs.backbone,
        task=inputs.task,
        image_size=inputs.image_size,
        max_length=inputs.max_length,
        limit=inputs.limit,
        device=str(resolve_device(inputs.device, lambda _: None)),
        num_outputs=task.num_outputs,
        pooling=task.pooling,
        store=None if built is None or named.kind == "live" else str(built.folder.absolute()),
        views=capture.views,
        view_seed=capture.form().seed if capture.views else None,
        score=task.score_name,
        values=task.values or (),
        family=family_of(inputs.task),
        **protocol,
    )


def compared_job(
    request: Request,
    named: Named,
    lrs: tuple[float, ...],
    task: Task,
    facts: Mapping[str, str],
    built: BuildResult | None,
) -> Job:
    """A method's job in a comparison, of the first seed. `facts`: see `data_facts`."""
    data = {**facts, "method": code_sha256(named), "sidebench": __version__}
    if built is not None and named.kind != "live":
        data["store"] = built.manifest.digest
    return job_of(
        named,
        request.settings,
        request.inputs,
        task,
        request.capture,
        built,
        seed=request.seeds[0],
        split_seed=request.split_seed,
        epochs=request.epochs,
        batch_size=request.batch_size,
        lrs=lrs,
        precision=request.precision,
        data=data,
        tier=request.tier,
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
