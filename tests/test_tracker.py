"""The tracker against hand counts, and against two independent counters that live in torch."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sidebench.bench.tracker import CATEGORIES, OUTSIDE, Event, TrackedPeak, Tracker, replay, track
from sidebench.cache.errors import SidebenchError

FLOAT = 4
BATCH, WIDTH, HIDDEN, CLASSES = 32, 64, 128, 10
MLP_PARAMETERS = WIDTH * HIDDEN + HIDDEN + HIDDEN * CLASSES + CLASSES
LOSS = FLOAT


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def _batch(size: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, WIDTH, generator=generator), torch.randint(0, CLASSES, (size,), generator=generator)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=False)


def _loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: functional.cross_entropy(model(x), y)


def _track_forward(work: Callable[[], object], *tensors: Tensor) -> tuple[TrackedPeak, object]:
    """Track one forward phase that keeps its result, without any model."""
    with Tracker([], None, tensors) as tracker:
        tracker.begin_step()
        with tracker.phase("forward"):
            result = work()
    return tracker.peak(), result


def test_an_mlp_under_adamw_is_counted_by_hand() -> None:
    model, (x, y) = _mlp(), _batch()
    peak = track(model, _adamw(model), [x, y], _loss_of(model, x, y))
    trainable = MLP_PARAMETERS * FLOAT
    state = 2 * trainable + 4 * FLOAT  # two moments, and one float step counter for each of the four tensors
    inputs = BATCH * WIDTH * FLOAT + BATCH * 8
    # AdamW's loop holds two temporaries of the largest tensor (the root and its quotient) besides the loss
    temporaries = 2 * WIDTH * HIDDEN * FLOAT + LOSS
    assert peak.by_category == {
        "parameters": trainable,
        "optimizer": state,
        "gradients": trainable,
        "inputs": inputs,
        "activations": 0,
        "temporaries": temporaries,
    }
    assert peak.peak_bytes == peak.by_phase["step"] == 2 * trainable + state + inputs + temporaries
    assert peak.at.startswith("step: aten.")


def test_the_forward_peak_of_an_mlp_holds_exactly_what_backward_needs() -> None:
    model, (x, y) = _mlp(), _batch()
    peak = track(model, _adamw(model), [x, y], _loss_of(model, x, y))
    resident = MLP_PARAMETERS * FLOAT * 3 + 4 * FLOAT + BATCH * WIDTH * FLOAT + BATCH * 8
    relu, log_softmax = BATCH * HIDDEN * FLOAT, BATCH * CLASSES * FLOAT
    logits = BATCH * CLASSES * FLOAT
    # Input and output of the ReLU meet for a moment; so do the saved ReLU, the logits and their log-softmax
    at_the_relu = 2 * BATCH * HIDDEN * FLOAT
    at_the_loss = relu + logits + log_softmax
    assert peak.by_phase["forward"] == resident + max(at_the_relu, at_the_loss)


def test_saved_activations_of_an_mlp_are_counted_by_hand() -> None:
    model, (x, _) = _mlp(), _batch()
    with Tracker(model, None, [x]) as tracker:
        tracker.begin_step()
        with tracker.phase("forward"):
            out = model(x)
        with tracker.phase("look"):
            tracker.begin_step()  # from here on only what survived the forward is alive
    # The ReLU's output is saved once, for itself and for the second layer; the logits are nobody's input yet
    assert tracker.peak().by_category["activations"] == BATCH * HIDDEN * FLOAT
    assert tracker.peak().by_category["temporaries"] == out.numel() * FLOAT


def test_an_attention_block_is_counted_by_hand() -> None:
    torch.manual_seed(0)
    batch, tokens, width, heads = 2, 5, 8, 2
    qkv, out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
    x = torch.randn(batch, tokens, width)

    def attend() -> Tensor:
        q, k, v = qkv(x).view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT).softmax(-1)  # (B, H, T, T)
        return out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))

    with Tracker([qkv, out], None, [x]) as tracker:
        with tracker.phase("forward"):
            result = attend()
        tracker.begin_step()
    peak = tracker.peak()
    # The joint projection is not saved: matmul saves contiguous copies of q, k and v; softmax and merged heads are
    copies = 3 * batch * tokens * width
    softmax, merged = batch * heads * tokens * tokens, batch * tokens * width
    assert peak.by_category["activations"] == (copies + softmax + merged) * FLOAT
    assert peak.by_category["parameters"] == 4 * width * width * FLOAT
    assert peak.by_category["temporaries"] == result.numel() * FLOAT


def test_views_cost_nothing() -> None:
    x = torch.zeros(1000)
    peak, _ = _track_forward(lambda: [x.view(10, 100), x[:5], x.reshape(100, 10).mT, x.detach(), x.expand(3, 1000)], x)
    assert peak.peak_bytes == 4000


def test_in_place_operations_cost_nothing() -> None:
    x = torch.zeros(1000)
    peak, _ = _track_forward(lambda: x.add_(1).mul_(2).relu_(), x)
    assert peak.peak_bytes == 4000


def test_a_resized_storage_counts_with_its_new_size() -> None:
    x, empty, small = torch.zeros(1000), torch.empty(0), torch.zeros(10)
    peak, _ = _track_forward(lambda: (torch.mul(x, x, out=empty), small.resize_(500)), x, empty, small)
    assert peak.peak_bytes == 4000 + 4000 + 2000


def test_a_dead_temporary_is_gone() -> None:
    x = torch.zeros(1000)
    peak, _ = _track_forward(lambda: [(x + 1).sum() for _ in range(5)], x)
    assert peak.peak_bytes == 4000 + 4000 + 5 * FLOAT


def test_a_constant_nobody_named_counts_as_an_input() -> None:
    x, constant = torch.zeros(10), torch.zeros(500)
    peak, _ = _track_forward(lambda: constant.sum(), x)
    assert peak.by_category["inputs"] == 40 + 2000


def test_a_memory_mapped_array_counts_its_bytes_once(tmp_path) -> None:
    np.save(tmp_path / "rows.npy", np.ones((100, 25), dtype=np.float32))
    x = torch.from_numpy(np.load(tmp_path / "rows.npy", mmap_mode="c"))
    peak, _ = _track_forward(lambda: (x[0].sum(), x.mT[1].sum()), x)
    assert peak.by_category["inputs"] == 10_000
    assert peak.peak_bytes == 10_000 + 2 * FLOAT


def test_a_frozen_model_has_no_gradients_and_no_optimiser_state() -> None:
    model, (x, y) = _mlp(), _batch()
    model.requires_grad_(False)
    head = nn.Linear(CLASSES, CLASSES)
    peak = track([model, head], _adamw(head), [x, y], lambda: functional.cross_entropy(head(model(x)), y))
    head_bytes = (CLASSES * CLASSES + CLASSES) * FLOAT
    assert peak.by_category["parameters"] == MLP_PARAMETERS * FLOAT + head_bytes
    assert peak.by_category["optimizer"] == 2 * head_bytes + 2 * FLOAT
    assert peak.by_category["gradients"] <= head_bytes


def test_buffers_count_as_parameters() -> None:
    model = nn.BatchNorm1d(WIDTH)
    peak, _ = _track_forward(lambda: None)
    assert peak.peak_bytes == 0
    with Tracker(model, None) as tracker:
        tracker.begin_step()
    assert tracker.peak().by_category["parameters"] == 4 * WIDTH * FLOAT + 8  # weight, bias, mean, variance, a counter


@pytest.mark.parametrize("leaked_floats", [1, 5000])
def test_a_planted_leak_raises_the_peak_by_exactly_its_bytes(leaked_floats: int) -> None:
    def run(leak: list[Tensor] | None) -> TrackedPeak:
        model, (x, y) = _mlp(), _batch()

        def forward() -> Tensor:
            if leak is not None:
                leak.append(torch.zeros(leaked_floats))
            return functional.cross_entropy(model(x), y)

        return track(model, _adamw(model), [x, y], forward)

    sound, leaking = run(None), run([])
    assert leaking.peak_bytes == sound.peak_bytes + 2 * leaked_floats * FLOAT  # one for each of the two steps
    assert leaking.by_category["temporaries"] == sound.by_category["temporaries"] + 2 * leaked_floats * FLOAT


def _larger_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, HIDDEN),
        nn.GELU(),
        nn.LayerNorm(HIDDEN),
        nn.TransformerEncoderLayer(HIDDEN, 4, 2 * HIDDEN, dropout=0.0, batch_first=True),
        nn.Linear(HIDDEN, CLASSES),
    )


@pytest.mark.parametrize("size", [32, 2048])  # the peak is in the step, in backward
def test_torchs_own_memory_tracker_agrees(size: int) -> None:
    mem_tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    x, y = _batch(size)
    model = _larger_model()
    ours = track(model, _adamw(model), [x, y], _loss_of(model, x, y))

    model = _larger_model()
    optimizer = _adamw(model)
    theirs = mem_tracker.MemTracker()
    theirs.track_external(model, optimizer, x, y)
    with theirs:
        for step in range(2):
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step == 0:
                theirs.reset_mod_stats()
    snapshot = theirs.get_tracker_snapshot("peak")[torch.device("cpu")]
    # It drops the 4-byte loss where nothing holds it, and books AdamW's temporaries as optimiser state
    assert abs(ours.peak_bytes - snapshot["Total"]) <= LOSS


@pytest.mark.parametrize("size", [32, 2048])
def test_the_allocations_that_the_profiler_sees_agree(size: int) -> None:
    x, y = _batch(size)
    model = _larger_model()
    ours = track(model, _adamw(model), [x, y], _loss_of(model, x, y))

    model = _larger_model()
    optimizer = _adamw(model)

    def train_one_step() -> None:
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    train_one_step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_one_step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    growth = int(np.cumsum([event.nbytes() for event in events]).max())
    state = [value for held in optimizer.state.values() for value in held.values()]
    resident = sum(t.nbytes for t in (*model.parameters(), *state, x, y))
    # The profiler also sees the handful of numbers that kernels wrap as tensors
    assert abs(ours.peak_bytes - (resident + growth)) <= 64


def test_lbfgs_is_tracked_through_its_closure() -> None:
    model, (x, y) = _mlp(), _batch()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=2)
    with Tracker(model, optimizer, [x, y]) as tracker:

        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with tracker.phase("forward"):
                loss = functional.cross_entropy(model(x), y)
            with tracker.phase("backward"):
                loss.backward()
            return loss

        for _ in range(3):
            tracker.begin_step()
            with tracker.phase("step"):
                optimizer.step(closure)
    peak = tracker.peak()
    flat = MLP_PARAMETERS * FLOAT
    assert set(peak.by_phase) == {"forward", "backward", "step"}
    assert sum(peak.by_category.values()) == peak.peak_bytes == max(peak.by_phase.values())
    # d, the previous flat gradient, two pairs of history: all there in the steady state, whatever else the peak holds
    assert peak.by_category["optimizer"] >= 6 * flat
    assert peak.by_category["gradients"] <= flat
    assert peak.by_category["parameters"] == flat


def test_activation_bytes_are_affine_in_the_batch() -> None:
    def activations(size: int) -> int:
        model, (x, y) = _larger_model(), _batch(size)
        with Tracker(model, None, [x, y]) as tracker:
            with tracker.phase("forward"):
                loss = functional.cross_entropy(model(x), y)
            tracker.begin_step()
        assert loss.requires_grad
        return tracker.peak().by_category["activations"]

    assert activations(64) - activations(48) == activations(48) - activations(32) > 0


def test_the_numbers_of_the_model_are_unchanged_by_being_tracked() -> None:
    x, y = _batch()
    tracked, plain = _larger_model(), _larger_model()
    track(tracked, _adamw(tracked), [x, y], _loss_of(tracked, x, y), steps=3)
    optimizer = _adamw(plain)
    for _ in range(3):
        functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for mine, theirs in zip(tracked.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_checkpointing_saves_the_input_of_the_block_only() -> None:
    x, y = _batch(256)
    body, head = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)), nn.Linear(WIDTH, CLASSES)

    def run(restart: bool) -> TrackedPeak:
        inner, outer = copy.deepcopy(body), copy.deepcopy(head)

        def forward() -> Tensor:
            hidden = checkpoint(inner, x, use_reentrant=False) if restart else inner(x)
            return functional.cross_entropy(outer(hidden), y)

        return track([inner, outer], _adamw(nn.ModuleList([inner, outer])), [x, y], forward)

    plain, restarted = run(False), run(True)
    kept_less = 256 * HIDDEN * FLOAT  # the ReLU's output
    assert restarted.by_phase["forward"] <= plain.by_phase["forward"]
    assert plain.by_category["activations"] - restarted.by_category["activations"] == kept_less


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.clone())
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        (kept,) = ctx.saved_tensors
        return gradient * 2 + 0 * kept


def test_what_an_autograd_function_saves_is_an_activation() -> None:
    x = torch.zeros(1000, requires_grad=True)
    with Tracker([], None, [x]) as tracker:
        with tracker.phase("forward"):
            out = _Doubled.apply(x)
        tracker.begin_step()
        with tracker.phase("backward"):
            out.sum().backward()
    assert x.grad is not None
    with Tracker([], None, [x]) as tracker:
        with tracker.phase("forward"):
            out = _Doubled.apply(x)
        tracker.begin_step()
    assert tracker.peak().by_category["activations"] == out.nbytes == 4000


def test_sparse_gradients_count_indices_and_values() -> None:
    table = nn.Embedding(100, 8, sparse=True)
    rows = torch.tensor([1, 2, 3])
    with Tracker(table, None, [rows]) as tracker:
        with tracker.phase("forward"):
            loss = table(rows).sum()
        with tracker.phase("backward"):
            loss.backward()
        tracker.begin_step()
    assert tracker.peak().by_category["gradients"] == 3 * 8 * FLOAT + 3 * 8


def test_a_tensor_on_another_device_is_not_counted() -> None:
    elsewhere = torch.empty(1000, device="meta")
    peak, _ = _track_forward(lambda: elsewhere + 1, elsewhere)
    assert peak.peak_bytes == 0


def test_fake_tensors_give_the_same_peak_as_real_ones() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, (x, y) = _mlp(), _batch()
    real = track(model, _adamw(model), [x, y], _loss_of(model, x, y))
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
        x, y = torch.empty(BATCH, WIDTH), torch.empty(BATCH, dtype=torch.int64)
        assert track(model, _adamw(model), [x, y], _loss_of(model, x, y)) == real


def test_the_replay_reports_the_last_step_on_the_floor_of_what_lived_before() -> None:
    parameter, temporary = CATEGORIES.index("parameters"), CATEGORIES.index("temporaries")
    events = [
        Event("born", 1000, 0, OUTSIDE),
        Event("an early peak", 9000, 1, "forward"),
        Event("death", -9000, 1, "forward"),
        Event("late", 500, 2, "backward"),
    ]
    peak = replay(events, {0: parameter, 1: temporary}, step_start=3)
    assert peak.peak_bytes == 1500
    assert peak.by_category["parameters"] == 1000
    assert peak.by_category["temporaries"] == 500
    assert peak.by_phase == {"backward": 1500}
    assert peak.at == "backward: late"


def test_one_step_is_refused_since_it_cannot_be_the_steady_state() -> None:
    model, (x, y) = _mlp(), _batch()
    with pytest.raises(SidebenchError, match="2 or more"):
        track(model, _adamw(model), [x, y], _loss_of(model, x, y), steps=1)


def test_a_tracker_without_a_step_has_no_peak() -> None:
    with Tracker([], None) as tracker:
        pass
    with pytest.raises(SidebenchError, match="begin_step"):
        tracker.peak()
