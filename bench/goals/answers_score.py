"""How right answers to questions are: VQA's soft accuracy in both definitions, GQA's accuracy, and submission files.

By labels (as LXMERT's files have them, arXiv 1908.07490): an answer scores what the question's label gives it, and 0
where it is not in there. GQA's accuracy is the same with labels of one answer that counts 1: no code of its own.

By people (Antol et al. ICCV 2015, arXiv 1505.00468; visualqa.org/evaluation): min(how many of nine gave it / 3, 1),
averaged over the ten ways of leaving one person out, all answers normalised as published. The script that was released
with the data normalises what people said less (their punctuation alone, and only where they differ); files of VQA v2
hold it nearly normalised already.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import SidebenchError
from ...cache.store import Index
from ..tasks.base import Answers
from ..tasks.score import Numbers

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # neither the apostrophe nor the colon of a time; the period has its own rule
_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED.split())}
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_REPAIRED = {  # one apostrophe is missing; not those that are a word without it, like we'll
    word[: at.start()] + word[at.end() :]: word for word in _CONTRACTIONS.split() for at in re.finditer("'", word)
}


def label_scores(predicted: Index, labels: Answers) -> Numbers:
    """(N,) what the labels give the answers `predicted` (N,), indices into the vocabulary."""
    row = np.repeat(np.arange(len(predicted)), np.diff(labels.offsets))
    given = np.where(labels.classes == predicted[row], labels.scores.astype(np.float64), 0)
    return np.bincount(row, weights=given, minlength=len(predicted)).astype(np.float64)


def contributions(logits: NDArray[np.floating[Any]], labels: Answers) -> Numbers:
    """(N,) what the labels give the answer of the largest logit (N, K); nothing where a logit is no number."""
    return np.where(np.isnan(logits).any(1), 0, label_scores(logits.argmax(1), labels))


def official_scores(answers: Sequence[str], people: Sequence[Sequence[str]]) -> Numbers:
    """(N,) VQA's accuracy of each answer, given what (ten) people answered. Raises SidebenchError where none did."""
    return np.array([_official(answer, given) for answer, given in zip(answers, people, strict=True)], dtype=np.float64)


def _official(answer: str, people: Sequence[str]) -> float:
    if not people:
        raise SidebenchError("a question without people's answers cannot be scored by them; is it of the test part?")
    found = [normalised(given) for given in people].count(normalised(answer))
    # Leaving out one of those who agree leaves one fewer.
    left = found * min((found - 1) / 3, 1.0) + (len(people) - found) * min(found / 3, 1.0)
    return left / len(people)


@lru_cache(100_000)
def normalised(answer: str) -> str:
    """An answer in lower case, without punctuation and articles, with digits for numbers, and mended contractions.

    A mark becomes a space, or nothing where one of its kind stands next to a space; and nothing, too, where a comma
    stands between digits (100,978). Periods go, but not those before a digit.
    """
    text = " ".join(answer.split())
    grouped = re.search(r"\d,\d", text)
    gone = {mark for mark in _PUNCTUATION if grouped or f" {mark}" in text or f"{mark} " in text}
    text = text.translate({ord(mark): "" if mark in gone else " " for mark in _PUNCTUATION})
    words = re.sub(r"\.(?!\d)", "", text).lower().split()
    digits = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_REPAIRED.get(word, word) for word in digits if word not in _ARTICLES)


def submission(
    question_ids: Sequence[int | str], answers: Sequence[str], keys: tuple[str, str]
) -> list[dict[str, int | str]]:
    """What the official server takes: an object with these two keys per question."""
    question, answer = keys
    return [{question: i, answer: said} for i, said in zip(question_ids, answers, strict=True)]
