"""The systems of UniPT's paper in miniature: its side methods, LoRA and full fine-tuning run on each, end to end."""

from collections.abc import Callable
from pathlib import Path

import pytest
from clip_vil_toys import save_clip_vil
from joint_files import write_gqa, write_refcoco
from mdetr_toys import save_mdetr
from pair_fixtures import compare_here
from retrieval_files import F30K_PARTS, write_karpathy, write_msvd

RANDOM_LST = ("--set", "lst.init=random", "--set", "lst.reduction=2")


def _vse(folder: Path, models: Path) -> tuple[str, ...]:
    write_karpathy(folder, "f30k", F30K_PARTS)
    backbone = f"pair:image=module:convolutions:tiny_resnet,text=hf:{models / 'bert'}"
    task = f"f30k:retrieval?root={folder}&pool=gpo&width=32&loss=triplet"
    return backbone, task, "--set", "unipt.width=32", *RANDOM_LST


def _clip4clip(folder: Path, models: Path) -> tuple[str, ...]:
    towers = (f"{stream}=hf:{models / 'clip'}?tower={tower}&projected=true" for stream, tower in _CLIP)
    task = f"msvd:retrieval?root={write_msvd(folder)}&width=32"
    return f"pair:{','.join(towers)}", task, "--set", "unipt.form=single_anchor", "--set", "unipt.reduction=1"


def _clipvil(folder: Path, models: Path) -> tuple[str, ...]:
    return save_clip_vil(folder / "net"), write_gqa(folder), "--image-size", "96", "--set", "unipt.form=mlp"


def _mdetr(folder: Path, models: Path) -> tuple[str, ...]:
    return save_mdetr(folder / "net"), write_refcoco(folder, "refcoco"), "--image-size", "64", *RANDOM_LST


_CLIP = (("image", "vision"), ("text", "text"))
SYSTEMS: dict[str, tuple[Callable[[Path, Path], tuple[str, ...]], str]] = {
    "VSE-infinity": (_vse, "sherl"),
    "CLIP4Clip": (_clip4clip, "sherl_single_anchor"),
    "CLIP-ViL": (_clipvil, "sherl"),
    "MDETR": (_mdetr, "sherl_two_stacks"),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_side_methods_lora_and_full_fine_tuning_run_on_each_system(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, sherl = SYSTEMS[name]
    backbone, task, *words = make(tmp_path / "data", models)
    methods = ["unipt", "lst", sherl, "lora", "full"]
    batch = ("--batch-size", "4", "--methods", ",".join(methods))
    compared = compare_here(tmp_path, monkeypatch, backbone, task, *words, *batch)
    assert compared.exit_code == 0, compared.output + compared.stderr
    table = {row["method"]: row for row in compared.document["table"]}
    assert list(table) == methods
    assert all(row["error"] is None and row["score"] is not None for row in table.values())
    assert table["full"]["trainable_params"] > max(table[method]["trainable_params"] for method in ("unipt", "lora"))
