"""GLUE's official files: what is read, split and refused; pairs of texts from the tokenizer to the backbone; runs."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from outcomes import here, spawning
from scipy import stats as scipy_stats

from sidebench.adapters._base import task_loss
from sidebench.adapters.linear_probe import Config, LinearProbe
from sidebench.bench import launch as launching
from sidebench.bench.compare import compare
from sidebench.bench.launch import Listener
from sidebench.bench.outcome import Request
from sidebench.bench.prepare import Inputs
from sidebench.bench.record import Job, read_predictions, read_record
from sidebench.bench.report import columns, markdown, verdicts
from sidebench.bench.table import comparisons, rows
from sidebench.bench.tasks.base import Task
from sidebench.bench.tasks.contents import TextExamples
from sidebench.bench.tasks.glue import GLUE
from sidebench.bench.tasks.load import load_task
from sidebench.bench.tasks.split import split
from sidebench.cache.backbone import Backbone
from sidebench.cache.errors import SidebenchError
from sidebench.cache.preprocess import TextPreprocess
from sidebench.cache.views import text_view

MNLI_HEAD = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
HEADS = {
    "sst2": "sentence label",
    "mrpc": "Quality #1_ID #2_ID #1_String #2_String",
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "mnli": f"{MNLI_HEAD} sentence1 sentence2 label1 gold_label",
    "qnli": "index question sentence label",
    "rte": "index sentence1 sentence2 label",
    "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
}
TEXTS = {"sentence", "sentence1", "sentence2", "question", "question1", "question2", "#1 String", "#2 String"}
LABELS = {
    "mnli": ("neutral", "entailment", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "stsb": ("0.000", "1.75", "2.6", "3.800", "5.0"),
}
SCORES = {
    "cola": "Matthews correlation",
    "mrpc": "accuracy and F1",
    "qqp": "accuracy and F1",
    "stsb": "Pearson and Spearman",
}


def _columns(name: str) -> list[str]:
    if name == "cola":
        return ["source", "label", "star", "sentence"]
    return [column.replace("_", " ") if name == "mrpc" else column for column in HEADS[name].split()]


def _rows(name: str, count: int, seed: int) -> list[list[str]]:
    """Lines of a file; where "good" stands in the (second) text, the label is the last one."""
    draw, labels = np.random.default_rng(seed), LABELS.get(name, ("0", "1"))
    texts = toys.make_texts(2 * count, seed=seed, longest=6).raw
    found = []
    for i in range(count):
        pair = texts[i], texts[count + i]
        last = "good" in (pair[1] if _pairs(name) else pair[0]).split()
        label = labels[-1] if last else labels[draw.integers(len(labels) - 1)]
        sides = iter(pair)
        found.append([next(sides) if column in TEXTS else f"x{i}" for column in _columns(name)])
        found[-1][_columns(name).index(GLUE[name].label)] = label
    return found


def _pairs(name: str) -> bool:
    return len(GLUE[name].texts) == 2


def _write(path: Path, name: str, count: int, seed: int, *, bom: bool = False) -> None:
    head = [] if name == "cola" else [_columns(name)]
    lines = ["\t".join(fields) for fields in [*head, *_rows(name, count, seed)]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + "".join(f"{line}\n" for line in lines).encode())


def write_glue(root: Path, name: str, train: int = 24, held: int = 11) -> str:
    """A task in the files and folders of the official download; returns its URI."""
    files = {"train.tsv": train, **dict.fromkeys(GLUE[name].held, held)}
    for seed, (file, count) in enumerate(files.items()):
        _write(root / GLUE[name].folder / file, name, count, seed)
    return f"glue:{name}?root={root}"


def _load(uri: str, limit: int | None = None, said: list[str] | None = None) -> Task:
    return load_task(uri, home=Path("/nowhere"), limit=limit, say=[].append if said is None else said.append)


# What is read


@pytest.mark.parametrize("name", GLUE)
def test_each_task_is_read_from_its_official_files(name: str, tmp_path: Path) -> None:
    task = _load(write_glue(tmp_path, name))
    files = 2 + (name == "mnli")
    assert len(task.examples) == 24 + 11 * (files - 1)
    assert task.score_name == SCORES.get(name, "accuracy")
    wanted = [fields for seed in range(files) for fields in _rows(name, 11 if seed else 24, seed)]
    places = [_columns(name).index(column) for column in GLUE[name].texts]
    for i, fields in enumerate(wanted):
        texts = tuple(fields[place] for place in places)
        assert task.examples.load(i) == (texts if _pairs(name) else texts[0])
    labels = [fields[_columns(name).index(GLUE[name].label)] for fields in wanted]
    named = [task.classes[target] for target in task.examples.targets]
    if name == "stsb":
        assert task.values is not None
        assert [task.values[target] for target in task.examples.targets] == [float(label) for label in labels]
        assert (task.num_outputs, len(task.values)) == (1, 5)
    else:
        assert named == labels
        assert task.classes == tuple(sorted(LABELS.get(name, ("0", "1"))))
        assert task.num_outputs == len(task.classes)


def test_official_names_are_understood_and_others_get_a_suggestion(tmp_path: Path) -> None:
    for name, official in (("cola", "CoLA"), ("sst2", "SST-2"), ("stsb", "STS-B"), ("mrpc", "MRPC")):
        uri = write_glue(tmp_path, name).replace(f":{name}?", f":{official}?")
        assert _load(uri).examples.content_sha256 == _load(write_glue(tmp_path, name)).examples.content_sha256
    with pytest.raises(SidebenchError, match=r"no GLUE task 'sts-c'\. Did you mean 'stsb'"):
        _load(f"glue:sts-c?root={tmp_path}")
    with pytest.raises(SidebenchError, match=r"type glue:cola\?root=FOLDER"):
        _load("glue:cola")


def test_a_byte_order_mark_and_other_line_ends_change_nothing(tmp_path: Path) -> None:
    uri = write_glue(tmp_path, "rte")
    before = _load(uri).examples.content_sha256
    path = tmp_path / "RTE" / "train.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert _load(uri).examples.content_sha256 == before


def test_quotes_are_characters_like_others(tmp_path: Path) -> None:
    uri = write_glue(tmp_path, "sst2")
    with (tmp_path / "SST-2" / "train.tsv").open("a", encoding="utf-8") as file:
        file.write('"a film \u2028 with a lone quote\t1\n')
    assert _load(uri).examples.load(24) == '"a film \u2028 with a lone quote'


def test_microsofts_own_file_is_cut_by_the_list_of_validating_pairs(tmp_path: Path) -> None:
    ready = _load(write_glue(tmp_path / "ready", "mrpc", 20, 8))
    folder = tmp_path / "whole" / "MRPC"
    folder.mkdir(parents=True)
    lines = [[f"{i}", f"{1000 + i}"] for i in range(28)]
    body = [*_rows("mrpc", 20, 0), *_rows("mrpc", 8, 1)]
    for fields, ids in zip(body, lines, strict=True):
        fields[1:3] = ids
    order = np.random.default_rng(0).permutation(28)
    text = "".join("\t".join(fields) + "\r\n" for fields in [_columns("mrpc"), *(body[i] for i in order)])
    (folder / "msr_paraphrase_train.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    with pytest.raises(SidebenchError, match=r"no file .*dev_ids.tsv.*gluebenchmark.com"):
        _load(f"glue:mrpc?root={tmp_path / 'whole'}")
    (folder / "dev_ids.tsv").write_text("".join("\t".join(ids) + "\n" for ids in lines[20:]), "utf-8")
    whole = _load(f"glue:mrpc?root={tmp_path / 'whole'}")

    def contents(task: Task, parts: tuple[str, ...]) -> set[Any]:
        assert task.parts is not None
        return {task.examples.load(i) for i, part in enumerate(task.parts) if part in parts}

    assert contents(whole, ("train",)) == contents(ready, ("train",))
    assert contents(whole, ("val", "test")) == contents(ready, ("val", "test"))


def test_the_broken_lines_of_qqp_are_left_out_and_said(tmp_path: Path) -> None:
    uri, said = write_glue(tmp_path, "qqp"), list[str]()
    with (tmp_path / "QQP" / "train.tsv").open("a", encoding="utf-8") as file:
        file.write('77\t1\t2\t"a question that\n was cut in two?\twhy\t0\n')
    assert len(_load(uri, said=said).examples) == 35
    assert len(said) == 1
    assert "2 lines" in said[0]
    assert "line 26 first" in said[0]


@pytest.mark.parametrize(
    ("name", "file", "line", "words"),
    [
        ("cola", "train.tsv", "x\t1\ta film", "train.tsv line 25 has 3 fields; wanted 4"),
        ("mnli", "dev_matched.tsv", "1\t2", "dev_matched.tsv line 13 has 2 fields; wanted 12"),
        ("sst2", "dev.tsv", "a film\t2", "dev.tsv line 13: label is '2'; wanted one of 0, 1"),
        ("rte", "train.tsv", "1\ta\tb\tneutral", "line 26: label is 'neutral'; wanted one of entailment, not_ent"),
        ("sst2", "train.tsv", " \t1", "train.tsv line 26: 'sentence' hold no text"),
        ("stsb", "train.tsv", "\t".join([*"1234567", "a", "b", "5.5"]), "score is '5.5'; wanted a number from 0 to 5"),
        ("stsb", "train.tsv", "\t".join([*"1234567", "a", "b", "nan"]), "score is 'nan'; wanted a number from 0 to 5"),
        ("stsb", "train.tsv", "\t".join([*"1234567", "a", "b", "much"]), "score is 'much'; wanted a number"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(name: str, file: str, line: str, words: str, tmp_path: Path) -> None:
    uri = write_glue(tmp_path, name)
    with (tmp_path / GLUE[name].folder / file).open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    with pytest.raises(SidebenchError) as caught:
        _load(uri)
    assert words in str(caught.value)


def test_a_missing_file_and_a_missing_column_are_named(tmp_path: Path) -> None:
    uri = write_glue(tmp_path, "mnli")
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    with pytest.raises(SidebenchError, match=r"no file .*MNLI/dev_mismatched.tsv; .*gluebenchmark.com"):
        _load(uri)
    _write(tmp_path / "MNLI" / "dev_mismatched.tsv", "mnli", 0, 0)
    with pytest.raises(SidebenchError, match=r"MNLI/dev_mismatched\.tsv holds no examples"):
        _load(uri)
    _write(tmp_path / "RTE" / "train.tsv", "sst2", 3, 0)
    with pytest.raises(SidebenchError, match=r"no column 'sentence1'; it has 'sentence', 'label'"):
        _load(f"glue:rte?root={tmp_path}")


# Parts and limits


@pytest.mark.parametrize("name", [name for name in GLUE if name != "mnli"])
def test_a_small_task_halves_its_public_validation_part(name: str, tmp_path: Path) -> None:
    task = _load(write_glue(tmp_path, name))
    parts = split(task, 0)
    assert parts.sizes() == {"train": 24, "val": 5, "test": 6}
    assert parts.train.tolist() == list(range(24))
    again = split(_load(write_glue(tmp_path, name)), 7)
    assert [*parts.val, *parts.test] == [*again.val, *again.test]


def test_a_large_task_validates_on_a_thousand_training_lines(tmp_path: Path) -> None:
    task = _load(write_glue(tmp_path, "sst2", 10_000, 20))
    parts = split(task, 0)
    assert parts.sizes() == {"train": 9000, "val": 1000, "test": 20}
    assert parts.test.tolist() == list(range(10_000, 10_020))
    assert parts.val.max() < 10_000
    assert 300 < np.median(np.diff(parts.val)) * 50 < 600  # drawn from all of them, not the first ones
    almost = _load(write_glue(tmp_path / "almost", "sst2", 9999, 20))
    assert split(almost, 0).sizes() == {"train": 9999, "val": 10, "test": 10}


def test_mnli_validates_on_mismatched_and_is_tested_on_matched(tmp_path: Path) -> None:
    write_glue(tmp_path, "mnli")
    _write(tmp_path / "MNLI" / "dev_matched.tsv", "mnli", 7, 9)
    task = _load(f"glue:mnli?root={tmp_path}")
    parts = split(task, 0)
    assert parts.sizes() == {"train": 24, "val": 11, "test": 7}
    assert {task.examples.ids[i].split("-")[0] for i in parts.test} == {"dev_matched"}
    assert {task.examples.ids[i].split("-")[0] for i in parts.val} == {"dev_mismatched"}


def test_a_limit_on_numbers_keeps_the_parts_and_needs_no_example_of_each_number(tmp_path: Path) -> None:
    task = _load(write_glue(tmp_path, "stsb", 60, 20), limit=4)
    assert split(task, 0).sizes() == {"train": 2, "val": 1, "test": 1}
    assert task.values is not None
    assert len(task.values) == 5  # the numbers of the whole task


def test_a_number_that_is_never_trained_may_be_scored(tmp_path: Path) -> None:
    uri = write_glue(tmp_path, "stsb")
    path = tmp_path / "STS-B" / "dev.tsv"
    path.write_text(path.read_text("utf-8").replace("\t5.0\n", "\t4.123\n").replace("\t1.75\n", "\t0.01\n"), "utf-8")
    assert split(_load(uri), 0).sizes()["train"] == 24


# Pairs of texts


def _examples(*texts: Any) -> TextExamples:
    return TextExamples(tuple(map(str, range(len(texts)))), np.zeros(len(texts), dtype=np.int64), ("0", "1"), texts)


def test_the_content_hash_tells_both_texts_and_their_order_apart_and_is_the_old_one_of_single_texts() -> None:
    hashes = {
        _examples(*texts).content_sha256
        for texts in ([("a", "b")], [("b", "a")], [("ab", "")], [("", "ab")], ["ab"], ["a", "b"], [("a", "c")])
    }
    assert len(hashes) == 7
    total = hashlib.sha256(json.dumps(["sidebench content 1", "text", ("0", "1")]).encode() + b"\n")
    for i, text in enumerate(("a film", "ein Stück")):
        total.update(json.dumps([str(i), 0, hashlib.sha256(text.encode()).hexdigest()]).encode() + b"\n")
    assert _examples("a film", "ein Stück").content_sha256 == total.hexdigest()


def test_bert_is_told_which_text_a_token_is_of(tiny_bert: Backbone) -> None:
    prepared = tiny_bert.preprocess.prepare([("a film", "good"), ("the plot is dull", "a very good cast")])
    inputs, mask = tiny_bert.preprocess.collate(prepared)
    word = {name: 4 + i for i, name in enumerate(toys.WORDS)}
    assert inputs["input_ids"][0].tolist() == [2, word["a"], word["film"], 3, word["good"], 3, *[0] * 5]
    assert inputs["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, *[0] * 5]
    assert inputs["token_type_ids"][1].tolist() == [0] * 6 + [1] * 5
    assert mask is not None
    assert mask.sum(1).tolist() == [6, 11]
    layer = tiny_bert.final_layer
    told = tiny_bert.capture(inputs, [layer])[layer][0, :6]
    alone = {name: inputs[name][:1, :6] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.inference_mode():
        expected = tiny_bert.module(**alone).last_hidden_state[0]
        untold = tiny_bert.module(alone["input_ids"], alone["attention_mask"]).last_hidden_state[0]
    torch.testing.assert_close(told, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(told, untold, atol=1e-2)


def test_a_single_text_has_no_types_and_the_inputs_it_always_had(tiny_bert: Backbone) -> None:
    prepared = tiny_bert.preprocess.prepare(["a film", "good"])
    assert [one.ndim for one in prepared] == [1, 1]
    assert set(tiny_bert.preprocess.collate(prepared)[0]) == {"input_ids", "attention_mask"}


def test_a_backbone_without_segments_gets_a_pair_without_types(tiny_clip_text: Backbone) -> None:
    prepared = tiny_clip_text.preprocess.prepare([("a film", "good")])
    inputs, _ = tiny_clip_text.preprocess.collate(prepared)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].shape == (1, 6)
    assert tiny_clip_text.capture(inputs, tiny_clip_text.layers[-1:])


def test_of_a_long_pair_the_longer_text_is_cut_and_too_little_room_is_refused() -> None:
    preprocess = TextPreprocess(toys.tokenizer(), 8, token_types=True)
    ids, types = preprocess.prepare([("a the film is was", "good bad")])[0].T
    assert len(ids) == 8
    assert types.tolist() == [0] * 5 + [1] * 3
    with pytest.raises(SidebenchError, match="--max-length 4 leaves no room for a word of each text"):
        TextPreprocess(toys.tokenizer(), 4).prepare([("a", "film")])


def test_a_view_of_a_pair_drops_words_with_their_types() -> None:
    preprocess = TextPreprocess(toys.tokenizer(), 40, token_types=True)
    whole = preprocess.prepare([("a the film is was " * 3, "good bad very dull " * 3)])[0]
    view = text_view(whole, preprocess.special_ids(), np.random.default_rng(0))
    assert len(view) < len(whole)
    assert view[view[:, 0] < 4].tolist() == [[2, 0], [3, 0], [3, 1]]
    second = {4 + toys.WORDS.index(word) for word in ("good", "bad", "very", "dull")}
    assert all((int(i) in second) == bool(kind) for i, kind in view.tolist() if i >= 4)


# Numbers


def test_the_loss_of_numbers_is_their_mean_squared_error() -> None:
    rng = np.random.default_rng(0)
    outputs, targets = rng.normal(size=(7, 1)), rng.normal(size=7)
    expected = sum((o - t) ** 2 for o, t in zip(outputs[:, 0], targets, strict=True)) / 7
    found = task_loss(torch.from_numpy(outputs).float(), torch.from_numpy(targets).float())
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_the_probe_of_numbers_is_ridge_regression() -> None:
    rng = np.random.default_rng(1)
    x, y, l2 = rng.normal(size=(40, 5)) * 3 + 1, rng.normal(size=40), 0.1
    data = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    probe, chosen = LinearProbe(Config(smallest_l2=l2, largest_l2=l2, candidates=1)).fit(data, data, 1)
    z = (x - x.mean(0)) / x.std(0)
    centred = y - y.mean()
    # d/dW of mean (z W + b - y)² + l2/2 |W|² is zero
    weight = np.linalg.solve(2 * z.T @ z / 40 + l2 * np.eye(5), 2 * z.T @ centred / 40)
    np.testing.assert_allclose(probe(data[0]).detach().numpy()[:, 0], z @ weight + y.mean(), atol=1e-5)
    assert chosen["unconverged_l2"] == []


def test_a_solver_chooses_by_the_score_it_is_given() -> None:
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.normal(size=(60, 4))).float()
    data = x[:40], (x[:40, 0] + torch.from_numpy(rng.normal(size=40)) > 0).long()
    val = x[40:], (x[40:, 0] > 0).long()
    probe = LinearProbe(Config(candidates=5))
    asked: list[float] = []
    probe.score = lambda outputs, targets: asked.append(float(outputs.abs().max())) or -asked[-1]  # type: ignore[func-returns-value]
    _, chosen = probe.fit(data, val, 2)
    assert len(asked) == 5
    assert chosen["val_score"] == -min(asked)
    assert chosen["l2"] == pytest.approx(1e2)  # the strongest: its outputs are the smallest


# Comparisons


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: Job, folder: Path, listener: Listener) -> str | None:
        kept = json.loads(json.dumps(dataclasses.asdict(job)))  # as a worker reads it
        return here(Job(**{**kept, "lrs": tuple(kept["lrs"])}), folder, listener)

    monkeypatch.setattr(launching, "spawn", spawning(run))


METHODS = ("linear_probe", "unipt", "bitfit")
QUICK = {"linear_probe": {"candidates": "2", "max_iterations": "60"}}


def _by_scipy(name: str, logits: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> Mapping[str, float]:
    if name == "stsb":
        pearson, spearman = scipy_stats.pearsonr(logits[:, 0], targets), scipy_stats.spearmanr(logits[:, 0], targets)
        return {"Pearson": float(pearson[0]), "Spearman": float(spearman[0])}
    predicted = logits.argmax(1)
    accuracy = float(np.mean(predicted == targets))
    if name == "mnli":
        return {"accuracy": accuracy}
    if name == "cola":
        varied = len(set(predicted)) > 1
        return {"Matthews correlation": float(np.corrcoef(predicted, targets)[0, 1]) if varied else 0.0}
    tp = float(((predicted == 1) & (targets == 1)).sum())
    wrong = float((predicted != targets).sum())
    return {"accuracy": accuracy, "F1": 2 * tp / (2 * tp + wrong) if tp else 0.0}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    "name", ["stsb", *(pytest.param(name, marks=pytest.mark.long) for name in ("cola", "mrpc", "mnli"))]
)
def test_a_task_is_compared_from_its_files_to_the_report(name: str, tmp_path: Path, models: Path) -> None:
    uri = write_glue(tmp_path, name, 48, 40)
    inputs = Inputs(f"hf:{models / 'bert'}", uri, device="cpu")
    request = Request(inputs, METHODS, QUICK, seeds=(0,), epochs=1)
    outcome = compare(request, home=tmp_path, cache_dir=tmp_path / "caches", runs_dir=tmp_path / "runs")
    for path in outcome.files:
        record = read_record(path)
        logits, targets = read_predictions(path.with_suffix(".npz"))
        assert record.measured is not None
        assert logits.shape == (len(targets), {"stsb": 1, "mnli": 3}.get(name, 2))
        assert record.measured["scores"] == pytest.approx(_by_scipy(name, logits, targets), abs=1e-6)
        assert record.measured["score"] == pytest.approx(np.mean(list(record.measured["scores"].values())))
        assert record.asked["score"] == SCORES.get(name, "accuracy")
        assert -1 <= record.measured["val_score"] <= 1
    table, compared = rows(outcome), comparisons(outcome)
    for row in table:
        assert row["score"]["name"] == SCORES.get(name, "accuracy")
        assert row["score"]["test_ci95"][0] <= row["score"]["mean"] <= row["score"]["test_ci95"][1]
        if row["method"] != "linear_probe":  # an upper bound there
            assert row["predicted_peak_bytes"] == row["peak_tracked_bytes"]
    assert [c.method for c in compared] == ["unipt", "bitfit"]
    report = markdown(outcome, table, compared)
    assert " | ".join(columns(SCORES.get(name, "accuracy"), rows(outcome))) in report
    assert ("F1" in report) == (name == "mrpc")
    assert all(("sign-flip" in sentence) == (name == "mnli") for sentence in verdicts(outcome, compared))


@pytest.mark.usefixtures("in_process")
def test_a_regression_learns_a_number_that_the_texts_hold(tmp_path: Path, models: Path) -> None:
    """How many words the second text has, over two: every method sees that, and so the scores say."""
    write_glue(tmp_path, "stsb", 1, 1)
    for file, count, seed in (("train.tsv", 150, 0), ("dev.tsv", 60, 1)):
        body = _rows("stsb", count, seed)
        for fields in body:
            fields[-1] = str(min(len(fields[-2].split()) / 2, 5))
        lines = ["\t".join(fields) + "\n" for fields in [_columns("stsb"), *body]]
        (tmp_path / "STS-B" / file).write_text("".join(lines), "utf-8")
    inputs = Inputs(f"hf:{models / 'bert'}", f"glue:stsb?root={tmp_path}", device="cpu")
    request = Request(inputs, ("linear_probe", "unipt"), {**QUICK, "unipt": {"lr": "0.01"}}, seeds=(0,), epochs=6)
    outcome = compare(request, home=tmp_path, cache_dir=tmp_path / "caches", runs_dir=tmp_path / "runs")
    found = {row["method"]: row["score"]["mean"] for row in rows(outcome)}
    assert all(score > 0.5 for score in found.values()), found
