"""Finding methods by name or by file, and reading their options."""

import importlib.metadata
import json
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from sidebench.adapters import _registry
from sidebench.adapters._base import PrefixMethod, TrainingConfig
from sidebench.adapters._registry import config_facts, describe, find_method, known_methods
from sidebench.adapters.unipt import UniPT
from sidebench.cache.architecture import Architecture
from sidebench.cache.errors import SidebenchError

ONE = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sidebench.adapters._base import Body, CachedMethod, TrainingConfig, option
from sidebench.adapters.unipt import UniPT  # borrowing from another method's file makes it no second method


@dataclass(frozen=True)
class Config(TrainingConfig):
    depth: int = option(2, "how deep")
    mode: Literal["fast", "slow"] = option("fast", "how fast")
    extra: bool = option(False, "whether more")


class Mine(CachedMethod):
    """My own method.

    With more to say.
    """

    Config = Config
    paper = "none yet"

    def build(self, arch, widths, weights):
        return Body()
'''


def write(folder: Path, source: str, name: str = "mine.py") -> str:
    path = folder / name
    path.write_text(textwrap.dedent(source))
    return str(path)


def test_the_known_methods_are_the_files_and_are_sorted() -> None:
    assert list(known_methods()) == sorted(known_methods())
    assert {"unipt", "lst", "linear_probe", "lora", "vpt", "bitfit", "full"} <= set(known_methods())
    assert not any(name.startswith("_") for name in known_methods())


def test_a_method_goes_by_the_name_of_its_file() -> None:
    found = find_method("unipt")
    assert (found.text, found.key, found.cls) == ("unipt", "unipt", UniPT)


@pytest.mark.parametrize(("typed", "meant"), [("unpit", "unipt"), ("linear-probe", "linear_probe"), ("LoRA", None)])
def test_an_unknown_method_gets_the_nearest_and_the_list(typed: str, meant: str | None) -> None:
    with pytest.raises(SidebenchError) as caught:
        find_method(typed)
    sentence = str(caught.value)
    assert sentence.startswith(f"no method {typed!r}.")
    assert meant is None or f"Did you mean {meant!r}?" in sentence
    assert all(name in sentence for name in known_methods())


@pytest.mark.parametrize("typed", ["_base", "_registry", "unipt.UniPT", "../unipt", ""])
def test_plumbing_and_paths_are_no_methods(typed: str) -> None:
    with pytest.raises(SidebenchError, match="no method"):
        find_method(typed)


def test_a_live_method_on_the_last_blocks_is_a_prefix_method() -> None:
    found = find_method("lora@last4")
    assert (found.text, found.key, found.kind) == ("lora@last4", "lora", "prefix")
    method = found.configured({"rank": "2"})
    assert isinstance(method, PrefixMethod)
    assert method.config.rank == 2  # type: ignore[attr-defined]
    sizes = {"blocks": 6, "width": 32, "heads": 4, "mlp_width": 64}
    arch = Architecture("Toy", "text", prefix_tokens=0, final_layer="norm", norm="pre", **sizes)
    assert method.refusal(arch) is None
    assert (method.first_block(arch), method.layers(arch)) == (2, ("blocks.1",))
    assert find_method("lora@last6").configured({}).layers(arch) == ("embeddings",)  # type: ignore[attr-defined]
    refused = find_method("lora@last7").configured({}).refusal(arch)
    assert refused == "@last7 wants 7 blocks, and Toy has 6"
    assert "rank 0" in str(find_method("lora@last2").configured({"rank": "0"}).refusal(arch))


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("lora@4", "behind the @ stands lastK"),
        ("lora@last0", "behind the @ stands lastK"),
        ("lora@lastall", "behind the @ stands lastK"),
        ("unipt@last2", r"unipt is a cached method; @lastK takes one that trains inside the backbone: .*lora"),
        ("lroa@last2", "no method 'lroa'. Did you mean 'lora'"),
    ],
)
def test_what_cannot_stand_behind_an_at_sign_gets_a_sentence(typed: str, sentence: str) -> None:
    with pytest.raises(SidebenchError, match=sentence):
        find_method(typed)


def test_a_file_with_one_method_works(tmp_path: Path) -> None:
    path = write(tmp_path, ONE)
    found = find_method(path)
    assert (found.text, found.key, found.cls.__name__) == (path, "mine", "Mine")
    config = found.configured({"depth": "5", "mode": "slow", "extra": "True", "lr": "1e-2"}).config
    assert (config.depth, config.mode, config.extra, config.lr) == (5, "slow", True, 0.01)
    assert describe(path)["summary"] == "My own method."


def test_two_files_of_one_name_are_two_methods(tmp_path: Path) -> None:
    def with_depth(kind: str) -> str:
        return ONE.replace("@dataclass", f"Depth = {kind}\n\n\n@dataclass").replace("depth: int", "depth: Depth")

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = find_method(write(tmp_path / "a", with_depth("int")))
    second = find_method(write(tmp_path / "b", with_depth("float")))
    assert repr(first.configured({"depth": "1"}).config.depth) == "1"
    assert repr(second.configured({"depth": "1"}).config.depth) == "1.0"


def test_a_method_without_docstring_or_paper_can_be_described(tmp_path: Path) -> None:
    bare = """
        from sidebench.adapters._base import LiveMethod

        class Bare(LiveMethod):
            def build(self, backbone):
                raise NotImplementedError
    """
    described = describe(write(tmp_path, bare))
    assert described["summary"] == ""
    assert described["paper"] == "no paper named"
    assert described["kind"] == "live"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("x = 1\n", r"mine\.py defines 0 methods; a method file defines one"),
        (ONE + "\n\nclass Other(Mine):\n    pass\n", r"defines 2 methods \(Mine, Other\)"),
        ("raise RuntimeError('no GPU here')\n", r"importing .*mine\.py failed: RuntimeError: no GPU here"),
        ("def broken(:\n", r"importing .*mine\.py failed: SyntaxError"),
        ("import nowhere_to_be_found\n", r"importing .*mine\.py failed: ModuleNotFoundError"),
        (ONE.replace("def build", "def biuld"), r"mine\.py: Mine lacks build"),
    ],
    ids=["none", "two", "raises", "syntax", "import", "abstract"],
)
def test_a_file_that_is_no_method_is_refused_in_one_sentence(tmp_path: Path, source: str, sentence: str) -> None:
    with pytest.raises(SidebenchError, match=sentence):
        find_method(write(tmp_path, source))


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(SidebenchError, match=rf"no method file .*nothing\.py; looked in {tmp_path}"):
        find_method(str(tmp_path / "nothing.py"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"reducton": "2"}, r"no option of unipt 'reducton'\. Did you mean 'reduction'\?"),
        ({"reduction": "two"}, r"unipt\.reduction wants int; found 'two'"),
        ({"reduction": "2.5"}, r"unipt\.reduction wants int; found '2\.5'"),
        ({"reduction": "-1"}, r"unipt\.reduction wants a finite int of 0 or more"),
        ({"lr": "fast"}, r"unipt\.lr wants float; found 'fast'"),
        ({"lr": "nan"}, r"unipt\.lr wants a finite float"),
        ({"lr": "inf"}, r"unipt\.lr wants a finite float"),
        ({"form": "token"}, r"no value of unipt\.form 'token'\. Did you mean 'tokens'\?"),
    ],
)
def test_a_bad_option_gets_a_sentence(settings: dict[str, str], sentence: str) -> None:
    with pytest.raises(SidebenchError, match=sentence):
        find_method("unipt").configured(settings)


def test_a_switch_is_true_or_false() -> None:
    assert find_method("vpt").configured({"deep": "FALSE"}).config.deep is False
    with pytest.raises(SidebenchError, match=r"vpt\.deep is true or false; found '1'"):
        find_method("vpt").configured({"deep": "1"})


def test_an_option_of_a_type_that_cannot_be_typed_gets_a_sentence(tmp_path: Path) -> None:
    path = write(tmp_path, ONE.replace("depth: int", "depth: int | None"))
    assert find_method(path).configured({}).config.depth == 2
    with pytest.raises(SidebenchError, match=r"mine\.depth .*int \| None.*cannot be set"):
        find_method(path).configured({"depth": "3"})


@pytest.mark.parametrize("name", known_methods())
def test_a_description_is_plain_json_and_agrees_with_the_config(name: str) -> None:
    described = describe(name)
    assert set(described) == {"name", "kind", "paper", "summary", "parameters", "config", "families"}
    assert described["name"] == name
    assert described["parameters"].startswith("Trained")
    assert json.loads(json.dumps(described)) == described
    facts = config_facts(find_method(name).configured({}))
    assert facts == {key: option["default"] for key, option in described["config"].items()}


def test_a_config_cannot_be_changed_behind_the_records_back() -> None:
    method = find_method("unipt").configured({"lr": "0.25"})
    assert isinstance(method.config, TrainingConfig)
    assert config_facts(method)["lr"] == 0.25
    with pytest.raises(AttributeError):
        method.config.lr = 1.0


def test_an_entry_point_is_found_and_its_failure_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "sidebench.methods"
    points = [
        EntryPoint("theirs", "sidebench.adapters.unipt:UniPT", group),
        EntryPoint("lost", "not_installed:X", group),
    ]
    monkeypatch.setattr(_registry, "entry_points", lambda group: importlib.metadata.EntryPoints(points))
    assert find_method("theirs").cls is UniPT
    assert "theirs" in known_methods()
    with pytest.raises(SidebenchError, match=r"loading the method 'lost' \(not_installed:X\) failed"):
        find_method("lost")
