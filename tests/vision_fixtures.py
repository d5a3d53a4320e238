"""Tiny image tasks in the files and folders of VTAB-1k, VPT's FGVC splits and NOAH's few-shot lists."""

import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import spawning
from PIL import Image
from typer.testing import CliRunner

from sidebench.bench import launch as launching
from sidebench.bench import worker
from sidebench.bench.tasks.fgvc import FEW_SHOT, FGVC
from sidebench.bench.tasks.vtab import VTAB
from sidebench.cli import app


def compare_here(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, task: str, *words: str, seeds: str = "0"
) -> Any:
    """Runs `bench compare` on the tiny ViT and a task, with all its runs in this process."""
    monkeypatch.setenv("SIDEBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launching, "spawn", spawning())
    monkeypatch.setattr(worker, "emit", lambda *_, **__: None)
    line = ["compare", "--backbone", f"hf:{models / 'vit'}", "--task", task, "--methods", "linear_probe,unipt"]
    line += ["--set", "linear_probe.candidates=2", "--set", "linear_probe.max_iterations=60"]
    line += ["--epochs", "1", "--seeds", seeds, "--device", "cpu", *words]
    monkeypatch.setattr(sys, "argv", ["bench", *line])
    return CliRunner().invoke(app, line)


def write_image(path: Path, label: int) -> None:
    """A noisy picture of 16 x 10 pixels whose colour says its label."""
    draw = np.random.default_rng(zlib.crc32(f"{path} {label}".encode()))
    pixels = draw.integers(0, 60, size=(10, 16, 3)) + np.array([(label * 53) % 190, (label * 97) % 190, 40])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_list(path: Path, pairs: Sequence[tuple[str, int]]) -> None:
    """Lines "path label"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name} {label}\n" for name, label in pairs), "utf-8")


def write_vtab(root: Path, name: str = "eurosat", counts: tuple[int, int, int] = (20, 10, 10)) -> str:
    """A task as NOAH's script writes it: every list with a folder of images of its own, the union's too."""
    folder, classes = root / "vtab-1k" / name, VTAB[name].num_classes
    train, val, test = (
        [(f"images/{part}/{i:06d}.jpg", (i * 7 + offset) % classes) for i in range(count)]
        for offset, (part, count) in enumerate(zip(("train800", "val200", "test"), counts, strict=True))
    )
    union = [(f"images/train800val200/{i:06d}.jpg", label) for i, (_, label) in enumerate([*train, *val])]
    for part, pairs in {"train800": train, "val200": val, "train800val200": union, "test": test}.items():
        write_list(folder / f"{part}.txt", pairs)
        for path, label in pairs:
            write_image(folder / path, label)
    return f"vtab:{name}?root={root}"


def write_fgvc(root: Path, name: str = "cub", counts: tuple[int, int, int] = (6, 3, 3)) -> str:
    """A set in VPT's form, three classes whose ids have gaps and sort otherwise as words; returns its URI."""
    ids = (7, 30, 200)
    task = FGVC[name]
    for part, count in zip(("train", "val", "test"), counts, strict=True):
        found = {f"{ids[i % 3]:03d}.a bird/{part}_{i}.jpg": ids[i % 3] for i in range(count)}
        root.mkdir(parents=True, exist_ok=True)
        (root / f"{part}.json").write_text(json.dumps(found), "utf-8")
        for path, label in found.items():
            write_image(root / task.images / path, label)
    return f"fgvc:{name}?root={root}"


def write_few_shot(root: Path, name: str = "oxford-pets", shots: int = 1, seed: int = 0) -> str:
    """A set in NOAH's form; as in the published list of one pet per class, every line of it stands there twice."""
    lists, classes = root / "few-shot_split" / name / "annotations", FEW_SHOT[name].num_classes
    train = [(f"a pet_{label}_{i}.jpg", label) for label in range(classes) for i in range(shots)]
    twice = [pair for pair in train for _ in range(2)] if shots == 1 else train
    val = [(f"val_{label}.jpg", label) for label in range(0, classes, 3)]
    test = [(f"test_{label}.jpg", label) for label in range(0, classes, 2)]
    write_list(lists / f"train_meta.list.num_shot_{shots}.seed_{seed}", twice)
    write_list(lists / "val_meta.list", val)
    write_list(lists / "test_meta.list", test)
    for path, label in (*train, *val, *test):
        write_image(root / name / path, label)
    return f"fgvc:{name}?root={root}&shots={shots}&seed={seed}"
