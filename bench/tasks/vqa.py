"""VQA v2 (Goyal et al., CVPR 2017, arXiv 1612.00837) in the files of LXMERT, which CLIP-ViL and UniPT take over.

They train on train + nominival and select on minival, of which the literature reports what is not from the server. Here
minival is the test part and so selects nothing: a tenth of nominival's images validates.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...cache.errors import SidebenchError, unknown
from ...cache.uri import Uri
from .answers import LONGEST_ANSWER, Format, Label, Question, answer_task, read_questions, read_vocabulary
from .base import AnswerTask
from .image_text import carved, said_overlap
from .json_fields import Item, items_of, read_json
from .score import SOFT_ACCURACY

_SOURCE = "LXMERT's files of VQA v2 (lxmert_data/vqa; the two trainval_ files are in its repository, data/vqa)"
_IMAGES = "COCO's train2014.zip, val2014.zip and test2015.zip"
_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
_ANNOTATIONS_SOURCE = "v2_Annotations_Val_mscoco.zip of visualqa.org"
_PARTS = {"train": "train", "nominival": "train", "minival": "test"}
_PEOPLE = 10


def load_vqa(uri: Uri, root: Path, *, home: Path, limit: int | None, say: Callable[[str], None]) -> AnswerTask:
    """VQA v2 below `root`, which holds data/vqa and data/mscoco, or vqa and mscoco.

    With ?submit=test the questions of test.json are among the examples, for the server to score. Raises SidebenchError
    for any field that is not as published.
    """
    if uri.path != "v2":
        raise unknown("VQA", uri.path, ("v2",))
    data = root / "data" if (root / "data").is_dir() else root
    folder = data / "vqa"
    vocabulary = read_vocabulary(folder, _SOURCE)
    form = Format(_SOURCE, re.compile(r"COCO_(?:train2014|val2014|test2015)_[0-9]{12}"), True, _label)
    files = {name: read_questions(folder / f"{name}.json", form, vocabulary) for name in _PARTS}
    if wants_submission(uri):
        files["test"] = read_questions(folder / "test.json", form, vocabulary, labelled=False)
    questions = [question for file in files.values() for question in file]
    parts = _parts(files)
    said_overlap(parts, [question.image for question in questions], say)
    annotations = folder / _ANNOTATIONS
    if not annotations.is_file():
        say(
            f"there is no file {annotations} ({_ANNOTATIONS_SOURCE}): scores are those of LXMERT's labels, without "
            "the official mean over ten annotators."
        )
    return answer_task(
        uri.text,
        questions,
        parts,
        vocabulary,
        path_of=lambda image: data / "mscoco" / image.split("_")[1] / f"{image}.jpg",
        images_source=_IMAGES,
        home=home,
        limit=limit,
        score_name=SOFT_ACCURACY,
        annotations=annotations if annotations.is_file() else None,
    )


def wants_submission(uri: Uri) -> bool:
    """Whether the official test questions, whose answers are not public, are asked for."""
    asked = uri.options.get("submit")
    if asked not in (None, "test"):
        raise unknown("part to submit", asked, ("test",))
    return asked is not None


def _parts(files: Mapping[str, Sequence[Question]]) -> list[str]:
    validates = carved([question.image for question in files["nominival"]], "vqa2 validation")
    return [
        "val" if name == "nominival" and question.image in validates else _PARTS.get(name, "submit")
        for name, file in files.items()
        for question in file
    ]


def _label(item: Item, scores: Mapping[str, float], vocabulary: Mapping[str, int]) -> Label:
    """Soft labels of a question; LXMERT's files hold answers of the vocabulary only, of some questions none."""
    for answer in scores:
        if answer not in vocabulary:
            raise item.refused("label", f"answers of trainval_ans2label.json, which {answer[:40]!r} is not")
    return tuple((vocabulary[answer], float(score)) for answer, score in scores.items())


def read_annotations(path: Path, question_ids: Sequence[int]) -> tuple[tuple[str, ...], ...]:
    """What ten people answered to each of the questions, as they wrote it, from the official annotations."""
    document = read_json(path, _ANNOTATIONS_SOURCE)
    values = document.get("annotations") if isinstance(document, dict) else None
    wanted = set(question_ids)
    found: dict[int, tuple[str, ...]] = {}
    for item in items_of(path, "annotations", values):
        question_id = item.whole("question_id")
        if question_id in wanted:
            found[question_id] = _ten_answers(item)
    for question_id in question_ids:
        if question_id not in found:
            raise SidebenchError(f"{path} has no question {question_id}; it comes with {_ANNOTATIONS_SOURCE}.")
    return tuple(found[question_id] for question_id in question_ids)


def _ten_answers(item: Item) -> tuple[str, ...]:
    given = item.fields.get("answers")
    answers = [one.get("answer") for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    texts = tuple(answer for answer in answers if isinstance(answer, str))
    if not isinstance(given, list) or not len(given) == len(texts) == _PEOPLE:
        raise item.refused("answers", f'{_PEOPLE} objects such as {{"answer": "yes"}}')
    if max(map(len, texts)) > LONGEST_ANSWER:
        raise item.refused("answers", f"answers of at most {LONGEST_ANSWER} characters")
    return texts
