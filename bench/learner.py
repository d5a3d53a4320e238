"""A method and the task's head as one module, and where its batches come from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters._base import Batch, Body
from ..cache.backbone import Backbone
from ..cache.examples import Examples
from ..cache.feed import activation_batches, ahead
from ..cache.joint import JointPreprocess
from ..cache.pooling import masked_mean, pooling_mask
from ..cache.preprocess import Prepared, bytes_of
from ..cache.store import Index, Store
from ..cache.views import prepare_items
from .tasks.base import Pooling

_PREPARED_IN_RAM_BYTES = 2 * 2**30  # inputs of live methods are prepared once when they fit into this


class Learner(nn.Module):
    """Body, the task's pooling, the task's head. The pooling and the head are the same for every method."""

    def __init__(
        self, body: Body, num_outputs: int, pooling: Pooling, prefix_tokens: int, head: nn.Module | None = None
    ) -> None:
        """`head`: another than a linear one; with pooling "none" it takes the tokens and their mask."""
        super().__init__()
        self.body = body
        self.head: nn.Module = nn.Linear(body.width, num_outputs) if head is None else head
        self.pooling = pooling
        self.prefix_tokens = prefix_tokens

    def forward(self, batch: Batch) -> Tensor:
        """Outputs (B, K): of a classification logits."""
        out = self.body(batch)
        if self.pooling == "none":
            return self.head(out, batch.mask)
        if out.ndim == 3 and self.pooling == "cls":
            out = out[:, 0]
        elif out.ndim == 3:
            out = masked_mean(out, pooling_mask(batch.mask, self.prefix_tokens))
        return self.head(out)


class Source(Protocol):
    """Where a run's batches come from, of what its learner takes.

    Items beyond the examples are views of them (see cache.views).
    """

    @property
    def views(self) -> int:
        """Augmented views of each example, to be trained on in its place; 0: the example itself."""
        ...

    def batches(self, batches: Sequence[Index]) -> Iterator[Any]:
        """The batches of these items, in order, on the run's device."""
        ...

    def lengths(self) -> Index:
        """(items,) tokens (or pixels) per item: what decides which batch is the longest."""
        ...


@dataclass(frozen=True)
class CachedSource:
    """Activations from a store; no raw data. `entering`: the layer that enters the blocks of a prefix method."""

    store: Store
    layers: tuple[str, ...]
    device: torch.device
    tokens: Index
    views: int = 0
    entering: str | None = None

    def batches(self, batches: Sequence[Index]) -> Iterator[Batch]:
        """See Source."""
        for _, activations in activation_batches(self.store, batches, self.layers):
            moved = activations.to(self.device)
            batch = Batch(mask=moved.mask, activations=moved.layers, masks=moved.masks)
            yield batch if self.entering is None else batch.entering(self.entering)

    def lengths(self) -> Index:
        """See Source."""
        return self.tokens


class LiveSource:
    """Inputs of the backbone. Prepared (tokenised, resized) once if they fit into RAM, else batch by batch."""

    def __init__(
        self,
        backbone: Backbone,
        examples: Examples,
        *,
        views: int = 0,
        view_seed: int | None = None,
        prepared: Sequence[Prepared] | None = None,
    ) -> None:
        """prepared: what another source of the same facts has under that name."""
        self.views = views
        self._view_seed = view_seed
        self._preprocess = backbone.preprocess
        self._examples = examples
        items = len(examples) * (1 + views)
        self.device = backbone.device
        self._tokens = backbone.shapes([backbone.final_layer])[backbone.final_layer][0]  # None: as many as the text's
        self.prepared = prepared  # None: batch by batch
        if prepared is None:
            fits = bytes_of(self._prepare([0])[0]) * items <= _PREPARED_IN_RAM_BYTES
            self.prepared = self._prepare(range(items)) if fits or examples.modality == "text" else None

    def batches(self, batches: Sequence[Index]) -> Iterator[Batch]:
        """See Source."""
        for inputs, mask in ahead(batches, self._collate):
            moved = {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}
            yield Batch(mask=mask.to(self.device, non_blocking=True), inputs=moved)

    def lengths(self) -> Index:
        """See Source."""
        if isinstance(self._preprocess, JointPreprocess):
            return self._preprocess.token_counts(self._examples)
        if self.prepared is None or self._examples.modality == "image":
            return np.full(len(self._examples) * (1 + self.views), self._tokens or 1, dtype=np.int64)
        return np.array([len(ids) for ids in self.prepared], dtype=np.int64)

    def _prepare(self, indices: Sequence[int]) -> Sequence[Prepared]:
        return prepare_items(self._preprocess, self._examples, indices, self._view_seed)

    def _collate(self, index: Index) -> tuple[dict[str, Tensor], Tensor]:
        prepared = self._prepare(index.tolist()) if self.prepared is None else [self.prepared[i] for i in index]
        inputs, mask = self._preprocess.collate(prepared)
        if self._tokens is not None:
            return inputs, torch.ones((len(index), self._tokens), dtype=torch.bool)
        assert mask is not None
        return inputs, mask


def longest_batch(examples: Index, lengths: Index, batch_size: int) -> Index:
    """The batch that memory is measured on, the same for every method and seed: the longest examples and the shortest.

    With the shortest one in it a text batch holds a padded row, so that no attention kernel is spared its mask.
    """
    order = examples[np.argsort(lengths[examples], kind="stable")]
    longest = order[-batch_size:]
    return longest if len(longest) == 1 else np.concatenate([order[:1], longest[1:]])
