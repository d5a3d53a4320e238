"""The world a run happened in: versions, processor, GPU, commit. No host, user or path ever enters it."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from .nvml import nvml_status

PACKAGES = ("torch", "numpy", "zarr", "transformers", "peft")
VARIABLES = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
_PACKAGE_ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """Return a JSON-ready record; what is not known is None, with the reason beside it under `<name>_unavailable`."""
    import torch

    return {
        "sidebench": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _installed(name) for name in PACKAGES},
        **_cpu(),
        "torch_threads": torch.get_num_threads(),
        **_gpu(),
        **_commit(_PACKAGE_ROOT),
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)  # importing transformers for its version would cost seconds and memory
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_model(), "cpu_count": usable}


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"gpu": None, "gpu_driver": None, "gpu_unavailable": "torch sees no CUDA device"}
    status = nvml_status()
    found = {"gpu": torch.cuda.get_device_name(), "gpu_driver": status.get("driver"), "cuda": torch.version.cuda}
    return found if found["gpu_driver"] else {**found, "gpu_driver_unavailable": status["unavailable"]}


def _commit(root: Path) -> dict[str, Any]:
    """Commit and dirty flag of the checkout at `root`; one around it (a venv in a user's project) is not ours."""

    def unknown(reason: str) -> dict[str, Any]:
        return {"commit": None, "dirty": None, "commit_unavailable": reason}

    if not (root / ".git").exists():
        return unknown("the package does not lie in a git checkout")
    try:
        commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD").strip()
        dirty = bool(_git(root, "status", "--porcelain").strip())
    except FileNotFoundError:
        return unknown("git is not installed")
    except subprocess.TimeoutExpired:
        return unknown("git did not answer in time")
    except subprocess.CalledProcessError as error:
        # git's own message is left out: it may hold a path
        return unknown(f"git {error.cmd[3]} failed with exit code {error.returncode}")
    return {"commit": commit, "dirty": dirty}


def _git(root: Path, *arguments: str) -> str:
    # GIT_DIR and its kin would answer for another checkout
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True, env=variables).stdout
