"""On a CUDA device: what is predicted against what torch's allocator was asked for, and the meters against each other.

Each measurement is in a fresh interpreter (`python test_gpu.py …` is the child), since reserved memory, the context and
workspaces stick to a process. The same code runs once on the CPU, so that it does not rot where there is no GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import build
from toys import load, save_vit

from sidebench.adapters._base import Batch, CachedMethod, LiveMethod
from sidebench.adapters._registry import find_method
from sidebench.bench.assemble import seeded
from sidebench.bench.device_memory import DeviceMeter
from sidebench.bench.learner import Learner
from sidebench.bench.measure import measure_training
from sidebench.bench.predict import predict
from sidebench.bench.step import Step, kept_shapes
from sidebench.bench.training import Settings
from sidebench.cache.backbone import Backbone
from sidebench.cache.form import Form

CLASSES = 100
BOUND = 0.03  # predicted requested bytes against requested_bytes.all.peak
BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
}
# cuBLAS takes its workspace (8 MiB, 32 on Hopper) from torch's allocator, and no dispatch mode sees it. Set small, so
# that the bound is about tensors and holds for methods of a few hundred MiB too.
SMALL_WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "64"}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def measured_and_predicted(
    folder: Path, name: str, precision: str, device_name: str, *, side: int, batch_size: int
) -> dict[str, Any]:
    """Train `name` on the saved ViT, as a run does, and predict the same step."""
    device = torch.device(device_name)
    meter = DeviceMeter(device)  # before the first CUDA call
    method = find_method(name).configured({})
    assert isinstance(method, CachedMethod | LiveMethod)
    backbone = load(folder, image_size=side)
    step = Step(batch_size, CLASSES, precision, device.type, form=Form(dtype="float32"))
    predicted = predict(method, backbone, step)
    batch = _batch(method, backbone, step, side, device)
    with seeded(0):
        learner = Learner(build(method, backbone), CLASSES, "mean", backbone.arch.prefix_tokens).to(device)
    targets = torch.zeros(batch_size, dtype=torch.long, device=device)
    settings = Settings(0, 1, batch_size, method.config.lr, method.config.weight_decay, precision)
    memory = measure_training(learner, batch, targets, settings, meter)
    found = {"predicted": predicted.peak.peak_bytes, "unavailable": memory.unavailable, **memory.values}
    if predicted.allocator is not None:
        found["predicted_allocated"] = predicted.allocator.allocated_bytes
        found["predicted_reserved"] = predicted.allocator.reserved_bytes
    return found


def _batch(method: Any, backbone: Backbone, step: Step, side: int, device: torch.device) -> Batch:
    tokens = (side // backbone.preprocess.patch_size) ** 2 + backbone.arch.prefix_tokens  # type: ignore[attr-defined]
    mask = torch.ones(step.batch_size, tokens, dtype=torch.bool, device=device)
    if isinstance(method, CachedMethod):
        shapes = kept_shapes(method, backbone, step)
        return Batch(mask, {k: torch.zeros(step.batch_size, *shape, device=device) for k, shape in shapes.items()})
    return Batch(mask, inputs={"pixel_values": torch.zeros(step.batch_size, 3, side, side, device=device)})


@pytest.mark.parametrize("name", ["full", "unipt"])
def test_the_comparison_itself_runs_and_is_exact_on_a_cpu(name: str, models: Path) -> None:
    found = measured_and_predicted(models / "vit", name, "fp32", "cpu", side=16, batch_size=4)
    assert found["predicted"] == found["peak_tracked_bytes"]
    assert found["peak_requested_bytes"] is None


@pytest.fixture(scope="module")
def vit_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("models") / "vit", **BASE)


def _in_a_fresh_interpreter(folder: Path, name: str, precision: str) -> dict[str, Any]:
    command = [sys.executable, __file__, str(folder), name, precision]
    variables = {**os.environ, **SMALL_WORKSPACES}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.gpu
@pytest.mark.long
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["full", "lora", "bitfit", "vpt", "unipt", "lst"])
def test_what_is_predicted_is_requested_within_three_percent(vit_base: Path, name: str, precision: str) -> None:
    found = _in_a_fresh_interpreter(vit_base, name, precision)
    assert found["predicted"] == pytest.approx(found["peak_requested_bytes"], rel=BOUND)


@pytest.mark.gpu
@pytest.mark.long
@needs_gpu
def test_each_meter_counts_at_least_what_the_one_below_it_counts(vit_base: Path) -> None:
    found = _in_a_fresh_interpreter(vit_base, "lora", "fp32")
    assert 0 < found["peak_tracked_bytes"] <= found["peak_requested_bytes"] <= found["peak_device_bytes"]
    assert found["peak_device_bytes"] <= found["peak_reserved_bytes"]
    if found["peak_nvml_bytes"] is not None:
        assert found["peak_reserved_bytes"] < found["peak_nvml_bytes"]
        assert found["context_bytes"] > 0
    missing = {name for name, value in found.items() if value is None}
    assert missing == set(found["unavailable"])


@pytest.mark.gpu
@needs_gpu
def test_a_tensor_of_known_size_is_requested_to_the_byte() -> None:
    with DeviceMeter("cuda") as meter:
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        kept = torch.ones(10_000_001, device="cuda")
    memory = meter.result()
    assert memory.peak_requested_bytes == before + kept.nbytes
    assert memory.peak_requested_bytes <= memory.peak_allocated_bytes <= memory.peak_reserved_bytes  # type: ignore[operator]


if __name__ == "__main__":
    where, method_name, precise = sys.argv[1:]
    print(json.dumps(measured_and_predicted(Path(where), method_name, precise, "cuda", side=224, batch_size=64)))
