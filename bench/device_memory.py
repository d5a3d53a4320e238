"""Read a GPU's memory around a run, from torch's allocator and from the driver (NVML), each figure under its own name.

The figures differ on purpose: `requested` is what tensors asked for (comparable with `tracker` and `predict`),
`allocated` adds the allocator's rounding, `reserved` what it holds from the driver, and the process's NVML figure adds
the CUDA context and library workspaces. NVML degrades by steps, and each step says why: bytes of this process; else how
far the whole GPU grew; else torch's figures alone; without CUDA none of them.
"""

import gc
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from .nvml import (
    HOST_PIDS,
    OLD_MEMORY_QUERY,
    NvmlUnavailable,
    Reading,
    Sampler,
    handle_of,
    in_sentences,
    nvml_status,
    open_nvml,
    process_bytes,
    used_by_uuid,
    used_bytes,
)

_TORCH_FIELDS = {
    "peak_allocated_bytes": "allocated_bytes.all.peak",
    "peak_reserved_bytes": "reserved_bytes.all.peak",
    "peak_requested_bytes": "requested_bytes.all.peak",
}
_RESERVED_NOW = "reserved_bytes.all.current"
_NVML_FIELDS = ("nvml_process_bytes", "nvml_device_growth_bytes")
_TOO_SMALL = {  # than what torch holds, which is in both figures
    "nvml_process_bytes": f"NVML books fewer bytes for this pid than torch holds, so it is another's: {HOST_PIDS}",
    "nvml_device_growth_bytes": "this GPU's use grew by less than torch holds: other processes gave memory back",
}
UPPER_BOUND = "shared GPU: upper bound (growth of the whole GPU, so what others took meanwhile is in it)"


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one GPU; a field that could not be measured is None and `unavailable` says why.

    `nvml_process_bytes` is the peak of what the driver books for this process, `context_bytes` the part of it at the
    end that torch's allocator does not hold: the CUDA context, loaded kernels, library workspaces.
    `nvml_device_growth_bytes` is the peak of the whole GPU's use minus that before this process had a CUDA context.
    Both are sampled, and read once after the last step. `remarks` qualify a figure.
    """

    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_requested_bytes: int | None = None
    nvml_process_bytes: int | None = None
    nvml_device_growth_bytes: int | None = None
    context_bytes: int | None = None
    nvml_samples: int = 0
    nvml_longest_gap_seconds: float = 0.0
    unavailable: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)


class DeviceMeter:
    """Construct before the first CUDA call, enter after the warm-up steps, read `result()` after the block."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._no_torch_figures = why_not_measurable(self.device)
        self._used_before: dict[str, int] = {}  # GPU UUID -> bytes
        self._no_growth = ""
        self._old_memory_query = False
        self._sampler = Sampler({})
        self._readings: dict[str, Reading] = {}
        self._result: DeviceMemory | None = None
        if self._no_torch_figures:
            return
        if torch.cuda.is_initialized():
            self._no_growth = "CUDA was already in use when the meter was made, so there is no level to compare with"
            return
        try:
            with open_nvml() as nvml:
                self._used_before = used_by_uuid(nvml)
        except NvmlUnavailable as error:
            self._no_growth = str(error)

    def __enter__(self) -> "DeviceMeter":
        if self._no_torch_figures:
            return self
        gc.collect()  # first, so that what it frees can be given back
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self._opened = ExitStack()
        try:
            self._sampler = self._opened.enter_context(Sampler(self._queries()))
            self._readings = self._sampler.readings
        except NvmlUnavailable as error:
            self._opened.close()
            self._readings = {name: Reading(unavailable=str(error)) for name in _NVML_FIELDS}
        return self

    def __exit__(self, *exception: object) -> None:
        if self._no_torch_figures:
            names = (*_TORCH_FIELDS, *_NVML_FIELDS, "context_bytes")
            self._result = DeviceMemory(unavailable=dict.fromkeys(names, self._no_torch_figures))
            return
        try:
            torch.cuda.synchronize(self.device)
        finally:
            self._opened.close()  # which samples once more
        statistics = torch.cuda.memory_stats(self.device)
        values: dict[str, int] = {}
        unavailable: dict[str, str] = {}
        for name, key in _TORCH_FIELDS.items():
            if key in statistics:
                values[name] = int(statistics[key])
            else:
                unavailable[name] = f"this allocator keeps no {key} (PYTORCH_ALLOC_CONF chose another backend)"
        self._add_driver_figures(statistics.get(_RESERVED_NOW), values, unavailable)
        self._result = DeviceMemory(
            **values,
            nvml_samples=self._sampler.samples,
            nvml_longest_gap_seconds=self._sampler.longest_gap_seconds,
            unavailable=unavailable,
            remarks=self._remarks(values),
        )

    def result(self) -> DeviceMemory:
        """Return what was measured; only after the block."""
        if self._result is None:
            raise RuntimeError("the meter's block has not ended")
        return self._result

    def _queries(self) -> dict[str, Callable[[], int]]:
        """What to ask the driver about this GPU; NVML stays open until the block ends."""
        nvml = self._opened.enter_context(open_nvml())
        uuid = torch_uuid(self.device)
        with in_sentences(nvml):
            handle = handle_of(nvml, uuid)
            before = self._used_before.get(nvml.nvmlDeviceGetUUID(handle))

        def process() -> int:
            with in_sentences(nvml):
                return process_bytes(nvml, handle, os.getpid())

        def growth() -> int:
            if self._no_growth or before is None:
                raise NvmlUnavailable(self._no_growth or "NVML did not tell this GPU's use when the meter was made")
            with in_sentences(nvml):
                used, remark = used_bytes(nvml, handle)
            self._old_memory_query = bool(remark)
            return used - before

        return dict(zip(_NVML_FIELDS, (process, growth), strict=True))

    def _add_driver_figures(self, reserved: int | None, values: dict[str, int], unavailable: dict[str, str]) -> None:
        process = self._readings["nvml_process_bytes"]
        for name in _NVML_FIELDS:
            reading = self._readings[name]
            if reading.last is not None and reading.last < (reserved or 0):
                reading.last, reading.unavailable = None, _TOO_SMALL[name]
            if reading.last is None or reading.peak is None:
                unavailable[name] = reading.unavailable
            else:
                values[name] = reading.peak
        if process.last is None:
            unavailable["context_bytes"] = unavailable["nvml_process_bytes"]
            grown = "nvml_device_growth_bytes" in values
            instead = "the growth of the whole GPU stands in (shared GPU: upper bound)" if grown else "torch's remain"
            unavailable["nvml_process_bytes"] += f"; {instead}"
        elif reserved is None:
            unavailable["context_bytes"] = f"this allocator keeps no {_RESERVED_NOW}"
        else:
            values["context_bytes"] = process.last - int(reserved)

    def _remarks(self, values: dict[str, int]) -> dict[str, str]:
        if "nvml_device_growth_bytes" not in values:
            return {}
        old = f"; {OLD_MEMORY_QUERY}, before and after alike" if self._old_memory_query else ""
        return {"nvml_device_growth_bytes": UPPER_BOUND + old}


def torch_uuid(device: torch.device) -> str:
    """The UUID of a CUDA device as torch writes it; makes a CUDA context."""
    return str(torch.cuda.get_device_properties(device).uuid)


def why_not_measurable(device: torch.device) -> str:
    """Why this device has no memory figures of its own; "" where it has."""
    if device.type != "cuda":
        return f"no device memory is measured on {device.type!r}, only on a CUDA device"
    if not torch.cuda.is_available():  # torch's counters would answer 0 here
        return f"torch sees no CUDA device; {nvml_status().get('unavailable', 'the NVIDIA driver does see a GPU')}"
    return ""
