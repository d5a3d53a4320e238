"""Images with texts as examples, and the checked fields of the files they come from."""

from pathlib import Path

import numpy as np
import pytest
from joint_files import write_picture
from PIL import Image

from sidebench.bench.tasks import images
from sidebench.bench.tasks.image_text import ImageTextExamples, carved, image_files, kept, said_overlap, unique_ids
from sidebench.bench.tasks.json_fields import items_of, read_json
from sidebench.bench.tasks.load import JOINT
from sidebench.bench.tasks.pairs import PAIR_SCHEMES
from sidebench.cache.errors import SidebenchError
from sidebench.cache.joint import JointExamples, image_sizes_of, texts_of


def _examples(folder: Path, **changed: object) -> ImageTextExamples:
    """Three examples of two images."""
    first, second = folder / "a.png", folder / "b.png"
    for path, colour in ((first, "red"), (second, "blue")):
        if not path.exists():
            write_picture(path, colour)
    facts: dict[str, object] = {
        "ids": ("x", "y", "z"),
        "texts": ("a cat", "a dog", "two dogs"),
        "paths": (first, second, second),
        "memo": folder / "memo.json",
        "labels_sha256": "00",
    }
    return ImageTextExamples(**{**facts, **changed})  # type: ignore[arg-type]


def test_an_example_is_an_rgb_image_and_its_text_and_its_target_is_itself(tmp_path: Path) -> None:
    examples = _examples(tmp_path)
    Image.new("L", (7, 5), 3).save(tmp_path / "b.png")
    loaded = examples.load(2)
    assert (loaded.image.mode, loaded.image.size, loaded.text) == ("RGB", (7, 5), "two dogs")
    assert (len(examples), examples.modality, examples.targets.tolist()) == (3, "image-text", [0, 1, 2])


def test_the_size_comes_from_the_header_without_the_pixels(tmp_path: Path) -> None:
    """A file cut off after its header still says its size; loading it is refused."""
    write_picture(tmp_path / "b.png", size=(48, 32))
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:60])
    examples = _examples(tmp_path)
    assert examples.size(1) == (48, 32)
    with pytest.raises(SidebenchError, match=r"b\.png cannot be read"):
        examples.load(1)


def test_a_file_that_is_no_image_or_too_large_is_refused_by_size_and_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = _examples(tmp_path)
    monkeypatch.setattr(images, "_MAX_PIXELS", 100)
    for read in (examples.size, examples.load):
        with pytest.raises(SidebenchError, match="48 x 32 pixels; wanted at most 100"):
            read(0)
    (tmp_path / "a.png").write_text("no image")
    for read in (examples.size, examples.load):
        with pytest.raises(SidebenchError, match=r"a\.png cannot be read"):
            read(0)


def test_an_image_of_another_size_than_annotated_is_refused(tmp_path: Path) -> None:
    examples = _examples(tmp_path, sizes=np.array([[48, 32], [48, 32], [32, 48]]))
    assert examples.size(0) == (48, 32)
    for read in (examples.size, examples.load):
        with pytest.raises(SidebenchError, match=r"b\.png has 48 x 32 pixels, but .* for one of 32 x 48"):
            read(2)


def test_the_content_hash_sees_everything_but_the_folder(tmp_path: Path) -> None:
    found = {_examples(tmp_path).content_sha256}
    assert found == {_examples(tmp_path / "elsewhere" / "..").content_sha256}
    changes: tuple[dict[str, object], ...] = (
        {"ids": ("x", "y", "w")},
        {"texts": ("a cat", "a dog", "two dogs ")},
        {"texts": ("a dog", "a cat", "two dogs")},
        {"paths": (tmp_path / "a.png", tmp_path / "a.png", tmp_path / "b.png")},
        {"labels_sha256": "01"},
    )
    for changed in changes:
        found.add(_examples(tmp_path, **changed).content_sha256)
    write_picture(tmp_path / "b.png", "blue", (8, 8))
    found.add(_examples(tmp_path).content_sha256)
    assert len(found) == len(changes) + 2


def test_a_shared_image_is_opened_once_for_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, asked = _examples(tmp_path), list[Path]()
    assert isinstance(examples, JointExamples)

    def counted(path: Path) -> tuple[int, int]:
        asked.append(path)
        return 48, 32

    monkeypatch.setattr("sidebench.bench.tasks.image_text.image_size", counted)
    assert image_sizes_of(examples) == [(48, 32)] * 3
    assert asked == [tmp_path / "a.png", tmp_path / "b.png"]
    assert texts_of(examples) == ["a cat", "a dog", "two dogs"]


def test_a_shared_image_is_read_once_for_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def counted(paths: tuple[Path, ...], memo: Path) -> list[str]:
        asked.extend(paths)
        return ["0"] * len(paths)

    monkeypatch.setattr("sidebench.bench.tasks.image_text.file_hashes", counted)
    assert _examples(tmp_path).content_sha256
    assert asked == [tmp_path / "a.png", tmp_path / "b.png"]


def test_a_tenth_of_the_images_is_carved_by_name_alone() -> None:
    names = [f"image {i}" for i in range(45)]
    drawn = carved(names * 3, "salt")
    assert len(drawn) == 5
    assert drawn == carved(reversed(names), "salt") != carved(names, "pepper")
    assert drawn == carved(names + sorted(set(names) - drawn)[:1] * 200, "salt")
    assert len(drawn & carved([*names, "a new one"], "salt")) >= 4
    assert [len(carved(names[:n], "salt")) for n in (1, 14, 15, 24, 25)] == [1, 1, 2, 2, 3]


def test_a_limit_keeps_every_part_in_proportion_by_ids_alone() -> None:
    ids = [f"id {i}" for i in range(100)]
    parts = ["train"] * 80 + ["val"] * 5 + ["test"] * 14 + ["submit"]
    index = kept(ids, parts, 24, "x:y")
    counts = [sum(parts[i] == part for i in index) for part in ("train", "val", "test", "submit")]
    assert counts == [17, 2, 4, 1]  # one each, and the 20 others over 79 + 4 + 13 + 0 in proportion
    assert index == sorted(index)
    backwards = kept(ids[::-1], parts[::-1], 24, "x:y")
    assert sorted(99 - i for i in backwards) == index
    assert kept(ids, parts, None, "x:y") == kept(ids, parts, 100, "x:y") == list(range(100))
    assert [parts[i] for i in kept(ids, parts, 4, "x:y")] == ["train", "val", "test", "submit"]
    with pytest.raises(SidebenchError, match="limit 3 is less than the 4 parts of x:y"):
        kept(ids, parts, 3, "x:y")


def test_images_that_are_not_there_and_ids_that_stand_twice_are_named(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    assert image_files(["a", "a"], lambda name: tmp_path / f"{name}.png", "the shop") == (tmp_path / "a.png",) * 2
    with pytest.raises(SidebenchError, match=r"there is no file .*b\.png; it comes with the shop\."):
        image_files(["a", "b"], lambda name: tmp_path / f"{name}.png", "the shop")
    assert unique_ids(["p", "q"], "x:y") == ("p", "q")
    with pytest.raises(SidebenchError, match="x:y: the id 'p' stands twice"):
        unique_ids(["p", "q", "p"], "x:y")


def test_images_that_are_trained_and_tested_on_are_said() -> None:
    said: list[str] = []
    said_overlap(["train", "train", "val", "test", "submit"], ["a", "b", "c", "b", "a"], said.append)
    assert said == ["1 images of the test part also occur in training; its score is too good for that."]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "is no valid JSON"),
        ("[" * 100_000, "is no valid JSON"),
        ("\udcff", "is no valid JSON"),
        ("1" * 5000, "is no valid JSON"),
        ("[]", "questions is an empty list; wanted a list of objects"),
        ('{"a": 1}', 'questions is {"a": 1}; wanted a list of objects'),
        ('[{}, ["' + "b" * 90 + '"]]', 'questions[1] is ["' + "b" * 37 + "…; wanted an object"),
    ],
)
def test_a_file_of_another_form_is_refused(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(SidebenchError) as caught:
        list(items_of(path, "questions", read_json(path, "the shop")))
    assert part in str(caught.value)


def test_a_file_that_is_missing_or_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    with pytest.raises(SidebenchError, match=r"there is no file .*train\.json; it comes with the shop"):
        read_json(path, "the shop")
    with path.open("wb") as stream:
        stream.truncate(5 * 2**30)  # sparse: it takes no disk
    with pytest.raises(SidebenchError, match=r"has 5,368,709,120 bytes; wanted at most"):
        read_json(path, "the shop")


@pytest.mark.parametrize(
    ("read", "values"),
    [
        ("text", (None, 3, "", " \n", "half \ud800", ["a"])),
        ("whole", (None, True, 1.0, "1", -1, 2**63)),
        ("identifier", (None, True, 1.5, " ", -1, [])),
        ("numbers", (None, [1], [1, 2, 3], [1, "2"], [1, True], [1, float("nan")], [1, float("inf")], [1, 10**400])),
    ],
)
def test_a_field_of_another_type_is_refused_with_its_place(
    read: str, values: tuple[object, ...], tmp_path: Path
) -> None:
    path = tmp_path / "f.json"
    for value in values:
        item = next(items_of(path, "images", [{"k": value}]))
        with pytest.raises(SidebenchError, match=r"f\.json images\[0\]: 'k' is .*; wanted a "):
            getattr(item, read)("k", *([2] if read == "numbers" else []))
    with pytest.raises(SidebenchError, match=r"images\[0\] has no 'gone'; wanted a .* It has 'k'\."):
        getattr(item, read)("gone", *([2] if read == "numbers" else []))


def test_a_field_of_the_right_type_is_read() -> None:
    fields = {"t": " a ", "n": 0, "b": [1, 2.5], "s": "07"}
    item = next(items_of(Path("f"), "images", [fields]))
    assert (item.text("t"), item.whole("n"), item.numbers("b", 2)) == (" a ", 0, (1.0, 2.5))
    assert (item.identifier("s"), item.identifier("n")) == ("07", 0)
    with pytest.raises(SidebenchError, match="'n' is 0; wanted a whole number from 1 on"):
        item.whole("n", 1)


def test_the_page_of_data_sets_has_every_official_one_and_its_parts() -> None:
    page = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text("utf-8")
    forms = {scheme: known.form for scheme, known in {**PAIR_SCHEMES, **JOINT}.items() if scheme != "pairs"}
    assert len(forms) == 9
    for scheme, form in forms.items():
        paths = form.removeprefix(f"{scheme}:").partition("?")[0].split("|")
        assert any(f"`{scheme}:{path}?root=" in page for path in paths)
        assert all(f"{scheme}:{path}" in page or f"`{path}`" in page for path in paths)
