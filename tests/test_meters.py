"""The host meter against memory of known size; the device meter's refusals, and its logic against a STUB driver.

No figure of the stub is a measurement: it shows which field a number ends in and which sentence a failure gives.
"""

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pynvml
import pytest
import torch

from sidebench.bench import host_memory
from sidebench.bench.device_memory import DeviceMemory, DeviceMeter, nvml_status
from sidebench.bench.host_memory import HostMeter

MB = 1_000_000
linux_only = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is told on Linux only")


@linux_only
def test_the_host_meter_sees_an_array_of_200_mb() -> None:
    with HostMeter() as meter:
        array = np.ones(200 * MB, dtype=np.uint8)
    assert array.nbytes <= meter.result().peak_anonymous_bytes + 2 * MB
    assert meter.result().peak_anonymous_bytes < 210 * MB
    assert meter.result().unavailable == {}


@linux_only
def test_the_host_meter_remembers_memory_that_was_freed() -> None:
    with HostMeter() as meter:
        array = np.ones(100 * MB, dtype=np.uint8)
        time.sleep(0.03)
        del array
    assert 98 * MB < meter.result().peak_anonymous_bytes < 110 * MB


@linux_only
def test_blocks_that_the_c_library_keeps_after_they_were_freed_are_not_counted() -> None:
    block = torch.ones(16 * MB)
    del block  # after which glibc, left alone, keeps blocks of up to 64 MB for later
    with HostMeter() as meter:
        for _ in range(4):
            large = [torch.ones(5 * MB // 4) for _ in range(8)]  # 40 MB alive at most
            small = [torch.ones(MB // 40) for _ in range(8)]  # 0.8 MB that pin what lies below them
            del large
            time.sleep(0.01)
        held = len(small)
        time.sleep(0.01)
        now = host_memory._LinuxStatus().read_bytes()["anonymous"] - meter._baseline["anonymous"]
    assert held == 8
    assert now < 8 * MB
    assert meter.result().peak_anonymous_bytes < 50 * MB


@linux_only
def test_memory_from_before_the_block_is_not_counted() -> None:
    held = np.ones(100 * MB, dtype=np.uint8)
    with HostMeter() as meter:
        held.sum()
    assert meter.result().peak_anonymous_bytes < 5 * MB


@linux_only
def test_a_memory_mapped_file_is_resident_but_not_anonymous(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.ones(64 * MB, dtype=np.uint8))
    with HostMeter() as meter:
        rows = np.load(tmp_path / "rows.npy", mmap_mode="r")
        assert int(rows.max()) == 1
    assert meter.result().peak_anonymous_bytes < 5 * MB
    assert meter.result().peak_resident_bytes > 60 * MB  # else the file was never read and the line above says nothing


@linux_only
def test_the_host_meter_samples_every_few_milliseconds() -> None:
    with HostMeter() as meter:
        time.sleep(0.3)
    assert meter.result().samples >= 0.3 / 0.005
    assert meter.result().longest_gap_seconds > 0


def test_without_rss_anon_the_host_meter_says_so_and_gives_resident_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host_memory, "_STATUS", tmp_path / "missing")
    with HostMeter() as meter:
        array = np.ones(100 * MB, dtype=np.uint8)
    assert array.nbytes <= meter.result().peak_resident_bytes + 5 * MB
    assert meter.result().peak_anonymous_bytes is None
    assert "RssAnon" in meter.result().unavailable["peak_anonymous_bytes"]


def test_without_any_probe_the_host_meter_gives_none_and_reasons(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host_memory, "_STATUS", tmp_path / "missing")
    monkeypatch.setitem(sys.modules, "psutil", None)
    with HostMeter() as meter:
        pass
    assert meter.result().peak_resident_bytes is None
    assert set(meter.result().unavailable) == {"peak_anonymous_bytes", "peak_resident_bytes"}


def test_a_meter_has_no_result_before_its_block_ends() -> None:
    for meter in (HostMeter(), DeviceMeter("cpu")):
        with pytest.raises(RuntimeError, match="has not ended"):
            meter.result()


def _all_figures(memory: DeviceMemory) -> dict[str, int | None]:
    return {name: value for name, value in asdict(memory).items() if name != "unavailable"}


def _measure(device: str) -> DeviceMemory:
    with DeviceMeter(device) as meter:
        pass
    return meter.result()


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_device_that_is_not_cuda_gives_none_with_reasons_and_never_zero(device: str) -> None:
    memory = _measure(device)
    assert set(_all_figures(memory).values()) == {None}
    assert set(memory.unavailable) == set(_all_figures(memory))
    assert all(device in reason for reason in memory.unavailable.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_gives_none_with_reasons_and_never_zero() -> None:
    memory = _measure("cuda")
    assert set(_all_figures(memory).values()) == {None}
    assert "torch sees no CUDA device" in memory.unavailable["peak_allocated_bytes"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_requested_is_at_most_allocated_is_at_most_reserved() -> None:
    with DeviceMeter("cuda") as meter:
        kept = torch.ones(10 * MB, device="cuda")
    memory = meter.result()
    assert kept.nbytes <= memory.peak_requested_bytes <= memory.peak_allocated_bytes <= memory.peak_reserved_bytes


class StubNvml(SimpleNamespace):
    """Stands in for pynvml: its real errors and constants, an invented GPU, failures planted by name of query."""

    def __init__(
        self, fail: dict[str, int] | None = None, processes: list[Any] | None = None, mig: bool = False
    ) -> None:
        constants = {name: getattr(pynvml, name) for name in dir(pynvml) if name.startswith("NVML_ERROR")}
        super().__init__(**constants, NVMLError=pynvml.NVMLError, nvmlMemory_v2=pynvml.nvmlMemory_v2)
        self.used_v2 = 1000
        self.open_count = 0
        self._fail = fail or {}
        self._uuid = "MIG-1234" if mig else "GPU-1234"
        self._processes = [] if processes is None else processes

    def _maybe_fail(self, name: str) -> None:
        if name in self._fail:
            raise pynvml.NVMLError(self._fail[name])

    def nvmlInit(self) -> None:
        self._maybe_fail("init")
        self.open_count += 1

    def nvmlShutdown(self) -> None:
        self.open_count -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self._uuid:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "handle"

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return self._uuid

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "stub GPU"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "0.stub"

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> SimpleNamespace:
        self._maybe_fail("memory_v2" if version else "memory_v1")
        return SimpleNamespace(total=80_000, used=self.used_v2 if version else self.used_v2 + 300)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        self._maybe_fail("processes")
        return self._processes


def _process(used: int | None, pid: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(pid=os.getpid() if pid is None else pid, usedGpuMemory=used)


def _measure_on_stub(monkeypatch: pytest.MonkeyPatch, nvml: StubNvml, *, grows: int = 0) -> DeviceMemory:
    """Run the meter on a stub of torch.cuda and of NVML."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    statistics = {"allocated_bytes.all.peak": 22, "reserved_bytes.all.peak": 33, "requested_bytes.all.peak": 11}
    stubbed: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_stats": lambda device: statistics,
        "get_device_properties": lambda device: SimpleNamespace(uuid="1234"),
    }
    for name, function in stubbed.items():
        monkeypatch.setattr(torch.cuda, name, function)
    with DeviceMeter("cuda:0") as meter:
        nvml.used_v2 += grows
    assert nvml.open_count == 0
    return meter.result()


def test_stub_every_figure_lands_in_its_own_field(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = StubNvml(processes=[_process(7, pid=1), _process(44)])
    assert _measure_on_stub(monkeypatch, nvml, grows=55) == DeviceMemory(
        peak_allocated_bytes=22,
        peak_reserved_bytes=33,
        peak_requested_bytes=11,
        nvml_process_bytes=44,
        nvml_device_growth_bytes=55,
        unavailable={},
    )


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "differ in version"),
        (pynvml.NVML_ERROR_UNKNOWN, "Unknown Error"),
    ],
)
def test_stub_without_nvml_torchs_figures_remain(monkeypatch: pytest.MonkeyPatch, code: int, sentence: str) -> None:
    memory = _measure_on_stub(monkeypatch, StubNvml(fail={"init": code}))
    assert memory.peak_allocated_bytes == 22
    assert memory.nvml_process_bytes is None
    assert memory.nvml_device_growth_bytes is None
    assert set(memory.unavailable) == {"nvml_process_bytes", "nvml_device_growth_bytes"}
    assert all(sentence in reason for reason in memory.unavailable.values())
    assert sentence in nvml_status()["unavailable"]


@pytest.mark.parametrize(
    ("nvml", "sentence"),
    [
        (StubNvml(processes=[]), "container"),
        (StubNvml(processes=[_process(7, pid=-1)]), "container"),
        (StubNvml(processes=[_process(None)]), "WDDM"),
        (StubNvml(fail={"processes": pynvml.NVML_ERROR_NO_PERMISSION}), "no permission"),
        (StubNvml(fail={"processes": pynvml.NVML_ERROR_NOT_SUPPORTED}), "does not support"),
        (StubNvml(fail={"processes": pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}), "too old"),
    ],
)
def test_stub_without_process_bytes_the_growth_of_the_gpu_remains(
    monkeypatch: pytest.MonkeyPatch, nvml: StubNvml, sentence: str
) -> None:
    memory = _measure_on_stub(monkeypatch, nvml, grows=55)
    assert memory.nvml_process_bytes is None
    assert sentence in memory.unavailable["nvml_process_bytes"]
    assert memory.nvml_device_growth_bytes == 55
    assert "nvml_device_growth_bytes" not in memory.unavailable


def test_stub_an_old_driver_falls_back_to_the_first_memory_query(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = StubNvml(fail={"memory_v2": pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}, processes=[_process(44)])
    assert _measure_on_stub(monkeypatch, nvml, grows=55).nvml_device_growth_bytes == 55


def test_stub_a_mig_slice_is_found_by_its_own_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = StubNvml(processes=[_process(44)], mig=True)
    assert _measure_on_stub(monkeypatch, nvml).nvml_process_bytes == 44


def test_stub_a_meter_made_after_the_cuda_context_has_no_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = StubNvml(processes=[_process(44)])
    _measure_on_stub(monkeypatch, nvml)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with DeviceMeter("cuda:0") as meter:
        pass
    assert meter.result().nvml_device_growth_bytes is None
    assert "already in use" in meter.result().unavailable["nvml_device_growth_bytes"]
    assert meter.result().nvml_process_bytes == 44


def test_stub_nvml_status_lists_the_driver_and_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", StubNvml())
    gpu = {"name": "stub GPU", "uuid": "GPU-1234", "total_bytes": 80_000, "used_bytes": 1000}
    assert nvml_status() == {"driver": "0.stub", "devices": [gpu]}


def test_without_the_nvml_package_the_status_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "not installed" in nvml_status()["unavailable"]
