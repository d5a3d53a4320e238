"""Markdown from untrusted text: tables, lists, figures. Nothing that is shown may become markup."""

import re
from collections.abc import Sequence
from typing import Any

from .tasks.score import ACCURACY, shown

# What Markdown (with GitHub's tables and formulas) reads as markup; an underscore inside a word is none.
_SPECIAL = re.compile(r"[\\`*|~$\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
MIB = 2**20


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "\n".join(f"- {text(line)}" for line in lines)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others figures."""
    lines = [
        _line([text(name) for name in head]),
        _line(["---", *("---:" for _ in head[1:])]),
        *(_line([text(c) for c in row]) for row in body),
    ]
    return "\n".join(lines)


def _line(row: Sequence[str]) -> str:
    return "| " + " | ".join(row) + " |"


def text(value: Any) -> str:
    """Names and messages are untrusted: nothing in them may become markup or break a table."""
    escaped = _SPECIAL.sub(r"\\\g<0>", " ".join(str(value).split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def mib(count: int | None) -> str:
    """Bytes as MiB; nothing where there are none."""
    return "" if count is None else f"{count / MIB:,.1f}"


def interval(ends: Sequence[float] | None, score_name: str = ACCURACY) -> str:
    """Of fractions in percent, of other scores as they are."""
    return "" if ends is None else f"{shown(score_name, ends[0]):.2f} to {shown(score_name, ends[1]):.2f}"
