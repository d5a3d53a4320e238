"""Predict the memory of a solver: the log of a tiny real run, with every storage rescaled to the real sizes.

A solver such as L-BFGS branches on values, which fake tensors lack. But what it keeps are vectors whose sizes are
products of N examples, D features, M features selected of these and K outputs, in a pattern that does not depend on
them. So it is run for real on tiny numbers that are told apart by their prime factors, each storage in the log is
recognised by its size and given the size that it would have, and the log is replayed. Exact where the solver takes the
same way; how often a line search looks twice depends on the data, so a real run may differ by a few parameter vectors.
"""

from itertools import product

import torch

from ..adapters._base import FittedMethod
from .allocator import replay_allocator
from .predict import Prediction, Unpredictable
from .tracker import Event, Tracker, replay

TINY = {"N": 101, "D": 37, "K": 11}
_ITEM_BYTES = (1, 4, 8)
_UNKNOWN = "which is no product of its sizes, or could be several of them"


def predict_fit(
    method: FittedMethod, *, examples: int, width: int, num_outputs: int, semantics: str = "cuda"
) -> Prediction:
    """Peak memory of solving on `examples` training features (N, D) in float32: as `measure_fit` tracks it.

    With a full history, so that a run that converges early takes less; not decomposed. Raises Unpredictable for a
    method that keeps something whose size is none of those known here.
    """
    tiny = {**TINY, "K": 1 if num_outputs == 1 else TINY["K"], "M": method.kept(TINY["D"])}
    events, start, trainable = _tiny_log(method, tiny["K"])
    real = {"N": examples, "D": width, "K": num_outputs, "M": method.kept(width)}
    scaled = _rescaled(events, _certain(_sizes(tiny), _sizes(real)))
    allocator = replay_allocator(scaled, start) if semantics == "cuda" else None
    counts = _certain(_counts(tiny), _counts(real))
    if trainable not in counts:
        raise Unpredictable(f"it trains {trainable} parameters on a tiny problem, {_UNKNOWN}")
    count = counts[trainable]
    return Prediction(replay(scaled, {}, start), allocator, count, count, len(scaled))


def _tiny_log(method: FittedMethod, num_outputs: int) -> tuple[list[Event], int, int]:
    """The log of solving the tiny problem, where its step starts, and how many parameters came out."""
    generator = torch.Generator().manual_seed(0)
    # Neighbouring features are nearly the same, so the solver is slow and its history fills: the most it can take.
    features = torch.randn(TINY["N"], TINY["D"], generator=generator).cumsum(1)
    targets = torch.arange(TINY["N"]) % TINY["K"]
    if num_outputs == 1:  # numbers, not classes
        targets = targets.float()
    brief = method.brief()
    with Tracker([], None, [features, targets], device="cpu") as tracker:
        start = len(tracker.events)
        tracker.begin_step()
        with tracker.phase("step"):
            module, _ = brief.fit((features, targets), (features[:1], targets[:1]), num_outputs)
    return tracker.events, start, sum(p.numel() for p in module.parameters())


def _rescaled(events: list[Event], real_bytes: dict[int, int]) -> list[Event]:
    sizes: dict[int, int] = {}
    scaled = []
    for event in events:
        before = sizes.get(event.storage, 0)
        after = before + event.delta_bytes
        sizes[event.storage] = after
        if before not in real_bytes or after not in real_bytes:
            raise Unpredictable(f"it keeps {after} bytes on a tiny problem, {_UNKNOWN}")
        scaled.append(event._replace(delta_bytes=real_bytes[after] - real_bytes[before]))
    return scaled


def _certain(tiny: list[int], real: list[int]) -> dict[int, int]:
    """The real size of each tiny one, but for a tiny size that could be several."""
    pairs = set(zip(tiny, real, strict=True))
    return {one: other for one, other in pairs if sum(one == tiny_one for tiny_one, _ in pairs) == 1}


def _counts(sizes: dict[str, int]) -> list[int]:
    """Numbers of elements that a linear solver's tensors have, in a fixed order."""
    n, d, k, m = sizes["N"], sizes["D"], sizes["K"], sizes["M"]
    return [0, 1, 2, 3, 4, n, d, k, n * d, n * k, d * k, d * k + k, m, n * m, m * k, m * k + k]


def _sizes(sizes: dict[str, int]) -> list[int]:
    return [item * count for item, count in product(_ITEM_BYTES, _counts(sizes))]
