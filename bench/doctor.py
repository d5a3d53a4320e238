"""What of this works on this machine, and why the rest does not. Each meter is tried, none is guessed."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKS = "works"
Answer = str | dict[str, str]  # WORKS, or {"unavailable": reason}
_DEVICE_FIELDS = {
    "measured_torch_cuda": "peak_requested_bytes",
    "measured_nvml_process": "nvml_process_bytes",
    "measured_nvml_device": "nvml_device_growth_bytes",
}


def examine(home: Path, cache_dir: Path) -> dict[str, Any]:
    """Versions, devices, meters, samples and disk, with a list of problems in sentences."""
    import torch

    from ..cache.samples import status
    from .nvml import nvml_status

    on_device = _device_meters()  # before anything else makes a CUDA context, else there is no level to compare with
    problems = []
    cuda = None
    if torch.cuda.is_available():
        cuda = {
            "version": torch.version.cuda,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        }
    else:
        problems.append(f"no CUDA device: {_why_no_cuda(torch.version.cuda)}")
    existing = next(p for p in (cache_dir, *cache_dir.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < 2**30:
        problems.append(f"{existing} has only {free:,} bytes free; caches may not fit (--cache-dir elsewhere).")
    nvml = nvml_status()
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": cuda,
        "nvml": nvml,
        "gpu_figures": gpu_figures(on_device["measured_torch_cuda"], nvml.get("unavailable") if cuda is None else None),
        "tracked": _tried(_track),
        "predicted": _tried(_predict),
        **on_device,
        "measured_host": _host_meter(),
        "disk_free_bytes": free,
        "cache_dir": str(cache_dir),
        "samples": status(home),
        "problems": problems,
    }


def gpu_figures(torch_cuda: Answer, no_nvml: str | None) -> str:
    """The sentence above figures of a GPU: what kind they are here. `no_nvml`: the reason to show first."""
    if isinstance(torch_cuda, str):
        return "GPU figures are measured on this machine"
    return f"{no_nvml or torch_cuda['unavailable']}: GPU figures below are predicted, not measured"


def _why_no_cuda(built_for: str | None) -> str:
    why = "this torch is a CPU build" if built_for is None else f"torch was built for CUDA {built_for} but sees none"
    return f"{why}; everything runs on the CPU, and GPU memory cannot be measured."


def _device_meters() -> dict[str, Answer]:
    """Measure one small tensor, as a run is measured."""
    import torch

    from .device_memory import DeviceMeter
    from .energy import EnergyMeter

    try:
        with DeviceMeter("cuda") as meter:
            if torch.cuda.is_available():
                torch.ones(1, device="cuda")
        reasons, no_energy = meter.result().unavailable, EnergyMeter("cuda").unavailable
    except RuntimeError as error:  # a device that is there and cannot be used: taken by another process, out of memory
        reason = str(error).partition("\n")[0]
        reasons, no_energy = dict.fromkeys(_DEVICE_FIELDS.values(), reason), reason
    found = {name: _answer(reasons.get(field)) for name, field in _DEVICE_FIELDS.items()}
    return {**found, "measured_energy": _answer(no_energy)}


def _host_meter() -> Answer:
    from .host_memory import HostMeter

    with HostMeter() as meter:
        pass
    return _answer(meter.result().unavailable.get("peak_anonymous_bytes"))


def _answer(reason: str | None) -> Answer:
    return {"unavailable": reason} if reason else WORKS


def _tried(trial: Callable[[], int]) -> Answer:
    """Both rest on parts of torch that are not public, so another version may break them in any way."""
    import torch

    try:
        found = trial()
    except Exception as error:
        return {"unavailable": f"with torch {torch.__version__}: {type(error).__name__}: {error}".partition("\n")[0]}
    return WORKS if found > 0 else {"unavailable": f"with torch {torch.__version__} no tensor is seen"}


def _track() -> int:
    """Bytes of two steps of a small network."""
    import torch

    from .tracker import track

    layer, batch = torch.nn.Linear(8, 8), torch.zeros(2, 4, 8)
    optimizer = torch.optim.AdamW(layer.parameters())
    return track(layer, optimizer, [batch], lambda: layer(batch).sum()).peak_bytes


def _predict() -> int:
    """The same on fake tensors, with CUDA's attention."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.functional import scaled_dot_product_attention

    from .cuda_semantics import CudaSemantics, use_foreach
    from .tracker import track

    with FakeTensorMode():
        layer, batch = torch.nn.Linear(8, 8), torch.zeros(2, 1, 4, 8)
        optimizer = torch.optim.AdamW(layer.parameters())
        use_foreach(optimizer)

        def forward() -> torch.Tensor:
            states = layer(batch)
            return scaled_dot_product_attention(states, states, states).sum()

        with CudaSemantics():
            return track(layer, optimizer, [batch], forward).peak_bytes
