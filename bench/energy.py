"""Energy of a block on a GPU, from the driver's own counter (NVML, total energy since the driver was loaded).

The counter belongs to the whole GPU: its idle power is in it, and on a shared GPU what others do. The driver renews it
now and then, so a block must last far longer than that for the figure to mean something. The power sensors of some GPUs
look only a part of the time (arXiv 2312.02741), so compare figures of one GPU model, and small differences not at all.
"""

import time
from collections.abc import Callable
from types import TracebackType

import torch

from .device_memory import torch_uuid, why_not_measurable
from .nvml import NvmlUnavailable, handle_of, joules_so_far, open_nvml

WHOLE_GPU = "energy of the whole GPU: its idle power is in it, and on a shared GPU what others did meanwhile"
_SHORTEST_SECONDS = 2.0  # many renewals of the counter, whose rate the driver does not tell


class EnergyMeter:
    """Enter once the device is warm; after the block `joules` is a number, or None and `unavailable` says why."""

    def __init__(self, device: torch.device | str) -> None:
        self.joules: float | None = None
        self._device = torch.device(device)
        self.unavailable = why_not_measurable(self._device).replace("device memory", "energy") or self._why_no_counter()

    def __enter__(self) -> "EnergyMeter":
        if not self.unavailable:
            self._start = self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.unavailable or error is not None:
            self.unavailable = self.unavailable or "the block failed"
            return
        try:
            self.joules = self._read() - self._start
        except NvmlUnavailable as refusal:
            self.unavailable = str(refusal)

    def _why_no_counter(self) -> str:
        try:
            self._read()
        except NvmlUnavailable as error:
            return f"no energy counter: {error}"
        return ""

    def _read(self) -> float:
        torch.cuda.synchronize(self._device)
        with open_nvml() as nvml:
            return joules_so_far(nvml, handle_of(nvml, torch_uuid(self._device)))


def joules_per_step(step: Callable[[], object], device: torch.device) -> tuple[float | None, str]:
    """Repeat a step that is warm until the counter means something: joules of one, or None and why not."""
    meter = EnergyMeter(device)
    if meter.unavailable:
        return None, meter.unavailable
    repeats = 0
    with meter:
        begun = time.perf_counter()
        while repeats == 0 or time.perf_counter() - begun < _SHORTEST_SECONDS:
            step()
            torch.cuda.synchronize(device)  # else the host runs ahead of the device and the clock says nothing
            repeats += 1
    return (None, meter.unavailable) if meter.joules is None else (meter.joules / repeats, "")
