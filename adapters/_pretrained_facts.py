"""What a file of pre-trained modules says of them: JSON, and on the way back untrusted, every field looked at."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..cache.errors import SidebenchError

FORMAT = "sidebench-modules/1"
_LONGEST, _DEEPEST = 2**20, 12
_LARGEST_COUNT = 2**31


@dataclass(frozen=True)
class Facts:
    """What the modules are: plain JSON. Up to `backbone` it is compared with what is to be built."""

    method: str  # the key its options go by
    kind: str
    last: int | None  # `@lastK`
    config: Mapping[str, Any]
    backbone: Mapping[str, Any]  # name, weights_sha256, blocks, width
    layers: tuple[str, ...] = ()  # that it reads from a cache
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)  # task, sha256, sizes of the parts, …
    training: Mapping[str, Any] = field(default_factory=dict)  # objective, seed, epochs, steps, lr, …
    result: Mapping[str, Any] = field(default_factory=dict)  # what came of it: best epoch, validation score
    versions: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"format": FORMAT, **asdict(self), "layers": list(self.layers)}

    @property
    def blocks(self) -> int:
        """How many blocks the modules are for."""
        return int(self.last or self.backbone["blocks"])


def facts_from(text: str) -> Facts:
    """Read what `Facts.document` wrote as JSON. Raises SidebenchError naming the field that is not as it should be."""
    if len(text) > _LONGEST:
        raise SidebenchError(f"its facts have {len(text)} characters, more than any of ours.")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SidebenchError(f"its facts are no JSON: {type(error).__name__}.") from None
    try:
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise SidebenchError("its facts hold a number that is not finite, or half a character.") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else document
        raise SidebenchError(f"its format is {str(found)[:60]!r}; this version reads {FORMAT!r}.")
    if _deeper(document, _DEEPEST):
        raise SidebenchError(f"its facts are nested more than {_DEEPEST} deep.")
    last = document.get("last")
    named = {name: _dict(document, name) for name in ("config", "backbone", "preprocessing", "source", "training")}
    backbone, layers = named["backbone"], document.get("layers")
    for name in ("name", "weights_sha256"):
        _text(backbone, name, "backbone.")
    for name in ("blocks", "width"):
        _count(backbone.get(name), f"backbone.{name}")
    _text(named["source"], "task", "source.")
    result = _dict(document, "result")
    if not isinstance(result.get("val_score"), float | int):
        raise SidebenchError(f"its result.val_score is {str(result.get('val_score'))[:60]!r}; wanted a number.")
    _count(result.get("best_epoch"), "result.best_epoch")
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise SidebenchError(f"its layers is {str(layers)[:60]!r}; wanted a list of names.")
    return Facts(
        method=_text(document, "method"),
        kind=_text(document, "kind"),
        last=None if last is None else _count(last, "last", 1),
        layers=tuple(layers),
        result=result,
        versions=_dict(document, "versions"),
        **named,
    )


def _deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(part, levels - 1) for part in inner)


def _dict(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = document.get(name)
    if not isinstance(value, dict):
        raise SidebenchError(f"its {name} is {str(value)[:60]!r}; wanted an object.")
    return value


def _text(document: Mapping[str, Any], name: str, above: str = "") -> str:
    value = document.get(name)
    if not isinstance(value, str):
        raise SidebenchError(f"its {above}{name} is {str(value)[:60]!r}; wanted a text.")
    return value


def _count(value: Any, name: str, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _LARGEST_COUNT:
        raise SidebenchError(f"its {name} is {str(value)[:60]!r}; wanted a whole number from {least}.")
    return value
