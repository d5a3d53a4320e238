"""LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning.
Sung, Cho, Bansal. NeurIPS 2022, arXiv 2206.06522.

A copy of the backbone with every width divided by r runs beside it; before each of its blocks a gated ladder mixes in
the frozen block's output. The gradient stays in the side network.

    s_0 = W_e embeddings;  s_i = SideBlock_i(mu_i s_(i-1) + (1 - mu_i) W_i b_i),  mu_i = sigmoid(alpha_i / 0.1)
    tokens = W_up norm(s_L);  merge_last: mu tokens + (1 - mu) final layer, with an alpha of its own

b_i is block i's raw output: before the backbone's final norm, and after the block it is mixed in front of the side copy
of. A dropped block (option `keep`) has no side block and no ladder: s passes through. Its gate stays, unused, and is
counted. Cached: the embeddings, the states of the kept blocks, and for merge_last the final layer. Where that is one
projected embedding per example (CLIP's), W_up leads to its width E and is given the summary token alone (ours).
Trained, with S = D/r, F = mlp/r, K kept blocks of the L of one stack (for two see _lst_two_stacks.py, _lst_detr.py):
    (K+1)(DS + S) + L + K(4(S²+S) + 2SF + F + S + 4S [+ 2S layer scale]) + 2S + SD + D [+ 1 merge_last] [- L no gate]

init=fisher prunes by squared gradients and is the one thing here that back-propagates through the backbone: once,
before training, in n passes of one example. That needs the memory and time of full fine-tuning at batch size 1, which
the run's record states apart (`initialisation`). The default, magnitude, needs the weights alone.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture
from ..cache.block_weights import BackboneWeights
from ._base import Batch, Body, CachedMethod, TrainingConfig, WeightsLoader, option
from ._blocks import ACTIVATIONS, SideBlock
from ._lst_detr import DetrLadders
from ._lst_stages import StageLadder, refused
from ._lst_two_stacks import TwoLadders
from ._pruning import copy_pruned
from ._recompute import in_slices, recomputed
from ._tokens import summary_position, summary_token


@dataclass(frozen=True)
class Config(TrainingConfig):
    """LST's options."""

    lr: float = option(3e-3, "peak learning rate (LST's released GLUE scripts)")
    reduction: int = option(8, "r: every width is divided by it (8 for T5 on GLUE in the paper)")
    keep: str = option(
        "all",
        "blocks with a side block: all, or their numbers from 0 (1,2,3,5,6,7,9,10,11 of 12 in LST's GLUE scripts)",
    )
    init: Literal["magnitude", "fisher", "random"] = option(
        "magnitude",
        "the backbone's own weights, pruned by |w| (magnitude; no backward needed) or by squared gradients (fisher, as "
        "LST's code has it; back-propagates through the whole backbone once, before training); or random",
    )
    fisher_examples: int = option(1024, "training examples that init=fisher sums squared gradients over (LST's code)")
    gate: Literal["learned", "none"] = option("learned", "learned: mu s + (1 - mu) W b; none: the plain sum s + W b")
    temperature: float = option(0.1, "T of the gate sigmoid(alpha / T)")
    merge_last: bool = option(False, "true: mix the backbone's final layer into the output (off in LST's scripts)")
    lean: bool = option(
        True, "true: backward computes the side blocks again, a slice of the batch at a time; false: it keeps them all"
    )


class LST(CachedMethod):
    """A slim copy of the backbone beside it, fed by gated ladders from every block."""

    Config: ClassVar[type] = Config
    paper = "LST, NeurIPS 2022, arXiv 2206.06522"
    two_stacks = True
    projected = True

    def refusal(self, arch: Architecture) -> str | None:
        """The side network copies the backbone's block, so that block must be known and divide by r."""
        config, r = self.config, self.config.reduction
        if arch.stages:
            return self._refusal_of_stages(arch)
        if arch.decoder_blocks and not (arch.t5_blocks or arch.detr_blocks):
            return (
                "of encoder-decoders it copies the blocks of the first T5 alone (an MLP with a ReLU and no gate, heads "
                f"that share the width) and of MDETR, and this {arch.name} has others"
            )
        if not (arch.norm or arch.t5_blocks) or arch.heads is None or arch.mlp_width is None:
            return f"it copies the backbone's block, and {arch.name} has none this code can copy"
        if arch.activation is not None and arch.activation not in ACTIVATIONS:
            return f"it copies the backbone's block, and not the activation {arch.activation!r} of {arch.name}'s MLP"
        width = arch.state_width
        if width % arch.heads:
            return f"it copies the backbone's block, and width {width} does not split into {arch.heads} heads"
        if config.temperature <= 0:
            return f"temperature {config.temperature} is none for a gate; more than 0"
        if config.init == "fisher" and config.fisher_examples < 1:
            return "init=fisher needs lst.fisher_examples of 1 or more"
        depth = min(arch.blocks, arch.decoder_blocks or arch.blocks)  # the same blocks of both stacks are kept
        if kept_blocks(config.keep, depth) is None:
            return f"lst.keep={config.keep} is neither all nor numbers from 0 to {depth - 1} with commas between"
        if r < 1 or width % r or arch.mlp_width % r or width // r % arch.heads:
            return (
                f"width {width} divided by lst.reduction={r} does not split into {arch.heads} heads; "
                f"try --set lst.reduction={self._dividing(arch)}"
            )
        return None

    def _refusal_of_stages(self, arch: Architecture) -> str | None:
        config = self.config
        if config.init != "random":
            return "it copies no blocks of convolutions; side blocks of its own start anew: --set lst.init=random"
        if config.keep.strip() != "all":
            return "lst.keep names blocks, and stage maps have none; leave it at all"
        if config.temperature <= 0:
            return f"temperature {config.temperature} is none for a gate; more than 0"
        if config.reduction < 1:
            return f"lst.reduction={config.reduction} is none; 1 or more"
        return refused(arch)

    @property
    def gradient_examples(self) -> int:
        """See CachedMethod."""
        return int(self.config.fisher_examples) if self.config.init == "fisher" else 0

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """What enters the first block, the kept blocks' outputs, the final layer where it is merged; or all maps."""
        if arch.stages:
            return arch.states
        last = (arch.final_layer,) if self.config.merge_last else ()
        read = [
            name
            for states, kept in zip((arch.states, arch.decoder_states), self._kept(arch), strict=False)
            for name in (states[0], *(states[index + 1] for index in kept))
        ]
        return tuple(dict.fromkeys((*read, *last)))

    def build(self, arch: Architecture, widths: Mapping[str, int], weights: WeightsLoader) -> Body:
        """See CachedMethod."""
        config = self.config
        options = {"gated": config.gate == "learned", "merge_last": config.merge_last, "lean": config.lean}
        sizes = (arch, widths, config.reduction, config.temperature)
        if arch.stages:
            return StageLadder(*sizes, **options)
        kept = self._kept(arch)
        ladder: Ladder | TwoLadders
        if arch.decoder_blocks:
            ladder = (TwoLadders if arch.t5_blocks else DetrLadders)(*sizes, kept=kept, **options)
        else:
            ladder = Ladder(*sizes, kept=kept[0], **options)
        if config.init != "random":
            loaded = weights()
            importance = loaded.importance if config.init == "fisher" else loaded
            assert importance is not None  # gradient_examples asked for it
            ladder.begin_as(loaded, importance)
        return ladder

    def _kept(self, arch: Architecture) -> list[tuple[int, ...]]:
        """Of each stack of blocks."""
        depths = (arch.blocks, arch.decoder_blocks) if arch.decoder_blocks else (arch.blocks,)
        kept = [found for depth in depths if (found := kept_blocks(self.config.keep, depth)) is not None]
        assert len(kept) == len(depths)
        return kept

    def _dividing(self, arch: Architecture) -> int:
        assert arch.heads is not None
        assert arch.mlp_width is not None
        both = math.gcd(arch.state_width // arch.heads, arch.mlp_width)
        return next(r for r in (8, 4, 2, 1) if both % r == 0)


def kept_blocks(keep: str, blocks: int) -> tuple[int, ...] | None:
    """Ascending indices of the blocks that `keep` names; None where it is not "all", nor numbers below `blocks`."""
    if keep.strip() == "all":
        return tuple(range(blocks))
    if not re.fullmatch(r"\s*\d{1,6}\s*(,\s*\d{1,6}\s*)*", keep):
        return None
    named = sorted({int(number) for number in keep.split(",")})
    return tuple(named) if named[-1] < blocks else None


class Ladder(Body):
    """The side network; tokens (B, T, D) out. `kept`: indices of the blocks that have a side block (None: all)."""

    def __init__(
        self,
        arch: Architecture,
        widths: Mapping[str, int],
        reduction: int,
        temperature: float,
        *,
        kept: tuple[int, ...] | None = None,
        gated: bool = True,
        merge_last: bool = False,
        lean: bool = True,
    ) -> None:
        super().__init__()
        self.kept = tuple(range(arch.blocks)) if kept is None else kept
        self.states = (arch.states[0], *(arch.states[index + 1] for index in self.kept))
        self.final = arch.final_layer
        self.width = arch.width
        self.summed = arch.projected_from is not None
        self.causal = arch.causal
        self.temperature = temperature
        self.lean = lean
        side_width = arch.state_width // reduction
        self.down = nn.ModuleList(nn.Linear(widths[state], side_width) for state in self.states)
        self.alpha = nn.Parameter(torch.zeros(arch.blocks)) if gated else None  # mu = 0.5 at the start
        self.blocks = nn.ModuleList(SideBlock(arch, reduction) for _ in self.kept)
        self.norm = nn.LayerNorm(side_width, eps=arch.norm_eps)
        self.up = nn.Linear(side_width, self.width)
        self.alpha_last = nn.Parameter(torch.zeros(())) if merge_last else None
        for linear in (*self.down, self.up):  # N(0, 0.01), bias 0 (LST's released code)
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def begin_as(self, weights: BackboneWeights, importance: BackboneWeights) -> None:
        """Start the side blocks and the norm as the most important parts of the backbone's own."""
        copy_pruned(dict(zip(self.kept, self.blocks, strict=True)), self.norm, weights, importance)

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        return in_slices(self.climb, batch) if self.lean else self.climb(batch)

    def climb(self, batch: Batch) -> Tensor:
        """From the embeddings to the top. Of a lean climb backward keeps the side state behind every other block."""
        run: Callable[..., Tensor] = recomputed if self.lean else lambda compute, *args: compute(*args)
        side = run(self.rung, 0, batch)
        for first in range(0, len(self.blocks), 2):
            side = run(self.pass_two, first, side, batch)
        if self.summed:
            position = summary_position(batch.mask_of(self.states[-1]), last_real=self.causal)
            side = summary_token(side, position)[:, None]
        if self.alpha_last is None:
            return self.up(self.norm(side))  # (B, T, D)
        return run(self.merged, self.alpha_last, side, batch)

    def pass_two(self, first: int, side: Tensor, batch: Batch) -> Tensor:
        """The side state (B, T, S) behind the kept block `first` and the one after it from the state before them."""
        for place in range(first, min(first + 2, len(self.blocks))):
            rung = self.rung(place + 1, batch)
            mixed = side + rung if self.alpha is None else self.mixed(self.alpha[self.kept[place]], side, rung)
            side = self.blocks[place](mixed, batch.mask_of(self.states[place + 1]))
        return side

    def merged(self, alpha: Tensor, side: Tensor, batch: Batch) -> Tensor:
        """Tokens (B, T, D), mixed with the backbone's own final ones."""
        return self.mixed(alpha, self.up(self.norm(side)), batch.state(self.final))

    def mixed(self, alpha: Tensor, ours: Tensor, frozen: Tensor) -> Tensor:
        """The gate: mu ours + (1 - mu) frozen."""
        gate = torch.sigmoid(alpha / self.temperature)
        return gate * ours + (1 - gate) * frozen

    def rung(self, index: int, batch: Batch) -> Tensor:
        """What a frozen state brings in: W_index b_index (B, T, S)."""
        return self.down[index](batch.state(self.states[index]))
