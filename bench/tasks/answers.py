"""What VQA v2 and GQA share: questions in the files of LXMERT (arXiv 1908.07490), the vocabulary and soft labels."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...cache.errors import SidebenchError
from .base import Answers, AnswerTask
from .image_text import ImageTextExamples, image_files, kept, unique_ids
from .json_fields import Item, is_number, items_of, read_json

Label = tuple[tuple[int, float], ...]
"""Classes and what each scores."""


@dataclass(frozen=True)
class Format:
    """What differs between the two: what an image and a question are called, and what may be answered."""

    source: str  # of the question files
    image: re.Pattern[str]  # the whole of an img_id: a path is made of it
    numbered: bool  # question ids are whole numbers only, as the server wants them
    label: Callable[[Item, Mapping[str, float], Mapping[str, int]], Label]  # (question, its scores, vocabulary)


class Question(NamedTuple):
    """A question of a file; `label` is empty where no known answer is right, or none is published."""

    id: str  # file and question id
    question_id: int | str
    image: str
    text: str
    label: Label


LONGEST_ANSWER = 1000  # characters; arrays of texts give every one the room of the longest


def read_vocabulary(folder: Path, source: str) -> dict[str, int]:
    """Class of each answer, in order of the classes, from the two files that say it and must agree."""
    ordered_path, index_path = folder / "trainval_label2ans.json", folder / "trainval_ans2label.json"
    ordered, index = read_json(ordered_path, source), read_json(index_path, source)
    if not isinstance(ordered, list) or not ordered or not all(isinstance(answer, str) for answer in ordered):
        raise SidebenchError(f'{ordered_path} is no list of answers such as ["yes", "no"].')
    if longest := next((answer for answer in ordered if len(answer) > LONGEST_ANSWER), None):
        raise SidebenchError(f"{ordered_path} has an answer of {len(longest):,} characters; at most {LONGEST_ANSWER}.")
    vocabulary = {answer: label for label, answer in enumerate(ordered)}
    if len(vocabulary) < len(ordered):
        twice = next(answer for label, answer in enumerate(ordered) if vocabulary[answer] != label)
        raise SidebenchError(f"{ordered_path} lists the answer {twice!r} twice; answers must differ.")
    if index != vocabulary or any(isinstance(label, bool) for label in index.values()):
        raise SidebenchError(
            f"{index_path} does not give every answer of {ordered_path.name} its place there; take both from {source}."
        )
    return vocabulary


def read_questions(path: Path, form: Format, vocabulary: Mapping[str, int], *, labelled: bool = True) -> list[Question]:
    """The questions of a file in its order; the labels of one that is only answered (`labelled` false) are not read."""
    items, stem = items_of(path, "questions", read_json(path, form.source)), path.stem
    return [_question(item, stem, form, vocabulary, labelled) for item in items]


def _question(item: Item, stem: str, form: Format, vocabulary: Mapping[str, int], labelled: bool) -> Question:
    question_id = item.whole("question_id") if form.numbered else item.identifier("question_id")
    image = item.text("img_id")
    if not form.image.fullmatch(image):
        raise item.refused("img_id", f"an image's name of the form {form.image.pattern}")
    label = form.label(item, _scores(item), vocabulary) if labelled else ()
    return Question(f"{stem}-{question_id}", question_id, image, item.text("sent"), label)


def _scores(item: Item) -> Mapping[str, float]:
    """What each answer of a question scores, as its file says."""
    found = item.fields.get("label")
    if not isinstance(found, dict) or not all(is_number(score) and 0 <= score <= 1 for score in found.values()):
        raise item.refused("label", 'an object of answers and their scores from 0 to 1, such as {"yes": 1}')
    return found


def answer_task(
    uri: str,
    questions: Sequence[Question],
    parts: Sequence[str],
    vocabulary: Mapping[str, int],
    *,
    path_of: Callable[[str], Path],
    images_source: str,
    home: Path,
    limit: int | None,
    score_name: str,
    annotations: Path | None = None,
    keys: tuple[str, str] = AnswerTask.keys,
) -> AnswerTask:
    """The task of these questions, or of as many as `--limit` leaves; `path_of`: where an image is."""
    unique_ids([question.id for question in questions], uri)
    index = kept([question.id for question in questions], parts, limit, uri)
    chosen = [questions[i] for i in index]
    labels = soft_labels([question.label for question in chosen])
    examples = ImageTextExamples(
        tuple(question.id for question in chosen),
        tuple(question.text for question in chosen),
        image_files([question.image for question in chosen], path_of, images_source),
        home / "hashes.json",
        _labels_sha256(tuple(vocabulary), labels),
    )
    return AnswerTask(
        uri,
        examples,
        tuple(vocabulary),
        labels,
        tuple(question.question_id for question in chosen),
        tuple(parts[i] for i in index),
        score_name,
        annotations,
        keys,
    )


def soft_labels(labels: Sequence[Label]) -> Answers:
    """Sparse soft labels of examples, each an own number of classes and scores."""
    pairs = [pair for label in labels for pair in label]
    return Answers(
        np.array([0, *accumulate(map(len, labels))], dtype=np.int64),
        np.array([answer for answer, _ in pairs], dtype=np.int64),
        np.array([score for _, score in pairs], dtype=np.float32),
    )


def _labels_sha256(answers: tuple[str, ...], labels: Answers) -> str:
    total = sha256(json.dumps(answers).encode())
    for column in (labels.offsets.astype("<i8"), labels.classes.astype("<i8"), labels.scores.astype("<f4")):
        total.update(column.tobytes())
    return total.hexdigest()
