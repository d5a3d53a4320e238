"""One worker of a build: `python -m sidebench.bench.build_worker`, its job the first line of standard input.

It writes the chunks of its share and nothing else, and tells what it does in JSON lines on standard output. The end of
standard input means that the parent is gone; then it stops at once, so nobody writes a chunk beside the next builder.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> int:
    """Write the share; 0 when it is on disk, 1 after an error that was told."""
    job = json.loads(sys.stdin.readline())
    # Before the imports of `run`, which take seconds.
    threading.Thread(target=_stop_with_parent, name="sidebench-parent-watch", daemon=True).start()
    from ..cache.errors import SidebenchError

    try:
        run(job)
    except SidebenchError as error:
        emit("error", message=str(error))
        return 1
    return 0


def run(job: dict[str, Any]) -> None:
    """Plan as the parent did, compute the batches that overlap the share, write its chunks."""
    import torch

    from ..cache.errors import SidebenchError
    from ..cache.fill import compute, stored_channels
    from ..cache.planning import CaptureOptions
    from ..cache.writer import StoreWriter
    from .prepare import Inputs, only_tower, plan_store, prepare

    torch.set_num_threads(job["threads"])
    cache_dir = Path(job["cache_dir"])
    prepared = prepare(Inputs(**job["inputs"]), home=Path(job["home"]), cache_dir=cache_dir, say=lambda _: None)
    capture = CaptureOptions(**{**job["capture"], "layers": tuple(job["capture"]["layers"])})
    planned = plan_store(only_tower(prepared), capture)
    if planned.manifest.digest != job["digest"]:
        raise SidebenchError("the backbone or the task changed while the build began; run the same command again.")
    writer = StoreWriter(cache_dir / planned.manifest.folder_name, planned.manifest, only=job["share"])
    first: list[int] = []

    def progress(done: int, _: int) -> None:
        first.append(done)
        emit("computed", examples=done - first[0])

    try:
        forward_seconds = compute(planned, writer, stored_channels(planned.manifest, writer), progress)
        writer.finish()
    finally:
        writer.close()
    emit("finished", forward_seconds=forward_seconds, write_seconds=writer.write_seconds)


def emit(event: str, **values: Any) -> None:
    """Tell the parent something, as a JSON line."""
    print(json.dumps({"event": event, **values}), flush=True)


def _stop_with_parent() -> None:
    # Not through sys.stdin, whose lock a thread that waits would hold when the interpreter ends.
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
