"""The host meter against memory of known size; the device meter's refusals, and its logic against a STUB of pynvml.

No figure of the stub is a measurement: it shows which field a number ends in and which sentence a failure gives. The
real pynvml on a stub of the driver's library is in test_nvml_stub.py, a real device in test_gpu.py.
"""

import os
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pynvml
import pytest
import torch

from sidebench.bench import device_memory, energy, host_memory
from sidebench.bench.device_memory import UPPER_BOUND, DeviceMemory, DeviceMeter
from sidebench.bench.energy import EnergyMeter, joules_per_step
from sidebench.bench.host_memory import HostMeter
from sidebench.bench.nvml import SAMPLE_SECONDS, NvmlUnavailable, Sampler, nvml_status

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
    return {name: value for name, value in asdict(memory).items() if name.endswith("_bytes")}


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


def test_without_a_gpu_there_is_no_energy_but_a_reason() -> None:
    ran: list[int] = []
    assert joules_per_step(lambda: ran.append(1), torch.device("cpu")) == (
        None,
        "no energy is measured on 'cpu', only on a CUDA device",
    )
    assert ran == []


@pytest.mark.parametrize(("answers", "reason"), [([1.0, 1.0, None], "gone"), ([1.0, 1.0, 3.0], "")])
def test_a_counter_that_goes_in_between_leaves_no_energy(
    monkeypatch: pytest.MonkeyPatch, answers: list[float | None], reason: str
) -> None:
    def read(_: EnergyMeter) -> float:
        if (found := answers.pop(0)) is None:
            raise NvmlUnavailable("gone")
        return found

    monkeypatch.setattr(energy, "why_not_measurable", lambda _: "")
    monkeypatch.setattr(EnergyMeter, "_read", read)
    with EnergyMeter("cuda") as meter:
        pass
    assert (meter.joules, meter.unavailable) == (None if reason else 2.0, reason)


def test_a_block_that_failed_has_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "why_not_measurable", lambda _: "")
    monkeypatch.setattr(EnergyMeter, "_read", lambda _: 1.0)
    meter = EnergyMeter("cuda")
    with pytest.raises(RuntimeError, match="planted"), meter:
        raise RuntimeError("planted")
    assert (meter.joules, meter.unavailable) == (None, "the block failed")


class StubNvml(SimpleNamespace):
    """Stands in for pynvml: its real errors and constants, an invented GPU, failures planted by name of query."""

    def __init__(self, fail: dict[str, int] | None = None, processes: list[Any] | None = None) -> None:
        constants = {name: getattr(pynvml, name) for name in dir(pynvml) if name.startswith("NVML_ERROR")}
        super().__init__(**constants, NVMLError=pynvml.NVMLError, nvmlMemory_v2=pynvml.nvmlMemory_v2)
        self.used_v2 = 1000
        self.open_count = 0
        self._fail = fail or {}
        self._uuid = "GPU-1234"
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

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: str) -> list[Any]:
        self._maybe_fail("processes")
        return self._processes


def _process(used: int | None, pid: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(pid=os.getpid() if pid is None else pid, usedGpuMemory=used)


PID = 12345
STATISTICS = {
    "allocated_bytes.all.peak": 22,
    "reserved_bytes.all.peak": 33,
    "requested_bytes.all.peak": 11,
    "reserved_bytes.all.current": 30,
}


def _stub_cuda(monkeypatch: pytest.MonkeyPatch, calls: list[str], statistics: dict[str, int]) -> None:
    """Replace torch.cuda; `calls` hears of what has an effect on a device."""
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": False,
        "get_device_properties": SimpleNamespace(uuid="1234"),
        "memory_stats": statistics,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: calls.append(name))


def _measure_on_stub(
    monkeypatch: pytest.MonkeyPatch, nvml: StubNvml, *, grows: int = 0, statistics: dict[str, int] = STATISTICS
) -> DeviceMemory:
    """Run the meter on a stub of torch.cuda and of NVML."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    _stub_cuda(monkeypatch, [], statistics)
    with DeviceMeter("cuda:0") as meter:
        nvml.used_v2 += grows
    assert nvml.open_count == 0
    return meter.result()


def test_stub_garbage_goes_before_the_cache_is_emptied_and_the_peak_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    _stub_cuda(monkeypatch, calls, STATISTICS)
    monkeypatch.setitem(sys.modules, "pynvml", StubNvml(processes=[_process(44)]))
    monkeypatch.setattr(device_memory.gc, "collect", lambda: calls.append("collect"))
    with DeviceMeter("cuda:0"):
        calls.append("steps")
    assert calls == ["collect", "synchronize", "empty_cache", "reset_peak_memory_stats", "steps", "synchronize"]


def test_stub_the_last_reading_is_after_the_last_step_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a step keeps the sampler from running, the allocator gives nothing back, so the end tells."""
    nvml = StubNvml()
    sizes = iter([44, 99])  # at the start, and when the steps in flight have ended
    monkeypatch.setattr(device_memory.Sampler, "_sample_until_stopped", lambda _: None)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    _stub_cuda(monkeypatch, [], STATISTICS)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: nvml._processes.append(_process(next(sizes), pid=PID)))
    monkeypatch.setattr(device_memory.os, "getpid", lambda: PID)
    with DeviceMeter("cuda:0") as meter:
        pass
    assert meter.result().nvml_process_bytes == 44 + 99
    assert meter.result().nvml_samples == 1


def test_a_query_that_fails_at_the_end_leaves_no_figure_and_one_that_recovers_does() -> None:
    answers = {"failing": iter([5, None]), "recovering": iter([None, 3])}

    def query(name: str) -> int:
        if (found := next(answers[name])) is None:
            raise NvmlUnavailable("gone")
        return found

    sampler = Sampler({name: partial(query, name) for name in answers})
    sampler._sample()
    sampler._sample()
    assert (sampler.readings["failing"].last, sampler.readings["failing"].unavailable) == (None, "gone")
    assert (sampler.readings["recovering"].last, sampler.readings["recovering"].unavailable) == (3, "")


def test_nvml_is_sampled_at_least_every_ten_milliseconds() -> None:
    assert SAMPLE_SECONDS <= 0.01
    heard = threading.Event()

    def query() -> int:
        if sampler.samples == 5:
            heard.set()
        return 1

    sampler = Sampler({"figure": query})
    with sampler:
        assert heard.wait(60)
    assert sampler.longest_gap_seconds > 0


def test_stub_every_figure_lands_in_its_own_field(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = StubNvml(processes=[_process(7, pid=1), _process(44)])
    memory = _measure_on_stub(monkeypatch, nvml, grows=55)
    assert memory.nvml_samples >= 1
    assert replace(memory, nvml_samples=0, nvml_longest_gap_seconds=0.0) == DeviceMemory(
        peak_allocated_bytes=22,
        peak_reserved_bytes=33,
        peak_requested_bytes=11,
        nvml_process_bytes=44,
        nvml_device_growth_bytes=55,
        context_bytes=14,
        unavailable={},
        remarks={"nvml_device_growth_bytes": UPPER_BOUND},
    )


@pytest.mark.parametrize("grows", [-500, 0, 29])  # torch holds 30
def test_stub_growth_below_what_torch_holds_is_no_figure(monkeypatch: pytest.MonkeyPatch, grows: int) -> None:
    memory = _measure_on_stub(monkeypatch, StubNvml(processes=[]), grows=grows)
    assert memory.nvml_device_growth_bytes is None
    assert "other processes gave memory back" in memory.unavailable["nvml_device_growth_bytes"]
    assert memory.unavailable["nvml_process_bytes"].endswith("torch's remain")
    assert memory.remarks == {}


def test_stub_another_allocator_keeps_some_figures_only(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = _measure_on_stub(monkeypatch, StubNvml(processes=[_process(44)]), statistics={"num_ooms": 0})
    assert memory.nvml_process_bytes == 44
    assert memory.peak_requested_bytes is None
    assert "PYTORCH_ALLOC_CONF" in memory.unavailable["peak_requested_bytes"]
    assert memory.context_bytes is None
    assert "reserved_bytes.all.current" in memory.unavailable["context_bytes"]


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
    assert set(memory.unavailable) == {"nvml_process_bytes", "nvml_device_growth_bytes", "context_bytes"}
    assert all(sentence in reason for reason in memory.unavailable.values())
    assert sentence in nvml_status()["unavailable"]


@pytest.mark.parametrize(
    ("nvml", "sentence"),
    [
        (StubNvml(fail={"processes": pynvml.NVML_ERROR_NOT_SUPPORTED}), "does not support"),
        (StubNvml(fail={"processes": pynvml.NVML_ERROR_GPU_IS_LOST}), "NVML failed: GPU is lost"),
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
