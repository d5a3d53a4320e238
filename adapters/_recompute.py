"""Training with the memory of one slice of one layer: what backward needs is computed again instead of kept.

Examples are independent, so a batch may be worked through a slice at a time; stored activations stay in their storage
dtype and only the slice of the layer at hand is upcast. Two shapes of side network are served, and a new method may use
either: a chain of steps (`in_slices` and `recomputed`) and a confidence-weighted sum over layers (`summed_in_turn`).
The price is one more forward pass per step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVarTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ._base import Batch

# 8 images of ViT-B/16. Fewer would not lower a step's peak by much, since there the tokens that a method returns and
# their pooling take over; larger slices take 4.7 MiB more for each image of UniPT.
TOKENS_AT_A_TIME = 1600

Arguments = TypeVarTuple("Arguments")


def slices(batch: Batch) -> Iterator[Batch]:
    """The batch in slices of whole examples, of about TOKENS_AT_A_TIME tokens each."""
    examples = len(batch.mask)
    tokens = max(mask.shape[1] for mask in (batch.mask, *batch.masks.values()))  # a decoder's final layer may have one
    size = max(TOKENS_AT_A_TIME // tokens, 1)
    return (batch.rows(slice(start, start + size)) for start in range(0, examples, size))


def in_slices(compute: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """`compute(batch)`, a slice at a time: backward, too, takes one slice after the other."""
    return torch.cat([compute(part) for part in slices(batch)])


def recomputed(compute: Callable[[*Arguments], Tensor], *args: *Arguments) -> Tensor:
    """`compute(*args)`, which must draw no random numbers; `args` are kept for backward, nothing made inside is."""
    return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False)


class SumOverLayers(Protocol):
    """A body that computes close(opened, sum_l a_l V_l) with (V_l, c_l) = look(l, opened, batch), a = softmax_l(c)."""

    looks: int

    def open(self, batch: Batch) -> tuple[Tensor, ...]:
        """What every layer is looked at with."""
        ...

    def look(self, index: int, opened: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Value (B, ...) and logit (B, 1) of one layer."""
        ...

    def close(self, opened: Sequence[Tensor], merged: Tensor) -> Tensor:
        """The output (B, ...) from the weighted sum of the values."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """As of an nn.Module."""
        ...


def summed_in_turn(body: SumOverLayers, batch: Batch) -> Tensor:
    """The body's output with one layer of one slice alive at a time; backward looks at each layer once more.

    Kept for backward are the sum over layers and the logarithm of its normaliser, as in attention kernels.
    """
    return _InTurn.apply(body, batch, *_trained(body))  # type: ignore[no-untyped-call]


def _trained(body: SumOverLayers) -> list[Tensor]:
    return [parameter for parameter in body.parameters() if parameter.requires_grad]


class _InTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, body: SumOverLayers, batch: Batch, *parameters: Tensor) -> Tensor:
        ctx.body, ctx.batch, ctx.parameters = body, batch, parameters
        ctx.autocast = _autocast_as_here(batch.mask.device.type)
        outs, kept = [], []
        with ctx.autocast():
            for part in slices(batch):
                opened = body.open(part)
                merged, normaliser = _online_softmax_sum(body, opened, part)
                outs.append(body.close(opened, merged))
                kept += [merged, normaliser]
        ctx.save_for_backward(*kept, *parameters)  # the latter so that autograd notices changes in place
        return torch.cat(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors[: -len(ctx.parameters)]
        if [*map(id, _trained(ctx.body))] != [*map(id, ctx.parameters)]:
            raise RuntimeError("the body's parameters are no longer those of forward: backward cannot recompute it.")
        sums = _Sums(ctx.parameters)
        begin = 0
        for part, merged, normaliser in zip(slices(ctx.batch), kept[::2], kept[1::2], strict=True):
            end = begin + len(part.mask)
            with torch.enable_grad(), ctx.autocast():
                _add_gradients(sums, ctx.body, part, merged, normaliser, grad[begin:end])
            begin = end
        return None, None, *sums.values


def _online_softmax_sum(body: SumOverLayers, opened: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """(sum_l softmax(c)_l V_l, log sum_l exp c_l) in one pass: a new largest logit rescales what was summed so far."""
    merged, logit = body.look(0, opened, batch)
    dtype = torch.promote_types(merged.dtype, torch.float32)  # sums are not taken in bfloat16
    merged, largest = merged.to(dtype), logit.to(dtype)
    normaliser = torch.ones_like(largest)
    for index in range(1, body.looks):
        value, logit = body.look(index, opened, batch)
        new = torch.maximum(largest, logit)
        rescale, weight = torch.exp(largest - new), torch.exp(logit - new)
        merged = merged * _like(rescale, merged)
        merged += value * _like(weight, merged)
        normaliser, largest = normaliser * rescale + weight, new
    return merged / _like(normaliser, merged), largest + normaliser.log()


def _add_gradients(
    sums: "_Sums", body: SumOverLayers, batch: Batch, merged: Tensor, normaliser: Tensor, grad: Tensor
) -> None:
    """Add the gradients of one slice: through the closing, through each layer on its own, through the opening."""
    opened = body.open(batch)
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in opened]
    of_opened, of_merged = _Sums(leaves), _Sums([merged.detach().requires_grad_()])
    _differentiate([body.close(leaves, *of_merged.tensors)], [grad], sums, of_opened, of_merged)
    (d_merged,) = of_merged.values
    assert d_merged is not None
    shift = _dot(d_merged, merged)  # (B, 1)
    for index in range(body.looks):
        value, logit = body.look(index, leaves, batch)
        confidence = torch.exp(logit.detach() - normaliser)  # (B, 1)
        # The softmax's own gradient: a_l (<d, V_l> - sum_k a_k <d, V_k>), and the sum is <d, merged>.
        d_logit = confidence * (_dot(d_merged, value.detach()) - shift)
        _differentiate([value, logit], [d_merged * _like(confidence, d_merged), d_logit], sums, of_opened)
        del value, logit  # before the next layer
    _differentiate(opened, of_opened.values, sums)


class _Sums:
    """The gradients of some tensors, summed; None where there is none."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.values: list[Tensor | None] = [None] * len(tensors)


def _differentiate(outputs: Sequence[Tensor], d_outputs: Sequence[Tensor | None], *into: _Sums) -> None:
    pairs = [(o, d.to(o.dtype)) for o, d in zip(outputs, d_outputs, strict=True) if o.requires_grad and d is not None]
    places = [(sums, i) for sums in into for i, tensor in enumerate(sums.tensors) if tensor.requires_grad]
    if not pairs:
        return
    wanted = [sums.tensors[i] for sums, i in places]
    with torch.autocast(outputs[0].device.type, enabled=False):  # gradients have the types that forward chose
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [d for _, d in pairs], allow_unused=True)
    for (sums, i), new in zip(places, found, strict=True):
        if new is not None:
            old = sums.values[i]
            # Not in place: a gradient that autograd hands out may share its memory with another.
            sums.values[i] = new if old is None else old + new


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).flatten(1).sum(1, keepdim=True)


def _like(weights: Tensor, values: Tensor) -> Tensor:
    """(B, 1) -> (B, 1, ...) to multiply `values` with."""
    return weights.reshape(-1, *[1] * (values.ndim - 1))


def _autocast_as_here(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """Make contexts with the autocast of this moment, which backward leaves.

    Without its cache of cast weights: before torch 2.11 one that is cast without a graph, as in forward, would stay in
    the cache and cut the graph of backward off (pytorch/pytorch#112583).
    """
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
