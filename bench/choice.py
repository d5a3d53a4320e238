"""From names as typed to configured methods: for whatever command takes --methods and --set."""

from collections.abc import Mapping, Sequence

from ..adapters._base import Method
from ..adapters._registry import Named, find_method, known_methods
from ..cache.errors import SidebenchError, unknown

Settings = Mapping[str, Mapping[str, str]]
"""Method key -> option -> value as typed."""


def chosen_methods(methods: Sequence[str], settings: Settings) -> list[tuple[Named, Method]]:
    """The methods named, in order and each once; "all" are those known, and all options must belong to one of them.

    Raises SidebenchError for an unknown method or option, or a value that does not fit.
    """
    if not methods:
        raise SidebenchError(f"no methods given; name some of {', '.join(known_methods())}, or all.")
    texts = dict.fromkeys(name for text in methods for name in (known_methods() if text == "all" else (text,)))
    named = [find_method(text) for text in texts]
    keys = {n.key for n in named}
    for key in settings:
        if key not in keys:
            raise unknown("method in --set", key, keys)
    return [(n, n.configured(settings.get(n.key, {}))) for n in named]
