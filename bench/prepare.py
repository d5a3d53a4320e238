"""Join a backbone and a task: load both, and find or build the store that holds the one's activations on the other."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cache.architecture import Architecture
from ..cache.backbone import Backbone
from ..cache.build import BuildResult, CaptureOptions, Plan, Progress, Workers, build, plan
from ..cache.catalog import find_store, imported_store, nearest_mismatch
from ..cache.errors import SidebenchError
from ..cache.load import IMPORTED, load_backbone
from ..cache.manifest import Manifest, missing_layers
from .tasks.base import Task
from .tasks.load import load_task

Say = Callable[[str], None]


@dataclass(frozen=True)
class Inputs:
    """What the user named: the same for `bench cache build` and `bench compare`."""

    backbone: str
    task: str
    image_size: int | None = None
    max_length: int | None = None
    limit: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Prepared:
    """Both loaded, and where to look for stores. Imported features have a store and no backbone."""

    inputs: Inputs
    backbone: Backbone | None
    task: Task
    cache_dir: Path
    imported: BuildResult | None = None

    @property
    def arch(self) -> Architecture:
        """What is known of the backbone."""
        return self.network.arch if self.imported is None else self.imported.manifest.architecture

    @property
    def network(self) -> Backbone:
        """The backbone itself. Raises SidebenchError when there is none behind the features."""
        if self.backbone is None:
            raise SidebenchError(
                f"{self.inputs.backbone} has no network behind it, so nothing can be built from it; "
                "`bench cache import` brings features in, `bench compare` reads them."
            )
        return self.backbone


def prepare(inputs: Inputs, *, home: Path, cache_dir: Path, say: Say) -> Prepared:
    """Load task and backbone. The task first: it is the quicker one to be wrong."""
    task = load_task(inputs.task, home=home, limit=inputs.limit, say=say)
    if inputs.backbone.startswith(IMPORTED):
        return _prepare_imported(inputs, task, cache_dir)
    backbone = load_backbone(
        inputs.backbone,
        home=home,
        device=resolve_device(inputs.device, say),
        image_size=inputs.image_size,
        max_length=inputs.max_length,
        say=say,
    )
    return Prepared(inputs, backbone, task, cache_dir)


def _prepare_imported(inputs: Inputs, task: Task, cache_dir: Path) -> Prepared:
    if inputs.image_size is not None or inputs.max_length is not None:
        raise SidebenchError(
            f"--image-size and --max-length say how a backbone reads; {inputs.backbone} was computed elsewhere. "
            "Leave them out."
        )
    name = inputs.backbone.removeprefix(IMPORTED)
    folder, manifest = imported_store(cache_dir, name, task.examples.content_sha256, task.uri)
    return Prepared(inputs, None, task, cache_dir, BuildResult("exists", folder, manifest))


def plan_store(prepared: Prepared, options: CaptureOptions) -> Plan:
    """The plan of this backbone on this task."""
    return plan(prepared.network, prepared.task.examples, options, limit=prepared.inputs.limit)


def build_store(
    prepared: Prepared, planned: Plan, *, progress: Progress, say: Say, workers: Workers | None = None
) -> BuildResult:
    """Build, resume or find the store of a plan. Its notes say how to make the same plan again."""
    inputs = prepared.inputs
    notes = {name: getattr(inputs, name) for name in ("backbone", "task", "image_size", "max_length", "limit")}
    notes["device"] = prepared.network.device.type
    return build(planned, prepared.cache_dir, notes=notes, progress=progress, say=say, workers=workers)


def store_for(
    prepared: Prepared, planned: Plan, layers: tuple[str, ...], *, may_build: bool, progress: Progress, say: Say
) -> BuildResult:
    """A complete store that covers `layers`, built if need be.

    Raises SidebenchError naming the nearest store and the facts in which it differs when building is not allowed, or
    the layers that --layers leaves out.
    """
    wanted = _with_layers(planned.manifest, layers)
    found = find_store(prepared.cache_dir, wanted)
    if found is not None:
        return BuildResult("exists", found.folder, found.manifest)
    if not may_build:
        raise SidebenchError(
            f"no cache serves this comparison and --no-build forbids making one: "
            f"{nearest_mismatch(prepared.cache_dir, wanted)}."
        )
    return build_store(prepared, planned, progress=progress, say=say)


def _with_layers(manifest: Manifest, layers: tuple[str, ...]) -> Manifest:
    lacking = missing_layers(layers, manifest)
    if lacking:
        raise SidebenchError(
            f"--layers keeps {', '.join(manifest.layers)}, but the methods also read {', '.join(lacking)}; "
            "leave --layers out, or add them."
        )
    return manifest.only(layers)


def resolve_device(text: str, say: Say) -> torch.device:
    """The device asked for; "auto" takes CUDA when there is one and says so. Never another one than asked."""
    if text == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
        say(f"device: {chosen}")
        return torch.device(chosen)
    try:
        device = torch.device(text)
    except RuntimeError:
        raise SidebenchError(f"no device {text!r}; wanted auto, cpu, cuda or cuda:0.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SidebenchError("--device cuda, but this torch sees no CUDA device; `bench doctor` says why.")
    if device.type not in ("cpu", "cuda"):
        raise SidebenchError(f"device {text!r} is not supported; wanted auto, cpu, cuda or cuda:0.")
    return device
