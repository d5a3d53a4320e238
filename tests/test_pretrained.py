"""Files of pre-trained modules: what they hold, what is refused and how it is said, and the mappings asked for."""

import copy
import dataclasses
import itertools
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from method_cases import Case, build
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sidebench.adapters._base import Body, trained
from sidebench.adapters._pretrained import (
    TRAINING_ONLY,
    Pretrained,
    check_fit,
    load_into,
    module_tensors,
    read_pretrained,
    save_pretrained,
)
from sidebench.adapters._pretrained_facts import FORMAT, Facts
from sidebench.adapters._pretrained_maps import Blocks
from sidebench.adapters._registry import config_facts, find_method, known_methods
from sidebench.cache.backbone import Backbone
from sidebench.cache.errors import SidebenchError

HASHES = torch.arange(48, dtype=torch.uint8).reshape(3, 16)
CASES = [
    Case("vpt"),
    Case("vpt", (("deep", "false"),)),
    Case("lora"),
    Case("houlsby"),
    Case("adaptformer"),
    Case("unipt"),
    Case("lst", (("reduction", "4"),)),
    Case("lora@last1"),
    Case("bitfit"),
]
named = pytest.mark.parametrize("case", CASES, ids=str)


def body_of(case: Case, backbone: Backbone, seed: int = 0) -> Body:
    torch.manual_seed(seed)
    return build(case.method(), copy.deepcopy(backbone))


def facts_of(case: Case, backbone: Backbone, **changes: Any) -> Facts:
    found, arch = find_method(case.name), backbone.arch
    about = {"name": arch.name, "weights_sha256": "ab" * 32, "blocks": arch.blocks, "width": arch.width}
    made = Facts(found.key, found.kind, found.last, config_facts(case.method()), about | changes.pop("of", {}))
    usual = {"source": {"task": "folder:photos"}, "result": {"val_score": 0.5, "best_epoch": 1}}
    return dataclasses.replace(made, **(usual | changes))


def saved(path: Path, case: Case, backbone: Backbone, seed: int = 1, **changes: Any) -> Pretrained:
    save_pretrained(path, body_of(case, backbone, seed), facts_of(case, backbone, **changes), HASHES)
    return read_pretrained(path)


# What a file holds


@named
def test_a_file_gives_back_every_trained_tensor_and_none_that_is_frozen(
    case: Case, tiny_vit: Backbone, tmp_path: Path
) -> None:
    body = body_of(case, tiny_vit, 1)
    file = saved(tmp_path / "f.safetensors", case, tiny_vit)
    assert set(file.shapes) == set(trained(body))
    other = body_of(case, tiny_vit, 2)
    frozen = {name: p.clone() for name, p in other.named_parameters() if not p.requires_grad}
    assert load_into(other, file, facts_of(case, tiny_vit)) == []
    for name, parameter in other.named_parameters():
        wanted = frozen[name] if name in frozen else trained(body)[name]
        assert torch.equal(parameter, wanted), name


def test_the_statistics_of_a_norm_that_trains_are_kept_and_those_of_a_frozen_one_are_not() -> None:
    body = nn.ModuleDict({"ours": nn.BatchNorm1d(3), "theirs": nn.BatchNorm1d(3).requires_grad_(False)})
    assert set(module_tensors(body)) == {"ours.weight", "ours.bias", "ours.running_mean", "ours.running_var"}


def test_it_is_plain_safetensors_with_one_text_beside_the_tensors(tiny_vit: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    saved(path, CASES[0], tiny_vit)
    header = header_of(path.read_bytes())
    document = json.loads(header["__metadata__"]["sidebench"])
    assert set(header["__metadata__"]) == {"sidebench"}
    assert document["format"] == FORMAT
    assert set(document) >= {"method", "kind", "last", "config", "backbone", "layers", "source", "training", "versions"}
    assert set(load_file(path)) == {"prompts", "/source_hashes"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()


def test_equal_contents_give_equal_bytes_whatever_the_order_of_the_examples(tiny_vit: Backbone, tmp_path: Path) -> None:
    body, facts = body_of(CASES[2], tiny_vit, 1), facts_of(CASES[2], tiny_vit)
    for name, hashes in (("a", HASHES), ("b", torch.cat([HASHES.flip(0), HASHES[:1]]))):
        save_pretrained(tmp_path / name, body, facts, hashes)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "a", tmp_path / "b"] or len(list(tmp_path.iterdir())) == 2
    (tmp_path / "a").rename(tmp_path / "a.safetensors")
    assert read_pretrained(tmp_path / "a.safetensors").source_hashes() == {bytes(row) for row in HASHES.numpy()}


def test_a_folder_that_cannot_be_written_is_a_sentence(tiny_vit: Backbone, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SidebenchError, match="cannot write"):
        saved(tmp_path / "file" / "f.safetensors", CASES[0], tiny_vit)


# Strictness


@pytest.fixture
def prompts(tiny_vit: Backbone, tmp_path: Path) -> Pretrained:
    return saved(tmp_path / "f.safetensors", Case("vpt"), tiny_vit)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"method": "lora"}, ["method is vpt in the file and lora here", "pre-train lora"]),
        ({"backbone": {"weights_sha256": "cd" * 32}}, ["backbone.weights_sha256 is abab", "and cdcd", "ViTModel"]),
        ({"config": {"deep": False}}, ["vpt.deep is True in the file and False here", "--set vpt.deep=true"]),
        (
            {"config": {"prompts": 3}},
            ["vpt.prompts is 10 in the file and 3 here", "--set vpt.prompts=10", "--map-init"],
        ),
        ({"config": {"new": 3}}, ["vpt.new is not there in the file and 3 here"]),
        ({"last": 1}, ["blocks is every block in the file and the last 1 here", "--map-init layers"]),
    ],
    ids=["method", "digest", "deep", "prompts", "an option of later", "blocks"],
)
def test_what_differs_is_named_with_both_values_and_what_to_type(
    prompts: Pretrained, tiny_vit: Backbone, changes: dict[str, Any], parts: list[str]
) -> None:
    wanted = facts_of(Case("vpt"), tiny_vit)
    check_fit(prompts, wanted)
    changed = {
        name: {**getattr(wanted, name), **value} if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    with pytest.raises(SidebenchError) as caught:
        check_fit(prompts, dataclasses.replace(wanted, **changed))
    for part in (str(prompts.path), *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", known_methods())
def test_every_option_is_strict_but_those_that_only_say_how_to_train(name: str, tmp_path: Path) -> None:
    config_class = find_method(name).cls.Config
    for field in dataclasses.fields(config_class):
        facts = Facts(
            name, "live", None, {field.name: 1}, {"weights_sha256": "a", "blocks": 2, "name": "n", "width": 4}
        )
        file = Pretrained(tmp_path / "f", "", facts, {})
        other = dataclasses.replace(facts, config={field.name: 2})
        if field.name in TRAINING_ONLY:
            check_fit(file, other)
        else:
            with pytest.raises(SidebenchError, match=f"{name}.{field.name} is 1 in the file and 2 here"):
                check_fit(file, other)


def test_an_unknown_mapping_is_refused(prompts: Pretrained, tiny_vit: Backbone) -> None:
    with pytest.raises(SidebenchError, match=r"no mapping in --map-init 'layer'\. Did you mean 'layers'"):
        check_fit(prompts, facts_of(Case("vpt"), tiny_vit), ["layer"])


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t.pop("prompts"), "it holds no tensor of a module"),
        (lambda t: t.update(more=torch.zeros(2)), "it holds more, which this module has not"),
        (
            lambda t: t.update(prompts=torch.zeros(2, 10, 31)),
            "prompts is (2, 10, 31) of float32 in the file and (2, 10, 32)",
        ),
        (lambda t: t.update(prompts=torch.zeros(2, 10)), "prompts is (2, 10) of float32"),
        (lambda t: t.update(prompts=torch.zeros(2, 10, 32).half()), "(2, 10, 32) of float16"),
        (lambda t: t.update(prompts=torch.full((2, 10, 32), torch.nan)), "prompts holds a number that is not finite"),
        (lambda t: t.pop("/source_hashes"), "/source_hashes is not (N, 16) bytes"),
        (lambda t: t.update({"/source_hashes": torch.zeros(3, 15).byte()}), "/source_hashes is not (N, 16) bytes"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_loaded(
    prompts: Pretrained, tiny_vit: Backbone, change: Callable[[dict[str, Tensor]], Any], part: str
) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(prompts.path).items()}
    metadata = header_of(prompts.path.read_bytes())["__metadata__"]
    change(tensors)
    save_file(tensors, prompts.path, metadata)
    body = body_of(Case("vpt"), tiny_vit)
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    with pytest.raises(SidebenchError) as caught:
        load_into(body, read_pretrained(prompts.path), facts_of(Case("vpt"), tiny_vit))
    assert part in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in body.state_dict().items())


# Mappings


@pytest.mark.parametrize(("theirs", "ours"), [(10, 4), (4, 10), (3, 3), (1, 5)])
@pytest.mark.parametrize("deep", ["true", "false"])
def test_prompts_are_cut_off_or_taken_over_and_over(
    theirs: int, ours: int, deep: str, tiny_vit: Backbone, tmp_path: Path
) -> None:
    made, case = (Case("vpt", (("deep", deep), ("prompts", str(count)))) for count in (theirs, ours))
    file = saved(tmp_path / "f.safetensors", made, tiny_vit)
    body = body_of(case, tiny_vit)
    said = load_into(body, file, facts_of(case, tiny_vit), ["prompts"])
    source, found = file.tensors()["prompts"], trained(body)["prompts"]
    for block, prompt in itertools.product(range(len(source)), range(ours)):
        kept = prompt
        while kept >= theirs:
            kept -= theirs
        assert torch.equal(found[block, prompt], source[block, kept])
    assert bool(said) == (theirs != ours)
    assert all(sentence.startswith("prompts: ") for sentence in said)


def test_blocks_of_another_depth_are_those_at_the_nearest_relative_depth() -> None:
    for theirs, ours in itertools.product(range(1, 14), range(1, 14)):
        blocks = Blocks(theirs, ours, tail=False)
        for block in range(ours):
            found = blocks.source(block)
            assert 0 <= found < theirs
            if ours > 1 and theirs > 1:
                depths = [abs(other / (theirs - 1) - block / (ours - 1)) for other in range(theirs)]
                assert depths[found] == pytest.approx(min(depths))
    assert [Blocks(12, 4, tail=True).source(block) for block in range(4)] == [8, 9, 10, 11]


@pytest.mark.parametrize("case", [Case("vpt"), *CASES[2:7], Case("bitfit")], ids=str)
@pytest.mark.parametrize("depths", [(5, 3), (3, 5)])
def test_modules_of_a_deeper_and_a_shallower_network_are_matched_block_by_block(
    case: Case, depths: tuple[int, int], tmp_path: Path
) -> None:
    theirs, ours = (toys.load(toys.save_vit(tmp_path / str(n), num_hidden_layers=n)) for n in depths)
    file = saved(tmp_path / "f.safetensors", case, theirs)
    wanted = facts_of(case, ours, of={"weights_sha256": "cd" * 32})
    body = body_of(case, ours)
    with pytest.raises(SidebenchError, match="--map-init layers"):
        load_into(body, file, wanted)
    (said,) = load_into(body, file, wanted, ["layers"])
    assert said.startswith(f"layers: of the file's {depths[0]} blocks, block 0 from 0, 1 from ")
    tensors = file.tensors()
    for name, tensor in trained(body).items():
        assert torch.equal(tensor, by_depth(name, tuple(tensor.shape), tensors, *depths)), name


def by_depth(name: str, shape: tuple[int, ...], tensors: dict[str, Tensor], theirs: int, ours: int) -> Tensor:
    """Naively: the number in the name, or the first dimension, counts blocks, states (one more) or pairs of them."""
    block = {i: int(i * (theirs - 1) / (ours - 1) + 0.5) for i in range(ours)}
    state = {0: 0} | {i + 1: block[i] + 1 for i in block}
    pair = {2 * i + j: 2 * block[i] + j for i in block for j in (0, 1)}
    pieces = name.split(".")
    where = next((i for i, piece in enumerate(pieces) if piece.isdigit()), None)
    if where is not None:
        stem, rest = ".".join(pieces[:where]), ".".join(pieces[where + 1 :])
        count = len({n.split(".")[where] for n in tensors if n.startswith(f"{stem}.")})
        rows = {theirs: block, theirs + 1: state, 2 * theirs: pair}.get(count)
        number = int(pieces[where]) if rows is None else rows[int(pieces[where])]
        return tensors[".".join(piece for piece in (stem, str(number), rest) if piece)]
    if tensors[name].shape == shape:
        return tensors[name]
    rows = {ours: block, ours + 1: state}[shape[0]]
    return torch.stack([tensors[name][rows[i]] for i in range(shape[0])])


@pytest.mark.parametrize("name", ["lora", "houlsby", "adaptformer", "vpt", "bitfit"])
def test_on_the_last_blocks_the_tensors_of_the_last_blocks_are_taken(name: str, tmp_path: Path) -> None:
    backbone = toys.load(toys.save_vit(tmp_path / "vit", num_hidden_layers=4))
    file = saved(tmp_path / "f.safetensors", Case(name), backbone)
    case = Case(f"{name}@last2")
    body = body_of(case, backbone)
    with pytest.raises(SidebenchError, match="--map-init layers"):
        load_into(body, file, facts_of(case, backbone))
    assert load_into(body, file, facts_of(case, backbone), ["layers"]) == [
        "layers: of the file's 4 blocks, block 0 from 2, 1 from 3"
    ]
    theirs = list(file.tensors().items())
    whole = trained(body_of(Case(name), backbone, 1))
    kept = {name: tensor for name, tensor in whole.items() if torch.equal(tensor, file.tensors()[name])}
    assert len(kept) == len(theirs)
    if name == "vpt":
        assert torch.equal(trained(body)["prompts"], file.tensors()["prompts"][2:])
        return
    ours = trained(body)
    absolute = set(ours) <= set(whole) and name in ("lora", "bitfit")
    for own, tensor in ours.items():
        stem, _, rest = own.partition("adapters.")
        number, _, behind = rest.partition(".")
        behind_all = len(whole) - len(ours)
        source = own if absolute else f"{stem}adapters.{int(number) + behind_all // 4}.{behind}"
        assert torch.equal(tensor, file.tensors()[source]), own


def test_of_the_last_blocks_alone_there_is_no_way_to_all(tiny_vit: Backbone, tmp_path: Path) -> None:
    file = saved(tmp_path / "f.safetensors", Case("lora@last1"), tiny_vit)
    check_fit(file, facts_of(Case("lora@last1"), tiny_vit))
    for case in (Case("lora"), Case("lora@last2")):
        with pytest.raises(SidebenchError, match=r"blocks is the last 1 in the file .* type lora@last1@"):
            check_fit(file, facts_of(case, tiny_vit), ["layers"])


def test_another_network_of_equal_depth_is_refused_with_the_mapping_too(tiny_vit: Backbone, tmp_path: Path) -> None:
    file = saved(tmp_path / "f.safetensors", Case("lora"), tiny_vit)
    wanted = facts_of(Case("lora"), tiny_vit, of={"weights_sha256": "cd" * 32})
    with pytest.raises(SidebenchError, match=r"backbone\.weights_sha256"):
        check_fit(file, wanted, ["layers"])
    other = {"weights_sha256": "cd" * 32, "blocks": 3, "width": 64}
    with pytest.raises(SidebenchError, match=r"backbone\.width is 32 in the file and 64 here"):
        check_fit(file, facts_of(Case("lora"), tiny_vit, of=other), ["layers"])


# Untrusted files


def header_of(content: bytes) -> dict[str, Any]:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def with_header(content: bytes, header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :]


def with_facts(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    header = header_of(content)
    document = json.loads(header["__metadata__"]["sidebench"])
    changed = change(document)
    header["__metadata__"]["sidebench"] = json.dumps(document if changed is None else changed)
    return with_header(content, header)


@pytest.fixture(scope="module")
def content(tiny_vit: Backbone, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "f.safetensors"
    saved(path, Case("vpt"), tiny_vit)
    return path.read_bytes()


@pytest.mark.parametrize(
    "field",
    [
        *(
            "format",
            "method",
            "kind",
            "config",
            "backbone",
            "preprocessing",
            "source",
            "training",
            "result",
            "versions",
        ),
        *("backbone.name", "backbone.weights_sha256", "backbone.blocks", "backbone.width", "source.task", "layers"),
        *("result.val_score", "result.best_epoch"),
    ],
)
@pytest.mark.parametrize("value", [None, 7.5, [{}], {"a": 1}, True, "x" * 500], ids=repr)
def test_a_field_of_another_shape_is_named(field: str, value: Any, content: bytes, tmp_path: Path) -> None:
    if (field == "result.val_score" and isinstance(value, float | bool)) or (
        isinstance(value, str)
        and field in ("method", "kind", "backbone.name", "backbone.weights_sha256", "source.task")
    ):
        pytest.skip("it is of the right shape")
    if value == {"a": 1} and field in ("config", "preprocessing", "training", "versions"):
        pytest.skip("it is of the right shape")
    above, _, name = field.rpartition(".")

    def change(document: dict[str, Any]) -> None:
        (document[above] if above else document)[name] = value

    path = tmp_path / "f.safetensors"
    path.write_bytes(with_facts(content, change))
    with pytest.raises(SidebenchError) as caught:
        read_pretrained(path)
    assert f"{path} is refused: its {name if not above else field}"[:60] in str(caught.value) or field in str(
        caught.value
    )
    assert len(str(caught.value)) < 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("text", ["", "nonsense", "[" * 10**6, "7" * 10**6, "null", "x" * 2**21])
def test_facts_that_are_no_json_are_refused(text: str, content: bytes, tmp_path: Path) -> None:
    header = header_of(content)
    header["__metadata__"]["sidebench"] = text
    path = tmp_path / "f.safetensors"
    path.write_bytes(with_header(content, header))
    with pytest.raises(SidebenchError, match=r"is refused: its (facts|format)"):
        read_pretrained(path)


@pytest.mark.parametrize("value", ["NaN", "1e999", '"\\ud800"'])
def test_facts_that_no_record_could_hold_are_refused(value: str, content: bytes, tmp_path: Path) -> None:
    header = header_of(content)
    facts = json.loads(header["__metadata__"]["sidebench"])
    facts["training"]["note"] = "HERE"
    header["__metadata__"]["sidebench"] = json.dumps(facts).replace('"HERE"', value)
    path = tmp_path / "f.safetensors"
    path.write_bytes(with_header(content, header))
    with pytest.raises(SidebenchError, match="not finite, or half a character"):
        read_pretrained(path)


def test_facts_nested_beyond_all_use_are_refused(content: bytes, tmp_path: Path) -> None:
    deep: Any = {}
    for _ in range(400):
        deep = {"a": [deep]}
    path = tmp_path / "f.safetensors"
    path.write_bytes(with_facts(content, lambda document: document["source"].update(deep)))
    with pytest.raises(SidebenchError, match="nested more than"):
        read_pretrained(path)


@given(document=JSON)
def test_facts_of_any_json_are_refused_in_a_sentence(document: Any, content: bytes) -> None:
    _refused_or_sound(with_facts(content, lambda _: document if document is not None else []))


@given(field=st.sampled_from(["last", "layers", "config", "backbone", "source", "result"]), value=JSON)
def test_a_field_of_any_json_is_refused_or_sound(field: str, value: Any, content: bytes) -> None:
    _refused_or_sound(with_facts(content, lambda document: document.__setitem__(field, value)))


@given(data=st.data())
def test_a_damaged_file_is_refused_or_still_sound(content: bytes, data: st.DataObject) -> None:
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    _refused_or_sound(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    _refused_or_sound(bytes(damaged))


@pytest.mark.parametrize("shape", [[2**40, 2**40], [2**62, 16], [2**30, 2**30, 2**30], [-1], [10**30]])
def test_sizes_beyond_the_file_are_refused_before_anything_is_allocated(
    shape: list[int], content: bytes, tmp_path: Path
) -> None:
    header = header_of(content)
    header["prompts"]["shape"] = shape
    path = tmp_path / "f.safetensors"
    path.write_bytes(with_header(content, header))
    with pytest.raises(SidebenchError, match="cannot be read as safetensors"):
        read_pretrained(path)


@pytest.mark.parametrize("body", [b"", b"\xff" * 7, b"\xff" * 64, (2**63).to_bytes(8, "little") + b"{}", b"PK\x03\x04"])
def test_what_is_no_safetensors_is_refused(body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(body)
    with pytest.raises(SidebenchError, match="cannot be read as safetensors"):
        read_pretrained(path)


def test_somebody_elses_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"prompts": torch.zeros(2)}, path)
    with pytest.raises(SidebenchError, match="was not made by `bench pretrain`"):
        read_pretrained(path)


def _refused_or_sound(content: bytes) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"sidebench-{os.getpid()}.safetensors"
    try:
        path.write_bytes(content)
        try:
            file = read_pretrained(path)
            file.tensors()
            assert isinstance(file.facts.document(), dict)
        except SidebenchError as error:
            assert str(path) in str(error)  # noqa: PT017
    finally:
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Names


def test_a_file_behind_the_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last@home").mkdir()
    for name in ("pre.safetensors", "last4.safetensors", "last@home/a@b.safetensors"):
        (tmp_path / name).write_bytes(b"")
        for text, last in ((f"vpt@{name}", None), (f"vpt@last3@{name}", 3)):
            found = find_method(text)
            assert (found.text, found.key, found.last, found.init) == (text, "vpt", last, Path(name))
            assert found.twin == ("vpt" if last is None else "vpt@last3")
            assert found.kind == ("live" if last is None else "prefix")
    assert find_method("unipt@pre.safetensors").kind == "cached"
    assert find_method("vpt").init is None


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("vpt@none.safetensors", "no file none.safetensors of pre-trained modules; `bench pretrain --out none.safe"),
        ("vpt@last2@none.safetensors", "no file none.safetensors"),
        ("vpt@pre.bin", "behind the @ stands lastK"),
        ("vpt@last2@", "behind the @ stands lastK"),
        ("vpt@last2@pre.bin", "behind the @ stands lastK"),
        ("linear_probe@pre.safetensors", "linear_probe is solved"),
        ("unipt@last2@pre.safetensors", "@lastK takes one that trains inside the backbone"),
    ],
)
def test_a_file_that_is_not_there_or_has_no_use_is_refused_at_once(
    text: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pre.safetensors").write_bytes(b"")
    with pytest.raises(SidebenchError) as caught:
        find_method(text)
    assert part in str(caught.value)


def test_a_method_file_takes_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from sidebench.adapters._base import CachedMethod\n"
        "class Mine(CachedMethod):\n    def build(self, arch, widths, weights): ...\n"
    )
    (tmp_path / "pre.safetensors").write_bytes(b"")
    found = find_method("./mine.py@pre.safetensors")
    assert (found.key, found.init, found.twin) == ("mine", Path("pre.safetensors"), "./mine.py")


def test_source_hashes_survive_numpy(tiny_vit: Backbone, tmp_path: Path) -> None:
    file = saved(tmp_path / "f.safetensors", Case("vpt"), tiny_vit)
    assert bytes(np.arange(16, 32, dtype=np.uint8)) in file.source_hashes()
