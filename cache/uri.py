"""The form of every backbone and task name: scheme:path?option=value&option=value."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from urllib.parse import unquote

from .errors import SidebenchError, unknown


@dataclass(frozen=True)
class Uri:
    """A parsed name; `options` holds only options its scheme knows."""

    text: str
    scheme: str
    path: str
    options: Mapping[str, str]


def parse_uri(text: str, *, kind: str, known: Mapping[str, Collection[str]]) -> Uri:
    """Split `text`; `known` maps each scheme to its options, `kind` ("task", "backbone") names it in errors.

    Option values are percent-decoded, so a column called "a&b" is written a%26b; the path is taken as it stands.
    """
    scheme, colon, rest = text.partition(":")
    if not colon:
        forms = ", ".join(f"{name}:…" for name in sorted(known))
        raise SidebenchError(f"{kind} {text!r} has no scheme in front of a colon; write one of {forms}.")
    if scheme not in known:
        raise unknown(f"{kind} scheme", scheme, known)
    path, mark, query = rest.partition("?")
    if not path:
        raise SidebenchError(f"{kind} {text!r} names nothing after {scheme + ':'!r}.")
    options: dict[str, str] = {}
    for piece in query.split("&") if mark else ():
        name, equals, value = piece.partition("=")
        if not (name and equals and value):
            raise SidebenchError(f"{piece!r} in {kind} {text!r} is no option; write ?name=value&name=value.")
        if name not in known[scheme]:
            raise unknown(f"option of {scheme + ':'!r}", name, known[scheme])
        if name in options:
            raise SidebenchError(f"option {name!r} stands twice in {kind} {text!r}; give it once.")
        options[name] = unquote(value)
    return Uri(text, scheme, path, options)
