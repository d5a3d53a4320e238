"""Flickr30K and COCO from the files of VSE∞: what is read, in which order, what validates, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from retrieval_files import COCO_PARTS, F30K_PARTS, write_image, write_karpathy, write_lines

from sidebench.bench.tasks import json_fields
from sidebench.bench.tasks.base import PairTask
from sidebench.bench.tasks.pairs import is_pairs, load_pairs
from sidebench.cache.errors import SidebenchError


def _load(uri: str, said: list[str] | None = None, limit: int | None = None) -> PairTask:
    return load_pairs(uri, home=Path("/nowhere"), limit=limit, say=[].append if said is None else said.append)


def _refused(uri: str, *parts: str, limit: int | None = None) -> None:
    with pytest.raises(SidebenchError) as caught:
        _load(uri, limit=limit)
    for part in parts:
        assert part in str(caught.value)


def _parts(task: PairTask) -> dict[str, int]:
    assert task.item_parts is not None
    return {part: task.item_parts.count(part) for part in ("train", "val", "test")}


def _captions_of(task: PairTask, item: str) -> list[str]:
    of = np.flatnonzero(task.text.targets == task.item_ids.index(item))
    return [str(task.text.load(int(i))) for i in of]


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("below", ["", "f30k"])
def test_flickr_reads_either_form_of_its_lists_from_its_folder_or_the_one_above(
    tmp_path: Path, repeated: bool, below: str
) -> None:
    write_karpathy(tmp_path, "f30k", F30K_PARTS, repeated=repeated)
    task = _load(f"f30k:retrieval?root={tmp_path / below}")
    assert task.item_ids == ("1000", "1001", "1002", "1003", "2000", "2001", "3000", "3001", "3002")
    assert _parts(task) == {"train": 4, "val": 2, "test": 3}
    assert len(task.text) == 45
    assert task.text.targets.tolist() == [i // 5 for i in range(45)]
    assert _captions_of(task, "3001") == [f"test image 1 caption {k}" for k in range(5)]
    assert (task.folds, task.frames, task.visual.modality, task.text.modality) == (1, None, "image", "text")
    pixels = np.random.default_rng(3001).integers(0, 256, (16, 16, 3), np.uint8)
    found = np.asarray(task.visual.load(task.item_ids.index("3001"))).astype(int)
    assert abs(found.mean(axis=(0, 1)) - pixels.mean(axis=(0, 1))).max() < 8  # that image and no other, after JPEG


def test_the_two_forms_of_lists_are_the_same_content(tmp_path: Path) -> None:
    tasks = []
    for repeated in (False, True):
        root = write_karpathy(tmp_path / str(repeated), "f30k", F30K_PARTS, repeated=repeated)
        tasks.append(load_pairs(f"f30k:retrieval?root={root}", home=tmp_path, say=[].append))
    assert tasks[0].visual.content_sha256 == tasks[1].visual.content_sha256
    assert tasks[0].text.content_sha256 == tasks[1].text.content_sha256


def test_coco_is_tested_on_all_its_test_images_and_1k_cuts_them_into_five_folds(tmp_path: Path) -> None:
    write_karpathy(tmp_path, "coco", COCO_PARTS)
    whole, folded = (_load(f"coco-retrieval:{form}?root={tmp_path}") for form in ("5k", "1k"))
    assert _parts(whole) == _parts(folded) == {"train": 4, "val": 2, "test": 5}
    assert (whole.folds, folded.folds) == (1, 5)
    assert whole.item_ids == folded.item_ids
    assert _captions_of(whole, "3004")[0] == "testall image 4 caption 0"


def test_coco_validates_on_the_first_thousand_images_of_its_dev_part_and_says_so(tmp_path: Path) -> None:
    folder = write_karpathy(tmp_path, "coco", {**COCO_PARTS, "dev": 1_003})
    said: list[str] = []
    task = _load(f"coco-retrieval:5k?root={folder}", said)
    assert _parts(task) == {"train": 4, "val": 1_000, "test": 5}
    assert "2999" in task.item_ids
    assert "3002" not in task.item_ids[:1_004]
    assert any("the first 1,000 of 1,003 images of dev validate" in line for line in said)


def test_flickr_validates_on_its_whole_dev_part(tmp_path: Path) -> None:
    folder = write_karpathy(tmp_path, "f30k", {**F30K_PARTS, "dev": 1_003})
    with pytest.raises(SidebenchError, match="'3000' "):  # nothing is cut: the writer's ids now meet those of test
        _load(f"f30k:retrieval?root={folder}")


def test_counts_other_than_the_published_ones_are_said(tmp_path: Path) -> None:
    said: list[str] = []
    _load(f"f30k:retrieval?root={write_karpathy(tmp_path, 'f30k', F30K_PARTS)}", said)
    assert [line.rpartition(": ")[2] for line in said] == [
        "train has 4 images; the published part has 29000.",
        "dev has 2 images; the published part has 1014.",
        "test has 3 images; the published part has 1000.",
    ]


def test_a_limit_keeps_items_of_every_part_with_all_their_captions(tmp_path: Path) -> None:
    folder = write_karpathy(tmp_path, "f30k", {"train": 12, "dev": 3, "test": 5})
    whole, task = (_load(f"f30k:retrieval?root={folder}", limit=limit) for limit in (None, 10))
    assert _parts(task) == {"train": 5, "val": 2, "test": 3}
    assert list(task.item_ids) == [item for item in whole.item_ids if item in task.item_ids]
    assert all(_captions_of(task, item) == _captions_of(whole, item) for item in task.item_ids)
    assert task.item_ids == _load(f"f30k:retrieval?root={folder}", limit=10).item_ids
    _refused(f"f30k:retrieval?root={folder}", "limit 2", "3 parts", limit=2)


def test_folds_stay_of_equal_size_under_a_limit(tmp_path: Path) -> None:
    folder = write_karpathy(tmp_path, "coco", {"train": 10, "dev": 2, "testall": 20})
    said: list[str] = []
    task = _load(f"coco-retrieval:1k?root={folder}", said, limit=22)
    tested = _parts(task)["test"]
    assert tested == 10
    assert any("left out, so that 5 folds have equal sizes" in line for line in said)
    _refused(f"coco-retrieval:1k?root={folder}", "test items for 5 folds", limit=6)


@pytest.mark.parametrize("name", ["precomp/dev_ids.txt", "precomp/test_caps.txt", "id_mapping.json"])
def test_a_missing_file_names_itself_and_where_it_comes_from(tmp_path: Path, name: str) -> None:
    folder = write_karpathy(tmp_path, "f30k", F30K_PARTS)
    (folder / name).unlink()
    _refused(f"f30k:retrieval?root={folder}", f"there is no file {folder / name}", "VSE")


def test_a_missing_folder_or_image_says_where_it_comes_from(tmp_path: Path) -> None:
    _refused(f"f30k:retrieval?root={tmp_path}", f"there is no {tmp_path / 'precomp'}", "?root=FOLDER")
    folder = write_karpathy(tmp_path, "coco", COCO_PARTS)
    gone = folder / "images" / "val2014" / "COCO_val2014_000000003004.jpg"
    gone.unlink()
    _refused(f"coco-retrieval:5k?root={folder}", f"there is no image {gone}", "cocodataset.org")


@pytest.mark.parametrize(
    ("name", "lines", "reason"),
    [
        ("dev_ids.txt", ["2000", "2001", "2002"], "has 10 captions and"),
        ("dev_ids.txt", ["2000", "2000"], "lists the image 2000 twice"),
        ("dev_ids.txt", ["2000", "two"], "line 2 is 'two'"),
        ("dev_ids.txt", ["2000", "-1"], "line 2 is '-1'"),
        ("dev_ids.txt", ["2000", "9999"], "names no file for the image 9999"),
        ("dev_ids.txt", ["2000", "3000"], "'3000' is in val and in test"),
        ("dev_ids.txt", ["2000"] * 4 + ["2001"] * 6, "line 5 is 2001, after 4 times 2000"),
        ("dev_ids.txt", [], "dev_ids.txt is empty"),
        ("dev_caps.txt", ["a"] * 9, "has 9 captions and"),
        ("dev_caps.txt", ["a", "", *["b"] * 8], "line 2 is empty"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path: Path, name: str, lines: list[str], reason: str) -> None:
    folder = write_karpathy(tmp_path, "f30k", F30K_PARTS)
    write_lines(folder / "precomp" / name, lines)
    _refused(f"f30k:retrieval?root={folder}", reason)


@pytest.mark.parametrize("file", ["../outside.jpg", "/etc/outside.jpg", 3, None])
def test_an_image_outside_the_folder_is_refused(tmp_path: Path, file: object) -> None:
    folder = write_karpathy(tmp_path, "f30k", F30K_PARTS)
    write_image(folder / "outside.jpg", 1)
    mapping = json.loads((folder / "id_mapping.json").read_text())
    (folder / "id_mapping.json").write_text(json.dumps({**mapping, "1000": file}))
    _refused(f"f30k:retrieval?root={folder}", "lies outside" if isinstance(file, str) else "names no file")


@pytest.mark.parametrize("content", ["[1, 2]", "{", "[" * 100_000])
def test_a_mapping_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    folder = write_karpathy(tmp_path, "f30k", F30K_PARTS)
    (folder / "id_mapping.json").write_text(content)
    _refused(f"f30k:retrieval?root={folder}", "id_mapping.json")


def test_a_file_beyond_the_limit_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_karpathy(tmp_path, "f30k", F30K_PARTS)
    monkeypatch.setattr(json_fields, "_MAX_BYTES", 100)
    _refused(f"f30k:retrieval?root={folder}", "id_mapping.json has", "wanted at most 100")


def test_blank_lines_at_the_end_of_a_list_are_no_lines(tmp_path: Path) -> None:
    folder = write_karpathy(tmp_path, "f30k", F30K_PARTS)
    with (folder / "precomp" / "dev_ids.txt").open("ab") as stream:
        stream.write(b"\r\n \n")
    assert len(_load(f"f30k:retrieval?root={folder}").item_ids) == 9


def test_other_forms_get_a_suggestion() -> None:
    _refused("coco-retrieval:1K?root=/x", "no form of coco '1K'", "1k, 5k")
    _refused("f30k:5k?root=/x", "no form of f30k '5k'")
    _refused("f30k:retrieval", "type f30k:retrieval?root=FOLDER")
    assert is_pairs("f30k:retrieval?root=x")
    assert not is_pairs("csv:x.csv")
