"""SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited Transfer Learning.
Diao, Wan, Jia, Zhuge, Zhang, Lu, Chen. ECCV 2024, arXiv 2407.07523. The form for MDETR; `sherl` is the one for one
stack of blocks.

In each stack some states are projected and summed with weights in which a layer counts less the more the others
resemble it, token by token. The encoder's sum is the memory that the decoder's last frozen block reads, with gradient,
and the decoder's sum is what enters that block.

    X_l = LN(W_l H_l);  g = X_last, all others are shallow;  rho_l = sum_j relu(cos(X_l, X_j)), j shallow
    w = l1_layers(relu(fc(X_l * g)) / rho_l);  z = g + LN(W_2 relu(W_1 sum_l w_l X_l))
    u = LN(W_up relu(z)) + tanh(gamma / 0.1) H_last;  tokens = norm(DecoderBlock_last(u_decoder, memory = u_encoder))

Of 6 blocks it reads the encoder's outputs 1, 2, 4, 6 and the decoder's 1, 3, 4, 5; the rule for other depths is ours,
and so is torch's initialisation. A single shallow state has the weight 1 and no fc. Cached: those states and the
positions of the tokens, which the block adds to its keys. In memory: that block, the queries, the norm. Trained,
with t and u states read, s = D // r:
    (t + u)(Ds + s + 2s) + 2(s + 1) + 2(sD + D + Ds + s + 2s) + 2(sD + D + 2D) + 2      464,900 of MDETR
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..cache.architecture import POSITIONS, Architecture
from ..cache.block_weights import BackboneWeights
from ..cache.errors import SidebenchError
from ..cache.mdetr import decoder_layer
from ._base import Batch, Body, CachedMethod, TrainingConfig, WeightsLoader, option
from ._recompute import in_slices, recomputed
from ._sherl import without_repeats

EPS = 1e-6  # of cosines and weights
TEMPERATURE = 0.1  # of the gate


@dataclass(frozen=True)
class Config(TrainingConfig):
    """SHERL's options."""

    lr: float = option(5e-4, "peak learning rate (SHERL's scripts keep UniPT's)")
    weight_decay: float = option(1e-4, "AdamW's weight decay (UniPT's MDETR script; SHERL's was not read)")
    reduction: int = option(2, "r: the side width is s = D // r (2 in the paper)")
    lean: bool = option(True, "true: backward computes the early routes again, a slice of the batch at a time")


class SherlTwoStacks(CachedMethod):
    """SHERL on MDETR: the encoder's states as a memory without repeats, read by the decoder's last frozen block."""

    Config: ClassVar[type] = Config
    paper = "SHERL, ECCV 2024, arXiv 2407.07523 (its MDETR form)"
    two_stacks = True
    runs_blocks = True

    def refusal(self, arch: Architecture) -> str | None:
        """It needs DETR's two stacks, and a shallow state beside the deep one in each."""
        if not arch.detr_blocks or arch.heads is None or arch.mlp_width is None:
            return f"it is made for MDETR's encoder and decoder, and {arch.name} is none; sherl is for one stack"
        if arch.blocks < 2 or arch.decoder_blocks < 3:
            return f"it needs 2 blocks in the encoder and 3 in the decoder, and {arch.name} has fewer"
        if self.config.reduction < 1 or arch.width // self.config.reduction < 1:
            return f"reduction {self.config.reduction} leaves no side width of {arch.width}"
        return None

    def layers(self, arch: Architecture) -> tuple[str, ...]:
        """The positions, and the states of both stacks; last a decoder's, whose tokens are the method's."""
        encoder, decoder = taps(arch)
        return (POSITIONS, *encoder, *decoder)

    def build(self, arch: Architecture, widths: Mapping[str, int], weights: WeightsLoader) -> Body:
        """See CachedMethod. Raises SidebenchError for states that the block cannot read."""
        if any(widths[layer] != arch.width for layer in self.layers(arch)):
            raise SidebenchError(f"sherl_two_stacks runs a block on states of width {arch.width}. Type --tokens all.")
        return MemoryAndQueries(arch, weights(), arch.width // self.config.reduction, lean=self.config.lean)


def taps(arch: Architecture) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The states that are read of the encoder and of the decoder, the deep one last."""
    last = arch.blocks - 1
    encoder = sorted({0, *range(last, -1, -2)})
    decoder = sorted({0, *range(max(arch.decoder_blocks - 4, 0), arch.decoder_blocks - 1)})
    return tuple(arch.states[i + 1] for i in encoder), tuple(arch.decoder_states[i + 1] for i in decoder)


class EarlyRoute(nn.Module):
    """The trained part of a stack: from its states to one (B, T, D) of their kind."""

    def __init__(self, states: tuple[str, ...], width: int, side_width: int) -> None:
        super().__init__()
        self.states = states
        self.down = nn.ModuleList(linear_norm(width, side_width) for _ in states)
        self.score = nn.Linear(side_width, 1) if len(states) > 2 else None
        self.project = nn.Sequential(nn.Linear(side_width, width), nn.ReLU(), *linear_norm(width, side_width))
        self.up = linear_norm(side_width, width)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch) -> Tensor:
        """u (B, T, D)."""
        *shallow, deep = (down(batch.state(state)) for down, state in zip(self.down, self.states, strict=True))
        merged = shallow[0] if self.score is None else without_repeats(self.score, deep, torch.stack(shallow, -2), EPS)
        gate = torch.tanh(self.gamma / TEMPERATURE)
        return self.up(torch.relu(deep + self.project(merged))) + gate * batch.state(self.states[-1])


class MemoryAndQueries(Body):
    """Both early routes, then the decoder's last block as it is; tokens (B, Q, D) out."""

    def __init__(self, arch: Architecture, weights: BackboneWeights, side_width: int, *, lean: bool = True) -> None:
        super().__init__()
        encoder, decoder = taps(arch)
        self.width = arch.width
        self.lean = lean
        self.encoder = EarlyRoute(encoder, arch.width, side_width)
        self.decoder = EarlyRoute(decoder, arch.width, side_width)
        self.block, self.norm, self.queries = decoder_layer(arch, weights)

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        return in_slices(self.climb, batch) if self.lean else self.climb(batch)

    def levels(self, batch: Batch) -> list[Tensor]:
        """What MDETR's losses read, each (B, Q, D): what enters the last block, not normed, then the output."""
        route: Callable[[Batch], Tensor] = self.decoder
        entering = in_slices(lambda part: recomputed(route, part), batch) if self.lean else route(batch)
        return [entering, self(batch)]

    def climb(self, batch: Batch) -> Tensor:
        """The memory, what enters the last block, and that block with its norm."""
        run: Callable[..., Tensor] = recomputed if self.lean else lambda compute, *args: compute(*args)
        memory, entering = run(self.encoder, batch), run(self.decoder, batch)
        seen = batch.mask_of(self.encoder.states[-1])[:, None, None, :]  # (B, 1, 1, T)
        queries = self.queries.weight.expand(len(entering), -1, -1)
        return self.norm(self.block(entering, queries, memory, batch.state(POSITIONS), seen))


def linear_norm(inputs: int, outputs: int) -> nn.Sequential:
    """A Linear and the LayerNorm behind it."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs))
