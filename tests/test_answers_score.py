"""VQA's two soft accuracies and the submission files, against loops over labels and people."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidebench.bench.goals.answers_score import (
    contributions,
    label_scores,
    normalised,
    official_scores,
    submission,
)
from sidebench.bench.tasks.base import Answers, AnswerTask
from sidebench.bench.tasks.gqa import KEYS
from sidebench.cache.errors import SidebenchError

VOCABULARY = 6
labels_of_questions = st.lists(
    st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([0.3, 0.6, 0.9, 1.0])), min_size=1, max_size=8
)


def _sparse(labels: list[dict[int, float]]) -> Answers:
    offsets = np.cumsum([0, *map(len, labels)])
    classes = np.array([answer for label in labels for answer in label], dtype=np.int64)
    return Answers(offsets, classes, np.array([s for label in labels for s in label.values()], dtype=np.float32))


@given(labels_of_questions, st.data())
def test_an_answer_scores_what_its_label_gives_it(labels: list[dict[int, float]], data: st.DataObject) -> None:
    predicted = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=len(labels), max_size=len(labels)))
    naive = [label.get(answer, 0.0) for label, answer in zip(labels, predicted, strict=True)]
    assert label_scores(np.array(predicted), _sparse(labels)) == pytest.approx(naive, abs=1e-7)
    logits = np.eye(VOCABULARY, dtype=np.float32)[predicted] - 3
    assert contributions(logits, _sparse(labels)) == pytest.approx(naive, abs=1e-7)


def test_one_answer_that_counts_one_is_exact_match() -> None:
    answers = np.array([2, 0, 1, 1])
    labels = Answers(np.array([0, 1, 2, 3, 3]), np.array([2, 1, 1]), np.ones(3, dtype=np.float32))
    assert label_scores(answers, labels).tolist() == [1, 0, 1, 0]  # the last one's answer is not in the vocabulary


def test_logits_that_are_no_number_answer_nothing() -> None:
    labels = _sparse([{0: 1.0}, {0: 1.0}])
    assert contributions(np.array([[np.nan, np.nan], [1.0, 0.0]]), labels).tolist() == [0, 1]


def _naive_official(answer: str, people: list[str]) -> float:
    total = 0.0
    for out in range(len(people)):
        others = [said for i, said in enumerate(people) if i != out]
        total += min(sum(said == answer for said in others) / 3, 1)
    return total / len(people)


words = st.sampled_from(["red", "blue", "left", "2"])


@given(words, st.lists(words, min_size=1, max_size=12))
def test_people_are_left_out_one_by_one(answer: str, people: list[str]) -> None:
    found = official_scores([answer, answer], [people, sorted(people)])
    assert found == pytest.approx([_naive_official(answer, people)] * 2, abs=1e-12)


def test_three_of_ten_are_a_little_short_of_all() -> None:
    people = [["yes"] * agreeing + ["no"] * (10 - agreeing) for agreeing in (0, 1, 2, 3, 4, 10)]
    assert official_scores(["yes"] * 6, people) == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("The Dog", "dog"),
        ("a cat and an owl", "cat and owl"),
        ("two", "2"),
        ("None", "0"),
        ("ten thousand", "10 thousand"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("girl's", "girl's"),
        ("well", "well"),
        ("2:30 pm", "2:30 pm"),
        ("100,978", "100978"),
        ("1,000-2,000", "10002000"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt red"),
        ("t-shirt -red", "tshirt red"),
        ("t-shirt- red", "tshirt red"),
        ("t-shirt-\nred", "tshirt red"),
        (" -red-hot", "red hot"),
        ("yes!", "yes"),
        ("3.5", "3.5"),
        ("u.s.a.", "usa"),
        ("at\nthe\ttable ", "at table"),
        ("black/white", "black white"),
        ("what?!", "what"),
    ],
)
def test_answers_are_normalised_as_published(answer: str, same: str) -> None:
    assert normalised(answer) == same


def test_both_sides_are_normalised_before_they_are_compared() -> None:
    people = ["t shirt"] + ["A t-shirt!"] * 2 + ["hat"] * 7
    assert official_scores(["the T-Shirt"], [people]) == pytest.approx([0.9])


def test_a_question_that_nobody_answered_is_refused() -> None:
    with pytest.raises(SidebenchError, match="without people's answers"):
        official_scores(["yes"], [[]])


def test_submissions_are_what_the_servers_take() -> None:
    assert submission([262148000, 3], ["yes", "t-shirt"], AnswerTask.keys) == [
        {"question_id": 262148000, "answer": "yes"},
        {"question_id": 3, "answer": "t-shirt"},
    ]
    assert submission(["201307251"], ["left"], KEYS) == [{"questionId": "201307251", "prediction": "left"}]
