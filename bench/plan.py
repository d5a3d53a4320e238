"""What a comparison would take before anything runs: predicted memory per method, what fits, the cache and its gain."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters._base import CachedMethod, FittedMethod, LiveMethod, Method, PrefixMethod
from ..cache.backbone import Backbone
from ..cache.clip_vil_load import config_clip_vil
from ..cache.configs import config_backbone, without_weights
from ..cache.errors import SidebenchError, unknown
from ..cache.load import CONFIG_ONLY, backbone_uri, load_backbone, projected
from ..cache.mdetr_load import config_mdetr
from ..cache.planning import CaptureOptions
from ..cache.resnet_load import config_resnet
from .choice import chosen_methods, refusal
from .goals.base import Goal
from .importance import predicted_peak
from .plan_cache import CacheFacts, Data, cache_facts
from .predict import Prediction, Unpredictable, predict
from .predict_fit import predict_fit
from .prepare import Say, resolve_device
from .step import Step, kept_shapes
from .tasks.load import JOINT, family_of, load_task
from .tasks.pairs import is_pairs
from .tasks.split import split
from .with_forward import WithForward

ASSUMED_EXAMPLES = 1000  # for a method solved on all training examples, where no task says how many (VTAB-1k's number)
_LARGEST_BATCH = 2**20
_MOST_PREDICTIONS = 8
_MOST_EVENTS = 60_000  # of all predictions of one search: about 15 s
_NEAR = 0.9  # a batch that is known to fit stands for a guess no further above it, where that cannot be predicted
_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class PlanRequest:
    """What `bench plan` was asked for; without a task `num_outputs` and `num_examples` say what it would have said."""

    backbone: str
    methods: tuple[str, ...]
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    task: str | None = None
    limit: int | None = None
    batch_size: int = 32
    image_size: int | None = None
    max_length: int | None = None
    num_outputs: int | None = None
    num_examples: int | None = None
    precision: str = "fp32"
    semantics: str = "cuda"
    attention: str = "auto"
    capture: CaptureOptions = field(default_factory=CaptureOptions)
    device_memory: str | None = None
    goal: Goal | None = None  # in the place of classes and numbers
    num_captions: int | None = None  # of a pair of backbones; `num_examples` are the items
    frames: int = 1  # of each item
    with_forward: bool = False  # cached methods also with the frozen forward beside them, as papers measure


def plan(request: PlanRequest, *, home: Path, cache_dir: Path, say: Say) -> dict[str, Any]:
    """The document that `bench plan --json` prints.

    Raises SidebenchError for a wrong name, option or size; a method that cannot take the backbone is left to "skipped".
    """
    family = None if request.task is None else family_of(request.task)
    asked = chosen_methods(request.methods, request.settings, family)
    configured = beside({named.text: method for named, method in asked}, request)
    check(request)
    memory = None if request.device_memory is None else parse_bytes(request.device_memory)
    data = _data(request, home, say)
    backbone = backbone_for(request, home, say)
    _check_modality(backbone, data)
    real = None if request.backbone.startswith(CONFIG_ONLY) else backbone
    fake = without_weights(backbone)
    data = data.with_lengths(real)
    step = Step(
        request.batch_size,
        request.num_outputs or data.num_outputs,
        request.precision,
        request.semantics,
        request.attention,
        request.capture.form(),
        data.longest,
        data.pooling,
        data.token_types,
        request.goal,
    )
    rows, skipped = [], []
    for name, method in configured.items():
        say(f"predicting {name}")
        if reason := refusal(method, fake.arch, step.form):
            skipped.append({"method": name, "reason": reason})
            continue
        try:
            rows.append(_row(name, method, fake, step, data, memory))
        except Unpredictable as error:
            rows.append(unknown_row(name, method, str(error)))
        except SidebenchError as error:
            skipped.append({"method": name, "reason": str(error)})
    kept = [method for name, method in configured.items() if name in {row["method"] for row in rows}]
    facts = cache_facts(CacheFacts(request.capture, kept, fake, step, data), real, cache_dir, say)
    return {
        "backbone": request.backbone,
        "task": request.task,
        "kind": "predicted",
        "semantics": semantics_of(request),
        "step": step_facts(step, fake),
        "device_memory_bytes": memory,
        "methods": rows,
        "skipped": skipped,
        "cache": facts,
    }


def beside(methods: Mapping[str, Method], request: PlanRequest) -> dict[str, Method]:
    """The methods and, where that was asked for, behind each cached one the same with the frozen forward beside it."""
    found: dict[str, Method] = {}
    for name, method in methods.items():
        found[name] = method
        if request.with_forward and isinstance(method, CachedMethod):
            found[f"{name}+forward"] = WithForward(method)
    return found


def parse_bytes(text: str) -> int:
    """Bytes of "24GiB", "24GB", "500 MB" or a plain number. Raises SidebenchError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]{0,3})\s*", text)
    unit = None if found is None else _SIZES.get(found[2].upper())
    if found is None or unit is None or (size := int(float(found[1]) * unit)) < 1:
        raise SidebenchError(f"{text!r} is no amount of memory; write 24GiB (2^30), 24GB (10^9) or a number of bytes.")
    return size


def check(request: PlanRequest) -> None:
    """Raise SidebenchError for an option that is none, or that another one excludes."""
    for option, value, known in (
        ("precision", request.precision, ("fp32", "bf16")),
        ("semantics", request.semantics, ("cuda", "cpu")),
        ("attention kernel", request.attention, ("auto", "efficient", "flash", "math")),
    ):
        if value not in known:
            raise unknown(option, value, known)
    if request.attention != "auto" and request.semantics == "cpu":
        raise SidebenchError("--attention chooses among CUDA's kernels; leave it out with --semantics cpu.")
    if request.attention == "flash" and request.precision == "fp32":
        raise SidebenchError("the flash kernel does not compute in float32: use --precision bf16, or another kernel.")


def _data(request: PlanRequest, home: Path, say: Say) -> Data:
    if request.task is None:
        if request.limit is not None:
            raise SidebenchError("--limit cuts a task down; without --task give --num-examples.")
        return Data(num_outputs=100, num_examples=request.num_examples)
    if request.num_examples is not None:
        raise SidebenchError("--num-examples stands in for a task; with --task use --limit.")
    if request.task.partition(":")[0] in JOINT:
        raise SidebenchError(
            f"{request.task} is not read for a plan, which needs no task: leave --task out and give --recipe NAME "
            "(such as unipt-clipvil-vqa2 or unipt-mdetr-refcoco), beside which --backbone may be typed."
        )
    if is_pairs(request.task):
        raise SidebenchError(
            f"{request.backbone} is one backbone, and {request.task} has images and texts apart; "
            "write --backbone pair:image=URI,text=URI."
        )
    task = load_task(request.task, home=home, limit=request.limit, say=say)
    parts = split(task, 0).sizes()
    return Data(task.num_outputs, len(task.examples), parts["train"], task.pooling, task.examples)


def backbone_for(request: PlanRequest, home: Path, say: Say) -> Backbone:
    """The backbone of a request, with weights or without, as its name says."""
    uri = backbone_uri(request.backbone)
    sizes = {"image_size": request.image_size, "max_length": request.max_length}
    if uri.scheme == "clipvil-config":
        return config_clip_vil(uri.path, **sizes)
    if uri.scheme == "mdetr-config":
        return config_mdetr(uri.path, **sizes)
    if uri.scheme == "resnet-config":
        return config_resnet(uri.path, request.image_size)
    if uri.scheme == "hf-config":
        return config_backbone(uri.path, tower=uri.options.get("tower"), projected=projected(uri), **sizes)
    device = resolve_device("auto", lambda _: None)
    return load_backbone(request.backbone, home=home, device=device, say=say, **sizes)


def _check_modality(backbone: Backbone, data: Data) -> None:
    if data.examples is not None and data.examples.modality != backbone.arch.modality:
        raise SidebenchError(
            f"{backbone.arch.name} reads {backbone.arch.modality}, the task holds {data.examples.modality}; "
            "choose a backbone and a task of one kind (bench backbones, bench tasks)."
        )


def _row(name: str, method: Method, backbone: Backbone, step: Step, data: Data, memory: int | None) -> dict[str, Any]:
    row: dict[str, Any] = {"method": name, "kind": method.kind, "initialisation_peak_bytes": None}
    if isinstance(method, FittedMethod):
        shapes = kept_shapes(method, backbone, step).items()
        width = method.features({layer: torch.empty(0, 2, shape[1]) for layer, shape in shapes}, 0).shape[1]
        examples = data.num_train or data.num_examples or ASSUMED_EXAMPLES
        found = predict_fit(
            method, examples=examples, width=width, num_outputs=step.num_outputs, semantics=step.semantics
        )
        row |= figures(found, memory)
        row["training_examples"] = examples
        row["assumes"] = f"{examples:,} training examples, solved at once, with the most that its solver keeps"
        row["by_category"] = row["largest_batch"] = None
        row["unavailable"] = {"by_category": "solved in one call, not decomposed"}
        if memory is not None:
            row["unavailable"]["largest_batch"] = "solved on all examples at once"
        return row
    assert isinstance(method, CachedMethod | PrefixMethod | LiveMethod)
    found = predict(method, backbone, step)
    row |= {**figures(found, memory), "largest_batch": None, "unavailable": {}}
    if isinstance(method, CachedMethod) and method.gradient_examples:
        row["initialisation_peak_bytes"] = before = predicted_peak(backbone, step)
        row["fits"] = None if memory is None else row["fits"] and before <= memory
    if memory is not None:
        row["largest_batch"] = largest_batch(method, backbone, step, found, memory)
    return row


def figures(found: Prediction, memory: int | None) -> dict[str, Any]:
    """What the row of a method says of a prediction; memory: bytes of the device, where some were given."""
    allocator = found.allocator
    return {
        "trainable_params": found.trainable_params,
        "head_params": found.head_params,
        "predicted_peak_bytes": found.peak.peak_bytes,
        "by_category": dict(found.peak.by_category),
        "by_phase": dict(found.peak.by_phase),
        "at": found.peak.at,
        "predicted_allocated_bytes": None if allocator is None else allocator.allocated_bytes,
        "predicted_reserved_bytes": None if allocator is None else allocator.reserved_bytes,
        "fits": None if memory is None else needed_bytes(found) <= memory,
    }


def unknown_row(name: str, method: Method, reason: str) -> dict[str, Any]:
    """The row of a method that cannot be predicted."""
    names = ("trainable_params", "predicted_peak_bytes", "by_category", "by_phase", "predicted_allocated_bytes")
    missing = (*names, "predicted_reserved_bytes", "fits", "largest_batch")
    row = {"method": name, "kind": method.kind, "initialisation_peak_bytes": None, **dict.fromkeys(missing)}
    return {**row, "unavailable": dict.fromkeys(missing, reason)}


def needed_bytes(found: Prediction) -> int:
    """What is held against a device's memory: reserved segments under CUDA semantics, else requested bytes."""
    return found.peak.peak_bytes if found.allocator is None else found.allocator.reserved_bytes


def largest_batch(
    method: CachedMethod | PrefixMethod | LiveMethod, backbone: Backbone, step: Step, found: Prediction, memory: int
) -> dict[str, Any]:
    """The largest batch found to fit into `memory` bytes.

    Memory is close to affine in the batch, so a line through two predictions says where it meets the limit and a
    prediction there says whether it does; each one that misses moves the line. "confirmed": the batch itself was
    predicted; "exact": so was the next one, which does not fit. A method that goes through its batch in slices takes
    the longer to predict the larger the batch: where the limit is out of reach, the line ends at the largest batch
    that is in reach, and the answer is what it says.
    """
    known = {step.batch_size: found}
    guess = step.batch_size // 2 if step.batch_size > 1 else 2
    left = _MOST_EVENTS
    while True:
        known[guess] = predict(method, backbone, replace(step, batch_size=guess))
        left -= known[guess].events
        fits, over = _sides(known, memory)
        exact = over == 1 or over == fits + 1
        guess, reach = _next_guess(known, memory), _reach(known, left)
        if exact or guess in known or len(known) == _MOST_PREDICTIONS or (guess > reach and fits > _NEAR * guess):
            size = needed_bytes(known[fits]) if fits else None
            return {"batch_size": fits, "predicted_bytes": size, "confirmed": True, "exact": exact}
        if guess > reach and reach < 2 * max(known):
            return {"batch_size": guess, "predicted_bytes": None, "confirmed": False, "exact": False}
        guess = min(guess, reach)


def _sides(known: Mapping[int, Prediction], memory: int) -> tuple[int, int]:
    """The largest batch known to fit (0: none) and the smallest known not to."""
    fits = max((batch for batch, found in known.items() if needed_bytes(found) <= memory), default=0)
    return fits, min((batch for batch in known if batch > fits), default=_LARGEST_BATCH)


def _next_guess(known: Mapping[int, Prediction], memory: int) -> int:
    """Where a line meets the limit: the one between what fits and what does not, else through the two largest."""
    fits, over = _sides(known, memory)
    *_, low, high = sorted(known) if fits not in known or over not in known else (fits, over)
    slope = (needed_bytes(known[high]) - needed_bytes(known[low])) / (high - low)
    if slope <= 0:  # reserved segments grow in steps
        return min(2 * max(known), over - 1)
    met = int(low + (memory - needed_bytes(known[low])) / slope)
    return min(max(met, fits + 1), over - 1)


def _reach(known: Mapping[int, Prediction], events: int) -> int:
    """The largest batch whose prediction takes no more than so many events."""
    *_, low, high = sorted(known)
    slope = (known[high].events - known[low].events) / (high - low)
    return _LARGEST_BATCH if slope <= 0 else int(high + (events - known[high].events) / slope)


def semantics_of(request: PlanRequest) -> str:
    """Whose kernels and defaults the figures are of."""
    if request.semantics == "cpu":
        return "cpu"
    auto = "efficient" if request.precision == "fp32" else "flash without a mask, else efficient"
    return f"cuda, attention: {auto if request.attention == 'auto' else request.attention}"


def step_facts(step: Step, backbone: Backbone) -> dict[str, Any]:
    """What the step is, as `bench plan --json` has it."""
    modality, text = backbone.arch.modality, getattr(backbone.preprocess, "max_length", None)
    return {
        "batch_size": step.batch_size,
        "num_outputs": step.num_outputs,
        "precision": step.precision,
        "optimizer": "AdamW, foreach" if step.semantics == "cuda" else "AdamW",
        "image_size": None if modality == "text" else getattr(backbone.preprocess, "image_size", None),
        "max_length": (step.max_length if modality == "text" else None) or text,
        "steps": 2,
    }
