"""Peak memory of a run: extra training steps on its longest batch, before and apart from the timed training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..adapters._base import Batch, FittedMethod
from .device_memory import DeviceMemory, DeviceMeter
from .energy import WHOLE_GPU, joules_per_step
from .host_memory import HostMeter
from .towers import PairBatch
from .tracker import Tracker, track
from .training import SUPERVISED, Objective, Settings, load_trained, make_optimizer, snapshot

STEPS = 2  # the first makes the optimiser's state, the second is the steady state


@dataclass(frozen=True)
class Memory:
    """Peaks of one training step, each by its own meter; see `Cost` for the fields."""

    values: Mapping[str, Any]
    unavailable: Mapping[str, str] = field(default_factory=dict)


def measure_training(
    learner: nn.Module,
    batch: Batch | PairBatch,
    targets: Tensor,
    settings: Settings,
    device_meter: DeviceMeter,
    objective: Objective = SUPERVISED,
) -> Memory:
    """Train a few steps on one batch under each meter in turn, then put the parameters back as they were.

    The device meter comes from outside because it must be made before the first CUDA call.
    """
    before = snapshot(learner)
    learner.train()

    def stepping() -> Callable[[], None]:
        optimizer = make_optimizer(learner, settings)

        def step() -> None:
            objective.loss(learner, batch, targets, settings.precision).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def steps() -> None:
        step = stepping()
        for _ in range(STEPS):
            step()

    def tracked() -> Any:
        return track(
            learner,
            make_optimizer(learner, settings),
            [targets, *batch.tensors()],
            lambda: objective.loss(learner, batch, targets, settings.precision),
            steps=STEPS,
        )

    memory = _measured(steps, tracked, device_meter)
    memory = _with_energy(memory, *joules_per_step(stepping(), device_meter.device))
    load_trained(learner, before)
    return memory


def measure_fit(
    method: FittedMethod, train: tuple[Tensor, Tensor], num_outputs: int, device_meter: DeviceMeter
) -> Memory:
    """The same for a method that is solved on all features at once."""
    brief = method.brief()
    few = (train[0][:1], train[1][:1])

    def tracked() -> Any:
        with Tracker([], None, [*train], device=train[0].device) as tracker:
            tracker.begin_step()
            with tracker.phase("step"):
                brief.fit(train, few, num_outputs)
        return tracker.peak()

    memory = _measured(lambda: brief.fit(train, few, num_outputs), tracked, device_meter)
    # The solver owns its parameters and history, so they cannot be told apart from outside.
    reason = "solved in one call, not decomposed"
    memory = _with_energy(memory, None, "solved in one call, it has no steps")
    return Memory(
        {**memory.values, "memory_by_category": None},
        {**memory.unavailable, "memory_by_category": reason},
    )


def _measured(steps: Callable[[], Any], tracked: Callable[[], Any], device_meter: DeviceMeter) -> Memory:
    steps()  # warm-up: library handles, thread pools and workspaces are not the method's
    with device_meter, HostMeter() as host_meter:  # which clear and reset at entry, and wait for the device at exit
        steps()
    peak = tracked()
    on_device, on_host = device_meter.result(), host_meter.result()
    values = {
        "peak_device_bytes": on_device.peak_allocated_bytes,
        "peak_reserved_bytes": on_device.peak_reserved_bytes,
        "peak_requested_bytes": on_device.peak_requested_bytes,
        "peak_nvml_bytes": on_device.nvml_process_bytes,
        "nvml_device_growth_bytes": on_device.nvml_device_growth_bytes,
        "context_bytes": on_device.context_bytes,
        "peak_host_bytes": on_host.peak_anonymous_bytes,
        "peak_tracked_bytes": peak.peak_bytes,
        "memory_by_category": dict(peak.by_category),
        "memory_by_phase": dict(peak.by_phase),
        "memory_peak_at": peak.at,
        "remarks": _remarks(on_device),
    }
    names = {
        "peak_allocated_bytes": "peak_device_bytes",
        "nvml_process_bytes": "peak_nvml_bytes",
        "peak_anonymous_bytes": "peak_host_bytes",
    }
    reasons = {**on_device.unavailable, **on_host.unavailable}
    kept = {names.get(name, name): reason for name, reason in reasons.items() if names.get(name, name) in values}
    return Memory(values, {name: reason for name, reason in kept.items() if values[name] is None})


def _remarks(memory: DeviceMemory) -> dict[str, str]:
    if memory.nvml_process_bytes is None:
        return memory.remarks
    gap = f"at most {1000 * memory.nvml_longest_gap_seconds:.1f} ms apart"
    how = f"{memory.nvml_samples} samples {gap}, the last one after the last step"
    return {**memory.remarks, "peak_nvml_bytes": how}


def _with_energy(memory: Memory, joules: float | None, why_not: str) -> Memory:
    name = "energy_joules_per_step"
    if joules is None:
        return Memory({**memory.values, name: None}, {**memory.unavailable, name: why_not})
    remarks = {**memory.values["remarks"], name: WHOLE_GPU}
    return Memory({**memory.values, name: joules, "remarks": remarks}, memory.unavailable)
