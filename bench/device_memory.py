"""Read a GPU's memory after a run, from torch's allocator and from the driver (NVML), each figure under its own name.

The figures differ on purpose: `requested` is what tensors asked for (comparable with `tracker`), `allocated` adds the
allocator's rounding, `reserved` what it holds from the driver, and the process's NVML figure adds the CUDA context and
library workspaces. NVML degrades by steps, and each step says why: bytes of this process; else how far the whole GPU
grew; else torch's figures alone. GPUs are matched by UUID, since CUDA_VISIBLE_DEVICES renumbers them and NVML does not.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

_TORCH_FIELDS = {
    "peak_allocated_bytes": "allocated_bytes.all.peak",
    "peak_reserved_bytes": "reserved_bytes.all.peak",
    "peak_requested_bytes": "requested_bytes.all.peak",
}
_NVML_FIELDS = ("nvml_process_bytes", "nvml_device_growth_bytes")


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one GPU; a field that could not be measured is None and `unavailable` says why.

    `nvml_process_bytes` is read once at the end: the allocator gives nothing back during a run, so that is its peak.
    `nvml_device_growth_bytes` is the GPU's use minus that before this process had a CUDA context; on a shared GPU it
    includes what others took meanwhile.
    """

    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_requested_bytes: int | None = None
    nvml_process_bytes: int | None = None
    nvml_device_growth_bytes: int | None = None
    unavailable: dict[str, str] = field(default_factory=dict)


class NvmlUnavailable(Exception):
    """NVML cannot answer; the message is the sentence to show."""


class DeviceMeter:
    """Construct before the first CUDA call, enter after the warm-up steps, read `result()` after the block."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._no_torch_figures = _why_not_measurable(self._device)
        self._used_before: dict[str, int] = {}  # GPU UUID -> bytes
        self._no_growth = ""
        self._result: DeviceMemory | None = None
        if self._no_torch_figures:
            return
        if torch.cuda.is_initialized():
            self._no_growth = "CUDA was already in use when the meter was made, so there is no level to compare with"
            return
        try:
            with _nvml() as nvml:
                handles = _handles(nvml)
                self._used_before = {nvml.nvmlDeviceGetUUID(handle): _used_bytes(nvml, handle) for handle in handles}
        except NvmlUnavailable as error:
            self._no_growth = str(error)

    def __enter__(self) -> "DeviceMeter":
        if not self._no_torch_figures:
            torch.cuda.synchronize(self._device)
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._no_torch_figures:
            names = (*_TORCH_FIELDS, *_NVML_FIELDS)
            self._result = DeviceMemory(unavailable=dict.fromkeys(names, self._no_torch_figures))
            return
        torch.cuda.synchronize(self._device)
        statistics = torch.cuda.memory_stats(self._device)
        values: dict[str, int] = {}
        unavailable: dict[str, str] = {}
        for name, key in _TORCH_FIELDS.items():
            if key in statistics:
                values[name] = int(statistics[key])
            else:
                unavailable[name] = f"this allocator keeps no {key} (PYTORCH_ALLOC_CONF chose another backend)"
        uuid = str(torch.cuda.get_device_properties(self._device).uuid)
        for name, read in zip(_NVML_FIELDS, (self._process_bytes, self._growth_bytes), strict=True):
            try:
                values[name] = read(uuid)
            except NvmlUnavailable as error:
                unavailable[name] = str(error)
        self._result = DeviceMemory(**values, unavailable=unavailable)

    def result(self) -> DeviceMemory:
        """Return what was measured; only after the block."""
        if self._result is None:
            raise RuntimeError("the meter's block has not ended")
        return self._result

    def _process_bytes(self, uuid: str) -> int:
        with _nvml() as nvml:
            return process_bytes(nvml, uuid, os.getpid())

    def _growth_bytes(self, uuid: str) -> int:
        if self._no_growth:
            raise NvmlUnavailable(self._no_growth)
        with _nvml() as nvml:
            handle = _handle_of(nvml, uuid)
            before = self._used_before.get(nvml.nvmlDeviceGetUUID(handle))
            if before is None:
                raise NvmlUnavailable("NVML did not list this GPU when the meter was made (a MIG slice is not listed)")
            return _used_bytes(nvml, handle) - before


def process_bytes(nvml: Any, uuid: str, pid: int) -> int:
    """Bytes that the driver books for process `pid` on the GPU `uuid`; `NvmlUnavailable` says why it does not."""
    listed = nvml.nvmlDeviceGetComputeRunningProcesses(_handle_of(nvml, uuid))
    mine = [process.usedGpuMemory for process in listed if process.pid == pid]
    if not mine:
        raise NvmlUnavailable(
            f"NVML lists {len(listed)} processes on this GPU, not this one: in a container it sees the host's pids"
        )
    if any(used is None for used in mine):
        raise NvmlUnavailable("the driver does not tell memory per process (Windows' display driver model, WDDM)")
    return sum(int(used) for used in mine)


def nvml_status() -> dict[str, Any]:
    """Driver version and GPUs with their bytes, or `{"unavailable": reason}`; makes no CUDA context."""
    try:
        with _nvml() as nvml:
            devices = []
            for handle in _handles(nvml):
                total_bytes = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
                devices.append(
                    {
                        "name": nvml.nvmlDeviceGetName(handle),
                        "uuid": nvml.nvmlDeviceGetUUID(handle),
                        "total_bytes": total_bytes,
                        "used_bytes": _used_bytes(nvml, handle),
                    }
                )
            return {"driver": nvml.nvmlSystemGetDriverVersion(), "devices": devices}
    except NvmlUnavailable as error:
        return {"unavailable": str(error)}


def _why_not_measurable(device: torch.device) -> str:
    if device.type != "cuda":
        return f"no device memory is measured on {device.type!r}, only on a CUDA device"
    if not torch.cuda.is_available():  # torch's counters would answer 0 here
        return f"torch sees no CUDA device; {nvml_status().get('unavailable', 'the NVIDIA driver does see a GPU')}"
    return ""


@contextmanager
def _nvml() -> Iterator[Any]:
    """Open NVML; every failure inside leaves as `NvmlUnavailable` with its sentence."""
    try:
        import pynvml
    except ImportError:
        raise NvmlUnavailable("the Python package nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
        try:
            yield pynvml
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(_sentence(pynvml, error)) from error


def _sentence(nvml: Any, error: Any) -> str:
    sentences = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver on this machine (NVML library not found)",
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is installed but its kernel module is not loaded",
        nvml.NVML_ERROR_NO_PERMISSION: "NVML refuses to answer this user (no permission)",
        nvml.NVML_ERROR_NOT_SUPPORTED: "this GPU or its mode (MIG, vGPU) does not support the NVML query",
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND: "this NVIDIA driver is too old for the NVML query",
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVML library and the loaded driver differ in version: reboot",
        nvml.NVML_ERROR_NOT_FOUND: "NVML does not know the GPU that torch uses",
    }
    return sentences.get(error.value, f"NVML failed: {error}")


def _handles(nvml: Any) -> list[Any]:
    return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]


def _handle_of(nvml: Any, uuid: str) -> Any:
    """Find the GPU by torch's UUID, which lacks NVML's prefix for a whole GPU or a MIG slice."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError as error:
        if error.value not in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT):
            raise
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _used_bytes(nvml: Any, handle: Any) -> int:
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used)
    except nvml.NVMLError as error:
        if error.value != nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            raise
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)  # old driver: includes what the driver itself reserves
