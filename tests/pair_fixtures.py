"""A tiny captioned set, and comparisons on two tiny towers with all runs in this process."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from outcomes import spawning
from retrieval_files import write_image
from typer.testing import CliRunner

from sidebench.bench import launch as launching
from sidebench.bench import worker
from sidebench.cli import app

WORDS = ("good", "bad", "film", "plot", "cast", "fine", "dull", "great")


def write_pairs(folder: Path, items: int = 20, captions: int = 2) -> Path:
    """A jsonl of images and captions; every fifth item tests, every fifth validates."""
    rows = []
    for item in range(items):
        write_image(folder / f"{item}.png", item)
        said = f"the {WORDS[item % 8]} {WORDS[item // 8]} was"
        part = {3: "val", 4: "test"}.get(item % 5, "train")
        texts = [" ".join([said, WORDS[k], *["and fine"] * k]) for k in range(captions)]  # of several lengths
        rows += [{"image": f"{item}.png", "text": text, "split": part} for text in texts]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def two_towers(models: Path) -> str:
    return f"pair:image=hf:{models / 'vit'},text=hf:{models / 'bert'}"


def bench(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """`bench WORDS --json --quiet` in `folder`, its home beside; the result with `document`, what it printed."""
    monkeypatch.setenv("SIDEBENCH_HOME", str(folder / "home"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(launching, "spawn", spawning())
    monkeypatch.setattr(worker, "emit", lambda *_, **__: None)
    line = [*words, "--json", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["bench", *line])
    result = CliRunner().invoke(app, line)
    result.document = json.loads(result.stdout) if result.stdout else None  # type: ignore[attr-defined]
    return result


def compare_here(folder: Path, monkeypatch: pytest.MonkeyPatch, backbone: str, task: str, *words: str) -> Any:
    """`bench compare` of one epoch and seed."""
    line = ("--backbone", backbone, "--task", task, "--epochs", "1", "--seeds", "0", "--device", "cpu")
    return bench(folder, monkeypatch, "compare", *line, *words)
