"""Read a pickled dict of str -> list of lists of str without unpickling it: nothing that a file says is ever run.

Unpickling calls whatever a file names, so it is no way to read a stranger's. Here the standard library's `pickletools`
takes the opcodes apart, and only those that make texts, lists and a dict are followed, of protocols 0 to 5 and as
Python 2 wrote them (its byte strings are taken as UTF-8). All else is refused, and so is a list that stands in two
places: a short file could spell out endlessly many words by it.
"""

import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...cache.errors import SidebenchError

_MAX_BYTES = 1 << 26  # of the file; the official one has a tenth of it
_MAX_MADE = 1 << 28  # bytes, about, of what it spells out
_LIST_BYTES = 64  # an empty one, about
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTE_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING")  # Python 2's; pickletools takes them as Latin-1
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_MARK = object()


class _Refused(Exception):
    """What was found that is not followed."""


class _Reader:
    """What opcodes have made so far: the stack, and the memo of texts to be used again."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.made = 0

    def follow(self, opcode: str, argument: Any) -> None:
        """Do what an opcode says, if it is one of those that make texts, lists and dicts."""
        if opcode in _TEXTS:
            self.push(argument, len(argument))
        elif opcode in _BYTE_TEXTS:
            self.push(argument.encode("latin-1").decode("utf-8"), len(argument))
        elif opcode in _PUTS:
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif opcode in _GETS:
            text = self.memo[argument]
            if not isinstance(text, str):
                raise _Refused("a list or a dict in two places")
            self.push(text, len(text))
        elif opcode in _STEPS:
            _STEPS[opcode](self)
        elif opcode not in ("PROTO", "FRAME"):
            raise _Refused(f"the opcode {opcode}")

    def push(self, value: Any, size: int) -> None:
        """Put it on the stack; `size` in bytes."""
        self.made += size + 8
        if self.made > _MAX_MADE:
            raise _Refused(f"more than {_MAX_MADE:,} bytes of texts")
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        """Take what lies above the last mark off the stack, and the mark."""
        found = []
        while (value := self.stack.pop()) is not _MARK:
            found.append(value)
        return found[::-1]

    def append(self, values: list[Any]) -> None:
        """Lengthen the list on top of the stack."""
        if not isinstance(self.stack[-1], list):
            raise _Refused("something added to what is no list")
        self.stack[-1].extend(values)

    def set(self, values: list[Any]) -> None:
        """Enter keys and values, by turns, into the dict on top of the stack."""
        top = self.stack[-1]
        if not isinstance(top, dict):
            raise _Refused("a key set in what is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str) or key in top:
                raise _Refused(f"the key {key!r:.40} again" if isinstance(key, str) else "a key that is no text")
            top[key] = value

    def empty(self, value: Any) -> None:
        """Put a new list or dict on the stack."""
        self.push(value, _LIST_BYTES)

    def of_marked(self, value: Any) -> None:
        """Put a new list or dict on the stack that holds what lies above the last mark."""
        values = self.since_mark()
        self.empty(value)
        self.append(values) if isinstance(value, list) else self.set(values)


_STEPS: Mapping[str, Callable[[_Reader], None]] = {
    "MARK": lambda reader: reader.push(_MARK, 0),
    "EMPTY_LIST": lambda reader: reader.empty([]),
    "EMPTY_DICT": lambda reader: reader.empty({}),
    "LIST": lambda reader: reader.of_marked([]),
    "DICT": lambda reader: reader.of_marked({}),
    "APPEND": lambda reader: reader.append([reader.stack.pop()]),
    "APPENDS": lambda reader: reader.append(reader.since_mark()),
    "SETITEM": lambda reader: reader.set([reader.stack.pop(), reader.stack.pop()][::-1]),
    "SETITEMS": lambda reader: reader.set(reader.since_mark()),
}


def read_lists(path: Path) -> dict[str, list[list[str]]]:
    """The dict in a file of at most 64 MiB. Raises SidebenchError for a pickle of anything else."""
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise SidebenchError(f"{path} has {size:,} bytes; wanted at most {_MAX_BYTES:,}.")
    reader = _Reader()
    try:
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            if opcode.name == "STOP":
                break
            reader.follow(opcode.name, argument)
        return _checked(reader.stack)
    except _Refused as refused:
        raise SidebenchError(
            f"{path} holds {refused}; wanted a pickled dict of lists of lists of words, and nothing else is read."
        ) from refused
    except (IndexError, KeyError, ValueError) as error:
        raise SidebenchError(f"{path} is no whole pickle of texts ({error}); get it anew.") from error


def _checked(stack: list[Any]) -> dict[str, list[list[str]]]:
    if len(stack) != 1 or not isinstance(stack[0], dict):
        raise _Refused("no dict")
    for key, lists in stack[0].items():
        if not isinstance(lists, list) or not all(isinstance(words, list) for words in lists):
            raise _Refused(f"no list of lists at the key {key!r:.40}")
        if not all(isinstance(word, str) for words in lists for word in words):
            raise _Refused(f"a word that is no text at the key {key!r:.40}")
    return stack[0]
