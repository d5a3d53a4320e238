"""The one error a user may see: a sentence that says what is wrong, what was found, and what to type."""

import errno
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class SidebenchError(Exception):
    """Wrong use or refused input. The command line prints the message without a traceback and exits with 2."""


def unknown(kind: str, name: str, known: Iterable[str]) -> SidebenchError:
    """Build the error for a name that is not known, with the nearest known one suggested."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return SidebenchError(f"no {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write the store `folder` into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
            raise SidebenchError(
                f"the disk of {folder.parent} is full ({free} bytes free). What is written is kept: free some "
                "space, or move on with --cache-dir, and run the same command again to resume."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise SidebenchError(
                f"cannot write to {folder.parent}: {error.strerror}. Choose another folder with --cache-dir."
            ) from error
        raise SidebenchError(f"writing {folder} failed: {error}.") from error
