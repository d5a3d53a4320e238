"""Retrieval both ways: captions and what they describe become directions in one space, and the nearest are found.

The head of each stream is a linear map to the width of the space, only where the method yields another width, and a
pooling of tokens: their mean, the class token, or VSE-infinity's learnt pooling (methods.md 1.3).

Losses. contrastive: symmetric cross-entropy over the batch, as CLIP's with its logit scale frozen (methods.md 1.5).
triplet: margin 0.2, over all negatives of the batch in the first epoch, then the hardest (VSE++, methods.md 1.10). In
both a caption of the same item is no negative: ours.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...cache.feed import batches_of
from ...cache.pair import STREAMS
from ...cache.store import Index
from ..learner import Learner, Source
from ..tasks.base import PairLoss
from ..towers import PairBatch, PairSource
from ..towers import Towers as Learners
from ..training import Settings, autocast
from .base import Tested, Tower, Towers
from .ranks import Ranks, ranks_of

LOGIT_SCALE = 100.0  # CLIP's after its training, where it is clipped
MARGIN = 0.2


@dataclass(frozen=True)
class Pairs:
    """See Goal. width: E of the space; folds: the test part is searched in so many; video: figures are a video's."""

    width: int
    pooling: Literal["mean", "cls", "gpo"]
    loss_name: PairLoss = "contrastive"
    folds: int = 1
    video: bool = False

    def learner(self, towers: Towers) -> nn.Module:
        """See Goal."""
        visual, text = (self._tower(towers[stream]) for stream in STREAMS)
        return Learners(visual, text)

    def _tower(self, tower: Tower) -> Learner:
        width = tower.body.width
        project: nn.Module = nn.Identity() if width == self.width else nn.Linear(width, self.width)
        if self.pooling == "gpo":
            from .gpo import GPO

            return Learner(tower.body, self.width, "none", tower.prefix_tokens, PooledHead(project, GPO()))
        return Learner(tower.body, self.width, self.pooling, tower.prefix_tokens, project)

    def blank_targets(self, examples: int) -> Tensor:
        """See Goal: every caption describes an item of its own."""
        return torch.arange(examples)

    def items(self, index: Index, *, examples: int, views: int, seed: int, epoch: int) -> Index:
        """See Objective: the captions themselves."""
        return index

    def loss(self, learner: nn.Module, batch: PairBatch, targets: Tensor, precision: str, epoch: int = 0) -> Tensor:
        """See Objective. targets: (B,) the item that each caption describes."""
        with autocast(targets.device, precision):
            visual, text = learner(batch)
        alike = visual.float() @ text.float().T  # (B, B)
        same = (targets[:, None] == targets) & ~torch.eye(len(targets), dtype=torch.bool, device=targets.device)
        return contrastive(alike, same) if self.loss_name == "contrastive" else triplet(alike, same, hardest=epoch > 0)

    def score(self, learner: nn.Module, source: Source, targets: Tensor, index: Index, settings: Settings) -> float:
        """See Objective: Rsum, searching among all of `index` whatever the folds of the test part."""
        return self._ranks(learner, source, targets, index, settings, folds=1)[0].rsum

    def test(self, learner: nn.Module, source: Source, targets: Tensor, index: Index, settings: Settings) -> Tested:
        """See Goal. Kept: rank of every item among captions and, in the order of `index`, of its captions among items.

        0 is found first.
        """
        ranks, items = self._ranks(learner, source, targets, index, settings, folds=self.folds)
        arrays = {
            "contributions": ranks.contributions(),
            "item_ranks": ranks.items,
            "caption_ranks": ranks.captions,
            "caption_items": ranks.owner,
        }
        figures = ranks.figures()
        return Tested(ranks.rsum, figures, items, arrays)

    def _ranks(
        self, learner: nn.Module, source: Source, targets: Tensor, index: Index, settings: Settings, *, folds: int
    ) -> tuple[Ranks, Index]:
        """The ranks of the captions of `index` and of the items they describe, and which items those are."""
        assert isinstance(learner, Learners)
        assert isinstance(source, PairSource)
        items, owner = np.unique(targets.cpu().numpy()[index], return_inverse=True)
        learner.eval()
        visual, text = [], []
        with torch.inference_mode(), autocast(targets.device, settings.precision):
            for batch, frames in source.visual_batches(batches_of(items, settings.batch_size)):
                visual.append(learner.embed_visual(batch, frames).float())
            for batch in source.text.batches(batches_of(index, settings.batch_size)):
                text.append(learner.embed_text(batch).float())
        visual_rows, text_rows = (torch.cat(found).cpu().numpy() for found in (visual, text))
        return ranks_of(visual_rows, text_rows, owner, folds=folds, video=self.video), items


class PooledHead(nn.Module):
    """Tokens (B, T, D) and their mask to a vector (B, E): each projected, then pooled; a vector (B, D) projected."""

    def __init__(self, project: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.project = project
        self.pool = pool

    def forward(self, out: Tensor, mask: Tensor) -> Tensor:
        """See the class."""
        found = self.project(out)
        return found if found.ndim == 2 else self.pool(found, mask)


def contrastive(alike: Tensor, same: Tensor) -> Tensor:
    """Mean of both directions' cross-entropies of cosines (B, B), the diagonal being right; `same` are no negatives."""
    logits = (LOGIT_SCALE * alike).masked_fill(same, float("-inf"))
    right = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, right) + functional.cross_entropy(logits.T, right)) / 2


def triplet(alike: Tensor, same: Tensor, *, hardest: bool) -> Tensor:
    """Sum over the batch and both directions of max(0, margin + wrong - right), over all wrong ones or the hardest."""
    right = alike.diagonal()
    left_out = same | torch.eye(len(alike), dtype=torch.bool, device=alike.device)
    by_item = (MARGIN + alike - right[:, None]).clamp(min=0).masked_fill(left_out, 0)
    by_caption = (MARGIN + alike - right).clamp(min=0).masked_fill(left_out, 0)
    if hardest:
        return by_item.amax(1).sum() + by_caption.amax(0).sum()
    return by_item.sum() + by_caption.sum()
