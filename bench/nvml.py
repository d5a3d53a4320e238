"""Ask the NVIDIA driver (NVML, through pynvml) about a GPU; whatever it does not answer is a sentence.

GPUs are matched by UUID: CUDA_VISIBLE_DEVICES renumbers them, and CUDA's order is not NVML's even without it.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

NO_DRIVER = "no NVIDIA driver on this machine (NVML library not found)"
OLD_MEMORY_QUERY = "this driver has only the first memory query, which counts what the driver itself reserves as used"
HOST_PIDS = "in a container (a pid namespace of its own) it knows the host's pids"
SAMPLE_SECONDS = 0.005


class NvmlUnavailable(Exception):
    """NVML cannot answer; the message is the sentence to show."""


@contextmanager
def open_nvml() -> Iterator[Any]:
    """Open NVML and yield pynvml; every failure inside leaves as `NvmlUnavailable` with its sentence."""
    try:
        import pynvml
    except ImportError:
        raise NvmlUnavailable("the Python package nvidia-ml-py is not installed") from None
    with in_sentences(pynvml):
        pynvml.nvmlInit()
        try:
            yield pynvml
        finally:
            pynvml.nvmlShutdown()


def nvml_status() -> dict[str, Any]:
    """Driver version and GPUs with their bytes, or `{"unavailable": reason}`; makes no CUDA context."""
    try:
        with open_nvml() as nvml:
            devices = [_described(nvml, handle) for handle in _gpus(nvml)]
            return {"driver": nvml.nvmlSystemGetDriverVersion(), "devices": devices}
    except NvmlUnavailable as error:
        return {"unavailable": str(error)}


def used_by_uuid(nvml: Any) -> dict[str, int]:
    """Bytes in use on every GPU and MIG slice that answers."""
    found = {}
    for handle in _gpus(nvml):
        for each in (handle, *_slices(nvml, handle)):
            try:
                found[nvml.nvmlDeviceGetUUID(each)] = used_bytes(nvml, each)[0]
            except nvml.NVMLError:  # in MIG mode a user may be allowed to ask about his slice and not about the GPU
                continue
    return found


def used_bytes(nvml: Any, handle: Any) -> tuple[int, str]:
    """Bytes in use on the whole GPU, and what is to be said of the figure ("": nothing)."""
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used), ""
    except nvml.NVMLError as error:
        if error.value not in (nvml.NVML_ERROR_FUNCTION_NOT_FOUND, nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH):
            raise
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).used), OLD_MEMORY_QUERY


def process_bytes(nvml: Any, handle: Any, pid: int) -> int:
    """Bytes that the driver books for process `pid` on a GPU; `NvmlUnavailable` says why it does not."""
    listed = _processes(nvml, handle)
    mine = [process.usedGpuMemory for process in listed if process.pid == pid]
    if not mine:
        raise NvmlUnavailable(f"NVML lists {len(listed)} processes on this GPU, not this one: {HOST_PIDS}")
    if any(used is None for used in mine):
        raise NvmlUnavailable("the driver does not tell memory per process (Windows' display driver model, WDDM)")
    return sum(int(used) for used in mine)


def joules_so_far(nvml: Any, handle: Any) -> float:
    """Energy that the whole GPU took since its driver was loaded."""
    return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000  # NVML counts millijoules


def handle_of(nvml: Any, uuid: str) -> Any:
    """Find the GPU by torch's UUID, which lacks NVML's prefix for a whole GPU or a MIG slice."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError as error:
        if error.value not in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT):
            raise
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


@dataclass
class Reading:
    """What one query gave over a block: the largest value, the last one, or why there is none."""

    peak: int | None = None
    last: int | None = None
    unavailable: str = ""


class Sampler:
    """Ask each query every few milliseconds from a thread, and once more at the end.

    A spike shorter than `longest_gap_seconds` may be missed. The last answer is the one that must be there: PyTorch's
    allocator gives nothing back during a run, so its end is its peak but for what others do.
    """

    def __init__(self, queries: Mapping[str, Callable[[], int]], interval_seconds: float = SAMPLE_SECONDS) -> None:
        self.readings = {name: Reading() for name in queries}
        self.samples, self.longest_gap_seconds = 0, 0.0
        self._queries = queries
        self._interval_seconds = interval_seconds
        self._last_seconds = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="nvml-sampler", daemon=True)

    def __enter__(self) -> "Sampler":
        self._last_seconds = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(self._interval_seconds):
            self._sample()

    def _sample(self) -> None:
        for name, query in self._queries.items():
            reading = self.readings[name]
            try:
                reading.last, reading.unavailable = query(), ""
                reading.peak = reading.last if reading.peak is None else max(reading.peak, reading.last)
            except NvmlUnavailable as error:
                reading.last, reading.unavailable = None, str(error)
        now_seconds = time.perf_counter()
        self.longest_gap_seconds = max(self.longest_gap_seconds, now_seconds - self._last_seconds)
        self._last_seconds = now_seconds
        self.samples += 1


@contextmanager
def in_sentences(nvml: Any) -> Iterator[None]:
    """A failure of NVML inside leaves as `NvmlUnavailable`."""
    try:
        yield
    except nvml.NVMLError as error:
        raise NvmlUnavailable(_sentence(nvml, error)) from error


def _sentence(nvml: Any, error: Any) -> str:
    sentences = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: NO_DRIVER,
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is installed but its kernel module is not loaded",
        nvml.NVML_ERROR_NO_PERMISSION: "NVML refuses to answer this user (no permission)",
        nvml.NVML_ERROR_NOT_SUPPORTED: "this GPU or its mode (MIG, vGPU, WSL) does not support the NVML query",
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND: "this NVIDIA driver is too old for the NVML query",
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVML library and the loaded driver differ in version: reboot",
        nvml.NVML_ERROR_NOT_FOUND: "NVML does not know the GPU that torch uses",
    }
    return sentences.get(error.value, f"NVML failed: {error}")


def _gpus(nvml: Any) -> list[Any]:
    return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]


def _slices(nvml: Any, handle: Any) -> list[Any]:
    """The MIG slices of a GPU, which NVML does not list among the GPUs."""
    try:
        most = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except nvml.NVMLError:  # no MIG on this GPU or in this driver
        return []
    found = []
    for index in range(most):
        try:
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
        except nvml.NVMLError:  # places without a slice
            continue
    return found


def _processes(nvml: Any, handle: Any) -> list[Any]:
    """pynvml's unversioned call raises something that is no NVMLError where the driver lacks the newest version."""
    try:
        return list(nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle))
    except nvml.NVMLError as error:
        if error.value != nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            raise
        return list(nvml.nvmlDeviceGetComputeRunningProcesses_v2(handle))


def _described(nvml: Any, handle: Any) -> dict[str, Any]:
    """One GPU; in MIG mode a user may be refused its bytes."""
    facts = {"name": nvml.nvmlDeviceGetName(handle), "uuid": nvml.nvmlDeviceGetUUID(handle)}
    try:
        total = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
        used, remark = used_bytes(nvml, handle)
    except nvml.NVMLError as error:
        return {**facts, "total_bytes": None, "used_bytes": None, "unavailable": _sentence(nvml, error)}
    facts |= {"total_bytes": total, "used_bytes": used}
    return {**facts, "remark": remark} if remark else facts
