"""Repair a store: load the backbone and the task that its notes name, and have the bad chunks recomputed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cache.catalog import read_notes
from ..cache.errors import SidebenchError
from ..cache.fill import Progress
from ..cache.manifest import Manifest
from ..cache.pair import STREAMS
from ..cache.planning import Plan, options_of
from ..cache.repair import Repair, repair
from .prepare import Inputs, Say, only_tower, plan_store, prepare


def repair_store(folder: Path, *, home: Path, cache_dir: Path, progress: Progress, say: Say) -> Repair:
    """Mend every bad object of a store; see cache.repair.

    Raises SidebenchError when the notes do not say what it was built from, or that is not at hand or has changed.
    """

    def replan(manifest: Manifest) -> Plan:
        own = folder.resolve().parent == cache_dir.resolve()
        inputs = inputs_from(read_notes(folder), folder, own=own)
        say(f"repair: computing again from {inputs.backbone} and {inputs.task}")
        try:
            prepared = prepare(inputs, home=home, cache_dir=cache_dir, say=say)
            return plan_store(only_tower(prepared), options_of(manifest))
        except SidebenchError as error:
            raise SidebenchError(f"{folder.name} was built from what is not at hand now: {error}") from error

    return repair(folder, replan, progress=progress)


def inputs_from(notes: Mapping[str, Any], folder: Path, *, own: bool) -> Inputs:
    """What a store's notes say it was built from: untrusted, so only plain names and counts are taken.

    A `module:` backbone is code of the user's machine that a file asks to run: only of a store in the user's `own`
    cache folder, which their own builds wrote.
    """
    names = {key: notes.get(key) for key in ("backbone", "task")}
    sizes = {key: notes.get(key) for key in ("image_size", "max_length", "limit")}
    right = all(isinstance(name, str) and name for name in names.values()) and all(
        size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0) for size in sizes.values()
    )
    if not right:
        raise SidebenchError(
            f"{folder / 'notes.json'} does not say which backbone and task the cache was built from; "
            f"`bench cache rm {folder}` and build it again."
        )
    backbone = str(names["backbone"])
    if backbone.startswith("module:") and not own:
        raise SidebenchError(
            f"the notes of {folder} name {backbone}, which would run code, and this cache is not in your cache folder; "
            f"say that it is yours with --cache-dir {folder.parent}."
        )
    device = notes.get("device") if notes.get("device") in ("cpu", "cuda") else "auto"
    stream = notes.get("stream") if notes.get("stream") in STREAMS else ""
    return Inputs(backbone, str(names["task"]), device=str(device), stream=str(stream), **sizes)
