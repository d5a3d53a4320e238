"""What `bench pretrain` was asked for: refused before anything is loaded, and said in full as the facts of its file."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .. import __version__
from ..adapters._base import FittedMethod, LiveMethod, Method
from ..adapters._pretrained_facts import Facts
from ..adapters._registry import SUFFIX, Named
from ..cache.build import CaptureOptions, Plan
from ..cache.errors import SidebenchError, unknown
from .choice import chosen_methods, layers_read
from .contrastive import PROJECTION
from .jobs import parts_sha256
from .prepare import Inputs, Tower
from .pretrained import backbone_facts, module_facts
from .record import epochs_within
from .tasks.base import Split, Task
from .tasks.load import family_of

OBJECTIVES = ("supervised", "contrastive")


@dataclass(frozen=True)
class PretrainRequest:
    """What `bench pretrain` was asked for."""

    inputs: Inputs
    method: str
    settings: Mapping[str, Mapping[str, str]]
    out: Path
    objective: str = "supervised"
    temperature: float = 0.1
    seed: int = 0
    epochs: int = 10
    steps: int | None = None  # at most so many, in whole epochs, in place of `epochs`
    batch_size: int = 32
    lr: float | None = None  # None: the method's default
    precision: str = "fp32"
    split_seed: int = 0
    capture: CaptureOptions = field(default_factory=CaptureOptions)
    zero_shot: str | None = None  # a task on whose test part the source head is tried as it is
    fresh: bool = False


def method_of(request: PretrainRequest) -> tuple[Named, Method]:
    """The method, and everything refused that needs neither backbone nor data."""
    if request.out.suffix != SUFFIX:
        raise SidebenchError(f"--out wants a file that ends in {SUFFIX}; found {str(request.out)!r}.")
    if request.out.is_dir():
        raise SidebenchError(f"--out {request.out} is a folder.")
    if request.objective not in OBJECTIVES:
        raise unknown("objective", request.objective, OBJECTIVES)
    chosen = chosen_methods([request.method], request.settings, family_of(request.inputs.task))
    if len(chosen) != 1:
        raise SidebenchError(f"--method names one method; found {request.method!r}.")
    named, method = chosen[0]
    if isinstance(method, FittedMethod):
        raise SidebenchError(f"{named.text} is solved, not trained in steps: it has no modules to pre-train.")
    if named.init is not None:
        raise SidebenchError(f"pre-training begins at the method's own initialisation; type --method {named.twin}.")
    if request.seed >= 2**63:
        raise SidebenchError(f"--seed wants a number from 0 to 2^63 - 1; found {request.seed}.")
    if request.lr is not None and not 0 < request.lr < float("inf"):
        raise SidebenchError(f"--lr wants a positive number; found {request.lr:g}.")
    if request.objective == "contrastive":
        if request.capture.views < 2:
            raise SidebenchError("--objective contrastive compares two views of an example; type --views 2, or more.")
        if request.batch_size < 2 or not 0 < request.temperature < float("inf"):
            raise SidebenchError("--objective contrastive wants a batch of 2 or more and a positive temperature.")
        if getattr(method, "gradient_examples", 0):
            raise SidebenchError(f"--objective contrastive sees no labels, and {named.key}.init=fisher reads them.")
        if request.zero_shot is not None:
            raise SidebenchError("--zero-shot tries the source head, and --objective contrastive has none.")
    _check_folder(request.out.parent)
    return named, method


def _check_folder(folder: Path) -> None:
    """Before anything long: a folder that cannot be written is found out now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SidebenchError(f"cannot write to {folder}: {error.strerror}. Choose another --out.") from error
    if not os.access(folder, os.W_OK):
        raise SidebenchError(f"cannot write to {folder}. Choose another --out.")


def facts_of(
    request: PretrainRequest,
    named: Named,
    method: Method,
    task: Task,
    tower: Tower,
    planned: Plan,
    parts: Split,
) -> Facts:
    """Everything that decides the outcome, but for versions of packages, which are noted."""
    manifest = planned.manifest
    contrastive = request.objective == "contrastive"
    of_objective = {"temperature": request.temperature, "projection": PROJECTION} if contrastive else {}
    sizes = parts.sizes()
    return module_facts(
        named,
        method,
        backbone_facts(tower.arch, str(manifest.backbone["weights_sha256"])),
        layers=layers_read([method], tower.arch),
        preprocessing=dict(manifest.preprocessing),
        source={
            "task": task.uri,
            "sha256": str(manifest.dataset["sha256"]),
            "classes": len(task.classes),
            "limit": request.inputs.limit,
            "split_seed": request.split_seed,
            "parts": None if task.parts is None else parts_sha256(task.parts),
            "train": sizes["train"],
            "val": sizes["val"],
            "pooling": task.pooling,
        },
        training={
            "objective": request.objective,
            **of_objective,
            "seed": request.seed,
            "epochs": _epochs(request, sizes["train"]),
            "steps": _epochs(request, sizes["train"]) * -(-sizes["train"] // request.batch_size),
            "batch_size": request.batch_size,
            "lr": request.lr if request.lr is not None else float(method.config.lr),
            "precision": request.precision,
            "activations": None if isinstance(method, LiveMethod) else asdict(manifest.form),
            "views": request.capture.views,
        },
        versions={"sidebench": __version__, "torch": str(torch.__version__)},
    )


def _epochs(request: PretrainRequest, examples: int) -> int:
    return epochs_within(request.steps, examples, request.batch_size) or request.epochs
