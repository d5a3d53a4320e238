"""`vpt@FILE.safetensors` in a comparison: refused before anything runs, or said in its jobs and records."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..adapters._base import LiveMethod, Method
from ..adapters._pretrained import HASH_BYTES, Pretrained, check_fit, load_into, read_pretrained
from ..adapters._pretrained_facts import Facts
from ..adapters._registry import Named, config_facts, find_method
from ..cache.architecture import Architecture
from ..cache.errors import SidebenchError
from ..cache.manifest import Manifest
from .learner import Learner
from .prepare import Say
from .record import Job, RunRecord
from .tasks.base import Split, Task
from .tasks.contents import example_hashes


def backbone_facts(arch: Architecture, weights_sha256: str) -> dict[str, Any]:
    """What a file of pre-trained modules says of the backbone, and what has to be equal."""
    return {"name": arch.name, "weights_sha256": weights_sha256, "blocks": arch.blocks, "width": arch.width}


def module_facts(named: Named, method: Method, backbone: Mapping[str, Any], **others: Any) -> Facts:
    """What is compared between a file and a module to be built, and what else is known of it."""
    return Facts(named.key, named.kind, named.last, config_facts(method), backbone, **others)


def initialisations(
    methods: Mapping[Named, Method],
    task: Task,
    parts: Split,
    manifest: Manifest,
    *,
    mappings: Sequence[str],
    allow_overlap: bool,
    say: Say,
) -> dict[str, dict[str, Any]]:
    """By method as typed, what its jobs say of the file that its modules start as.

    Raises SidebenchError when a file does not fit, or when it was pre-trained on examples of the task.
    """
    asked = {named: method for named, method in methods.items() if named.init is not None}
    if not asked:
        if mappings or allow_overlap:
            raise SidebenchError(
                "--map-init and --allow-overlap are for METHOD@FILE.safetensors, and no method has one."
            )
        return {}
    weights = manifest.backbone.get("weights_sha256")
    if weights is None:
        raise SidebenchError("imported features do not say which weights made them, so no pre-trained modules fit.")
    backbone = backbone_facts(manifest.architecture, str(weights))
    hashes = [bytes(row) for row in example_hashes(task.examples, HASH_BYTES)]
    found = {}
    for named, method in asked.items():
        assert named.init is not None
        file = read_pretrained(named.init)
        check_fit(file, module_facts(named, method, backbone), mappings)
        differing = _differing(file, manifest, task, cached=not isinstance(method, LiveMethod))
        if differing:
            say(f"{named.text}: pre-trained otherwise ({differing}); loaded all the same")
        shared = _shared(file, hashes, parts)
        if any(shared.values()) and not allow_overlap:
            counts = ", ".join(f"{count} {part}" for part, count in shared.items())
            raise SidebenchError(
                f"{named.text} was pre-trained on {file.facts.source['task']}, which holds examples of {task.uri} "
                f"({counts}), so its score would mean little; choose another source, or go on with --allow-overlap, "
                "which every record says."
            )
        found[named.text] = {
            "sha256": file.sha256,
            "backbone": backbone,
            "mappings": list(mappings),
            "overlap": shared,
            "differing": differing,
            **{field: dict(getattr(file.facts, field)) for field in ("source", "training", "result")},
        }
    return found


def sentences(records: Sequence[RunRecord]) -> list[str]:
    """What a report says of the pre-trained modules among these runs, once per method."""
    found = {}
    for record in records:
        init = record.asked.get("init")
        if init is None:
            continue
        source, training, overlap = init["source"], init["training"], init["overlap"]
        lines = [
            f"{record.asked['method']}: its modules start as pre-trained on {source['task']} "
            f"({source.get('train')} examples, {training.get('objective')}, {training.get('steps')} steps at learning "
            f"rate {training.get('lr')}, seed {training.get('seed')}; file sha256 {init['sha256'][:16]})"
        ]
        if record.measured is not None:
            lines += record.measured.get("mapped", ())
        if init["differing"]:
            lines.append(f"pre-trained otherwise: {init['differing']}")
        if any(overlap.values()):
            counts = ", ".join(f"{count} of {part}" for part, count in overlap.items())
            lines.append(f"--allow-overlap: these examples of this task were in that source: {counts}")
        found[record.asked["method"]] = "; ".join(lines) + "."
    return list(found.values())


def _differing(file: Pretrained, manifest: Manifest, task: Task, *, cached: bool) -> str:
    """What the modules saw otherwise than they will here, though they fit."""
    theirs = {**file.facts.preprocessing, "pooling": file.facts.source.get("pooling")}
    ours = {**manifest.preprocessing, "pooling": task.pooling}
    if cached:
        theirs["activations"], ours["activations"] = file.facts.training.get("activations"), asdict(manifest.form)
    return ", ".join(
        f"{key} {str(theirs.get(key))[:40]} then and {str(ours.get(key))[:40]} now"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key)
    )


def _shared(file: Pretrained, hashes: Sequence[bytes], parts: Split) -> dict[str, int]:
    """How many examples of each part of the task the modules were pre-trained on."""
    known = file.source_hashes()
    return {part: sum(hashes[i] in known for i in getattr(parts, part)) for part in ("train", "val", "test")}


def begin_pretrained(job: Job, method: Method, learner: Learner) -> list[str]:
    """Put the file's tensors into a learner that was built as ever; says what was mapped. It draws nothing."""
    named = find_method(job.method)
    assert named.init is not None
    assert job.init is not None
    file = read_pretrained(named.init)
    if file.sha256 != job.init["sha256"]:
        raise SidebenchError(f"{named.init} was changed since the comparison began; start it again.")
    wanted = module_facts(named, method, job.init["backbone"])
    return load_into(learner.body, file, wanted, job.init["mappings"])
