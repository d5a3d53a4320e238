"""`bench plan` of two streams, each with its backbone and its cache: what retrieval would take."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters._base import CachedMethod, LiveMethod, Method, PrefixMethod
from ..cache.backbone import Backbone
from ..cache.configs import without_weights
from ..cache.errors import SidebenchError
from ..cache.load import CONFIG_ONLY
from ..cache.pair import STREAMS, towers_of
from .choice import chosen_methods, refusal
from .goals.pairs import Pairs
from .plan import PlanRequest, backbone_for, beside, check, figures, parse_bytes, semantics_of, step_facts, unknown_row
from .plan_cache import CacheFacts, Data, cache_facts
from .predict import Prediction, Unpredictable, predict_towers
from .prepare import Say
from .step import Step, batch_for
from .tasks.base import PairTask
from .tasks.load import load_any
from .towers import PairBatch

_SEARCHED = "searched for one backbone only"
_NOT_MEASURED = "not measured for two backbones; `bench plan` of each alone, with its weights, measures its cache"
_BY_STREAM = "images and texts are cached apart; see streams"
_IMAGE, _TEXT = STREAMS


def predict_pair(method: Method, backbones: Mapping[str, Backbone], step: Step, frames: int = 1) -> Prediction:
    """`predict` of two backbones by stream: a batch is `step.batch_size` captions and the items that they describe.

    step.goal is Pairs; frames: how many each item has. Raises as `predict` does.
    """
    if not isinstance(method, CachedMethod | PrefixMethod | LiveMethod):
        raise Unpredictable("it is not trained in steps")
    of_images = replace(step, batch_size=step.batch_size * frames)

    def batch(copies: Mapping[str, Backbone]) -> PairBatch:
        visual = batch_for(method, copies[_IMAGE], of_images)
        starts = None if frames == 1 else tuple(range(0, of_images.batch_size + 1, frames))
        return PairBatch(visual, batch_for(method, copies[_TEXT], step), starts)

    return predict_towers(method, backbones, batch, step)


def pair_refusal(method: Method, backbones: Mapping[str, Backbone], step: Step) -> str | None:
    """Why a method cannot work on one of the backbones; None when it can on both."""
    said = {stream: refusal(method, backbone.arch, step.form) for stream, backbone in backbones.items()}
    return next((f"of the {stream}s: {reason}" for stream, reason in said.items() if reason), None)


def pair_cache(streams: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of both caches as one: `streams` is by stream what `cache_facts` says; how many examples, only they say."""
    image, text = (streams[stream] for stream in STREAMS)
    known = None not in (image["bytes"], text["bytes"])
    return {
        **image,
        "streams": dict(streams),
        "layers": [f"{stream}:{layer}" for stream in STREAMS for layer in streams[stream]["layers"]],
        "examples": None,
        "ragged": image["ragged"] or text["ragged"],
        "bytes_per_example": None,
        "bytes": image["bytes"] + text["bytes"] if known else None,
        "unavailable": {
            **image["unavailable"],
            **text["unavailable"],
            **dict.fromkeys(("examples", "bytes_per_example"), _BY_STREAM),
        },
    }


def plan_pair(request: PlanRequest, *, home: Path, cache_dir: Path, say: Say) -> dict[str, Any]:
    """`plan` of `pair:image=URI,text=URI`. Raises SidebenchError as `plan` does."""
    asked = chosen_methods(request.methods, request.settings)
    configured = beside({named.text: method for named, method in asked}, request)
    check(request)
    memory = None if request.device_memory is None else parse_bytes(request.device_memory)
    task = None if request.task is None else _pairs(request, home, say)
    frames, goal = _frames(request, task), _goal(request, task)
    towers = towers_of(request.backbone)
    loaded = {s: backbone_for(replace(request, backbone=uri), home, say) for s, uri in towers.items()}
    _check_modalities(loaded)
    data = _data(request, task, {s: one for s, one in loaded.items() if not towers[s].startswith(CONFIG_ONLY)})
    backbones = {stream: without_weights(one) for stream, one in loaded.items()}
    step = Step(
        request.batch_size,
        precision=request.precision,
        semantics=request.semantics,
        attention=request.attention,
        form=request.capture.form(),
        max_length=data[_TEXT].longest,
        goal=goal,
    )
    rows, skipped = [], []
    for name, method in configured.items():
        say(f"predicting {name}")
        try:
            if reason := pair_refusal(method, backbones, step):
                raise SidebenchError(reason)
            rows.append(_row(name, method, predict_pair(method, backbones, step, frames), memory))
        except Unpredictable as error:
            rows.append(unknown_row(name, method, str(error)))
        except SidebenchError as error:
            skipped.append({"method": name, "reason": str(error)})
    kept = [method for name, method in configured.items() if name in {row["method"] for row in rows}]
    streams = {
        s: cache_facts(CacheFacts(request.capture, kept, one, step, data[s]), None, cache_dir, say, _NOT_MEASURED)
        for s, one in backbones.items()
    }
    return {
        "backbone": request.backbone,
        "task": request.task,
        "kind": "predicted",
        "semantics": semantics_of(request),
        "step": {
            **step_facts(step, backbones[_TEXT]),
            "image_size": step_facts(step, backbones[_IMAGE])["image_size"],
            "num_outputs": goal.width,
            "frames": frames,
        },
        "device_memory_bytes": memory,
        "methods": rows,
        "skipped": skipped,
        "cache": pair_cache(streams),
    }


def _row(name: str, method: Method, found: Prediction, memory: int | None) -> dict[str, Any]:
    row = {"method": name, "kind": method.kind, "initialisation_peak_bytes": None}
    return {**row, **figures(found, memory), "largest_batch": None, "unavailable": {"largest_batch": _SEARCHED}}


def _pairs(request: PlanRequest, home: Path, say: Say) -> PairTask:
    if request.num_examples is not None or request.num_captions is not None:
        raise SidebenchError("--num-examples stands in for a task; with --task use --limit.")
    task = load_any(str(request.task), home=home, limit=request.limit, say=say)
    if not isinstance(task, PairTask):
        raise SidebenchError(f"{request.backbone} is two backbones, and {request.task} has one kind of example.")
    return task


def _frames(request: PlanRequest, task: PairTask | None) -> int:
    """Of an item; where they have several numbers of them, the most, as in the largest batch."""
    if task is None:
        return request.frames
    return 1 if task.frames is None else int(np.diff(task.frames).max())


def _data(request: PlanRequest, task: PairTask | None, real: Mapping[str, Backbone]) -> dict[str, Data]:
    """What the cache of each stream holds; real: the backbones that have a tokenizer, if they read text."""
    if task is None:
        images = request.num_examples and request.num_examples * request.frames
        return {_IMAGE: Data(1, images), _TEXT: Data(1, request.num_captions)}
    return {s: Data(1, len(held), examples=held).with_lengths(real.get(s)) for s, held in task.streams.items()}


def _goal(request: PlanRequest, task: PairTask | None) -> Pairs:
    if isinstance(request.goal, Pairs):
        return request.goal
    if task is None:
        return Pairs(PairTask.width, PairTask.pooling)
    return Pairs(task.width, task.pooling, task.loss, task.folds, task.frames is not None)


def _check_modalities(backbones: Mapping[str, Backbone]) -> None:
    for stream, backbone in backbones.items():
        if backbone.arch.modality != stream:
            raise SidebenchError(
                f"{backbone.arch.name} reads {backbone.arch.modality} and stands for the {stream}s of a pair; write "
                "pair:image=URI,text=URI."
            )
