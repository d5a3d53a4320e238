"""LST's form for an encoder and its decoder: the paper's own, on T5 (for DETR's blocks see _lst_detr.py).

Beside each stack climbs a slim copy of it (see lst.py), of T5's blocks: RMS norms before, no biases, a ReLU between the
MLP's two matrices, scores that are not scaled and get a learned bias by relative position, from one table a stack. The
decoder's side reads the encoder's side output, behind that one's final norm, and is causal. Trained, with S = D/r,
F = mlp/r, H heads, and K kept of L blocks in the encoder, k of l in the decoder:
    encoder (K+1)(DS + S) + L + K(4S² + 2SF + 2S) + 32H + S;  decoder (k+1)(DS + S) + l + k(8S² + 2SF + 3S) + 32H + S
    and SD + D [+ 1 merge_last] [- L - l no gate]: 3,878,712 of T5-base with LST's nine of twelve blocks, its 1.74 %

The paper goes on with T5's frozen vocabulary matrix, behind a factor D^-0.5. Here the task's own linear head reads the
tokens, is trained and counted apart. The side's dropout is left out, as in lst.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cache.architecture import Architecture
from ..cache.block_weights import BackboneWeights, BlockWeights, CrossWeights
from ._base import Batch, Body
from ._pruning import kept_rows, strongest
from ._recompute import in_slices, recomputed

BUCKETS, FARTHEST = 32, 128  # of the table of relative positions; distances from the last on share a bucket
Memory = tuple[Tensor, Tensor]  # what a decoder reads of the encoder: tokens (B, T, S), and the mask of real ones


class RMSNorm(nn.Module):
    """T5's: no mean is taken away and none is added. In plain operations, whose memory is the same on every device."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, S) -> (B, T, S), in float32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    """T5's, with the norm before it and the sum behind it."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(width, eps)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.softmax = nn.Softmax(-1)  # a module, so that a dropout can be hooked behind it
        nn.init.normal_(self.query.weight, std=(width * width // heads) ** -0.5)  # as T5 begins; scores are not scaled
        for linear in (self.key, self.value, self.out):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(self, x: Tensor, seen: Tensor, bias: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """(B, Q, S) -> (B, Q, S). seen: which keys, to broadcast over (B, H, Q, K); keys are x's own or `memory`'s."""
        normed = self.norm(x)
        keys = normed if memory is None else memory
        pairs = ((self.query, normed), (self.key, keys), (self.value, keys))
        q, k, v = (linear(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear, y in pairs)
        scores = q @ k.mT  # (B, H, Q, K)
        if bias is not None:
            scores = scores + bias
        weights = self.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min))
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


class SlimBlock(nn.Module):
    """T5's block; of a decoder with a second attention, across to the encoder."""

    def __init__(self, width: int, hidden: int, heads: int, eps: float, *, across: bool) -> None:
        super().__init__()
        self.own = Attention(width, heads, eps)
        self.across = Attention(width, heads, eps) if across else None
        self.norm = RMSNorm(width, eps)
        self.fc1, self.fc2 = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        nn.init.normal_(self.fc1.weight, std=width**-0.5)
        nn.init.normal_(self.fc2.weight, std=hidden**-0.5)

    def forward(self, x: Tensor, seen: Tensor, bias: Tensor, memory: Memory | None) -> Tensor:
        """(B, T, S) -> (B, T, S)."""
        x = self.own(x, seen, bias)
        if self.across is not None:
            assert memory is not None
            x = self.across(x, memory[1][:, None, None, :], memory=memory[0])
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Stack(nn.Module):
    """The side of one stack, up to its final norm: tokens (B, T, S). Subclasses have `blocks` and a `norm`."""

    blocks: nn.ModuleList
    norm: nn.Module

    def __init__(
        self,
        states: tuple[str, ...],
        widths: Mapping[str, int],
        side_width: int,
        kept: tuple[int, ...],
        *,
        gated: bool,
        temperature: float,
        lean: bool,
        decoder: bool,
    ) -> None:
        super().__init__()
        self.depth = len(states) - 1
        self.kept = kept
        self.states = (states[0], *(states[index + 1] for index in kept))
        self.temperature = temperature
        self.decoder = decoder
        self.lean = lean
        self.down = nn.ModuleList(nn.Linear(widths[state], side_width) for state in self.states)
        self.alpha = nn.Parameter(torch.zeros(self.depth)) if gated else None  # mu = 0.5 at the start

    def forward(self, batch: Batch, memory: Memory | None = None) -> Tensor:
        """From the embeddings to the top; of a lean climb backward keeps the side state behind every other block."""
        run: Callable[..., Tensor] = recomputed if self.lean else lambda compute, *args: compute(*args)
        side = run(self.rung, 0, batch)
        for first in range(0, len(self.blocks), 2):
            side = run(self.pass_two, first, side, batch, memory)
        return self.norm(side)

    def pass_two(self, first: int, side: Tensor, batch: Batch, memory: Memory | None) -> Tensor:
        """The side state (B, T, S) behind the kept block `first` and the one after it from the state before them."""
        around = self.around(side, batch)
        for place in range(first, min(first + 2, len(self.blocks))):
            rung = self.rung(place + 1, batch)
            gate = None if self.alpha is None else torch.sigmoid(self.alpha[self.kept[place]] / self.temperature)
            mixed = side + rung if gate is None else gate * side + (1 - gate) * rung
            side = self.blocks[place](mixed, *around, memory)
        return side

    def around(self, side: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """What every block is given besides its input and the memory."""
        raise NotImplementedError

    def rung(self, index: int, batch: Batch) -> Tensor:
        """What a frozen state brings in: W_index b_index (B, T, S)."""
        return self.down[index](batch.state(self.states[index]))


class SideStack(Stack):
    """Of T5's blocks."""

    def __init__(
        self,
        arch: Architecture,
        states: tuple[str, ...],
        widths: Mapping[str, int],
        side_width: int,
        kept: tuple[int, ...],
        **options: Any,
    ) -> None:
        super().__init__(states, widths, side_width, kept, **options)
        assert arch.heads is not None
        assert arch.mlp_width is not None
        sizes = (side_width, arch.mlp_width * side_width // arch.width, arch.heads, arch.norm_eps)
        self.blocks = nn.ModuleList(SlimBlock(*sizes, across=self.decoder) for _ in kept)
        self.positions = nn.Embedding(BUCKETS, arch.heads)  # the first kept block's in LST's code
        nn.init.normal_(self.positions.weight, std=side_width**-0.5)
        self.norm = RMSNorm(side_width, arch.norm_eps)

    def around(self, side: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """The keys that are seen, to broadcast over (B, H, Q, K), and the bias (H, Q, K)."""
        bias = self.positions(buckets(side.shape[1], side.device, causal=self.decoder)).permute(2, 0, 1)
        seen = batch.mask_of(self.states[0])[:, None, None, :]
        if self.decoder:
            seen = seen & torch.ones(seen.shape[-1:] * 2, dtype=torch.bool, device=side.device).tril()
        return seen, bias


class TwoLadders(Body):
    """Both sides; the decoder's tokens (B, T_dec, D) out. `kept`: the blocks that have a side block, by stack."""

    stack: ClassVar[type[Any]] = SideStack

    def __init__(
        self,
        arch: Architecture,
        widths: Mapping[str, int],
        reduction: int,
        temperature: float,
        *,
        kept: Sequence[tuple[int, ...]],
        gated: bool = True,
        merge_last: bool = False,
        lean: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.final = arch.width, arch.final_layer
        self.temperature = temperature
        self.lean = lean
        side_width = arch.width // reduction
        options: dict[str, Any] = {"gated": gated, "temperature": temperature, "lean": lean}
        self.encoder = self.stack(arch, arch.states, widths, side_width, kept[0], **options, decoder=False)
        self.decoder = self.stack(arch, arch.decoder_states, widths, side_width, kept[1], **options, decoder=True)
        self.up = nn.Linear(side_width, self.width)
        self.alpha_last = nn.Parameter(torch.zeros(())) if merge_last else None
        for linear in (*self.encoder.down, *self.decoder.down, self.up):  # N(0, 0.01), bias 0 (LST's released code)
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    @torch.no_grad()
    def begin_as(self, weights: BackboneWeights, importance: BackboneWeights) -> None:
        """Start as the most important parts of the backbone's own (see _pruning.py).

        One walk leads up the encoder and on up the decoder, whose reading of the encoder is a step like others: LST's
        code has it so. Tables of relative positions are copied whole.
        """
        pairs = iter(zip(weights.blocks, importance.blocks, strict=True))
        kept = strongest(importance.embedding.abs().sum(0), self.up.in_features)
        for stack, norm in ((self.encoder, weights.encoder_norm), (self.decoder, weights.norm)):
            pairs_of_stack = zip(stack.kept, stack.blocks, strict=True)
            blocks = {index: block for index, block in pairs_of_stack if isinstance(block, SlimBlock)}
            for index in range(stack.depth):
                source, measure = next(pairs)
                kept = _copy_block(blocks.get(index), source, measure, kept)
                if source.positions is not None:
                    stack.positions.weight.copy_(source.positions)
            if norm is not None:
                stack.norm.weight.copy_(norm[0][kept])

    def forward(self, batch: Batch) -> Tensor:
        """See Body."""
        return in_slices(self.climb, batch) if self.lean else self.climb(batch)

    def climb(self, batch: Batch) -> Tensor:
        """The encoder's side, then the decoder's."""
        memory = self.encoder(batch), batch.mask_of(self.encoder.states[0])
        out = self.up(self.decoder(batch, memory))
        if self.alpha_last is None:
            return out
        gate = torch.sigmoid(self.alpha_last / self.temperature)
        return gate * out + (1 - gate) * batch.state(self.final)


def buckets(length: int, device: torch.device, *, causal: bool) -> Tensor:
    """(Q, K) rows of T5's table by the distance from query to key.

    Small distances have rows of their own, larger ones share them on a logarithmic scale. Both directions have half of
    the rows each; of a causal stack the keys behind have all.
    """
    place = torch.arange(length, device=device)
    ahead = place[None, :] - place[:, None]
    rows = BUCKETS if causal else BUCKETS // 2
    distance = (-ahead).clamp(min=0) if causal else ahead.abs()
    alone = rows // 2
    share = torch.log(distance.clamp(min=alone).float() / alone) / math.log(FARTHEST / alone)
    far = (alone + (share * (rows - alone)).long()).clamp(max=rows - 1)
    found = torch.where(distance < alone, distance, far)
    return found if causal else found + rows * (ahead > 0)


def _copy_block(side: SlimBlock | None, source: BlockWeights, measure: BlockWeights, entering: Tensor) -> Tensor:
    """Fill a side block, where there is one, and say which indices leave it."""
    kept = _copy_attention(None if side is None else side.own, source, measure, entering)
    if source.across is not None and measure.across is not None:
        kept = _copy_attention(None if side is None else side.across, source.across, measure.across, kept)
    inner = kept_rows((measure.fc1,), kept, len(measure.fc1[0]) * len(entering) // len(measure.out[0]))
    leaving = kept_rows((measure.fc2,), inner, len(entering))
    if side is not None:
        side.norm.weight.copy_(source.norm2[0][kept])
        side.fc1.weight.copy_(source.fc1[0][inner][:, kept])
        side.fc2.weight.copy_(source.fc2[0][leaving][:, inner])
    return leaving


def _copy_attention(
    side: Attention | None, source: BlockWeights | CrossWeights, measure: BlockWeights | CrossWeights, entering: Tensor
) -> Tensor:
    attended = kept_rows((measure.query, measure.key, measure.value), entering, len(entering))
    leaving = kept_rows((measure.out,), attended, len(entering))
    if side is not None:
        side.norm.weight.copy_(source.norm1[0][entering])
        for linear, pair in ((side.query, source.query), (side.key, source.key), (side.value, source.value)):
            linear.weight.copy_(pair[0][attended][:, entering])
        side.out.weight.copy_(source.out[0][leaving][:, attended])
    return leaving
