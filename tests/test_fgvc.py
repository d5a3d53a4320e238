"""VPT's FGVC splits and NOAH's few-shot lists: what is read and refused, and a comparison from each kind of file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from vision_fixtures import compare_here, write_few_shot, write_fgvc, write_image, write_list

from sidebench.bench.record import read_predictions
from sidebench.bench.tasks.base import Task
from sidebench.bench.tasks.fgvc import FEW_SHOT, FGVC
from sidebench.bench.tasks.load import known_tasks, load_task
from sidebench.bench.tasks.split import split
from sidebench.cache.errors import SidebenchError


def _load(uri: str, said: list[str] | None = None) -> Task:
    return load_task(uri, home=Path("/nowhere"), say=[].append if said is None else said.append)


def _refused(uri: str, *parts: str) -> None:
    with pytest.raises(SidebenchError) as caught:
        _load(uri)
    for part in parts:
        assert part in str(caught.value)


# VPT's splits


def test_the_sets_have_their_published_classes() -> None:
    assert {name: task.num_classes for name, task in FGVC.items()} == {
        "cub": 200,
        "nabirds": 555,
        "flowers": 102,
        "dogs": 120,
        "cars": 196,
    }
    assert [task.num_classes for task in FEW_SHOT.values()] == [100, 101, 102, 37, 196]
    assert [task.form for task in known_tasks() if task.scheme == "fgvc"] == [
        "fgvc:NAME|all?root=FOLDER[&pool=mean|cls]",
        "fgvc:NAME|all?root=FOLDER&shots=K[&seed=S&pool=mean|cls]",
    ]


@pytest.mark.parametrize("name", FGVC)
def test_each_set_has_its_images_where_vpt_has_them(name: str, tmp_path: Path) -> None:
    task = _load(write_fgvc(tmp_path, name))
    below = {"cub": "images", "nabirds": "images", "dogs": "Images"}.get(name, "")
    assert (tmp_path / below / task.examples.ids[0]).is_file()
    assert task.examples.load(0).size == (16, 10)
    assert split(task, 0).sizes() == {"train": 6, "val": 3, "test": 3}


def test_class_ids_become_targets_in_sorted_order_over_all_files(tmp_path: Path) -> None:
    """VPT sorts the ids of each file by themselves; here a val part without the smallest id must not shift the rest."""
    uri = write_fgvc(tmp_path)
    (tmp_path / "val.json").write_text(json.dumps({"030.a bird/val_1.jpg": 30, "200.a bird/val_2.jpg": 200}))
    task = _load(uri)
    assert task.classes == ("7", "30", "200")
    by_name = dict(zip(task.examples.ids, task.examples.targets.tolist(), strict=True))
    assert by_name["030.a bird/val_1.jpg"] == 1
    assert by_name["200.a bird/val_2.jpg"] == 2
    assert by_name["007.a bird/test_0.jpg"] == 0


@pytest.mark.parametrize("folder", ["cars", "Stanford-cars", "stanford_cars", "StanfordCars"])
def test_the_root_is_the_set_or_holds_it_under_a_usual_name(folder: str, tmp_path: Path) -> None:
    write_fgvc(tmp_path / folder, "cars")
    assert len(_load(f"fgvc:cars?root={tmp_path}").examples) == 12
    assert len(_load(f"fgvc:cars?root={tmp_path / folder}").examples) == 12


def test_fewer_classes_than_published_are_said_and_more_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    uri = write_fgvc(tmp_path)
    _load(uri, said)
    assert said == [f"{tmp_path} has 3 classes; the published set has 200."]
    train = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps({**train, **{f"new/{i}.jpg": 1000 + i for i in range(198)}}))
    _refused(uri, f"{tmp_path} has 201 classes; cub has 200. Is it another set?")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["test.json is no valid JSON"]),
        ("[]", ['test.json is no object such as {"images/1.jpg": 3}']),
        ("{}", ["or an empty one"]),
        ('{"a.jpg": true}', ["the class of 'a.jpg' is true; wanted a class id"]),
        ('{"a.jpg": 1.5}', ["the class of 'a.jpg' is 1.5"]),
        ('{"a.jpg": {"b": 1}}', ["the class of 'a.jpg' is {\"b\": 1}"]),
        ('{"a.jpg": 7, "a.jpg": 30}', ["test.json lists 'a.jpg' twice"]),
        ('{"../a.jpg": 7}', ["'../a.jpg' lies outside"]),
        ('{"/etc/hostname": 7}', ["'/etc/hostname' lies outside"]),
        ('{"gone.jpg": 7}', ["there is no image", "gone.jpg", "VPT's splits of FGVC"]),
        ('{"007.a bird/val_0.jpg": 7}', ["'007.a bird/val_0.jpg' is listed for val and for test"]),
    ],
)
def test_what_no_split_may_hold_is_refused(text: str, parts: list[str], tmp_path: Path) -> None:
    uri = write_fgvc(tmp_path)
    (tmp_path / "test.json").write_text(text, "utf-8")
    _refused(uri, *parts)


def test_a_class_that_is_tested_and_never_trained_is_refused(tmp_path: Path) -> None:
    uri = write_fgvc(tmp_path)
    (tmp_path / "test.json").write_text('{"new.jpg": 8}', "utf-8")
    write_image(tmp_path / "images" / "new.jpg", 8)
    with pytest.raises(SidebenchError, match="test has the label '8', which does not occur in train"):
        split(_load(uri), 0)


def test_missing_files_are_named_with_their_source(tmp_path: Path) -> None:
    _refused(f"fgvc:dogs?root={tmp_path}", f"no train.json in {tmp_path}", "StanfordDogs", "VPT's splits of FGVC")
    uri = write_fgvc(tmp_path)
    (tmp_path / "val.json").unlink()
    _refused(uri, f"there is no file {tmp_path / 'val.json'}", "VPT's splits of FGVC")


# NOAH's few-shot lists


def test_a_few_shot_set_is_read_from_its_lists_and_the_published_repeats_count_once(tmp_path: Path) -> None:
    said: list[str] = []
    task = _load(write_few_shot(tmp_path, "oxford-pets", shots=1, seed=2), said)
    assert task.classes == tuple(str(i) for i in range(37))
    parts = split(task, 0)
    assert parts.sizes() == {"train": 37, "val": 13, "test": 19}
    assert task.examples.targets[parts.train].tolist() == list(range(37))
    assert task.examples.load(int(parts.test[3])).size == (16, 10)
    assert len(said) == 1
    assert said[0].endswith("train_meta.list.num_shot_1.seed_2: 37 lines repeat others and are left out.")


def test_shots_and_seed_choose_the_list(tmp_path: Path) -> None:
    write_few_shot(tmp_path, shots=2, seed=0)
    write_few_shot(tmp_path, shots=4, seed=1)
    assert split(_load(f"fgvc:oxford-pets?root={tmp_path}&shots=2"), 0).sizes()["train"] == 2 * 37
    assert split(_load(f"fgvc:pets?root={tmp_path}&shots=4&seed=1"), 0).sizes()["train"] == 4 * 37
    _refused(
        f"fgvc:oxford-pets?root={tmp_path}&shots=4&seed=0",
        "there is no list",
        "there are train_meta.list.num_shot_2.seed_0, train_meta.list.num_shot_4.seed_1",
    )
    _refused(f"fgvc:oxford-pets?root={tmp_path}&shots=four", "?shots wants a whole number; found 'four'")
    _refused(f"fgvc:oxford-pets?root={tmp_path}&shots=4&seed=-1", "?seed wants a whole number; found '-1'")


def test_what_set_and_options_do_not_go_together_is_said(tmp_path: Path) -> None:
    _refused(f"fgvc:oxford-pets?root={tmp_path}", "type fgvc:oxford-pets?root=FOLDER&shots=K")
    _refused(f"fgvc:cub?root={tmp_path}&shots=4", "no few-shot task 'cub'")
    _refused(f"fgvc:cub?root={tmp_path}&seed=0", "give ?shots=K with it")
    _refused(f"fgvc:dog?root={tmp_path}", "no FGVC task 'dog'. Did you mean 'dogs'?")
    _refused("fgvc:cub", "type fgvc:cub?root=FOLDER")


def test_lists_and_images_that_are_missing_are_named_with_their_source(tmp_path: Path) -> None:
    uri = write_few_shot(tmp_path)
    (tmp_path / "oxford-pets" / "test_4.jpg").unlink()
    _refused(uri, f"there is no image {tmp_path / 'oxford-pets' / 'test_4.jpg'}", "data/few-shot of NOAH")
    lists = tmp_path / "few-shot_split" / "oxford-pets" / "annotations"
    write_list(lists / "val_meta.list", [("val_0.jpg", 37)])
    _refused(uri, "val_meta.list line 1 has the label 37; this task's labels are 0 to 36")
    (lists / "val_meta.list").unlink()
    _refused(uri, f"there is no file {lists / 'val_meta.list'}", "data/few-shot of NOAH")
    _refused(f"fgvc:food101?root={tmp_path}&shots=1", "there is no file", "data/few-shot of NOAH")


# Comparisons


@pytest.mark.parametrize(("write", "outputs"), [(write_fgvc, 3), (write_few_shot, 37)])
def test_a_task_is_compared_from_its_files_to_the_report(
    write: Callable[[Path], str], outputs: int, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = compare_here(tmp_path, models, monkeypatch, write(tmp_path), "--json", "--quiet")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["method"] for row in found["table"]] == ["linear_probe", "unipt"]
    for path in map(Path, found["records"]):
        logits, _ = read_predictions(path.with_suffix(".npz"))
        assert logits.shape == (found["examples"]["test"], outputs)
