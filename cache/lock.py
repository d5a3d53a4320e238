"""One builder per digest: a lock beside the store, held by the kernel, so a dead holder's is free at once."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import SidebenchError, disk_errors

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

_DYING_SECONDS = 10.0


@contextmanager
def builder_lock(folder: Path) -> Iterator[int]:
    """Hold `<folder>.lock` while building; yields its handle, which holds the lock in a process that inherits it.

    Raises SidebenchError naming the process that holds it. A holder that is dead may have left workers that are about
    to notice; they are waited for.
    """
    path = folder.with_name(folder.name + ".lock")
    with disk_errors(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(handle, folder)
        with disk_errors(folder):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield handle
    finally:
        os.close(handle)  # the file stays: removing it would let two builders lock two files of one name


def _take(handle: int, folder: Path) -> None:
    give_up = time.monotonic() + _DYING_SECONDS
    while fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = os.pread(handle, 64, 0).decode("ascii", "replace").strip()
        if _alive(holder) or time.monotonic() > give_up:
            raise SidebenchError(
                f"process {holder or 'unknown'} is building this cache right now ({folder}); wait for it, or stop it "
                "and run the same command again: it resumes."
            )
        time.sleep(0.02)


def _alive(holder: str) -> bool:
    """Whether the process that took the lock lives; a number that was not written yet counts as alive."""
    try:
        os.kill(int(holder), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        return True
    return True
