"""What a run is trained for besides classes: labels found by example, heads that begin as the checkpoint has them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_vil_toys import save_clip_vil
from joint_files import write_refcoco, write_vqa
from mdetr_toys import make_scenes, save_mdetr
from torch import Tensor

from sidebench.adapters._base import Batch, Body
from sidebench.bench.compare import check_pooling
from sidebench.bench.goals.answers import Answers
from sidebench.bench.goals.base import Tower
from sidebench.bench.goals.boxes import HEAD_RATE, Boxes, BoxLearner
from sidebench.bench.goals.labels import goal_facts, labels_of
from sidebench.bench.learner import LiveSource
from sidebench.bench.tasks.base import Answers as Labels
from sidebench.bench.tasks.base import AnswerTask, BoxTask, Spans
from sidebench.bench.tasks.load import load_any
from sidebench.bench.training import Settings, make_optimizer
from sidebench.cache.backbone import Backbone
from sidebench.cache.build import CaptureOptions, plan
from sidebench.cache.errors import SidebenchError
from sidebench.cache.load import load_backbone

CPU = torch.device("cpu")
SETTINGS = Settings(0, 1, 3, 1e-2, 0.0, "fp32")


def _load(uri: str, folder: Path, **sizes: int) -> Backbone:
    return load_backbone(uri, home=folder, device=CPU, **sizes)


def _quiet(_: str) -> None:
    return None


@pytest.fixture(scope="module")
def grounding(tmp_path_factory: pytest.TempPathFactory) -> tuple[BoxTask, Backbone, Boxes]:
    folder = tmp_path_factory.mktemp("boxes")
    task = load_any(write_refcoco(folder, "refcocog", test="test"), home=folder, say=_quiet)
    assert isinstance(task, BoxTask)
    backbone = _load(save_mdetr(folder / "mdetr"), folder, image_size=64)
    facts = goal_facts(task, {"": backbone.arch})
    assert facts == {"kind": "boxes", "memory": "blocks.3"}
    return task, backbone, Boxes("blocks.3", labels_of(task, {"": backbone}))


class _Queries(Body):
    """The decoder's final tokens, as they are."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.width = backbone.arch.width
        self.backbone = [backbone]

    def forward(self, batch: Batch) -> Tensor:
        return self.backbone[0].tokens(batch.inputs)


def _learner(backbone: Backbone, goal: Boxes) -> BoxLearner:
    learner = goal.learner({"": Tower(_Queries(backbone), 0, backbone)})
    assert isinstance(learner, BoxLearner)
    return learner


def test_the_heads_begin_as_the_checkpoint_has_them(grounding: tuple[BoxTask, Backbone, Boxes]) -> None:
    _, backbone, goal = grounding
    held = backbone.module.state_dict()
    for name, value in _learner(backbone, goal).head.state_dict().items():
        assert torch.equal(value, held[name]), name


def test_the_heads_learn_at_a_tenth_of_the_rate(grounding: tuple[BoxTask, Backbone, Boxes]) -> None:
    _, backbone, goal = grounding
    learner = _learner(backbone, goal)
    learner.scale = torch.nn.Parameter(torch.ones(1))
    rates = {id(p): group["lr"] for group in make_optimizer(learner, SETTINGS).param_groups for p in group["params"]}
    assert rates[id(learner.scale)] == SETTINGS.lr
    assert {rates[id(p)] for p in learner.head.parameters()} == {HEAD_RATE * SETTINGS.lr}


def test_a_module_of_somebody_else_has_no_rate_of_its_own(grounding: tuple[BoxTask, Backbone, Boxes]) -> None:
    """Only the head says at which share it learns."""
    _, backbone, goal = grounding
    learner = _learner(backbone, goal)
    learner.own = torch.nn.Linear(2, 2)
    learner.own.rate = learner.own.learning_rate_share = 0.5
    rates = {id(p): group["lr"] for group in make_optimizer(learner, SETTINGS).param_groups for p in group["params"]}
    assert {rates[id(p)] for p in learner.own.parameters()} == {SETTINGS.lr}


def test_every_block_of_a_decoder_that_runs_is_a_level_behind_the_norm(
    grounding: tuple[BoxTask, Backbone, Boxes],
) -> None:
    task, backbone, goal = grounding
    learner, source = _learner(backbone, goal), LiveSource(backbone, task.examples)
    (batch,) = source.batches([np.array([0, 1])])
    with torch.no_grad():
        levels, memory, _ = learner.train()(batch)
        last, _, _ = learner.eval()(batch)
        seen = backbone.capture(batch.inputs, ["blocks.3", "decoder.blocks.0", "decoder.blocks.1", "norm"])
        norm = backbone.module.get_submodule(backbone.tap_path("norm"))
        wanted = [norm(seen["decoder.blocks.0"].clone()), norm(seen["decoder.blocks.1"].clone()), seen["norm"].clone()]
    torch.testing.assert_close(levels, torch.stack(wanted))
    torch.testing.assert_close(last, wanted[2][None])
    torch.testing.assert_close(memory, seen["blocks.3"].clone())


def test_heads_of_another_width_than_the_methods_are_refused(
    grounding: tuple[BoxTask, Backbone, Boxes], questions: tuple[AnswerTask, Backbone, Answers]
) -> None:
    narrow = Tower(_First(torch.zeros(1, 3)), 0)
    with pytest.raises(SidebenchError, match="is wanted for the method's width 3"):
        grounding[2].learner({"": narrow})
    with pytest.raises(SidebenchError, match="and the method yields 3"):
        questions[2].learner({"": narrow})


@pytest.mark.parametrize("tokens", ["mean", "cls", "first:2", "proj:4"])
def test_a_cache_without_the_tokens_that_a_head_reads_is_refused(
    tokens: str,
    grounding: tuple[BoxTask, Backbone, Boxes],
    questions: tuple[AnswerTask, Backbone, Answers],
) -> None:
    def check(task: BoxTask | AnswerTask, backbone: Backbone) -> None:
        check_pooling(task, plan(backbone, task.examples, CaptureOptions(tokens=tokens)).manifest)

    with pytest.raises(SidebenchError, match=f"--tokens {tokens} does not keep"):
        check(*grounding[:2])
    if tokens in ("mean", "proj:4"):
        with pytest.raises(SidebenchError, match="reads the first token"):
            check(*questions[:2])
    else:
        check(*questions[:2])


def test_the_tokens_that_name_a_box_are_those_of_its_span(grounding: tuple[BoxTask, Backbone, Boxes]) -> None:
    task, backbone, goal = grounding
    texts = task.examples.texts  # type: ignore[attr-defined]
    tokenizer: Any = backbone.preprocess.texts.tokenizer  # type: ignore[attr-defined]
    for example in range(len(texts)):
        first, last = goal.arrays["named_of"][example : example + 2]
        bounds = tokenizer(texts[example], return_offsets_mapping=True)["offset_mapping"]
        said = {texts[example][slice(*bounds[token])] for token in goal.arrays["named"][first:last]}
        wanted = set()
        begin, end = task.spans.offsets[example : example + 2]
        for start, stop in task.spans.bounds[begin:end]:
            wanted |= set(texts[example][start:stop].split())
        assert said == wanted
        assert goal.arrays["text_tokens"][example] == len(bounds)


def test_the_text_is_found_behind_the_image_whatever_padding_lies_between(
    grounding: tuple[BoxTask, Backbone, Boxes],
) -> None:
    """Alone an example has no padding; beside others of other sizes it has, behind its image and behind its text."""
    _, backbone, _ = grounding
    examples, texts = make_scenes(6), backbone.preprocess.texts  # type: ignore[attr-defined]
    counts = np.array([len(ids) for ids in texts.prepare(list(examples.texts))])
    assert len(set(counts.tolist())) > 1
    goal = Boxes("blocks.3", {"boxes": np.zeros((6, 4)), "text_tokens": counts})
    learner = _learner(backbone, goal).eval()
    source, targets = LiveSource(backbone, examples), torch.arange(6)
    index = np.arange(6)
    (together,) = source.batches([index])
    with torch.no_grad():
        found, real = goal._found(learner, together, targets, "fp32")
        for example in index:
            (alone,) = source.batches([np.array([example])])
            single, own = goal._found(learner, alone, targets[[example]], "fp32")
            assert int(own.sum()) == counts[example] == int(real[example].sum())
            wanted = single.tokens[0][own[0]]
            torch.testing.assert_close(found.tokens[example][real[example]], wanted, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.boxes[:, example], single.boxes[:, 0], atol=1e-5, rtol=1e-5)


def test_alone_the_text_is_the_last_tokens_that_the_encoder_yields(grounding: tuple[BoxTask, Backbone, Boxes]) -> None:
    task, backbone, goal = grounding
    learner = _learner(backbone, goal).eval()
    (alone,) = LiveSource(backbone, task.examples).batches([np.array([2])])
    with torch.no_grad():
        found, real = goal._found(learner, alone, torch.tensor([2]), "fp32")
        memory = backbone.capture(alone.inputs, ["blocks.3"])["blocks.3"].clone()
        last = memory[:, -int(goal.arrays["text_tokens"][2]) :]
        wanted = torch.nn.functional.normalize(learner.head.contrastive_align_projection_text(last), dim=-1)
    torch.testing.assert_close(found.tokens[:, real[0]], wanted)


def test_boxes_are_fractions_of_the_image(grounding: tuple[BoxTask, Backbone, Boxes]) -> None:
    task, _, goal = grounding
    for (left, top, width, height), (w, h), found in zip(task.boxes, task.sizes, goal.arrays["boxes"], strict=True):
        assert found.tolist() == pytest.approx([(left + width / 2) / w, (top + height / 2) / h, width / w, height / h])


def test_a_backbone_without_a_decoder_grounds_nothing(
    grounding: tuple[BoxTask, Backbone, Boxes], tiny_vit: Backbone
) -> None:
    with pytest.raises(SidebenchError, match="has no decoder"):
        goal_facts(grounding[0], {"": tiny_vit.arch})


def test_a_text_whose_named_words_are_cut_off_is_refused(tmp_path: Path) -> None:
    task = load_any(write_refcoco(tmp_path, "refcoco", test="val"), home=tmp_path, say=_quiet)
    assert isinstance(task, BoxTask)
    count = len(task.examples)
    last = np.tile(np.array([[len("the left "), len("the left half")]]), (count, 1))
    task = replace(task, spans=Spans(np.arange(count + 1), last))
    backbone = _load(save_mdetr(tmp_path / "mdetr"), tmp_path, image_size=64, max_length=4)
    with pytest.raises(SidebenchError, match="none names its box"):
        labels_of(task, {"": backbone})


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> tuple[AnswerTask, Backbone, Answers]:
    folder = tmp_path_factory.mktemp("questions")
    task = load_any(write_vqa(folder), home=folder, say=_quiet)
    assert isinstance(task, AnswerTask)
    backbone = _load(save_clip_vil(folder / "clipvil"), folder, image_size=96)
    return task, backbone, Answers(task.score_name, labels_of(task, {"": backbone}), task.keys)


class _First(Body):
    """One vector per example, which the test chooses."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows
        self.width = rows.shape[1]

    def forward(self, batch: Batch) -> Tensor:
        return self.rows[batch.inputs["row"]]


class _Numbers:
    """Batches that say which examples they are."""

    views = 0

    def batches(self, batches: list[np.ndarray]) -> list[Batch]:
        return [
            Batch(torch.ones(len(rows), 1, dtype=torch.bool), inputs={"row": torch.from_numpy(rows)})
            for rows in batches
        ]


def test_labels_of_some_examples_are_theirs_in_their_order() -> None:
    labels = Labels(np.array([0, 2, 2, 3]), np.array([4, 1, 7]), np.array([0.5, 1, 0.25], dtype=np.float32))
    some = labels.of(np.array([2, 1, 0, 2]))
    assert some.offsets.tolist() == [0, 1, 1, 3, 4]
    assert some.classes.tolist() == [7, 4, 1, 7]
    assert some.scores.tolist() == [0.25, 0.5, 1, 0.25]


def test_the_pooler_is_the_checkpoints(questions: tuple[AnswerTask, Backbone, Answers]) -> None:
    _, backbone, goal = questions
    learner: Any = goal.learner({"": Tower(_First(torch.zeros(1, backbone.arch.width)), 0)})
    held = backbone.module.state_dict()
    assert torch.equal(learner.head.weight, held["pooler.weight"])
    assert torch.equal(learner.head.bias, held["pooler.bias"])


def test_each_answer_scores_what_its_label_gives_and_what_people_said(
    questions: tuple[AnswerTask, Backbone, Answers],
) -> None:
    """Every question is answered by the first of its labels, and one by none of them."""
    task, _, goal = questions
    count, answers = len(task.examples), len(task.answers)
    said = np.array([task.labels.classes[start] for start in task.labels.offsets[:-1]])
    tested = np.flatnonzero(np.array(task.parts) == "test")
    wrong = int(tested[0])
    given = task.labels.classes[task.labels.offsets[wrong] : task.labels.offsets[wrong + 1]]
    said[wrong] = next(answer for answer in range(answers) if answer not in given)
    logits = torch.nn.functional.one_hot(torch.from_numpy(said), answers).float()
    learner: Any = goal.learner({"": Tower(_First(torch.zeros(1, len(goal.arrays["pooler_weight"]))), 0)})
    learner.body, learner.head = _First(logits), torch.nn.Identity()
    learner.pooling = "mean"
    found = goal.test(learner, _Numbers(), torch.arange(count), tested, SETTINGS)  # type: ignore[arg-type]
    wanted = [0.0 if i == wrong else float(task.labels.scores[task.labels.offsets[i]]) for i in tested]
    assert found.arrays["contributions"].tolist() == pytest.approx(wanted)
    assert found.figures["soft accuracy"] == found.score == pytest.approx(np.mean(wanted))
    # As the fixture has it, ten, three or one of the ten gave what scores 1, 0.9 or 0.3: so they are scored by people.
    assert found.figures["official VQA accuracy"] == pytest.approx(np.mean(wanted))
