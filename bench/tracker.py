"""Count the exact bytes of live tensors over real training steps, on any device, and say what they were at the peak.

A dispatch mode sees every tensor an operation makes; a weak reference on its storage tells when the last view died.
The log of births and deaths is replayed afterwards, when it is known what each storage became, so nothing is retagged
while it runs. What counts is what the program asked for (`requested` bytes, before an allocator rounds them).

Out of scope: what no tensor shows, that is library workspaces (BLAS, cuDNN), a kernel's own scratch memory, the
allocator's rounding, the CUDA context. An activation is what autograd saves: tensors that a `torch.autograd.Function`
keeps as plain attributes, and those that `torch.utils.checkpoint` makes again during backward, count as temporaries.
Two tensors made from the same numpy array have two storages and count twice.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..cache.errors import SidebenchError

# From the strongest claim to the weakest: a parameter that is saved for backward is a parameter.
CATEGORIES = ("parameters", "optimizer", "gradients", "inputs", "activations", "temporaries")
OUTSIDE = "outside"  # the phase of what happens between the named ones


@dataclass(frozen=True)
class TrackedPeak:
    """The largest sum of live tensor bytes within one training step; a storage counts once, however many views it has.

    `by_category` is the composition at that moment (every name of `CATEGORIES`; they add up to `peak_bytes`),
    `by_phase` the largest sum within each named phase, `at` the phase and the operation that set the peak.
    """

    peak_bytes: int
    by_category: dict[str, int]
    by_phase: dict[str, int]
    at: str


class Event(NamedTuple):
    """A storage changed its size (birth: from 0, death: to 0), or, with storage -1, a phase or step began or ended."""

    op: str
    delta_bytes: int
    storage: int
    phase: str


@dataclass
class _Live:
    number: int
    size_bytes: int
    death: "weakref.ref[torch.UntypedStorage]"  # held so that its callback fires


class Tracker:
    """Log the storages of a training program: a context manager around two steps or more.

    `modules` give parameters and buffers (both count as parameters), `optimizer` its groups and state, `inputs` the
    tensors of the batch. Only tensors on `device` count (default: that of the first parameter). What the steps read but
    nobody named, such as a constant in a closure, is an input from its first use. Gradients and optimiser state are
    looked up whenever a phase ends, so a gradient made and dropped within one phase is a temporary.
    """

    def __init__(
        self,
        modules: nn.Module | Iterable[nn.Module],
        optimizer: torch.optim.Optimizer | None,
        inputs: Iterable[Tensor] = (),
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self.events: list[Event] = []
        self._modules = [modules] if isinstance(modules, nn.Module) else list(modules)
        self._optimizer = optimizer
        self._inputs = list(inputs)
        first = next((p for module in self._modules for p in module.parameters()), torch.empty(0))
        self._device = torch.empty(0, device=device).device if device is not None else first.device  # cuda -> cuda:0
        self._live: dict[int, _Live] = {}  # by the address of the C++ storage, which is its own while it lives
        self._born = 0
        self._became: dict[int, int] = {}  # storage number -> index into CATEGORIES
        self._phase = OUTSIDE
        self._step_start: int | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Tracker":
        self._look_up_owners()
        self.add_inputs(self._inputs)
        self._inputs.clear()  # a batch must be able to die
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._saved, _unchanged))
        self._stack.enter_context(_SeeEveryOperation(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._look_up_owners()
        self._live.clear()

    def begin_step(self) -> None:
        """Begin a training step; `peak` reports the one begun last."""
        self._step_start = len(self.events)
        self._mark("the start of the step")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what runs inside. Phases nest (a closure's forward inside an optimiser's step); the innermost counts."""
        outer, self._phase = self._phase, name
        self._mark(f"the start of {name}")
        try:
            yield
        finally:
            self._look_up_owners()
            self._phase = outer
            self._mark(f"the end of {name}")

    def add_inputs(self, tensors: Iterable[Tensor]) -> None:
        """Name the tensors of a batch that was not there at the start."""
        for tensor in tensors:
            self._label(tensor, "inputs")

    def peak(self) -> TrackedPeak:
        """Report the step begun last; from the second on that is the steady state, with optimiser state in place."""
        if self._step_start is None:
            raise SidebenchError("no step was tracked: call begin_step() before each training step.")
        return replay(self.events, self._became, self._step_start)

    def see(self, tensor: Tensor, op: str) -> list[int]:
        """Log the tensor's storages where they are new or resized, and return their numbers (none: other device)."""
        if tensor.device != self._device:
            return []
        return [self._see_storage(part.untyped_storage(), op) for part in _strided_parts(tensor)]

    def see_read(self, tensor: Tensor, op: str) -> None:
        """Log a tensor that an operation reads: if its storage is new here, nobody named it and it is an input."""
        born_before = self._born
        for number in self.see(tensor, op):
            if number >= born_before:
                self._became[number] = CATEGORIES.index("inputs")

    def _see_storage(self, storage: torch.UntypedStorage, op: str) -> int:
        size_bytes, address = int(storage.nbytes()), storage._cdata
        live = self._live.get(address)
        if live is None:
            # The Python object of a storage lives as long as the C++ one, so its weak reference dies with the memory.
            live = _Live(self._born, 0, weakref.ref(storage, lambda _: self._died(address)))
            self._live[address] = live
            self._born += 1
        if size_bytes != live.size_bytes:
            self.events.append(Event(op, size_bytes - live.size_bytes, live.number, self._phase))
            live.size_bytes = size_bytes
        return live.number

    def _died(self, address: int) -> None:
        live = self._live.pop(address, None)
        if live is not None:
            self.events.append(Event("death", -live.size_bytes, live.number, self._phase))

    def _mark(self, what: str) -> None:
        self.events.append(Event(what, 0, -1, self._phase))

    def _saved(self, tensor: Tensor) -> Tensor:
        self._label(tensor, "activations")
        return tensor

    def _label(self, tensor: Tensor, category: str) -> None:
        claim = CATEGORIES.index(category)
        for number in self.see(tensor, f"found among the {category}"):
            self._became[number] = min(claim, self._became.get(number, claim))

    def _look_up_owners(self) -> None:
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        state = [] if self._optimizer is None else list(self._optimizer.state.values())
        parameters = [p for module in self._modules for p in module.parameters()]
        parameters += [p for group in groups for p in group["params"]]
        held = {
            "parameters": [*parameters, *(buffer for module in self._modules for buffer in module.buffers())],
            "gradients": [p.grad for p in parameters if p.grad is not None],
            "optimizer": [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)],
        }
        for category, tensors in held.items():
            for tensor in tensors:
                self._label(tensor, category)


class _SeeEveryOperation(TorchDispatchMode):
    def __init__(self, tracker: Tracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracker = tracker

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        op = str(func)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._tracker.see_read(leaf, op)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._tracker.see(leaf, op)
        return result


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _strided_parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that hold the bytes of this one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)  # a wrapper subclass: its bytes lie in inner tensors
    if flatten is not None:
        names, _ = flatten()
        return [part for name in names for part in _strided_parts(getattr(tensor, name))]
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    raise SidebenchError(f"cannot count the bytes of a tensor of layout {tensor.layout}: use strided or sparse_coo.")


def replay(events: Sequence[Event], became: Mapping[int, int], step_start: int) -> TrackedPeak:
    """Run through the log and report the events from index `step_start` on; what lived before them is the floor.

    `became` maps a storage's number to its index in `CATEGORIES`; a storage that it lacks was a temporary.
    """
    live = [0] * len(CATEGORIES)
    total, peak, at, composition = 0, -1, "", list(live)
    by_phase: dict[str, int] = {}
    for position, event in enumerate(events):
        total += event.delta_bytes
        live[became.get(event.storage, len(CATEGORIES) - 1)] += event.delta_bytes
        if position < step_start:
            continue
        by_phase[event.phase] = max(total, by_phase.get(event.phase, 0))
        if total > peak:
            peak, at, composition = total, f"{event.phase}: {event.op}", list(live)
    by_phase.pop(OUTSIDE, None)
    return TrackedPeak(peak, dict(zip(CATEGORIES, composition, strict=True)), by_phase, at)


def track(
    modules: nn.Module | Iterable[nn.Module],
    optimizer: torch.optim.Optimizer,
    inputs: Iterable[Tensor],
    forward: Callable[[], Tensor],
    *,
    steps: int = 2,
    device: torch.device | str | None = None,
) -> TrackedPeak:
    """Train `steps` real steps (phases forward, backward, step with `zero_grad`) and report the last one.

    `forward` returns the scalar loss on the batch `inputs`. The weights do change: give a throw-away copy. An optimiser
    that calls a closure (`torch.optim.LBFGS`) needs a `Tracker` and phases of its own.
    """
    if steps < 2:
        raise SidebenchError(
            f"{steps} step cannot show the steady state, optimiser state appears in it: use 2 or more."
        )

    def train_one_step() -> None:
        with tracker.phase("forward"):
            loss = forward()
        with tracker.phase("backward"):
            loss.backward()
        with tracker.phase("step"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    with Tracker(modules, optimizer, inputs, device=device) as tracker:
        for _ in range(steps):
            tracker.begin_step()
            train_one_step()
    return tracker.peak()
