"""One builder per digest: a lock beside the store, held by the kernel, so a dead holder's is free at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import SidebenchError, disk_errors

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def builder_lock(folder: Path) -> Iterator[None]:
    """Hold `<folder>.lock` while building. Raises SidebenchError naming the process that holds it."""
    path = folder.with_name(folder.name + ".lock")
    with disk_errors(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(handle, 64).decode("ascii", "replace").strip() or "unknown"
                raise SidebenchError(
                    f"process {holder} is building this cache right now ({folder}); wait for it, or stop it and run "
                    "the same command again: it resumes."
                ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)  # the file stays: removing it would let two builders lock two files of one name
