"""What of this works on this machine, and why the rest does not."""

import shutil
import sys
from pathlib import Path
from typing import Any


def examine(home: Path, cache_dir: Path) -> dict[str, Any]:
    """Versions, devices, meters, samples and disk, with a list of problems in sentences."""
    import torch

    from ..cache.samples import status
    from .device_memory import nvml_status

    problems = []
    cuda = None
    if torch.cuda.is_available():
        cuda = {
            "version": torch.version.cuda,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        }
    else:
        built_for = torch.version.cuda
        problems.append(
            "no CUDA device: "
            + (
                "this torch is a CPU build"
                if built_for is None
                else f"torch was built for CUDA {built_for} but sees none"
            )
            + "; everything runs on the CPU, and GPU memory cannot be measured."
        )
    existing = next(p for p in (cache_dir, *cache_dir.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < 2**30:
        problems.append(f"{existing} has only {free:,} bytes free; caches may not fit (--cache-dir elsewhere).")
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": cuda,
        "nvml": nvml_status(),
        "disk_free_bytes": free,
        "cache_dir": str(cache_dir),
        "samples": status(home),
        "problems": problems,
    }
