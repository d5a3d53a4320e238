"""Retrieval on two towers: streams with a store each, the same methods on both, losses and figures as published."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_fixtures import bench, compare_here, two_towers, write_pairs

from sidebench.adapters._base import Batch, Body
from sidebench.bench.goals.base import Tower
from sidebench.bench.goals.pairs import LOGIT_SCALE, MARGIN, Pairs, contrastive, triplet
from sidebench.bench.learner import Learner
from sidebench.bench.prepare import Inputs
from sidebench.bench.record import Job, read_predictions
from sidebench.bench.tasks.base import Split
from sidebench.bench.tasks.load import load_any
from sidebench.bench.tasks.split import split
from sidebench.bench.towers import PairBatch, PairSource, Towers
from sidebench.cache.errors import SidebenchError
from sidebench.cache.manifest import read_manifest
from sidebench.cache.pair import towers_of
from sidebench.cache.store import Index

METHODS = "unipt,lst,lora,full"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder)
    return folder


@pytest.fixture(scope="module")
def compared(folder: Path, models: Path) -> dict[str, object]:
    with pytest.MonkeyPatch.context() as patch:
        task = f"pairs:{folder / 'pairs.jsonl'}"
        result = compare_here(folder, patch, two_towers(models), task, "--methods", METHODS)
    assert result.exit_code == 0, result.output
    return dict(result.document)


def test_every_method_runs_on_both_towers_and_has_a_rsum_in_its_unit(compared: dict[str, list[dict]]) -> None:  # type: ignore[type-arg]
    assert [row["method"] for row in compared["table"]] == METHODS.split(",")
    for row in compared["table"]:
        assert row["error"] is None
        assert row["score"]["name"] == "Rsum"
        assert 0 < row["score"]["mean"] <= 600
        parts = row["score"]["parts"]
        recalls = [value for name, value in parts.items() if "R@" in name]
        assert len(recalls) == 6
        assert row["score"]["mean"] == pytest.approx(100 * sum(recalls))
        low, high = row["score"]["test_ci95"]
        assert low <= row["score"]["mean"] <= high


def test_five_captions_of_an_image_cost_no_image_twice(compared: dict[str, dict]) -> None:  # type: ignore[type-arg]
    streams = compared["cache"]["streams"]
    image, text = (read_manifest(Path(streams[name]["path"]))[0] for name in ("image", "text"))
    assert (image.examples, text.examples) == (20, 40)
    assert compared["cache"]["bytes"] == sum(one["bytes"] for one in streams.values())
    assert compared["examples"] == {"train": 24, "val": 8, "test": 8, "test_items": 4}


def test_memory_is_predicted_to_the_byte(compared: dict[str, list[dict]]) -> None:  # type: ignore[type-arg]
    for row in compared["table"]:
        assert row["predicted_peak_bytes"] == row["peak_tracked_bytes"], row["method"]


def test_methods_are_tested_against_each_other_on_what_each_item_adds(
    compared: dict[str, list],  # type: ignore[type-arg]
    folder: Path,
) -> None:
    assert [pair["method"] for pair in compared["comparisons"]] == ["lst", "lora", "full"]
    scores = {row["method"]: row["score"]["mean"] for row in compared["table"]}
    for pair, path in zip(compared["comparisons"], compared["records"][1:], strict=True):
        assert pair["difference"] == pytest.approx(scores[pair["method"]] - scores["unipt"])
        names = ("contributions", "ids", "item_ranks")
        added, ids, ranks = read_predictions((folder / path).with_suffix(".npz"), names)
        assert ids.tolist() == ["4.png", "9.png", "14.png", "19.png"]
        assert added.mean() == pytest.approx(scores[pair["method"]])
        assert ranks.shape == (4,)


def test_the_report_names_every_figure(compared: dict[str, str], folder: Path) -> None:
    report = (folder / compared["report"]).read_text("utf-8")
    assert "| Rsum |" in report
    assert "I→T R@1" in report
    assert "24 training, 8 validation and 8 test captions (of 4 test items)" in report
    assert "after Holm over 3; 4 test items with their captions, 1 seeds" in report
    assert "image: `" in report
    assert "text: `" in report


def test_a_second_comparison_reuses_the_stores_and_the_runs(
    compared: dict[str, dict],  # type: ignore[type-arg]
    folder: Path,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = f"pairs:{folder / 'pairs.jsonl'}"
    again = compare_here(folder, monkeypatch, two_towers(models), task, "--methods", "unipt", "--no-build")
    assert again.exit_code == 0
    assert again.document["cache"]["streams"]["image"]["status"] == "exists"
    assert again.document["table"][0]["score"] == compared["table"][0]["score"]  # type: ignore[index]


def test_cache_build_makes_both_stores_and_repair_makes_either_again(
    folder: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--backbone", two_towers(models), "--task", f"pairs:{folder / 'pairs.jsonl'}", "--device", "cpu")
    built = bench(tmp_path, monkeypatch, "cache", "build", *words)
    assert built.exit_code == 0, built.output
    document = built.document
    assert document["status"] == "built"
    assert document["examples"] == {"train": 24, "val": 8, "test": 8}
    for one in document["streams"].values():
        chunk = next(path for path in Path(one["path"]).rglob("c/0*") if path.is_file() or path.is_dir())
        chunk = chunk if chunk.is_file() else next(path for path in chunk.rglob("*") if path.is_file())
        whole = chunk.read_bytes()
        chunk.write_bytes(bytes(len(whole)))
        verified = bench(tmp_path, monkeypatch, "cache", "verify", one["path"], "--repair")
        assert verified.exit_code == 0, verified.output
        assert chunk.read_bytes() == whole
    assert bench(tmp_path, monkeypatch, "cache", "build", *words).document["status"] == "exists"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shots", "1"), "--shots draws examples of each class"),
        (("--views", "2"), "--views augments examples that have a class"),
        (("--methods", "linear_probe"), "it is solved for classes"),
        (("--methods", "lst", "--set", "lst.init=fisher"), "a loss over classes"),
    ],
)
def test_what_needs_classes_is_refused(
    words: tuple[str, ...], said: str, folder: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words if "--methods" in words else (*words, "--methods", "unipt")
    result = compare_here(tmp_path, monkeypatch, two_towers(models), f"pairs:{folder / 'pairs.jsonl'}", *words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_one_backbone_for_two_streams_and_two_for_one_are_refused(
    folder: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = f"pairs:{folder / 'pairs.jsonl'}"
    one = compare_here(tmp_path, monkeypatch, f"hf:{models / 'vit'}", task, "--methods", "unipt")
    assert one.exit_code == 2
    assert "pair:image=URI,text=URI" in one.stderr
    two = compare_here(tmp_path, monkeypatch, two_towers(models), "sample:digits", "--methods", "unipt")
    assert two.exit_code == 2
    assert "is two backbones" in two.stderr


def _split_of(folder: Path, parts: dict[int, str]) -> Split:
    """Of twenty items, each with two captions; `parts`: of item i, or none at all."""
    rows = [json.loads(line) for line in write_pairs(folder).read_text("utf-8").splitlines()]
    for i, row in enumerate(rows):
        row.pop("split")
        row |= {"split": parts[i // 2]} if parts else {}
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return split(load_any(f"pairs:{folder / 'pairs.jsonl'}", home=folder, say=lambda _: None), 0)


def test_without_parts_a_tenth_of_the_items_tests_and_a_tenth_validates(tmp_path: Path) -> None:
    found = _split_of(tmp_path, {})
    assert found.sizes() == {"train": 32, "val": 4, "test": 4}
    items = [set((index // 2).tolist()) for index in (found.train, found.val, found.test)]
    assert all(not one & other for one, other in itertools.combinations(items, 2))


def test_without_a_validation_part_a_tenth_of_what_trains_validates(tmp_path: Path) -> None:
    found = _split_of(tmp_path, {i: "test" if i < 10 else "train" for i in range(20)})
    assert found.sizes() == {"train": 18, "val": 2, "test": 20}
    assert set((found.test // 2).tolist()) == set(range(10))


def test_a_pair_is_parsed_in_either_order() -> None:
    wanted = {"image": "hf:a?tower=vision&projected=true", "text": "hf:b,c"}
    assert towers_of("pair:image=hf:a?tower=vision&projected=true,text=hf:b,c") == wanted
    assert towers_of("pair:text=hf:b,c,image=hf:a?tower=vision&projected=true") == wanted
    for wrong in ("pair:image=hf:a", "pair:hf:a,hf:b", "image=hf:a,text=hf:b", "pair:image=pair:image=a,text=b,text=c"):
        with pytest.raises(SidebenchError):
            towers_of(wrong)


# Losses, against loops


def _alike(rows: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


@given(items=st.lists(st.integers(0, 3), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_contrastive_is_both_cross_entropies_without_captions_of_the_same_item(items: list[int], seed: int) -> None:
    alike, rows = _alike(len(items), seed), range(len(items))
    same = torch.tensor([[a == b and i != j for j, b in enumerate(items)] for i, a in enumerate(items)])
    total = 0.0
    for i in rows:
        others = [j for j in rows if j == i or items[j] != items[i]]
        by_item = math.log(sum(math.exp(LOGIT_SCALE * (float(alike[i, j]) - float(alike[i, i]))) for j in others))
        by_text = math.log(sum(math.exp(LOGIT_SCALE * (float(alike[j, i]) - float(alike[i, i]))) for j in others))
        total += (by_item + by_text) / 2
    assert float(contrastive(alike, same)) == pytest.approx(total / len(items), abs=1e-9)


@pytest.mark.parametrize("hardest", [False, True])
@given(items=st.lists(st.integers(0, 3), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_triplet_sums_what_is_within_the_margin(hardest: bool, items: list[int], seed: int) -> None:
    alike, rows = _alike(len(items), seed), range(len(items))
    same = torch.tensor([[a == b and i != j for j, b in enumerate(items)] for i, a in enumerate(items)])
    total = 0.0
    for i in rows:
        wrong = [j for j in rows if items[j] != items[i]]
        for costs in (
            [max(0.0, MARGIN + float(alike[i, j]) - float(alike[i, i])) for j in wrong],
            [max(0.0, MARGIN + float(alike[j, i]) - float(alike[i, i])) for j in wrong],
        ):
            total += max(costs, default=0.0) if hardest else sum(costs)
    assert float(triplet(alike, same, hardest=hardest)) == pytest.approx(total, abs=1e-9)


# Batches


class _Rows:
    """A source whose batch tells which rows it was asked for."""

    views = 0

    def __init__(self, count: int) -> None:
        self.count = count

    def batches(self, batches: list[Index]) -> list[Batch]:
        return [Batch(torch.ones(len(rows), 1, dtype=torch.bool), {"row": torch.from_numpy(rows)}) for rows in batches]

    def lengths(self) -> Index:
        return np.arange(1, self.count + 1)


def _asked(batch: Batch) -> list[int]:
    rows = batch.activations["row"]
    assert isinstance(rows, torch.Tensor)
    return rows.tolist()


def test_a_batch_pairs_every_caption_with_what_it_describes() -> None:
    source = PairSource(_Rows(3), _Rows(5), owners=np.array([0, 0, 1, 2, 2]))  # type: ignore[arg-type]
    (batch,) = source.batches([np.array([4, 0, 1])])
    assert _asked(batch.text) == [4, 0, 1]
    assert _asked(batch.visual) == [2, 0, 0]
    assert batch.frames is None


def test_videos_come_with_all_their_frames_and_are_cut_between_them() -> None:
    frames = np.array([0, 2, 3, 6])
    source = PairSource(_Rows(6), _Rows(5), owners=np.array([0, 0, 1, 2, 2]), frames=frames)  # type: ignore[arg-type]
    (batch,) = source.batches([np.array([3, 2, 0])])
    assert _asked(batch.visual) == [3, 4, 5, 2, 0, 1]
    assert batch.frames == (0, 3, 4, 6)
    last = batch.rows(slice(1, None))
    assert (_asked(last.visual), last.frames, _asked(last.text)) == ([2, 0, 1], (0, 1, 3), [2, 0])
    assert source.lengths().tolist() == [1 + 3, 2 + 3, 3 + 3, 4 + 15, 5 + 15]


class _Given(Body):
    """Hands on what it is given."""

    width = 2

    def forward(self, batch: Batch) -> torch.Tensor:
        return batch.state("x")


def test_a_video_is_the_mean_of_its_frames_directions() -> None:
    towers = Towers(*(Learner(_Given(), 2, "mean", 0, torch.nn.Identity()) for _ in range(2)))
    frames = torch.tensor([[3.0, 0.0], [0.0, 5.0], [0.0, -2.0]])
    found = towers.embed_visual(Batch(torch.ones(3, 1, dtype=torch.bool), {"x": frames}), (0, 2, 3))
    half = math.sqrt(0.5)
    assert found.tolist() == [[pytest.approx(half), pytest.approx(half)], [0.0, -1.0]]


def test_a_head_projects_only_where_widths_differ() -> None:
    tower = Tower(_Given(), 0)
    for width, wanted in ((1, 2 * (2 + 1)), (2, 0), (3, 2 * (2 * 3 + 3))):
        learner = Pairs(width, "mean").learner({"image": tower, "text": tower})
        assert isinstance(learner, Towers)
        assert sum(p.numel() for p in learner.head.parameters()) == wanted


def test_a_job_of_two_streams_knows_each_ones_backbone_and_store() -> None:
    asked = json.loads(
        json.dumps({"method": "unipt", "backbone": "pair:image=hf:a,text=hf:b", "stores": {"image": "1", "text": "2"}})
    )
    usual = dict.fromkeys(Job.__dataclass_fields__)
    job = Job(**{**usual, "stores": {}, **asked})  # type: ignore[arg-type]
    assert job.streams == ("image", "text")
    assert (job.of("text").backbone, job.of("text").store) == ("hf:b", "2")
    assert Inputs("hf:a", "x").stream == ""


def test_pairs_of_a_batch_are_masked_as_tensors_of_both(folder: Path) -> None:
    batch = Batch(torch.ones(2, 3, dtype=torch.bool), {"x": torch.zeros(2, 3, 4)})
    both = PairBatch(batch, batch)
    assert len(both.tensors()) == 2 * len(batch.tensors())
    assert both.shapes() == (batch.shapes(), batch.shapes(), None)
