"""`bench cache import`: an exported store comes back as it was, features that somebody already has become a store."""

import re
from pathlib import Path

from ..cache.build import BuildResult, Progress
from ..cache.errors import SidebenchError
from ..cache.feature_file import describe
from ..cache.features import ImportOptions, import_features
from ..cache.hdf5 import opened
from ..cache.load import IMPORTED
from ..cache.restore import exported_manifest, is_export, restore
from .prepare import Say
from .tasks.load import load_task

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,79}")


def import_hdf5(
    path: Path,
    task_uri: str | None,
    options: ImportOptions,
    *,
    home: Path,
    cache_dir: Path,
    progress: Progress,
    say: Say,
) -> BuildResult:
    """Make a store of an HDF5 file.

    Raises SidebenchError when the file is refused or does not fit the task; a file of our own needs neither a task nor
    a name, and with a task it must be of that task's data.
    """
    with opened(path) as file:
        ours = is_export(file, path)
        if not ours and (task_uri is None or options.name is None):
            raise SidebenchError(f"{path} was not exported from a cache; say what it holds: --task, --backbone-name.")
        task = None if task_uri is None else load_task(task_uri, home=home, limit=options.limit, say=say)
        if ours:
            held = exported_manifest(file, path)[0]
            if task is not None and held.dataset["sha256"] != task.examples.content_sha256:
                raise SidebenchError(
                    f"{path} was exported from a cache of other data ({held.examples} examples) than {task_uri} holds "
                    f"({len(task.examples)}); leave --task out, or give the task (and --limit) it was built on."
                )
            say(f"{path.name} is an export of {held.digest[:16]} ({held.architecture.name}); its own facts are kept")
            return restore(file, path, cache_dir, progress=progress)
        assert task is not None
        assert options.name is not None
        if not _NAME.fullmatch(options.name):
            raise SidebenchError(f"--backbone-name wants letters, digits, - _ and .; found {options.name!r}.")
        features = describe(
            file, path, task.examples.ids, layers=options.layers, prefix_tokens=options.prefix_tokens, say=say
        )
        notes = {"backbone": IMPORTED + options.name, "task": task_uri}
        return import_features(features, task.examples, options, cache_dir, notes=notes, say=say, progress=progress)
