"""Every published set of UniPT's five tasks, from its official files through a cache to its official metric.

Networks are tiny and random, so no score means anything here; what is tested is that every figure is there, and right.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clip_vil_toys import save_clip_vil
from joint_files import write_gqa, write_refcoco, write_vqa
from mdetr_toys import save_mdetr
from pair_fixtures import bench, compare_here, two_towers
from retrieval_files import COCO_PARTS, F30K_PARTS, write_karpathy, write_msrvtt, write_msvd
from test_glue import write_glue

from sidebench.bench.record import read_predictions

METHODS = "unipt,lst,lora"
RECALLS = {f"{way} R@{k}" for way in ("I→T", "T→I") for k in (1, 5, 10)}
VIDEO = {f"{way} {figure}" for way in ("V→T", "T→V") for figure in ("R@1", "R@5", "R@10", "MdR", "MnR")}
PRECISIONS = {f"P@{k}{by}" for k in (1, 5, 10) for by in ("", " by GIoU")}


def _f30k(root: Path) -> str:
    write_karpathy(root, "f30k", F30K_PARTS)
    return f"f30k:retrieval?root={root}"


def _coco(root: Path, form: str) -> str:
    write_karpathy(root, "coco", COCO_PARTS)
    return f"coco-retrieval:{form}?root={root}"


def _msrvtt(root: Path) -> str:
    return f"msrvtt:9k?root={write_msrvtt(root, 8, 3)}"


def _msvd(root: Path) -> str:
    return f"msvd:retrieval?root={write_msvd(root)}"


SETS: dict[str, tuple[Callable[[Path], str], str, str, set[str]]] = {
    "f30k": (_f30k, "towers", "Rsum", RECALLS | {"Rsum"}),
    "coco-5k": (lambda root: _coco(root, "5k"), "towers", "Rsum", RECALLS | {"Rsum"}),
    "coco-1k": (lambda root: _coco(root, "1k"), "towers", "Rsum", RECALLS | {"Rsum"}),
    "msrvtt": (_msrvtt, "towers", "Rsum", VIDEO | {"Rsum"}),
    "msvd": (_msvd, "towers", "Rsum", VIDEO | {"Rsum"}),
    "vqa2": (write_vqa, "clipvil", "soft accuracy", {"soft accuracy", "official VQA accuracy"}),
    "gqa": (write_gqa, "clipvil", "exact match", {"exact match"}),
    "refcoco": (lambda root: write_refcoco(root, "refcoco", test="testA"), "mdetr", "P@1", PRECISIONS),
    "refcoco+": (lambda root: write_refcoco(root, "refcoco+", test="testB"), "mdetr", "P@1", PRECISIONS),
    "refcocog": (lambda root: write_refcoco(root, "refcocog", test="test"), "mdetr", "P@1", PRECISIONS),
}


@pytest.fixture(scope="module")
def backbones(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """By system, the words that name it."""
    folder = tmp_path_factory.mktemp("systems")
    return {
        "towers": (two_towers(models),),
        "clipvil": (save_clip_vil(folder / "clipvil"), "--image-size", "96"),
        "mdetr": (save_mdetr(folder / "mdetr"), "--image-size", "64"),
    }


@pytest.mark.parametrize("name", SETS)
def test_official_files_go_through_the_cache_to_the_official_metric(
    name: str, backbones: dict[str, tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, system, score, figures = SETS[name]
    task = write(tmp_path / "data")
    backbone, *words = backbones[system]
    built = bench(
        tmp_path, monkeypatch, "cache", "build", "--backbone", backbone, "--task", task, "--device", "cpu", *words
    )
    assert built.exit_code == 0, built.output
    assert built.document["status"] == "built"
    settings = ["--set", "lst.reduction=2", "--set", "lst.init=random"] if system == "mdetr" else []
    # Nothing is computed again: the methods read what was built.
    words = [*words, *settings, "--batch-size", "4", "--methods", METHODS, "--no-build"]
    compared = compare_here(tmp_path, monkeypatch, backbone, task, *words)
    assert compared.exit_code == 0, compared.output + compared.stderr
    for row, path in zip(compared.document["table"], compared.document["records"], strict=True):
        assert row["error"] is None
        assert row["score"]["name"] == score
        assert figures <= row["score"]["parts"].keys()
        # To the byte where a text of the batch is padded; where none is, transformers drops a mask, no prediction does.
        assert row["predicted_peak_bytes"] == pytest.approx(row["peak_tracked_bytes"], rel=0.03), row["unavailable"]
        (added,) = read_predictions((tmp_path / path).with_suffix(".npz"), ("contributions",))
        assert np.mean(added) == pytest.approx(row["score"]["mean"])


def test_so_does_glue_with_t5(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, task = f"hf:{models / 't5'}?tower=both", write_glue(tmp_path / "data", "mrpc", 48, 40)
    built = bench(tmp_path, monkeypatch, "cache", "build", "--backbone", backbone, "--task", task, "--device", "cpu")
    assert built.exit_code == 0, built.output
    words = ("--set", "lst.reduction=2", "--methods", METHODS, "--no-build")
    compared = compare_here(tmp_path, monkeypatch, backbone, task, *words)
    assert compared.exit_code == 0, compared.output + compared.stderr
    for row in compared.document["table"]:
        assert row["error"] is None
        assert row["score"]["name"] == "accuracy and F1"
        assert row["score"]["parts"].keys() == {"accuracy", "F1"}
        assert row["predicted_peak_bytes"] == row["peak_tracked_bytes"]


@pytest.mark.parametrize(
    ("write", "keys"), [(write_vqa, {"question_id", "answer"}), (write_gqa, {"questionId", "prediction"})]
)
def test_a_submission_answers_every_question_of_the_server(
    write: Callable[[Path], str],
    keys: set[str],
    backbones: dict[str, tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = f"{write(tmp_path / 'data')}&submit=test"
    backbone, *words = backbones["clipvil"]
    compared = compare_here(tmp_path, monkeypatch, backbone, task, "--methods", "unipt", *words)
    assert compared.exit_code == 0, compared.output + compared.stderr
    record = tmp_path / compared.document["records"][0]
    answers = json.loads(record.with_suffix(".submission.json").read_text("utf-8"))
    assert len(answers) == 2
    assert all(answer.keys() == keys for answer in answers)
