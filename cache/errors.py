"""The one error a user may see: a sentence that says what is wrong, what was found, and what to type."""

from collections.abc import Iterable
from difflib import get_close_matches


class SidebenchError(Exception):
    """Wrong use or refused input. The command line prints the message without a traceback and exits with 2."""


def unknown(kind: str, name: str, known: Iterable[str]) -> SidebenchError:
    """Build the error for a name that is not known, with the nearest known one suggested."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return SidebenchError(f"no {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")
