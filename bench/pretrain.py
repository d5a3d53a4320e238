"""`bench pretrain`: train a method's modules on a source task, keep them, and throw the head away.

PVP (Song, Yang, Guan, Zhu, Qiao, Hu; arXiv 2304.13639): prompts and low-rank updates fail at one or two examples per
class because they start at random, so they are pre-trained with the backbone frozen. The paper's own schedule could
not be read; the loop is that of every comparison here. Side methods (unipt, lst) are pre-trained from a cache: ours.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..adapters._base import Method, trained
from ..adapters._pretrained import HASH_BYTES, read_pretrained, save_pretrained
from ..adapters._pretrained_facts import Facts
from ..adapters._registry import Named
from ..cache.build import BuildResult, Plan, Progress
from ..cache.errors import SidebenchError
from ..cache.manifest import canonical_json
from .assemble import Initial, Shared, assemble, placed, seeded, settings_of
from .choice import layers_read, refusal
from .compare import check_pooling
from .contrastive import PROJECTION, Contrastive
from .jobs import code_sha256, job_of
from .learner import Learner
from .prepare import Say, Tower, classified, plan_store, prepare, resolve_device, store_for
from .pretrain_request import PretrainRequest, facts_of, method_of
from .record import Job
from .resume import ResumeFile
from .tasks.base import Split, Task
from .tasks.contents import example_hashes
from .tasks.split import split as split_task
from .training import SUPERVISED, Diverged, Objective, Trained, load_trained, train
from .zero_shot import Control, control_of


def pretrain(
    request: PretrainRequest, *, home: Path, cache_dir: Path, say: Say, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Make the file, or find it made; returns what `bench pretrain --json` prints.

    Raises SidebenchError before anything runs when something does not fit, Diverged when the loss is not finite.
    """
    named, method = method_of(request)
    prepared = prepare(request.inputs, home=home, cache_dir=cache_dir, say=say)
    task, tower = classified(prepared, "bench pretrain")
    if tower.backbone is None:
        raise SidebenchError("imported features have no network behind them, so no other task could be read alike.")
    parts = split_task(task, request.split_seed)
    planned = plan_store(tower, request.capture)
    check_pooling(task, planned.manifest)
    if reason := refusal(method, tower.arch, planned.manifest.form):
        raise SidebenchError(f"{request.method} cannot be pre-trained on {tower.arch.name}: {reason}.")
    facts = facts_of(request, named, method, task, tower, planned, parts)
    resume = ResumeFile(request.out.with_name(f"{request.out.name}.resume"), _about(facts, named, request), say)
    if request.fresh:
        resume.remove()
    elif request.out.exists() and not resume.path.exists():  # else it is about to be written over, as --fresh asked
        return _finished(request, facts, say)
    control = control_of(
        request.zero_shot, task, tower, method, request.capture, request.split_seed, home, say, progress
    )
    built = _store(tower, planned, method, say, progress)
    hashes = example_hashes(task.examples, HASH_BYTES)[np.concatenate([parts.train, parts.val])]
    job = _job(request, named, task, facts, built)
    del prepared, tower, planned  # a cached method trains with no backbone in memory
    return _train(request, method, job, parts, facts, torch.from_numpy(hashes), resume, control, say)


def _about(facts: Facts, named: Named, request: PretrainRequest) -> str:
    """Which training a resume file is of."""
    device = str(resolve_device(request.inputs.device, lambda _: None))
    return canonical_json({**facts.document(), "code": code_sha256(named), "device": device})


def _finished(request: PretrainRequest, facts: Facts, say: Say) -> dict[str, Any]:
    """What there is to say of a file that is there; one of other facts is never written over."""
    found = read_pretrained(request.out)
    ours, theirs = facts.document(), found.facts.document()
    differing = [key for key in ours if key not in ("result", "versions") and ours[key] != theirs[key]]
    if differing:
        raise SidebenchError(
            f"{request.out} is there and was made otherwise ({differing[0]} is {str(theirs[differing[0]])[:120]} in it "
            f"and {str(ours[differing[0]])[:120]} here); choose another --out, or write over it with --fresh."
        )
    say(f"{request.out} is finished; --fresh trains it again")
    control = {} if request.zero_shot is None else {"zero_shot": "the head is gone; --fresh trains it again"}
    return _document("exists", request, found.facts, found.sha256) | {"zero_shot": None, "unavailable": control}


def _store(tower: Tower, planned: Plan, method: Method, say: Say, progress: Progress) -> BuildResult | None:
    layers = layers_read([method], tower.arch)
    if not layers:
        return None
    return store_for(tower, planned, layers, may_build=True, progress=progress, say=say)


def _job(request: PretrainRequest, named: Named, task: Task, facts: Facts, built: BuildResult | None) -> Job:
    job = job_of(
        named,
        request.settings,
        request.inputs,
        task,
        request.capture,
        {} if built is None else {"": built},
        seed=request.seed,
        split_seed=request.split_seed,
        epochs=int(facts.training["epochs"]),
        batch_size=request.batch_size,
        lrs=(float(facts.training["lr"]),),
        precision=request.precision,
        data={},
    )
    return replace(job, num_outputs=PROJECTION) if request.objective == "contrastive" else job


def _train(
    request: PretrainRequest,
    method: Method,
    job: Job,
    parts: Split,
    facts: Facts,
    hashes: torch.Tensor,
    resume: ResumeFile,
    control: Control | None,
    say: Say,
) -> dict[str, Any]:
    begun, device = time.perf_counter(), torch.device(job.device)
    initial = Initial(job, method, parts.train, device, lambda *_, **__: None)
    made = assemble(job, method, device, initial, Shared())
    source, _ = placed(made.source, job, device)
    targets = torch.from_numpy(job.targets(made.targets)).to(device)
    objective: Objective = Contrastive(request.temperature) if request.objective == "contrastive" else SUPERVISED

    def tell(event: dict[str, float]) -> None:
        score = f"{'score' if objective is SUPERVISED else 'negative loss'} {event['val_score']:.4f}"
        say(f"epoch {event['epoch']}/{event['epochs']}, loss {event['loss']:.4f}, validation {score}")

    settings = settings_of(job, method, job.lrs[0], len(parts.train))
    with seeded(job.seed):
        found = train(
            made.learner, source, targets, parts.train, parts.val, settings, tell, objective, checkpoints=resume
        )
    if not math.isfinite(found.val_score):
        raise Diverged(
            f"the validation score is {found.val_score} at learning rate {settings.lr:g}; try a smaller --lr."
        )
    load_trained(made.learner, found.state)
    tried = None if control is None else control.tried(made, job, settings, hashes)
    result = {"best_epoch": found.best_epoch + 1, "val_score": found.val_score, "losses": found.losses}
    facts = replace(facts, result=result)
    save_pretrained(request.out, made.learner.body, facts, hashes)
    resume.remove()
    status = "resumed" if resume.epochs else "trained"
    document = _document(status, request, facts, read_pretrained(request.out).sha256)
    return document | _sizes(made.learner, found, time.perf_counter() - begun) | {"zero_shot": tried}


def _sizes(learner: Learner, found: Trained, seconds: float) -> dict[str, Any]:
    return {
        "trainable_params": sum(p.numel() for p in trained(learner).values()),
        "head_params": sum(p.numel() for p in learner.head.parameters()),
        "module_params": sum(p.numel() for p in trained(learner.body).values()),
        "train_seconds": found.train_seconds,
        "seconds": seconds,
        "unavailable": {},
    }


def _document(status: str, request: PretrainRequest, facts: Facts, sha256: str) -> dict[str, Any]:
    unknown_when_found = ("trainable_params", "head_params", "module_params", "train_seconds", "seconds")
    return {
        "status": status,
        "path": str(request.out),
        "sha256": sha256,
        "method": request.method,
        "kind": facts.kind,
        "source": dict(facts.source),
        **{key: facts.training[key] for key in ("objective", "seed", "epochs", "steps", "lr", "batch_size")},
        "val_score": facts.result.get("val_score"),
        "best_epoch": facts.result.get("best_epoch"),
        **dict.fromkeys(unknown_when_found),
    }


def sentence(found: Mapping[str, Any]) -> str:
    """What was made, and how to go on."""
    source, control = found["source"], found["zero_shot"]
    made = {"trained": "trained", "resumed": "trained to its end", "exists": "found finished"}[found["status"]]
    size = "" if found["module_params"] is None else f", {found['module_params']:,} parameters"
    lines = [
        f"{found['method']}: modules {made} on {source['task']} ({found['objective']}, {found['steps']} steps, "
        f"learning rate {found['lr']:g}, seed {found['seed']}), validation {found['val_score']:.4f} at epoch "
        f"{found['best_epoch']}{size}; the head is thrown away."
    ]
    if control is not None:
        lines.append(
            f"control: the source head as it is, zero-shot on {control['task']}: {control['name']} "
            f"{control['score']:.4f} on {control['examples']} test examples, {control['seen']} of them in the source."
        )
    lines.append(f"to use them: bench compare --methods {found['method']},{found['method']}@{found['path']} …")
    return "\n".join(lines)
