"""The device meter through the real pynvml and a STUB of the driver's library, in a child process.

No figure here is a measurement: the stub shows that structs are read rightly, which field a number ends in, and which
sentence each refusal gives. `python test_nvml_stub.py` is the child; torch.cuda is replaced in it and nowhere else.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidebench.bench import energy
from sidebench.bench.device_memory import DeviceMeter
from sidebench.bench.doctor import examine
from sidebench.bench.energy import EnergyMeter
from sidebench.bench.nvml import nvml_status

LIBRARY = "libnvidia-ml.so.1"  # what pynvml opens
SOURCE = Path(__file__).with_name("nvml_stub.c")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
UUIDS = {  # in CUDA's order, which is not the stub's
    "two GPUs": ("aaaaaaaa-0000-0000-0000-000000000000", "bbbbbbbb-0000-0000-0000-000000000001"),
    "mig": ("cccccccc-0000-0000-0000-000000000002",),
    "unknown to NVML": ("dddddddd-0000-0000-0000-000000000003",),
}
RESERVED = 4000  # what torch says that it holds
PROCESS, SPIKE = 5000, 9000  # at the end, and in between
GREW, GROWN = 6500, 7000

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C compiler"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stub is loaded as Linux loads libraries"),
]


# The child


def _replace_torch_cuda(scenario: str) -> None:
    statistics = {
        "allocated_bytes.all.peak": 22,
        "reserved_bytes.all.peak": 33,
        "requested_bytes.all.peak": 11,
        "reserved_bytes.all.current": 6000 if scenario == "another process's pid" else RESERVED,
    }
    uuids = UUIDS.get(scenario, UUIDS["two GPUs"])
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_stats": lambda device: statistics,
        "get_device_properties": lambda device: SimpleNamespace(uuid=uuids[device.index or 0]),
        "get_device_name": lambda index: "stub",
        "device_count": lambda: len(uuids),
    }
    for name, function in replaced.items():
        setattr(torch.cuda, name, function)


def _measure(device: str, stub: Any) -> tuple[dict[str, Any], float | None, str]:
    """The memory of a block that spikes and falls again, and its energy: 2.5 J."""
    stub.stub_set(PROCESS, 0, 1000)
    with DeviceMeter(device) as meter:
        stub.stub_set(SPIKE, GROWN, 1000)
        start = meter._sampler.samples
        while meter._sampler._thread.is_alive() and meter._sampler.samples < start + 2:
            time.sleep(0.001)
        stub.stub_set(PROCESS, GREW, 1000)
    energy_meter = EnergyMeter(device)
    with energy_meter:
        stub.stub_set(PROCESS, GREW, 3500)
    return asdict(meter.result()), energy_meter.joules, energy_meter.unavailable


def child(scenario: str, device: str) -> dict[str, Any]:
    _replace_torch_cuda(scenario)
    stub = ctypes.CDLL(LIBRARY)
    stub.stub_set.argtypes = [ctypes.c_ulonglong] * 3
    memory, joules, no_energy = _measure(device, stub)
    found = {"memory": memory, "joules": joules, "no_energy": no_energy, "status": nvml_status()}
    if scenario == "doctor":
        torch.ones = lambda *size, device: stub.stub_set(PROCESS, 2 * GREW, 3500)  # type: ignore[assignment]
        found["doctor"] = examine(Path.home(), Path.home())
    if scenario == "a step":
        energy._SHORTEST_SECONDS = 0.0
        found["per_step"] = energy.joules_per_step(lambda: stub.stub_set(PROCESS, 0, 3500 + 1500), torch.device(device))
    assert stub.stub_opened() == 0  # NVML is closed as often as it was opened
    return found


def children(cases: list[list[str]]) -> list[dict[str, Any]]:
    """One after the other, since importing torch takes longest; the stub reads its scenario at every call."""
    found = []
    for scenario, device in cases:
        os.environ["NVML_STUB"] = scenario
        found.append(child(scenario, device))
    return found


# The tests


TODAY = ["", "empty list", "foreign pids", "another process's pid", "wddm", "no permission", "driver not loaded"]
TODAY += ["unknown to NVML", "mig", "a step", "no energy counter", "doctor"]
DRIVERS = {  # flags of the compiler, and (scenario, device) to run
    "today's": ([], [("", "cuda:1"), *((scenario, "cuda:0") for scenario in TODAY)]),
    "old": (["-DOLD_DRIVER"], [("", "cuda:0")]),
    "oldest": (["-DOLD_DRIVER", "-DOLDEST_DRIVER"], [("", "cuda:0")]),
}
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What a child found in a scenario; one child per age of the driver, started when first asked for."""
    known: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}

    def start(driver: str) -> dict[tuple[str, str], dict[str, Any]]:
        flags, cases = DRIVERS[driver]
        folder = tmp_path_factory.mktemp("driver")
        library = str(folder / LIBRARY)
        build = [str(COMPILER), "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", *flags, "-o", library, str(SOURCE)]
        subprocess.run(build, check=True)
        variables = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
        command = [sys.executable, __file__, json.dumps(cases)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return dict(zip(cases, json.loads(done.stdout), strict=True))

    def run(scenario: str = "", device: str = "cuda:0", driver: str = "today's") -> dict[str, Any]:
        if driver not in known:
            known[driver] = start(driver)
        return known[driver][scenario, device]

    return run


def test_stub_every_figure_lands_in_its_own_field(run: Run) -> None:
    memory = run()["memory"]
    assert memory["peak_requested_bytes"] == 11
    assert memory["peak_allocated_bytes"] == 22
    assert memory["peak_reserved_bytes"] == 33
    assert memory["nvml_process_bytes"] == SPIKE  # sampled, for at the end it was over
    assert memory["context_bytes"] == PROCESS - RESERVED  # of the end, with what torch holds at the end
    assert memory["nvml_device_growth_bytes"] == GROWN
    assert memory["remarks"]["nvml_device_growth_bytes"].startswith("shared GPU: upper bound")
    assert memory["nvml_samples"] >= 3
    assert memory["unavailable"] == {}


def test_stub_gpus_are_matched_by_uuid_and_never_by_index(run: Run) -> None:
    first, second = run(device="cuda:0"), run(device="cuda:1")
    # The stub lists CUDA's second GPU first, and books one byte more on it.
    assert first["memory"]["nvml_process_bytes"] == SPIKE
    assert second["memory"]["nvml_process_bytes"] == SPIKE + 1
    assert second["memory"]["context_bytes"] == PROCESS + 1 - RESERVED
    assert [device["name"] for device in first["status"]["devices"]] == ["stub GPU B", "stub GPU A"]


@pytest.mark.parametrize(
    ("scenario", "sentence"),
    [
        ("empty list", "lists 0 processes on this GPU, not this one: in a container"),
        ("foreign pids", "lists 2 processes on this GPU, not this one: in a container"),
        ("another process's pid", "fewer bytes for this pid than torch holds, so it is another's: in a container"),
        ("wddm", "WDDM"),
        ("no permission", "no permission"),
    ],
)
def test_stub_without_bytes_of_the_process_the_growth_of_the_gpu_stands_in(
    run: Run, scenario: str, sentence: str
) -> None:
    memory = run(scenario)["memory"]
    assert memory["nvml_process_bytes"] is None
    assert sentence in memory["unavailable"]["nvml_process_bytes"]
    assert "the growth of the whole GPU stands in" in memory["unavailable"]["nvml_process_bytes"]
    assert memory["context_bytes"] is None
    assert sentence in memory["unavailable"]["context_bytes"]
    assert memory["nvml_device_growth_bytes"] == GROWN
    assert memory["peak_allocated_bytes"] == 22


@pytest.mark.parametrize(
    ("scenario", "sentence"),
    [("driver not loaded", "its kernel module is not loaded"), ("unknown to NVML", "does not know the GPU")],
)
def test_stub_without_nvml_torchs_figures_remain(run: Run, scenario: str, sentence: str) -> None:
    found = run(scenario)
    memory = found["memory"]
    assert memory["peak_requested_bytes"] == 11
    assert memory["peak_allocated_bytes"] == 22
    assert memory["peak_reserved_bytes"] == 33
    missing = {"nvml_process_bytes", "nvml_device_growth_bytes", "context_bytes"}
    assert set(memory["unavailable"]) == missing
    assert all(memory[name] is None and sentence in memory["unavailable"][name] for name in missing)
    assert memory["unavailable"]["nvml_process_bytes"].endswith("torch's remain")
    assert found["joules"] is None
    assert sentence in found["no_energy"]


def test_stub_the_second_memory_query_leaves_out_what_the_driver_reserves(run: Run) -> None:
    used = {device["name"]: device["used_bytes"] for device in run()["status"]["devices"]}
    assert used == {"stub GPU B": 1_000_000 + GREW, "stub GPU A": 2_000_000 + GREW}


def test_stub_an_old_driver_is_asked_in_the_old_way_and_the_figures_say_so(run: Run) -> None:
    found = run(driver="old")
    assert found["memory"]["nvml_process_bytes"] == SPIKE
    assert found["memory"]["nvml_device_growth_bytes"] == GROWN  # what the driver reserves is in both levels
    assert "only the first memory query" in found["memory"]["remarks"]["nvml_device_growth_bytes"]
    for device in found["status"]["devices"]:
        assert device["used_bytes"] > 300_000_000
        assert "only the first memory query" in device["remark"]
    assert found["joules"] is None
    assert "too old" in found["no_energy"]


def test_stub_the_oldest_driver_lists_no_processes(run: Run) -> None:
    memory = run(driver="oldest")["memory"]
    assert memory["nvml_process_bytes"] is None
    assert "too old" in memory["unavailable"]["nvml_process_bytes"]
    assert memory["nvml_device_growth_bytes"] == GROWN


def test_stub_a_mig_slice_is_asked_about_and_not_its_gpu(run: Run) -> None:
    found = run("mig")
    assert found["memory"]["nvml_process_bytes"] == SPIKE
    assert found["memory"]["nvml_device_growth_bytes"] == GROWN  # of the slice, which NVML's list of GPUs lacks
    assert found["memory"]["unavailable"] == {}
    assert found["joules"] is None  # the counter is the whole GPU's
    assert "MIG" in found["no_energy"]
    for device in found["status"]["devices"]:
        assert device["used_bytes"] is None
        assert "no permission" in device["unavailable"]


def test_stub_energy_is_the_counters_difference_in_joules(run: Run) -> None:
    found = run()
    assert found["joules"] == 2.5
    assert found["no_energy"] == ""


def test_stub_energy_of_a_step_is_the_difference_over_the_repeats(run: Run) -> None:
    assert run("a step")["per_step"] == [1.5, ""]


def test_stub_a_gpu_without_an_energy_counter_has_no_energy_and_never_zero(run: Run) -> None:
    found = run("no energy counter")
    assert found["joules"] is None
    assert "does not support" in found["no_energy"]
    assert found["memory"]["nvml_process_bytes"] == SPIKE  # the rest does not suffer


def test_stub_the_doctor_tries_every_meter(run: Run) -> None:
    found = run("doctor")["doctor"]
    assert found["gpu_figures"] == "GPU figures are measured on this machine"
    names = {name for name in found if name.startswith("measured_")}
    assert names == {f"measured_{n}" for n in ("torch_cuda", "nvml_process", "nvml_device", "energy", "host")}
    assert {name: found[name] for name in names} == dict.fromkeys(names, "works")


if __name__ == "__main__":
    print(json.dumps(children(json.loads(sys.argv[1]))))
