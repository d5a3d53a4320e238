"""Rows of a task from a csv or jsonl file: text or image, label, optional split and id."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import chain
from pathlib import Path

from ...cache.errors import SidebenchError
from ...cache.examples import Modality
from .rows import Rows, part_of

COLUMN_OPTIONS = ("text", "image", "label", "split", "id")
_MAX_FIELD_CHARACTERS = 1 << 24  # csv's own limit of 131,072 is short for a document; a lost quote still ends somewhere

# A line of the file: its name for errors ("reviews.csv line 3") and its fields.
Line = tuple[str, Mapping[str, object]]


def read_csv(path: Path, columns: Mapping[str, str]) -> Rows:
    """Rows of a comma-separated file whose first line names the columns; `columns` renames (option -> column)."""
    return _rows(path, csv_lines(path), columns)


def read_jsonl(path: Path, columns: Mapping[str, str]) -> Rows:
    """Rows of a file with one JSON object per line; `columns` renames (option -> key)."""
    return _rows(path, jsonl_lines(path), columns)


def csv_lines(path: Path) -> Iterator[Line]:
    """Lines of a comma-separated file by the columns that its first line names."""
    text = "".join(text for _, text in text_lines(path))
    previous = csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header: list[str] | None = None
        while True:
            where = f"{path} line {reader.line_num + 1}"
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise SidebenchError(f"{where} is no valid csv ({error}).") from error
            if fields is None:
                return
            if not fields:
                continue
            if header is None:
                header = fields
                if twice := {name for name in header if header.count(name) > 1}:
                    raise SidebenchError(f"{path} names the column {min(twice)!r} twice; column names must differ.")
            elif len(fields) != len(header):
                raise SidebenchError(f"{where} has {len(fields)} fields; the first line names {len(header)} columns.")
            else:
                yield where, dict(zip(header, fields, strict=True))
    finally:
        csv.field_size_limit(previous)


def jsonl_lines(path: Path) -> Iterator[Line]:
    """The JSON object of every line that is not blank."""
    for number, text in text_lines(path):
        where = f"{path} line {number}"
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SidebenchError(f"{where} is no valid JSON ({error}).") from error
        if not isinstance(row, dict):
            raise SidebenchError(f'{where} is {text.strip()[:40]!r}; wanted an object such as {{"text": "label": …}}.')
        yield where, row


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end), decoded one by one so that an error can name the line."""
    if not path.is_file():
        raise SidebenchError(f"there is no file {path}" + (" (it is a folder)." if path.is_dir() else "."))
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte 0x{raw[error.start]:02x}"
                raise SidebenchError(f"{path} line {number} is not UTF-8 ({byte}); save the file as UTF-8.") from error


def _rows(path: Path, lines: Iterator[Line], columns: Mapping[str, str]) -> Rows:
    start = next(lines, None)
    if start is None:
        raise SidebenchError(f"{path} holds no examples.")
    modality = _modality(*start, columns)
    optional = {option for option in ("split", "id") if option in columns or option in start[1]}
    folder = path.resolve().parent
    ids: list[str] = []
    labels: list[str] = []
    texts: list[str] = []
    images: list[Path] = []
    parts: list[str] = []
    for where, fields in chain([start], lines):
        content = value_of(where, fields, modality, columns)
        if modality == "text":
            texts.append(content)
        else:
            images.append(image_path(where, folder, content))
        labels.append(value_of(where, fields, "label", columns))
        for option in ("split", "id"):
            if option in fields and option not in optional:
                raise SidebenchError(
                    f"{where} has {option!r}, but the lines before it have none; give it to all or none."
                )
        ids.append(value_of(where, fields, "id", columns) if "id" in optional else str(len(ids)))
        if "split" in optional:
            parts.append(part_of(value_of(where, fields, "split", columns), where))
    contents: tuple[str, ...] | tuple[Path, ...] = tuple(texts) if modality == "text" else tuple(images)
    return Rows(modality, tuple(ids), tuple(labels), contents, tuple(parts) if "split" in optional else None)


def _modality(where: str, fields: Mapping[str, object], columns: Mapping[str, str]) -> Modality:
    both: tuple[Modality, Modality] = ("text", "image")
    there = [option for option in both if option in columns] or [option for option in both if option in fields]
    if len(there) == 2:
        raise SidebenchError(f"{where} offers text and image; write ?text=COLUMN or ?image=COLUMN to choose one.")
    return there[0] if there else "text"  # which then is the column that is missed


def value_of(where: str, fields: Mapping[str, object], option: str, columns: Mapping[str, str]) -> str:
    """Content of a field as text, which must be there, a plain value and not blank."""
    column = columns.get(option, option)
    if column not in fields:
        near = get_close_matches(column, list(fields), n=1, cutoff=0.5)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        has = f"It has: {', '.join(map(repr, fields)) or 'nothing'}."
        raise SidebenchError(f"{where} has no {column!r}.{guess} {has} Name another with ?{option}=COLUMN.")
    value = fields[column]
    if value is None or isinstance(value, dict | list):
        raise SidebenchError(f"{where}: {column!r} is {json.dumps(value)[:40]}; wanted a text or a number.")
    text = str(value)
    if not text.strip():
        raise SidebenchError(f"{where}: {column!r} is empty; every example needs one. Fill it in or remove the line.")
    if not is_unicode(text):
        raise SidebenchError(f"{where}: {column!r} holds half a character (a lone surrogate), which is no text.")
    return text


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON's escapes can spell half a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def image_path(where: str, folder: Path, value: str) -> Path:
    """The image that a field names, which must exist below the file's folder."""
    try:
        path = (folder / value).resolve()
        is_file = path.is_file()
    except (OSError, ValueError) as error:
        raise SidebenchError(f"{where}: {value[:80]!r} is no path of an image ({error}).") from error
    if not path.is_relative_to(folder):
        raise SidebenchError(f"{where}: the image {value!r} lies outside {folder}; move it below that folder.")
    if not is_file:
        raise SidebenchError(f"{where}: there is no image {path}.")
    return path
