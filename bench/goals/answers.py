"""Questions about images: one answer out of a vocabulary, trained on soft labels of several (VQA v2, GQA).

Besides the labels' score, VQA's official one is reported where ten people's answers of the test part are at hand, and
the questions of an official server are answered along (`Tested.submission`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...cache.errors import SidebenchError
from ...cache.store import Index
from ..learner import Learner, Source
from ..tasks.base import Answers as Labels
from ..training import Settings, autocast, predict
from .answer_head import AnswerHead, answer_loss, soft_targets
from .answers_score import contributions, official_scores, submission
from .base import Tested, Towers

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Answers:
    """See Goal. Targets are the examples' own numbers, by which labels are found.

    arrays: `offsets`, `classes`, `scores` (see tasks.base.Answers), `vocabulary` (K,); where they are there
    `question_ids` (N,), `submit` (S,) examples to be answered, `people` (P, 10) what people said on `people_of` (P,),
    and `pooler_weight`, `pooler_bias` of the backbone.
    """

    score_name: str
    arrays: Arrays
    keys: tuple[str, str] = ("question_id", "answer")  # of a submission

    @property
    def labels(self) -> Labels:
        """Of all examples."""
        return Labels(*(self.arrays[name] for name in ("offsets", "classes", "scores")))

    @property
    def count(self) -> int:
        """Of answers."""
        return len(self.arrays["vocabulary"])

    def learner(self, towers: Towers) -> nn.Module:
        """See Goal."""
        (tower,) = towers.values()
        pooler = None
        if "pooler_weight" in self.arrays:
            pooler = (torch.tensor(self.arrays["pooler_weight"]), torch.tensor(self.arrays["pooler_bias"]))
            if pooler[0].shape[1] != tower.body.width:
                raise SidebenchError(
                    f"the checkpoint's pooler reads width {pooler[0].shape[1]}, and the method yields "
                    f"{tower.body.width}; leave out the option that changes it."
                )
        head = AnswerHead(tower.body.width, self.count, pooler)
        return Learner(tower.body, self.count, "none", tower.prefix_tokens, head)

    def blank_targets(self, examples: int) -> Tensor:
        """See Goal."""
        return torch.zeros(examples, dtype=torch.int64)

    def items(self, index: Index, *, examples: int, views: int, seed: int, epoch: int) -> Index:
        """See Objective: the examples themselves."""
        return index

    def loss(self, learner: nn.Module, batch: Any, targets: Tensor, precision: str, epoch: int = 0) -> Tensor:
        """See Objective."""
        with autocast(targets.device, precision):
            logits = learner(batch)
        return answer_loss(logits.float(), self._wanted(targets))

    def score(self, learner: nn.Module, source: Source, targets: Tensor, index: Index, settings: Settings) -> float:
        """See Objective."""
        logits = predict(learner, source, index, settings).cpu().numpy()
        return float(contributions(logits, self.labels.of(targets.cpu().numpy()[index])).mean())

    def test(self, learner: nn.Module, source: Source, targets: Tensor, index: Index, settings: Settings) -> Tested:
        """See Goal. Kept: the answer (N,) of each question, by its number in the vocabulary, and what it scores."""
        logits = predict(learner, source, index, settings).cpu().numpy()
        added, answers = contributions(logits, self.labels.of(targets.cpu().numpy()[index])), logits.argmax(1)
        figures = {self.score_name: float(added.mean())}
        if "people" in self.arrays:
            figures["official VQA accuracy"] = self._official(index, answers)
        asked = self.arrays.get("submit", np.zeros(0, dtype=np.int64))
        submission = self._submission(asked, predict(learner, source, asked, settings)) if len(asked) else None
        return Tested(float(added.mean()), figures, index, {"contributions": added, "answers": answers}, submission)

    def _wanted(self, targets: Tensor) -> Tensor:
        if isinstance(targets, FakeTensor):  # of which no value is known, and none matters
            return torch.zeros(len(targets), self.count)
        return soft_targets(self.labels, targets.cpu().numpy(), self.count).to(targets.device)

    def _official(self, index: Index, answers: Index) -> float:
        """The mean over the questions that people answered."""
        row = {example: i for i, example in enumerate(index.tolist())}
        known = [(row[example], said) for example, said in zip(*self._people(), strict=True) if example in row]
        said = [str(self.arrays["vocabulary"][answers[i]]) for i, _ in known]
        return float(official_scores(said, [people for _, people in known]).mean())

    def _people(self) -> tuple[list[int], list[list[str]]]:
        return self.arrays["people_of"].tolist(), self.arrays["people"].tolist()

    def _submission(self, asked: Index, logits: Tensor) -> list[dict[str, int | str]]:
        said = self.arrays["vocabulary"][logits.argmax(1).cpu().numpy()].tolist()
        return submission(self.arrays["question_ids"][asked].tolist(), said, self.keys)
