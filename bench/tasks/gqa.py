"""GQA (Hudson and Manning, CVPR 2019, arXiv 1902.09506) in the files of LXMERT, which CLIP-ViL and UniPT take over.

They train on train + valid and select on testdev, which they report. Here testdev is the test part and so selects
nothing: a tenth of valid's images validates.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...cache.errors import SidebenchError, unknown
from ...cache.uri import Uri
from .answers import Format, Label, Question, answer_task, read_questions, read_vocabulary
from .base import AnswerTask
from .image_text import carved, said_overlap
from .json_fields import Item
from .score import EXACT_MATCH
from .vqa import wants_submission

_SOURCE = "LXMERT's files of GQA (lxmert_data/gqa; the two trainval_ files are in its repository, data/gqa)"
_IMAGES = "images.zip of GQA's own download (cs.stanford.edu/people/dorarad/gqa)"
KEYS = ("questionId", "prediction")  # of what GQA's server takes
_PARTS = {"train": "train", "valid": "train", "testdev": "test"}


def load_gqa(uri: Uri, root: Path, *, home: Path, limit: int | None, say: Callable[[str], None]) -> AnswerTask:
    """GQA below `root`, which holds data/gqa, or gqa.

    A question whose answer is not in the vocabulary is left out of training and counts as wrong elsewhere. With
    ?submit=test the questions of submit.json are among the examples, for the server to score. Raises SidebenchError for
    any field that is not as published.
    """
    if uri.path != "balanced":
        raise unknown("GQA", uri.path, ("balanced",))
    folder = (root / "data" if (root / "data").is_dir() else root) / "gqa"
    vocabulary = read_vocabulary(folder, _SOURCE)
    form = Format(_SOURCE, re.compile(r"[A-Za-z0-9]{1,40}"), False, _label)
    files = {name: read_questions(folder / f"{name}.json", form, vocabulary) for name in _PARTS}
    if wants_submission(uri):
        files["submit"] = read_questions(folder / "submit.json", form, vocabulary, labelled=False)
    validates = carved([question.image for question in files["valid"]], "gqa validation")
    placed = [
        ("val" if name == "valid" and question.image in validates else _PARTS.get(name, "submit"), question)
        for name, file in files.items()
        for question in file
    ]
    _say_unknown(placed, say)
    usable = [(part, question) for part, question in placed if part != "train" or question.label]
    parts, questions = [part for part, _ in usable], [question for _, question in usable]
    if "train" not in parts:
        raise SidebenchError(f"{folder}: no training question has an answer of trainval_ans2label.json.")
    said_overlap(parts, [question.image for question in questions], say)
    return answer_task(
        uri.text,
        questions,
        parts,
        vocabulary,
        path_of=lambda image: folder / "images" / f"{image}.jpg",
        images_source=_IMAGES,
        home=home,
        limit=limit,
        score_name=EXACT_MATCH,
        keys=KEYS,
    )


def _say_unknown(placed: Sequence[tuple[str, Question]], say: Callable[[str], None]) -> None:
    """Of each part, how many answers nobody can give; of "submit" no answer is published."""
    counts = Counter(part for part, question in placed if not question.label)
    if counts["train"]:
        say(f"{counts['train']} training questions have an answer outside the vocabulary and are left out.")
    for part in ("val", "test"):
        if counts[part]:
            say(f"{counts[part]} {part} questions have an answer outside the vocabulary and count as wrong.")


def _label(item: Item, scores: Mapping[str, float], vocabulary: Mapping[str, int]) -> Label:
    """The one answer of a question; nothing where the vocabulary lacks it."""
    if len(scores) != 1 or set(scores.values()) != {1}:
        raise item.refused("label", 'one answer that scores 1, such as {"yes": 1.0}')
    answer = next(iter(scores))
    return ((vocabulary[answer], 1.0),) if answer in vocabulary else ()
