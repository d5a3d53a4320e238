"""The lean forms: the numbers of the plain ones, with a fraction of their memory."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from method_cases import random_states
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sidebench.adapters import _recompute
from sidebench.adapters._base import Batch, Body, CachedMethod
from sidebench.adapters._recompute import in_slices, recomputed, slices, summed_in_turn
from sidebench.adapters._registry import config_facts, find_method
from sidebench.adapters._unipt_parallel import confidences
from sidebench.adapters._unipt_single import SingleAnchor
from sidebench.adapters.lst import Ladder
from sidebench.adapters.sherl_single_anchor import TieredAnchor
from sidebench.adapters.unipt import MlpAnchor, TokenAnchor
from sidebench.bench.tracker import TrackedPeak, Tracker, track
from sidebench.cache.architecture import Architecture

ARCH = Architecture(
    "Toy", "text", blocks=3, width=24, prefix_tokens=0, final_layer="norm", heads=2, mlp_width=32, norm="pre"
)
LAYERS = (*ARCH.states, "norm")
WIDTHS = dict.fromkeys(LAYERS, 24)
LENGTHS = (9, 5, 9, 7, 2, 9, 8)
SIDE = 12

BODIES: dict[str, Callable[[bool], Body]] = {
    "tokens": lambda lean: TokenAnchor(ARCH.states, WIDTHS, SIDE, 24, lean=lean),
    "mlp": lambda lean: MlpAnchor(ARCH.states, WIDTHS, SIDE, 24, lean=lean),
    "tiers": lambda lean: TieredAnchor(ARCH.states, "norm", WIDTHS, SIDE, last_real=False, gated=True, lean=lean),
    "first": lambda lean: SingleAnchor(ARCH.states, "norm", WIDTHS, SIDE, last_real=False, lean=lean),
    "last": lambda lean: SingleAnchor(ARCH.states, "norm", WIDTHS, SIDE, last_real=True, lean=lean),
    "ladder": lambda lean: Ladder(ARCH, WIDTHS, 2, 0.1, lean=lean),
    "ladder-dropped": lambda lean: Ladder(ARCH, WIDTHS, 2, 0.1, kept=(0, 2), merge_last=True, lean=lean),
}
every_body = pytest.mark.parametrize("name", BODIES)
VECTORS = ("first", "last", "tiers")
FROM_FLOAT32 = (*VECTORS, "ladder-dropped")  # what comes out is a sum with stored numbers


@pytest.fixture(autouse=True)
def _slices_of_two_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recompute, "TOKENS_AT_A_TIME", 2 * max(LENGTHS) + 1)


def pair(name: str) -> tuple[Body, Body]:
    """The lean and the plain form with the same weights, wide enough for every term to show."""
    torch.manual_seed(0)
    lean, plain = BODIES[name](True), BODIES[name](False)
    with torch.no_grad():
        for parameter in lean.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    plain.load_state_dict(lean.state_dict())
    return lean, plain


def stored(dtype: torch.dtype = torch.float16, lengths: Sequence[int] = LENGTHS) -> Batch:
    exact = random_states(LAYERS, WIDTHS, lengths)
    return Batch(exact.mask, {n: v.to(dtype) for n, v in exact.activations.items()})


def weighed(out: Tensor) -> Tensor:
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum()


def gradients(body: nn.Module, batch: Batch) -> dict[str, Tensor | None]:
    body.zero_grad()
    weighed(body(batch)).backward()
    return {name: p.grad for name, p in body.named_parameters()}


def assert_equal_within(tolerance: float, mine: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    """Relative to the largest gradient of all parameters."""
    assert mine.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values() if g is not None)
    for name, gradient in theirs.items():
        found = mine[name]
        assert (found is None) == (gradient is None), name
        if found is not None and gradient is not None:
            assert found.dtype == gradient.dtype
            assert float((found - gradient).abs().max()) <= tolerance * scale, name


def flat(found: dict[str, Tensor | None]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in found.values() if gradient is not None])


# --- the same numbers ------------------------------------------------------------------------------------------------


def test_a_batch_is_cut_into_slices_of_whole_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = stored()
    parts = list(slices(batch))
    assert [len(part.mask) for part in parts] == [2, 2, 2, 1]
    assert torch.equal(torch.cat([part.mask for part in parts]), batch.mask)
    for layer in LAYERS:
        assert torch.equal(torch.cat([part.state(layer) for part in parts]), batch.state(layer))
        whole = batch.activations[layer].untyped_storage().data_ptr()
        assert all(part.activations[layer].untyped_storage().data_ptr() == whole for part in parts)
    monkeypatch.setattr(_recompute, "TOKENS_AT_A_TIME", 1)
    assert [len(part.mask) for part in slices(batch)] == [1] * 7


def test_a_slice_of_a_live_batch_takes_its_inputs_along() -> None:
    batch = Batch(torch.ones(4, 3, dtype=torch.bool), inputs={"pixels": torch.arange(4)})
    assert batch.rows(slice(1, 3)).inputs["pixels"].tolist() == [1, 2]


@every_body
def test_the_gradients_are_the_plain_ones_in_double_precision(name: str) -> None:
    lean, plain = (body.double() for body in pair(name))
    batch = random_states(LAYERS, WIDTHS, LENGTHS)
    torch.testing.assert_close(lean(batch), plain(batch), atol=1e-12, rtol=1e-12)
    assert_equal_within(1e-10, gradients(lean, batch), gradients(plain, batch))


@every_body
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_gradients_are_the_plain_ones_from_stored_numbers(name: str, dtype: torch.dtype) -> None:
    lean, plain = pair(name)
    batch = stored(dtype)
    torch.testing.assert_close(lean(batch), plain(batch))
    assert_equal_within(1e-6, gradients(lean, batch), gradients(plain, batch))


@every_body
def test_two_runs_give_the_same_bits(name: str) -> None:
    lean, _ = pair(name)
    batch = stored()
    first, second = (gradients(lean, batch) for _ in range(2))
    for one, other in zip(first.values(), second.values(), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@every_body
def test_evaluation_gives_what_training_gives(name: str) -> None:
    lean, _ = pair(name)
    batch = stored()
    trained = lean(batch)
    assert trained.requires_grad
    with torch.inference_mode():
        assert torch.equal(lean(batch), trained)


@every_body
def test_mixed_precision_is_as_near_to_full_precision_as_the_plain_form(name: str) -> None:
    lean, plain = pair(name)
    batch = stored()

    def mixed(body: Body) -> dict[str, Tensor | None]:
        body.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = body(batch)
        assert out.dtype == (torch.float32 if name in FROM_FLOAT32 else torch.bfloat16)
        weighed(out.float()).backward()  # outside, as in the training loop
        return {n: p.grad for n, p in body.named_parameters()}

    full = flat(gradients(plain, batch))
    rounding, plain_rounding = ((flat(mixed(body)) - full).norm() / full.norm() for body in (lean, plain))
    assert 1e-3 < rounding <= 1.2 * plain_rounding


@every_body
def test_backward_inside_autocast_loses_no_gradient_to_its_cache(name: str) -> None:
    lean, _ = pair(name)
    batch = stored()
    found = []
    for inside in (True, False):
        lean.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = weighed(lean(batch).float())
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append({n: p.grad for n, p in lean.named_parameters()})
    assert_equal_within(0, *found)


# --- a body of one's own ---------------------------------------------------------------------------------------------


class Own(Body):
    """One linear map met in every part, a parameter without use, and logits as large as asked for."""

    looks = 5

    def __init__(self, logit_scale: float = 1.0) -> None:
        super().__init__()
        self.width = 24
        self.shared = nn.Linear(24, 24)
        self.unused = nn.Parameter(torch.ones(3))
        self.logit_scale = logit_scale

    def open(self, batch: Batch) -> tuple[Tensor, ...]:
        tokens = self.shared(batch.state(LAYERS[0]))
        return tokens, tokens.detach(), batch.mask.sum(1)

    def look(self, index: int, opened: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        value = torch.tanh(self.shared(batch.state(LAYERS[index])) * opened[1])
        return value, self.logit_scale * torch.cos(value + opened[0]).mean((1, 2))[:, None]

    def close(self, opened: Sequence[Tensor], merged: Tensor) -> Tensor:
        return self.shared(merged)

    def forward(self, batch: Batch) -> Tensor:
        opened = self.open(batch)
        values, logits = zip(*(self.look(i, opened, batch) for i in range(self.looks)), strict=True)
        return self.close(opened, torch.einsum("bl,lbtm->btm", confidences(logits), torch.stack(values)))


class OwnLean(Own):
    def forward(self, batch: Batch) -> Tensor:
        return summed_in_turn(self, batch)


def own_pair(logit_scale: float = 1.0) -> tuple[Own, Own]:
    torch.manual_seed(0)
    lean, plain = OwnLean(logit_scale).double(), Own(logit_scale).double()
    plain.load_state_dict(lean.state_dict())
    return lean, plain


@pytest.mark.parametrize("logit_scale", [1.0, 300.0, 1e5])
def test_a_body_may_use_a_parameter_everywhere_and_have_any_logits(logit_scale: float) -> None:
    lean, plain = own_pair(logit_scale)
    batch = random_states(LAYERS, WIDTHS, LENGTHS)
    torch.testing.assert_close(lean(batch), plain(batch), atol=1e-9, rtol=1e-9)
    assert_equal_within(1e-9, gradients(lean, batch), gradients(plain, batch))
    assert lean.unused.grad is None  # a zero would be decayed


def test_backward_recomputes_in_the_precision_of_forward_and_differentiates_outside_of_autocast() -> None:
    seen, mixed = [], []

    class Seen(OwnLean):
        def look(self, index: int, opened: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
            product = self.shared(batch.state(LAYERS[index]))
            seen.append(product.dtype)
            if product.requires_grad:
                product.register_hook(lambda _: mixed.append(torch.is_autocast_enabled("cpu")))
            return product, product.float().mean((1, 2))[:, None]

    body = Seen()
    with torch.autocast("cpu", torch.bfloat16):
        out = body(stored())
    in_forward = len(seen)
    out.float().square().sum().backward()
    assert len(seen) == 2 * in_forward == 2 * len(mixed)
    assert set(seen) == {torch.bfloat16}
    assert set(mixed) == {False}


def test_a_frozen_part_gets_no_gradient() -> None:
    lean, plain = (body.double() for body in pair("tokens"))
    for body in (lean, plain):
        body.get_submodule("down.1").requires_grad_(False)
        body.get_submodule("up").requires_grad_(False)
    batch = random_states(LAYERS, WIDTHS, LENGTHS)
    assert_equal_within(1e-10, gradients(lean, batch), gradients(plain, batch))


def test_parameters_swapped_since_forward_are_noticed() -> None:
    lean, _ = own_pair()
    batch = random_states(LAYERS, WIDTHS, LENGTHS)
    others = {name: p.detach().clone().requires_grad_() for name, p in lean.named_parameters()}
    out = torch.func.functional_call(lean, others, (batch,))
    with pytest.raises(RuntimeError, match="no longer those of forward"):
        weighed(out).backward()


def test_parameters_changed_since_forward_are_noticed() -> None:
    lean, _ = own_pair()
    out = lean(random_states(LAYERS, WIDTHS, LENGTHS))
    with torch.no_grad():
        lean.shared.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighed(out).backward()


def test_a_chain_of_ones_own_can_be_recomputed_in_slices() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(24, 24).double(), nn.Linear(24, 24).double()
    batch = random_states(LAYERS, WIDTHS, LENGTHS)
    calls = []

    def step(linear: nn.Linear, tokens: Tensor) -> Tensor:
        calls.append(len(tokens))
        return torch.tanh(linear(tokens))

    def chain(part: Batch) -> Tensor:
        return recomputed(step, second, recomputed(step, first, part.state("norm")))

    weighed(in_slices(chain, batch)).backward()
    found = [first.weight.grad, second.weight.grad]
    there = [2, 2, 2, 2, 2, 2, 1, 1]
    assert calls == [*there, *reversed(there)]  # backward begins with the last slice
    first.zero_grad()
    second.zero_grad()
    weighed(step(second, step(first, batch.state("norm")))).backward()
    for mine, theirs in zip(found, [first.weight.grad, second.weight.grad], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


SETTINGS = [
    ("unipt", {}),
    ("unipt", {"form": "mlp"}),
    ("unipt", {"form": "single_anchor"}),
    ("lst", {"init": "random", "reduction": "2"}),
    ("sherl_single_anchor", {}),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_lean_is_the_default_and_an_option_that_the_record_tells(name: str, settings: dict[str, str]) -> None:
    for choice, lean in (({}, True), ({"lean": "false"}, False)):
        method = find_method(name).configured({**settings, **choice})
        assert isinstance(method, CachedMethod)
        assert config_facts(method)["lean"] is lean
        assert method.build(ARCH, WIDTHS, lambda: pytest.fail("starts at random")).lean is lean


# --- the memory ------------------------------------------------------------------------------------------------------

MANY = (40,) * 16  # long enough for activations to outweigh parameters
FLOAT = 4


def kept_for_backward(body: Body, batch: Batch) -> int:
    """Bytes of what forward left behind, parameters, inputs and output apart."""
    with Tracker(body, None, [batch.mask, *batch.activations.values()]) as tracker:
        with tracker.phase("forward"):
            out = body(batch)
        tracker.begin_step()
    assert out.requires_grad
    return tracker.peak().by_category["activations"]


def test_the_parallel_form_keeps_the_sum_over_layers_and_its_normaliser() -> None:
    lean, plain = pair("tokens")
    batch = stored(lengths=MANY)
    tokens = len(MANY) * MANY[0]
    assert kept_for_backward(lean, batch) == (tokens * SIDE + len(MANY)) * FLOAT
    assert kept_for_backward(plain, batch) > len(ARCH.states) * tokens * (24 + 3 * SIDE) * FLOAT


def test_the_single_anchor_form_keeps_one_vector_per_example() -> None:
    lean, _ = pair("first")
    assert kept_for_backward(lean, stored(lengths=MANY)) == len(MANY) * (SIDE + 1) * FLOAT


def test_the_ladder_keeps_every_other_side_state_and_its_final_norm() -> None:
    lean, _ = pair("ladder")
    tokens = len(MANY) * MANY[0]
    states = 1 + -(-ARCH.blocks // 2)  # behind the embeddings, and behind blocks 1 and 2
    final_norm = tokens * (SIDE + 2)  # its output, mean and deviation; its input is the last of the states
    assert kept_for_backward(lean, stored(lengths=MANY)) == (tokens * SIDE * states + final_norm) * FLOAT


def test_a_ladder_that_merges_the_final_layer_keeps_side_states_alone() -> None:
    lean, _ = pair("ladder-dropped")
    tokens = len(MANY) * MANY[0]
    assert kept_for_backward(lean, stored(lengths=MANY)) == tokens * SIDE * 2 * FLOAT  # of the two kept blocks


def test_the_tiered_form_keeps_a_few_vectors_per_layer_and_example() -> None:
    lean, plain = pair("tiers")
    batch, vector = stored(lengths=MANY), SIDE * FLOAT
    assert kept_for_backward(lean, batch) < 6 * len(ARCH.states) * len(MANY) * vector
    assert kept_for_backward(plain, batch) > len(ARCH.states) * len(MANY) * MANY[0] * vector


def step_peak(body: Body, batch: Batch) -> TrackedPeak:
    optimizer = torch.optim.AdamW(body.parameters())
    return track(body, optimizer, [batch.mask, *batch.activations.values()], lambda: body(batch).square().mean())


@every_body
def test_a_lean_step_takes_a_fraction_of_the_plain_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recompute, "TOKENS_AT_A_TIME", 80)
    lean, plain = pair(name)
    batch = stored(lengths=MANY)

    def beside_inputs(peak: TrackedPeak) -> int:
        parts = peak.by_category
        return peak.peak_bytes - parts["inputs"] - parts["parameters"] - parts["optimizer"]

    assert beside_inputs(step_peak(lean, batch)) < 0.35 * beside_inputs(step_peak(plain, batch))


@pytest.mark.parametrize("name", ["tokens", "first"])
def test_one_layer_more_costs_its_stored_bytes_and_its_parameters(name: str) -> None:
    def peak(blocks: int) -> tuple[int, int]:
        torch.manual_seed(0)
        states = dataclasses.replace(ARCH, blocks=blocks).states
        widths = dict.fromkeys((*states, "norm"), 24)
        body = {
            "tokens": lambda: TokenAnchor(states, widths, SIDE, 24),
            "first": lambda: SingleAnchor(states, "norm", widths, SIDE, last_real=False),
        }[name]()
        exact = random_states(tuple(widths), widths, MANY)
        batch = Batch(exact.mask, {n: v.half() for n, v in exact.activations.items()})
        return step_peak(body, batch).peak_bytes, sum(p.numel() for p in body.parameters())

    (few, few_parameters), (many, many_parameters) = peak(2), peak(4)
    stored_bytes = 2 * len(MANY) * MANY[0] * 24 * 2
    # Parameters, two moments, gradients, and step counters of the two layers' tensors.
    learned = 4 * FLOAT * (many_parameters - few_parameters) + 2 * 4 * FLOAT
    assert stored_bytes < many - few <= stored_bytes + learned


@every_body
def test_no_layer_is_upcast_whole(name: str) -> None:
    lean, _ = pair(name)
    batch = stored(lengths=MANY)
    inputs = [batch.mask, *batch.activations.values()]
    with Tracker(lean, None, inputs) as tracker:
        weighed(lean(batch).mean(-1)).backward()
    upcast = len(MANY) * MANY[0] * 24 * FLOAT
    whole = [event.op for event in tracker.events if event.delta_bytes >= upcast and "found" not in event.op]
    # Tokens of the layers' own width come out of the token forms, and their gradient goes back in.
    assert [op for op in whole if "to_copy" in op] == []
    assert len(whole) <= (0 if name in VECTORS else 3)


@pytest.mark.parametrize("name", ["tokens", "mlp", "first", "tiers", "ladder", "ladder-dropped"])
def test_fake_tensors_predict_the_same_peak(name: str) -> None:
    def peak(make: Callable[[], Batch]) -> TrackedPeak:
        torch.manual_seed(0)
        body, batch = BODIES[name](True), make()
        optimizer = torch.optim.AdamW(body.parameters())
        inputs = [batch.mask, *batch.activations.values()]
        return track(body, optimizer, inputs, lambda: body(batch).square().mean())

    def empty() -> Batch:
        shape = (len(LENGTHS), max(LENGTHS))
        states = {layer: torch.empty((*shape, 24), dtype=torch.float16) for layer in LAYERS}
        return Batch(torch.ones(shape, dtype=torch.bool), states)

    real = peak(stored)
    with FakeTensorMode():
        assert peak(empty) == real
