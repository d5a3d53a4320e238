"""From a request to jobs: rates to try, hashes of all that decides a result, and the folder that the runs lie in."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..adapters import _base
from ..adapters._base import Method
from ..adapters._registry import Named
from ..cache.build import BuildResult, CaptureOptions
from ..cache.errors import SidebenchError
from ..cache.manifest import Manifest, canonical_json
from ..cache.pair import is_pair, towers_of
from .goals.known import Labels
from .goals.labels import labels_sha256
from .outcome import Request
from .prepare import Inputs, resolve_device
from .record import Job
from .tasks.base import AnyTask
from .tasks.load import family_of
from .tasks.split import parts_of

Stores = Mapping[str, BuildResult]
"""By stream of the task; none where no method reads one."""
LR_SHOTS = 4  # the learning rate of all shots is chosen once, at so many and the first seed
AUTO_FACTORS = (0.3, 1.0, 3.0)  # --lr auto: the method's own default and its neighbours, equally many for every method


def job_of(
    named: Named,
    settings: Mapping[str, Mapping[str, str]],
    inputs: Inputs,
    task: AnyTask,
    capture: CaptureOptions,
    built: Stores,
    **protocol: Any,
) -> Job:
    """A method on a backbone and a task; `protocol`: the other fields, how it trains and for what."""
    stores = {} if named.kind == "live" else {name: str(found.folder.absolute()) for name, found in built.items()}
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
        num_outputs=getattr(task, "num_outputs", 0),
        pooling=getattr(task, "pooling", "none"),
        store=stores.pop("", None),
        stores=stores,
        views=capture.views,
        view_seed=capture.form().seed if capture.views else None,
        score=task.score_name,
        values=getattr(task, "values", None) or (),
        family=family_of(inputs.task),
        **protocol,
    )


def compared_job(
    request: Request,
    named: Named,
    lrs: tuple[float, ...],
    task: AnyTask,
    facts: Mapping[str, str],
    built: Stores,
    goal: Mapping[str, Any] | None = None,
) -> Job:
    """A method's job in a comparison, of the first seed. `facts`: see `data_facts`."""
    data = {**facts, "method": code_sha256(named), "sidebench": __version__}
    if named.kind != "live":
        data |= {_of_stream("store", name): found.manifest.digest for name, found in built.items()}
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
        goal=goal,
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


def data_facts(
    manifests: Mapping[str, Manifest], task: AnyTask, labels: Labels, goal: Mapping[str, Any] | None
) -> dict[str, str]:
    """Hashes of what the runs are about, so that a record is reused only for the same data and weights."""
    facts: dict[str, str] = {}
    for name, manifest in manifests.items():
        backbone = manifest.backbone
        found = {
            "dataset": str(manifest.dataset["sha256"]),
            "weights": str(backbone.get("weights_sha256") or backbone.get("features_sha256")),
            "preprocessing": hashlib.sha256(canonical_json(manifest.preprocessing).encode()).hexdigest(),
        }
        facts |= {_of_stream(key, name): value for key, value in found.items()}
    if (parts := parts_of(task)) is not None:
        facts["parts"] = parts_sha256(parts)  # the content's hash knows none of them
    if labels:
        facts["labels"] = labels_sha256(labels)
    if goal is not None:
        facts["goal"] = hashlib.sha256(canonical_json(goal).encode()).hexdigest()
    return facts


def _of_stream(key: str, stream: str) -> str:
    return f"{stream}_{key}" if stream else key


def parts_sha256(parts: Sequence[str]) -> str:
    """Hash of the parts that a task names itself."""
    return hashlib.sha256(canonical_json(list(parts)).encode()).hexdigest()


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
    backbone = request.inputs.backbone
    towers = towers_of(backbone).values() if is_pair(backbone) else [backbone]
    return "-".join([*map(_slug, (*towers, request.inputs.task)), digest])


def _slug(uri: str) -> str:
    last = uri.split("?")[0].rstrip("/").replace(":", "/").rsplit("/", 1)[-1]
    return "".join(c if c.isalnum() else "-" for c in last)[:40] or "run"
