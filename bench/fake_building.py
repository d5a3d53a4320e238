"""Networks built on fake tensors, which have shapes and no values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class _AnyValue(TorchDispatchMode):
    """While a network is built, a value that is asked of a fake tensor is zero.

    Initialisations redraw until no number is out of bounds (trunc_normal_), and no byte depends on the outcome.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].dtype.is_floating_point else False if args[0].dtype is torch.bool else 0
        return func(*args, **(kwargs or {}))


@contextmanager
def building() -> Iterator[None]:
    """Let networks be built on fake tensors: `Module.to`, which peft calls, would swap tensors, and not fake ones."""
    original = nn.Module._apply
    nn.Module._apply = _assign  # type: ignore[method-assign]
    try:
        with _AnyValue():
            yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


def _assign(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module._apply` by assignment."""
    for child in module.children() if recurse else ():
        _assign(child, fn)
    for name, parameter in module._parameters.items():
        if parameter is not None and (moved := fn(parameter)) is not parameter:
            module._parameters[name] = nn.Parameter(moved.detach(), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module
