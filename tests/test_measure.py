"""Measuring memory: it changes nothing, adds up, grows with what it measures, and says why a figure is missing."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sidebench.adapters._base import Batch, Body, FittedMethod
from sidebench.adapters._registry import find_method
from sidebench.bench import measure
from sidebench.bench.assemble import seeded
from sidebench.bench.device_memory import DeviceMemory, DeviceMeter
from sidebench.bench.energy import WHOLE_GPU
from sidebench.bench.learner import Learner
from sidebench.bench.measure import Memory, measure_fit, measure_training
from sidebench.bench.record import Cost
from sidebench.bench.tracker import CATEGORIES
from sidebench.bench.training import Settings, Supervised, loss_of, make_optimizer, snapshot

WIDTH, SIDE, CLASSES = 24, 16, 3
SETTINGS = Settings(seed=0, epochs=1, batch_size=8, lr=0.1, weight_decay=0.1, precision="fp32")
CPU = torch.device("cpu")


class Side(Body):
    """A frozen map, a trained one and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.width = SIDE
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.layers = nn.Sequential(nn.Linear(WIDTH, SIDE), nn.GELU(), nn.Dropout(0.5))

    def forward(self, batch: Batch) -> Tensor:
        return self.layers(self.frozen(batch.state("x")))


def _learner() -> Learner:
    with seeded(0):
        return Learner(Side(), CLASSES, "mean", 0)


def _batch(size: int) -> tuple[Batch, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 6, WIDTH, generator=generator)
    targets = torch.randint(0, CLASSES, (size,), generator=generator)
    return Batch(torch.ones(size, 6, dtype=torch.bool), {"x": x}), targets


def _measured(learner: Learner, size: int = 8) -> Memory:
    return measure_training(learner, *_batch(size), SETTINGS, DeviceMeter(CPU))


def _losses(learner: Learner) -> list[float]:
    batch, targets = _batch(8)
    optimizer = make_optimizer(learner, SETTINGS)
    found = []
    with seeded(7):
        for _ in range(4):
            loss = loss_of(learner, batch, targets, "fp32")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
    return found


def test_measuring_leaves_every_parameter_bit_identical_and_no_gradient_behind() -> None:
    learner = _learner()
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    _measured(learner)
    for name, parameter in learner.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None, name


def test_training_after_measuring_gives_the_same_numbers_as_without() -> None:
    measured, untouched = _learner(), _learner()
    _measured(measured)
    assert _losses(measured) == _losses(untouched)
    expected = snapshot(untouched)
    assert all(torch.equal(value, expected[name]) for name, value in snapshot(measured).items())


def test_measuring_does_train_else_it_would_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "load_trained", lambda *_: None)
    learner = _learner()
    before = learner.head.weight.detach().clone()
    _measured(learner)
    assert not torch.equal(learner.head.weight, before)


def test_the_categories_are_all_there_and_add_up_to_the_peak() -> None:
    values = _measured(_learner()).values
    assert set(values["memory_by_category"]) == set(CATEGORIES)
    assert sum(values["memory_by_category"].values()) == values["peak_tracked_bytes"]
    assert set(values["memory_by_phase"]) == {"forward", "backward", "step"}
    assert max(values["memory_by_phase"].values()) == values["peak_tracked_bytes"]


def test_parameters_and_optimizer_state_are_counted_to_the_byte() -> None:
    learner = _learner()
    everything = sum(p.numel() for p in learner.parameters())
    moving = [p for p in learner.parameters() if p.requires_grad]
    found = _measured(learner).values["memory_by_category"]
    assert found["parameters"] == 4 * everything  # the frozen ones too
    # AdamW: two moments per trained number, and a step count of four bytes per tensor
    assert found["optimizer"] == 2 * 4 * sum(p.numel() for p in moving) + 4 * len(moving)


def test_the_batch_counts_and_grows_with_its_size_while_the_weights_do_not() -> None:
    small, large = (_measured(_learner(), size).values["memory_by_category"] for size in (64, 128))
    for size, found in ((64, small), (128, large)):
        assert found["inputs"] == size * (6 * WIDTH * 4 + 6 + 8)  # activations, mask, targets
    assert large["activations"] + large["temporaries"] > 1.8 * (small["activations"] + small["temporaries"])
    assert (large["parameters"], large["optimizer"]) == (small["parameters"], small["optimizer"])


def test_on_a_cpu_device_memory_is_none_with_the_reason_and_never_zero() -> None:
    memory = _measured(_learner())
    on_device = ("peak_device_bytes", "peak_reserved_bytes", "peak_requested_bytes", "peak_nvml_bytes")
    for name in (*on_device, "nvml_device_growth_bytes", "context_bytes", "energy_joules_per_step"):
        assert memory.values[name] is None
        assert "'cpu'" in memory.unavailable[name]


def test_every_figure_has_a_field_in_the_record() -> None:
    assert set(_measured(_learner()).values) <= {field.name for field in fields(Cost)}


class Told:
    """A device meter of which only the block is heard."""

    device = CPU

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def __enter__(self) -> "Told":
        self.calls.append("reset")
        return self

    def __exit__(self, *exception: object) -> None:
        self.calls.append("read")

    def result(self) -> DeviceMemory:
        return DeviceMemory(
            nvml_process_bytes=9,
            nvml_device_growth_bytes=7,
            nvml_samples=3,
            nvml_longest_gap_seconds=0.0061,
            remarks={"nvml_device_growth_bytes": "shared GPU"},
        )


def test_the_peak_is_reset_after_warm_up_and_read_before_the_tracked_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    track = measure.track
    monkeypatch.setattr(measure, "track", lambda *a, **k: (calls.append("track"), track(*a, **k))[1])

    class Counted(Supervised):
        def loss(self, *words: Any) -> Tensor:
            calls.append("step")
            return super().loss(*words)

    measure_training(_learner(), *_batch(8), SETTINGS, Told(calls), Counted())
    assert calls == ["step", "step", "reset", "step", "step", "read", "track", "step", "step"]


def test_what_qualifies_a_figure_is_kept_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "joules_per_step", lambda step, device: (2.5, ""))
    memory = measure_training(_learner(), *_batch(8), SETTINGS, Told([]))
    assert memory.values["nvml_device_growth_bytes"] == 7
    assert memory.values["energy_joules_per_step"] == 2.5
    assert memory.values["peak_nvml_bytes"] == 9
    assert memory.values["remarks"] == {
        "nvml_device_growth_bytes": "shared GPU",
        "peak_nvml_bytes": "3 samples at most 6.1 ms apart, the last one after the last step",
        "energy_joules_per_step": WHOLE_GPU,
    }
    assert "energy_joules_per_step" not in memory.unavailable


def test_energy_is_that_of_real_training_steps_which_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = _learner()
    before, seen = snapshot(learner), []

    def repeat(step: Any, device: torch.device) -> tuple[None, str]:
        at = learner.head.weight.detach().clone()
        for _ in range(3):
            step()
            seen.append(torch.equal(learner.head.weight, at))
        return None, "not here"

    monkeypatch.setattr(measure, "joules_per_step", repeat)
    memory = _measured(learner)
    assert seen == [False] * 3
    assert memory.unavailable["energy_joules_per_step"] == "not here"
    assert all(torch.equal(value, before[name]) for name, value in snapshot(learner).items())


def test_what_is_none_has_a_reason_and_what_is_measured_has_none() -> None:
    memory = _measured(_learner())
    assert {name for name, value in memory.values.items() if value is None} == set(memory.unavailable)


def _features(classes: int) -> tuple[tuple[Tensor, Tensor], int]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(400) % classes
    centres = torch.randn(classes, 16, generator=generator)
    return (centres[targets] + torch.randn(400, 16, generator=generator), targets), classes


def test_the_solver_of_a_fitted_method_is_never_measured_smaller_than_it_is() -> None:
    probe = find_method("linear_probe").configured({"candidates": "3"})
    assert isinstance(probe, FittedMethod)
    train, classes = _features(10)
    memory = measure_fit(probe, train, classes, DeviceMeter(CPU))
    history = 2 * 100 * (16 * classes + classes) * 8  # L-BFGS keeps 100 pairs of float64 vectors
    assert memory.values["peak_tracked_bytes"] > history
    whole = measure_fit(_as_it_is(probe), train, classes, DeviceMeter(CPU))
    assert 1 <= memory.values["peak_tracked_bytes"] / whole.values["peak_tracked_bytes"] < 1.5


def test_a_fitted_method_is_not_decomposed_and_says_so() -> None:
    probe = find_method("linear_probe").configured({})
    assert isinstance(probe, FittedMethod)
    memory = measure_fit(probe, *_features(3), DeviceMeter(CPU))
    assert memory.values["memory_by_category"] is None
    assert memory.unavailable["memory_by_category"] == "solved in one call, not decomposed"
    assert memory.values["peak_device_bytes"] is None
    assert "'cpu'" in memory.unavailable["peak_device_bytes"]
    assert memory.values["energy_joules_per_step"] is None
    assert memory.unavailable["energy_joules_per_step"] == "solved in one call, it has no steps"


@dataclass(frozen=True)
class Nothing:
    """A Config without options."""


class Centres(FittedMethod):
    """The mean of each class: a fitted method that is not the probe, as a user may bring one."""

    Config: ClassVar[type] = Nothing
    paper = "none"

    def fit(self, train: Any, val: Any, num_outputs: int) -> tuple[nn.Module, dict[str, Any]]:
        means = torch.stack([train[0][train[1] == k].mean(0) for k in range(num_outputs)])
        module = nn.Linear(means.shape[1], num_outputs, bias=False)
        module.weight.data.copy_(means)
        return module, {"val_score": 0.0}


def test_a_fitted_method_without_the_probes_options_is_measured_whole() -> None:
    train, classes = _features(3)
    memory = measure_fit(Centres(), train, classes, DeviceMeter(CPU))
    assert memory.values["peak_tracked_bytes"] >= train[0].nbytes


def _as_it_is(probe: FittedMethod) -> FittedMethod:
    """The probe with no more options than `measure_fit` leaves alone: measured over its whole path of L2 weights."""

    class Whole(Centres):
        def fit(self, train: Any, val: Any, num_outputs: int) -> tuple[nn.Module, dict[str, Any]]:
            return probe.fit(train, val, num_outputs)

    return Whole()


def test_seeded_gives_the_same_draws_and_leaves_the_generator_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with seeded(1):
        first = torch.rand(3)
    with seeded(1):
        second = torch.rand(3)
    assert np.array_equal(first.numpy(), second.numpy())
    assert torch.equal(torch.rand(2), expected)
