"""DTL: Disentangled Transfer Learning for Visual Recognition.
Fu, Zhu, Wu. AAAI 2024, arXiv 2312.07856.

Beside the backbone a side state sums up low-rank maps of what enters each block; behind each of the last W blocks it is
added to the stream through a smooth ReLU. DTL+ runs what is added through one depth-wise convolution over the patches.

    e_i = e_(i-1) + B_i A_i x_i;  x_(i+1) = Block_i(x_i) + theta(e_i), the last W blocks;  theta(e) = e sigmoid(beta e)

A (r x D) starts as Kaiming's, B at zero, so training starts at the frozen function. The convolution (3 x 3, zero
padding, no bias) is one for all blocks; the class token is added past it. Up to the first written block all states are
frozen, so they are read from the cache; the W - 1 blocks behind it are held and trained through. What follows is the
task's, as for every method: its pooling (DTL's is the mean of the patches) and no drop-path (0.1 in DTL on VTAB-1k).

Cached: what enters the blocks up to the first written one, and its output: 7 states and one more of 12 blocks.
Trained: 2 L r D [+ 9 D, DTL+]: 36,864 [43,776] at ViT-B.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..cache.architecture import Architecture
from ..cache.errors import SidebenchError
from ..cache.suffix import ENTERING, MASK, Suffix
from ._base import BackboneBody, Batch, Body, PrefixMethod, TrainingConfig, option
from ._live import lacks_blocks
from ._recompute import recomputed


@dataclass(frozen=True)
class Config(TrainingConfig):
    """DTL's options."""

    lr: float = option(8e-3, "peak learning rate (DTL's code, most often: it picks 1e-4 to 1e-2 per data set)")
    weight_decay: float = option(0.05, "AdamW's weight decay (DTL's code)")
    rank: int = option(2, "r: rank of each block's map (2 in DTL's code)")
    beta: float = option(100.0, "beta of theta, which is nearly a ReLU (100 in DTL's code)")
    write_back: int = option(
        0,
        "W: behind how many of the last blocks the side state is added; 0: half of them (6 of 12 in the paper; ours: 2 "
        "at least), and the last W - 1 are in memory",
    )
    plus: bool = option(False, "true: DTL+, a depth-wise 3 x 3 convolution over the patches of what is added")


class DTL(PrefixMethod):
    """Low-rank maps of every block's input, summed beside the backbone and added to its last blocks' outputs."""

    Config: ClassVar[type] = Config
    paper = "DTL, AAAI 2024, arXiv 2312.07856"

    def refusal(self, arch: Architecture) -> str | None:
        """It needs two attention blocks, and DTL+ patches."""
        config = self.config
        if config.rank < 1 or config.beta <= 0:
            return f"a rank of {config.rank} with beta {config.beta:g} adds nothing"
        if arch.blocks < 2:
            return f"it trains through blocks behind one that it writes to, and {arch.name} has {arch.blocks} blocks"
        if not 2 <= self._written(arch) <= arch.blocks:
            return f"dtl.write_back={config.write_back} is neither 0 nor 2 to the {arch.blocks} blocks of {arch.name}"
        if config.plus and arch.modality != "image":
            return f"DTL+ convolves the patches of an image, and {arch.name} reads texts; leave dtl.plus at false"
        return lacks_blocks(arch)

    def first_block(self, arch: Architecture) -> int:
        """See PrefixMethod: the one behind the first that is written to."""
        return arch.blocks - self._written(arch) + 1

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """What enters each block from 0 to the first held one."""
        return arch.states[: self.first_block(arch) + 1]

    def build(self, suffix: Suffix) -> Body:
        """See PrefixMethod. Raises SidebenchError for DTL+ on patches that lie in no square."""
        config, arch = self.config, suffix.arch
        side = CompactSide(arch.blocks, arch.width, config.rank, config.beta)
        if config.plus:
            patches = suffix.dummy()[ENTERING].shape[1] - arch.prefix_tokens
            if patches < 1 or math.isqrt(patches) ** 2 != patches:
                raise SidebenchError(
                    f"DTL+ convolves a square of patches, and {arch.name} has {patches}; leave dtl.plus at false."
                )
            side = ConvolvedSide(side, arch.prefix_tokens)
        return WrittenBack(suffix, side)

    def _written(self, arch: Architecture) -> int:
        return int(self.config.write_back) or max(arch.blocks // 2, 2)


class CompactSide(nn.Module):
    """The low-rank maps of all blocks, and what their sum adds to the stream."""

    def __init__(self, blocks: int, width: int, rank: int, beta: float) -> None:
        super().__init__()
        self.beta = beta
        bound = width**-0.5  # Kaiming's for fan-in D and a = sqrt(5)
        self.down = nn.Parameter(torch.empty(blocks, rank, width).uniform_(-bound, bound))  # A
        self.up = nn.Parameter(torch.zeros(blocks, rank, width))  # B, transposed

    def note(self, block: int, x: Tensor) -> Tensor:
        """A_i x_i (B, T, r): all that is kept of what enters a block."""
        return functional.linear(x, self.down[block])

    def added(self, *notes: Tensor) -> Tensor:
        """theta(e_i) (B, T, D) from the notes of blocks 0 … i."""
        state = torch.cat(notes, -1) @ self.up[: len(notes)].flatten(0, 1)
        return functional.silu(self.beta * state) / self.beta


class ConvolvedSide(CompactSide):
    """The same of DTL+: behind theta the patches are convolved, row by row in a square after the prefix tokens."""

    def __init__(self, side: CompactSide, prefix_tokens: int) -> None:
        nn.Module.__init__(self)
        self.beta, self.down, self.up = side.beta, side.down, side.up
        self.prefix_tokens = prefix_tokens
        width = side.up.shape[-1]
        self.convolution = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)

    def added(self, *notes: Tensor) -> Tensor:
        """See CompactSide."""
        prefix, patches = super().added(*notes).tensor_split([self.prefix_tokens], dim=1)
        square = patches.mT.unflatten(2, (math.isqrt(patches.shape[1]), -1))  # (B, D, H, W)
        return torch.cat([prefix, self.convolution(square).flatten(2).mT], dim=1)


class WrittenBack(BackboneBody):
    """The held blocks with the side state added before them and behind each.

    Of the side backward computes everything again but its notes, which are r numbers per token and block.
    """

    def __init__(self, suffix: Suffix, side: CompactSide) -> None:
        super().__init__(suffix)
        self.side = side
        self.first = suffix.first
        self.states = suffix.arch.states

    def forward(self, batch: Batch) -> Tensor:
        """Final tokens (B, T, D)."""
        notes = [recomputed(self.noted, block, batch) for block in range(self.first)]
        entering = batch.state(self.states[self.first]) + recomputed(self.side.added, *notes)
        with self.writing_back(notes):
            return self._backbone.tokens({ENTERING: entering, MASK: batch.inputs[MASK]})

    def noted(self, block: int, batch: Batch) -> Tensor:
        """The note of a block whose input is frozen."""
        return self.side.note(block, batch.state(self.states[block]))

    @contextmanager
    def writing_back(self, notes: list[Tensor]) -> Iterator[None]:
        """While this is on, the held blocks take notes and add what they come to; the hooks leave nothing behind."""

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            notes.append(self.side.note(len(notes), args[0] if args else kwargs["hidden_states"]))

        def add(_: nn.Module, __: Any, out: Any) -> Any:
            added = recomputed(self.side.added, *notes)
            return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added  # T5: the state comes first

        hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self._backbone.blocks]
        hooks += [block.register_forward_hook(add) for block in self._backbone.blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
