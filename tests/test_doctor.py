"""What `bench doctor` says of the meters. With a (stub of a) GPU: test_nvml_stub.py."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sidebench.bench import doctor, host_memory, tracker
from sidebench.bench.doctor import examine, gpu_figures
from sidebench.bench.nvml import NO_DRIVER

NO_GPU_METERS = ("measured_torch_cuda", "measured_nvml_process", "measured_nvml_device", "measured_energy")
no_gpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def _fail(*_: Any, **__: Any) -> None:
    raise AttributeError("gone in this version\nsecond line")


@no_gpu_only
def test_without_a_gpu_every_meter_of_it_has_a_reason_and_the_rest_works(tmp_path: Path) -> None:
    found = examine(tmp_path, tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found["gpu_figures"].endswith("GPU figures below are predicted, not measured")
    for name in NO_GPU_METERS:
        assert "torch sees no CUDA device" in found[name]["unavailable"]
    assert (found["tracked"], found["predicted"]) == ("works", "works")


def test_figures_of_a_gpu_are_called_predicted_until_torch_measures_one() -> None:
    why = {"unavailable": "torch sees no CUDA device; the NVIDIA driver does see a GPU"}
    assert gpu_figures(why, NO_DRIVER) == f"{NO_DRIVER}: GPU figures below are predicted, not measured"
    assert gpu_figures(why, None) == f"{why['unavailable']}: GPU figures below are predicted, not measured"
    assert gpu_figures("works", None) == "GPU figures are measured on this machine"


def test_a_torch_that_breaks_tracking_is_named_and_the_doctor_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "track", _fail)
    found = examine(tmp_path, tmp_path)
    reason = f"with torch {torch.__version__}: AttributeError: gone in this version"
    assert found["tracked"] == found["predicted"] == {"unavailable": reason}


def test_a_tracker_that_sees_nothing_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_track", lambda: 0)
    assert "no tensor is seen" in examine(tmp_path, tmp_path)["tracked"]["unavailable"]


def test_a_device_that_cannot_be_used_is_a_reason_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*_: Any) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", taken)
    found = examine(tmp_path, tmp_path)
    for name in NO_GPU_METERS:
        assert found[name] == {"unavailable": "CUDA error: all CUDA-capable devices are busy or unavailable"}
    assert found["gpu_figures"].startswith("CUDA error: all CUDA-capable devices are busy or unavailable: ")


def test_a_system_without_anonymous_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_STATUS", tmp_path / "missing")
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert "RssAnon" in examine(tmp_path, tmp_path)["measured_host"]["unavailable"]
