"""Finds methods: each file here, entry points in `sidebench.methods`, and a path to a file with one method."""

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, get_args

from ..cache.errors import SidebenchError, unknown
from ._at_last import AtLast
from ._base import FittedMethod, Kind, LiveMethod, Method, configured, describe_config, describe_families

_TRAINED = re.compile(r"\bTrained[:,].*?(?=\n\n|\Z)", re.DOTALL)
TABLE = re.compile(r"<!-- methods: [^\n]*-->\n(.*?)\n<!-- end of methods -->", re.DOTALL)
_LAST = re.compile(r"last[1-9][0-9]{0,3}(@|\Z)")
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Named:
    """A method as the user typed it, and the key its options go by."""

    text: str
    key: str
    cls: type[Method]
    last: int | None = None  # `@lastK`: on the last K blocks alone
    init: Path | None = None  # `@FILE.safetensors`: what its modules start as, see _pretrained.py
    twin: str | None = None  # with `init`: as typed without it, the same from its own initialisation

    @property
    def kind(self) -> Kind:
        """What stays in memory while it trains."""
        return self.cls.kind if self.last is None else "prefix"

    def configured(self, settings: Mapping[str, str], family: str | None = None) -> Method:
        """The method with `settings` (KEY -> text) over its defaults, those for the family of tasks going first."""
        method = self.cls(configured(self.key, self.cls.Config, settings, family))
        if self.last is None:
            return method
        assert isinstance(method, LiveMethod)
        return AtLast(method, self.last)


def known_methods() -> tuple[str, ...]:
    """Names of the methods that need no path, sorted."""
    return tuple(sorted({*_files(), *(point.name for point in entry_points(group="sidebench.methods"))}))


def _files() -> list[str]:
    package = importlib.import_module(__package__ or "")
    return [info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_")]


def find_method(text: str) -> Named:
    """Resolve `unipt`, an entry point, or `./mine.py`.

    Behind an @ may stand `lastK` (a live method on the last blocks alone, `lora@last4`), a file of pre-trained modules
    (`vpt@FILE.safetensors`), or both (`lora@last4@FILE.safetensors`). Raises SidebenchError with the nearest name for
    an unknown method, and for a file that is missing or does not hold one method.
    """
    name, rest = _parted(text)
    named = replace(_find(name), text=text)
    if rest is None:
        return named
    last, _, path = rest.partition("@") if _LAST.match(rest) else ("", "", rest)
    if path.endswith(SUFFIX):
        named = replace(named, init=_init(Path(path), named), twin=text.removesuffix(f"@{path}"))
    elif path or rest != last:
        raise SidebenchError(
            f"{text!r}: behind the @ stands lastK, the number of blocks to hold, as in lora@last4, or a file that "
            f"ends in {SUFFIX}, or one after the other."
        )
    if not last:
        return named
    if not issubclass(named.cls, LiveMethod):
        live = ", ".join(known for known in known_methods() if issubclass(_find(known).cls, LiveMethod))
        raise SidebenchError(
            f"{text}: {name} is a {named.cls.kind} method; @lastK takes one that trains inside the backbone: {live}."
        )
    return replace(named, last=int(last.removeprefix("last")))


def _parted(text: str) -> tuple[str, str | None]:
    """The method, which may be a path, and what stands behind its @."""
    ending = text.find(".py@")
    at = text.find("@") if ending < 0 else ending + len(".py")
    return (text, None) if at < 0 or text.endswith(".py") else (text[:at], text[at + 1 :])


def _init(path: Path, named: Named) -> Path:
    if issubclass(named.cls, FittedMethod):
        raise SidebenchError(f"{named.key} is solved, not trained in steps: it has no modules to start from {path}.")
    if not path.is_file():
        raise SidebenchError(f"no file {path} of pre-trained modules; `bench pretrain --out {path}` makes one.")
    return path


def _find(text: str) -> Named:
    if text.endswith(".py"):
        return Named(text, Path(text).stem, _single_method(_import_file(Path(text)), text))
    outside = {point.name: point for point in entry_points(group="sidebench.methods")}
    if text in outside:
        loaded = _load_entry_point(outside[text])
        return Named(text, text, loaded if isinstance(loaded, type) else _single_method(loaded, text))
    if text not in known_methods():
        raise unknown("method", text, known_methods())
    return Named(text, text, _single_method(importlib.import_module(f".{text}", __package__), text))


def describe(name: str) -> dict[str, Any]:
    """What `bench methods` prints, all of it read from the method's file."""
    cls = find_method(name).cls
    summary = (cls.__doc__ or "").strip().partition("\n")[0]
    counted = _TRAINED.search(inspect.getdoc(sys.modules[cls.__module__]) or "")
    return {
        "name": name,
        "kind": cls.kind,
        "paper": cls.paper,
        "summary": summary,
        "parameters": counted[0] if counted else "",
        "config": describe_config(cls.Config),
        "families": describe_families(cls.Config),
    }


def methods_table() -> str:
    """The methods in this folder as a Markdown table, which the README holds."""
    rows = [describe(name) for name in _files()]
    order = get_args(Kind)
    lines = ["| method | kind | what it is | paper |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (order.index(row["kind"]), row["name"])):
        lines.append(f"| `{row['name']}` | {row['kind']} | {row['summary']} | {row['paper']} |")
    return "\n".join(lines)


def config_facts(method: Method) -> dict[str, Any]:
    """A method's configuration as plain JSON, for the run record."""
    return asdict(method.config)


def _single_method(module: Any, text: str) -> type[Method]:
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = f" ({', '.join(cls.__name__ for cls in found)})" if found else ""
        raise SidebenchError(
            f"{text} defines {len(found)} methods{names}; a method file defines one subclass of Method."
        )
    if inspect.isabstract(found[0]):
        lacking = ", ".join(sorted(found[0].__abstractmethods__))
        raise SidebenchError(f"{text}: {found[0].__name__} lacks {lacking}; see the class it is derived from.")
    return found[0]


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise SidebenchError(f"no method file {path}; looked in {path.resolve().parent}.")
    place = zlib.crc32(str(path.resolve()).encode())  # two files of one name in two folders are two modules
    spec = importlib.util.spec_from_file_location(f"sidebench_user_method_{path.stem}_{place:08x}", path)
    if spec is None or spec.loader is None:
        raise SidebenchError(f"{path} cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise SidebenchError(f"importing {path} failed: {type(error).__name__}: {error}") from error
    return module


def _load_entry_point(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        raise SidebenchError(f"loading the method {point.name!r} ({point.value}) failed: {error}") from error


def _write_table(path: Path) -> None:
    """Put the table where the README marks its place."""
    text = path.read_text("utf-8")
    found = TABLE.search(text)
    if found is None:
        raise SidebenchError(f"{path} marks no place for the table of methods.")
    path.write_text(text[: found.start(1)] + methods_table() + text[found.end(1) :], "utf-8")


if __name__ == "__main__":
    _write_table(Path(sys.argv[1]))
