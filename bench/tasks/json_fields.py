"""Objects of the JSON files that data sets are published in, field by field: an error names file, place and field."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...cache.errors import SidebenchError
from .files import is_unicode
from .lists import existing

_MAX_BYTES = 4 * 2**30  # the largest of the official files has a tenth of it


@dataclass(frozen=True, slots=True)
class Item:
    """An object of a file: the `number`-th (from 0) of the list called `place`, and its fields."""

    path: Path
    place: str
    number: int
    fields: Mapping[str, object]

    @property
    def where(self) -> str:
        """For errors."""
        return f"{self.path} {self.place}[{self.number}]"

    def refused(self, key: str, wanted: str) -> SidebenchError:
        """The error for a field that is not as wanted."""
        if key not in self.fields:
            has = ", ".join(map(repr, list(self.fields)[:20])) or "nothing"
            return SidebenchError(f"{self.where} has no {key!r}; wanted {wanted}. It has {has}.")
        return SidebenchError(f"{self.where}: {key!r} is {shown(self.fields[key])}; wanted {wanted}.")

    def text(self, key: str) -> str:
        """A text that is not blank, as it stands."""
        value = self.fields.get(key)
        if not isinstance(value, str) or not value.strip() or not is_unicode(value):
            raise self.refused(key, "a text")
        return value

    def whole(self, key: str, least: int = 0) -> int:
        """A whole number from `least` on."""
        value = self.fields.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise self.refused(key, f"a whole number from {least} on")
        return value

    def identifier(self, key: str) -> int | str:
        """A text that is not blank, or a whole number."""
        value = self.fields.get(key)
        return self.text(key) if isinstance(value, str) else self.whole(key)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of so many finite numbers."""
        value = self.fields.get(key)
        if not isinstance(value, list) or len(value) != count or not all(map(is_number, value)):
            raise self.refused(key, f"a list of {count} numbers")
        return tuple(map(float, value))


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a finite number (true and false are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def shown(value: object) -> str:
    """A value as JSON, cut short, for errors."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"


def read_json(path: Path, source: str) -> object:
    """What a JSON file holds. `source`: where the file comes from, for errors."""
    size = existing(path, source).stat().st_size
    if size > _MAX_BYTES:
        raise SidebenchError(f"{path} has {size:,} bytes; wanted at most {_MAX_BYTES:,}. Is it from {source}?")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SidebenchError(f"{path} is no valid JSON ({error}); get it anew: it comes with {source}.") from error


def items_of(path: Path, place: str, values: object) -> Iterator[Item]:
    """The objects of a list that a file holds; `place` is what the list is called in errors."""
    if not isinstance(values, list) or not values:
        found = "an empty list" if values == [] else shown(values)
        raise SidebenchError(f"{path}: {place} is {found}; wanted a list of objects.")
    for number, fields in enumerate(values):
        if not isinstance(fields, dict):
            raise SidebenchError(f"{path} {place}[{number}] is {shown(fields)}; wanted an object.")
        yield Item(path, place, number, fields)
