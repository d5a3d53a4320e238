"""From names as typed to configured methods: for whatever command takes --methods and --set."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..adapters._base import CachedMethod, Defaults, FittedMethod, LiveMethod, Method, PrefixMethod, family_defaults
from ..adapters._registry import Named, find_method, known_methods
from ..cache.architecture import Architecture
from ..cache.errors import SidebenchError, unknown
from ..cache.form import Form
from ..cache.reduction import reduction_of

Settings = Mapping[str, Mapping[str, str]]
"""Method key -> option -> value as typed."""


def chosen_methods(methods: Sequence[str], settings: Settings, family: str | None = None) -> list[tuple[Named, Method]]:
    """The methods named, in order and each once; "all" are those known, and all options must belong to one of them.

    `family`: of the task, where there is one (`bench.tasks.load.family_of`).
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
    return [(n, n.configured(settings.get(n.key, {}), family)) for n in named]


def family_options(
    named: Sequence[Named], settings: Settings, family: str | None, *, lr_typed: bool
) -> dict[str, Defaults]:
    """By method, what the family changes in its defaults, where that is something and not typed otherwise."""
    left = {}
    for n in named:
        found = family_defaults(n.cls.Config, family)
        typed = {*settings.get(n.key, {}), *(["lr"] if lr_typed else [])}
        if options := {key: value for key, value in found.options.items() if key not in typed}:
            left[n.text] = replace(found, options=options)
    return left


def refusal(method: Method, arch: Architecture, form: Form) -> str | None:
    """Why a method cannot work on a backbone whose activations are cached in this form; None when it can.

    One that reads the cache alone sees the backbone through the tokens that it keeps.
    """
    if arch.decoder_blocks and not method.two_stacks:
        return f"it is made for one stack of blocks, {arch.name} has two; without ?tower=both it is the encoder alone"
    if arch.projected_from and not method.projected:
        return f"it reads the tokens of the final layer, and {arch.name} ends in one embedding; leave ?projected out"
    if isinstance(method, LiveMethod):
        return method.refusal(arch)
    if isinstance(method, PrefixMethod):
        if form.tokens != "all":
            return f"it restarts the backbone, which needs every token, and the cache keeps --tokens {form.tokens}"
        return method.refusal(arch)
    if isinstance(method, CachedMethod) and method.runs_blocks and form.tokens != "all":
        return f"it runs blocks of the backbone, which need every token, and the cache keeps --tokens {form.tokens}"
    return method.refusal(reduction_of(form.tokens, arch, form.seed).seen)


def layers_read(methods: Iterable[Method], arch: Architecture) -> tuple[str, ...]:
    """The layers that these methods read from a cache, each once; none of live methods."""
    reading = (method for method in methods if isinstance(method, CachedMethod | FittedMethod | PrefixMethod))
    return tuple(dict.fromkeys(layer for method in reading for layer in method.layers(arch)))
