"""Join backbones and a task: load both, and find or build the stores that hold the ones' activations on the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..cache.architecture import Architecture
from ..cache.backbone import Backbone
from ..cache.build import BuildResult, CaptureOptions, Plan, Progress, Workers, build, plan
from ..cache.catalog import find_store, imported_store, nearest_mismatch
from ..cache.errors import SidebenchError
from ..cache.examples import Examples
from ..cache.load import IMPORTED, load_backbone
from ..cache.manifest import Manifest, missing_layers
from ..cache.pair import is_pair, towers_of
from .tasks.base import AnyTask, Task
from .tasks.load import load_any

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
    stream: str = ""  # of a task of two: the one that `backbone` reads


@dataclass(frozen=True)
class Tower:
    """A backbone and the examples that it reads, and where to look for stores.

    Imported features have a store and no backbone.
    """

    inputs: Inputs
    backbone: Backbone | None
    examples: Examples
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


@dataclass(frozen=True)
class Prepared:
    """A task and what reads it: by stream, "" being the only one of a task that has but one."""

    inputs: Inputs
    task: AnyTask
    towers: Mapping[str, Tower]

    @property
    def names(self) -> str:
        """Of the backbones."""
        return " and ".join(tower.arch.name for tower in self.towers.values())


def prepare(inputs: Inputs, *, home: Path, cache_dir: Path, say: Say) -> Prepared:
    """Load task and backbones. The task first: it is the quicker one to be wrong.

    Of a task of two streams `inputs.stream` names the one that is wanted, else both are.
    """
    task = load_any(inputs.task, home=home, limit=inputs.limit, say=say)
    streams = _streams(inputs, task)
    return Prepared(
        inputs,
        task,
        {
            name: _tower(replace(inputs, backbone=backbone, stream=name), task, home, cache_dir, say)
            for name, backbone in streams.items()
        },
    )


def _streams(inputs: Inputs, task: AnyTask) -> dict[str, str]:
    """The backbone of each stream. Raises SidebenchError where there is one for two, or two for one."""
    paired = len(task.streams) > 1
    if inputs.stream:
        if inputs.stream not in task.streams:
            raise SidebenchError(f"{inputs.task} has no stream {inputs.stream!r}.")
        return {inputs.stream: inputs.backbone}
    if paired and not is_pair(inputs.backbone):
        raise SidebenchError(
            f"{inputs.task} pairs images with texts and {inputs.backbone} is one backbone; give one for each: "
            "--backbone pair:image=URI,text=URI."
        )
    if is_pair(inputs.backbone) and not paired:
        raise SidebenchError(
            f"{inputs.backbone} is two backbones, and {inputs.task} has one kind of example; give the one that reads "
            "it, or a retrieval task (bench tasks)."
        )
    return towers_of(inputs.backbone) if paired else {"": inputs.backbone}


def _tower(inputs: Inputs, task: AnyTask, home: Path, cache_dir: Path, say: Say) -> Tower:
    examples = task.streams[inputs.stream]
    if inputs.backbone.startswith(IMPORTED):
        return _imported_tower(inputs, task, examples, cache_dir)
    backbone = load_backbone(
        inputs.backbone,
        home=home,
        device=resolve_device(inputs.device, say),
        image_size=inputs.image_size,
        max_length=inputs.max_length,
        say=say,
    )
    return Tower(inputs, backbone, examples, cache_dir)


def _imported_tower(inputs: Inputs, task: AnyTask, examples: Examples, cache_dir: Path) -> Tower:
    if inputs.image_size is not None or inputs.max_length is not None:
        raise SidebenchError(
            f"--image-size and --max-length say how a backbone reads; {inputs.backbone} was computed elsewhere. "
            "Leave them out."
        )
    name = inputs.backbone.removeprefix(IMPORTED)
    folder, manifest = imported_store(cache_dir, name, examples.content_sha256, task.uri)
    return Tower(inputs, None, examples, cache_dir, BuildResult("exists", folder, manifest))


def only_tower(prepared: Prepared) -> Tower:
    """The tower, where one stream is all that was asked for."""
    (tower,) = prepared.towers.values()
    return tower


def classified(prepared: Prepared, what: str) -> tuple[Task, Tower]:
    """The task and its one tower, of a classification or regression. Raises SidebenchError that `what` needs one."""
    if not isinstance(prepared.task, Task):
        raise SidebenchError(f"{what} works on tasks with classes, and {prepared.task.uri} has none.")
    return prepared.task, only_tower(prepared)


def plan_store(tower: Tower, options: CaptureOptions) -> Plan:
    """The plan of this backbone on its examples."""
    return plan(tower.network, tower.examples, options, limit=tower.inputs.limit)


def build_store(
    tower: Tower, planned: Plan, *, progress: Progress, say: Say, workers: Workers | None = None
) -> BuildResult:
    """Build, resume or find the store of a plan. Its notes say how to make the same plan again."""
    inputs = tower.inputs
    notes = {name: getattr(inputs, name) for name in ("backbone", "task", "image_size", "max_length", "limit")}
    notes["device"] = tower.network.device.type
    if inputs.stream:
        notes["stream"] = inputs.stream
    return build(planned, tower.cache_dir, notes=notes, progress=progress, say=say, workers=workers)


def store_for(
    tower: Tower, planned: Plan, layers: tuple[str, ...], *, may_build: bool, progress: Progress, say: Say
) -> BuildResult:
    """A complete store that covers `layers`, built if need be.

    Raises SidebenchError naming the nearest store and the facts in which it differs when building is not allowed, or
    the layers that --layers leaves out.
    """
    wanted = _with_layers(planned.manifest, layers)
    found = find_store(tower.cache_dir, wanted)
    if found is not None:
        return BuildResult("exists", found.folder, found.manifest)
    if not may_build:
        raise SidebenchError(
            f"no cache serves this comparison and --no-build forbids making one: "
            f"{nearest_mismatch(tower.cache_dir, wanted)}."
        )
    return build_store(tower, planned, progress=progress, say=say)


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
