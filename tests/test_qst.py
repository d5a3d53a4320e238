"""QST against its formulas, written out in loops and in float64, and from quantised stores (arXiv 2401.07159)."""

import copy
import dataclasses
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from loops import layer_norms, linears, side_block
from method_cases import Case, random_states
from torch import Tensor, nn
from toys import ToyExamples, build_store

from sidebench.adapters import _recompute
from sidebench.adapters._base import Batch
from sidebench.adapters.qst import QST, Config, SideNetwork
from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone
from sidebench.cache.encode import tensors_of
from sidebench.cache.pooling import masked_mean
from sidebench.cache.quantise import Quantised, quantise
from sidebench.cache.zarr_store import ZarrStore

PRE = Architecture(
    "Toy",
    "text",
    blocks=3,
    width=24,
    prefix_tokens=0,
    final_layer="norm",
    heads=4,
    mlp_width=16,
    norm="pre",
    activation="gelu",
    layer_scale=True,
)
POST = dataclasses.replace(PRE, norm="post", layer_scale=False, final_layer="blocks.2", norm_eps=1e-12)
LAYERS = (*PRE.states, "norm")
WIDTHS = dict.fromkeys(LAYERS, 24)
LENGTHS = (2, 4, 3)
REDUCTION, RANK, SIDE = 4, 5, 6  # 4 heads do not divide 6 channels: 2 are left
both_norms = pytest.mark.parametrize("arch", [PRE, POST], ids=["pre", "post"])
in_slices = pytest.mark.usefixtures("_slices_of_two_examples")
both_ways_down = pytest.mark.parametrize("rank", [RANK, None], ids=["low_rank", "mean_pool"])


@pytest.fixture
def _slices_of_two_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recompute, "TOKENS_AT_A_TIME", 2 * max(LENGTHS))


def network(arch: Architecture, rank: int | None, *, lean: bool = True) -> SideNetwork:
    """In float64, every parameter moved, so that every term shows."""
    torch.manual_seed(0)
    body = SideNetwork(arch, WIDTHS, REDUCTION, rank, lean=lean).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return body


def naive_down(way: nn.Module, x: Tensor) -> Tensor:
    if isinstance(way, nn.AdaptiveAvgPool1d):
        return torch.stack([torch.stack([v[4 * i : 4 * i + 4].sum() / 4 for i in range(SIDE)]) for v in x])
    assert isinstance(way, nn.Sequential)
    hidden = linears(way[0], x)
    return layer_norms(way[3], linears(way[2], hidden / (1 + torch.exp(-hidden))))


def naive(body: SideNetwork, states: Sequence[Tensor], final: Tensor, arch: Architecture) -> Tensor:
    """One example's real tokens: the embeddings, every block's output, and the backbone's final tokens."""
    side = naive_down(body.down[0], states[0])
    for i, block in enumerate(body.blocks):
        gate = 1 / (1 + torch.exp(-body.gates[i]))
        side = side_block(block, (1 - gate) * naive_down(body.down[i], states[i + 1]) + gate * side, arch, 2)
    gate = 1 / (1 + torch.exp(-body.last_gate))
    return (1 - gate) * linears(body.up, layer_norms(body.norm, side)) + gate * final


@in_slices
@pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])
@both_ways_down
@both_norms
def test_every_real_token_equals_the_formula(arch: Architecture, rank: int | None, lean: bool) -> None:
    body, batch = network(arch, rank, lean=lean), random_states(LAYERS, WIDTHS, LENGTHS)
    out = body(batch)
    for row, real in enumerate(LENGTHS):
        states = [batch.state(name)[row, :real] for name in arch.states]
        expected = naive(body, states, batch.state(arch.final_layer)[row, :real], arch)
        torch.testing.assert_close(out[row, :real], expected, atol=1e-9, rtol=1e-9)


@in_slices
@both_norms
def test_lean_and_plain_have_the_same_gradients(arch: Architecture) -> None:
    batch = random_states(LAYERS, WIDTHS, LENGTHS)
    found = []
    for lean in (True, False):
        body = network(arch, RANK, lean=lean)
        out = body(batch)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        found.append({name: parameter.grad for name, parameter in body.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-11, rtol=1e-11)
    assert all(state.grad is None for state in batch.activations.values())


def test_the_gates_start_where_the_paper_starts_them() -> None:
    body = SideNetwork(PRE, WIDTHS, REDUCTION, RANK)
    assert body.gates.shape == (3, SIDE)
    assert (body.gates == 0.5).all()
    assert body.last_gate.shape == (24,)
    assert (body.last_gate == 1).all()


def test_an_open_last_gate_hands_out_the_backbone_s_final_tokens() -> None:
    body, batch = network(PRE, RANK), random_states(LAYERS, WIDTHS, LENGTHS)
    nn.init.constant_(body.last_gate, 1e3)
    assert torch.equal(body(batch), batch.state("norm"))


def test_each_channel_has_a_gate_of_its_own() -> None:
    body, batch = network(PRE, None), random_states(LAYERS, WIDTHS, LENGTHS)
    other = random_states(LAYERS, WIDTHS, LENGTHS, seed=1)
    nn.init.constant_(body.gates, 1e3)  # closed to every state
    nn.init.constant_(body.last_gate, -1e3)
    same_start = {**other.activations, "embeddings": batch.activations["embeddings"]}
    torch.testing.assert_close(body(dataclasses.replace(other, activations=same_start)), body(batch))
    with torch.no_grad():
        body.gates[1, 2] = -1e3  # open to channel 2 of the pooled state of blocks.1: channels 8 to 11
    state = batch.activations["blocks.1"]
    assert isinstance(state, Tensor)
    before = body(batch)
    for channels, seen in ((slice(8, 12), True), (slice(0, 8), False), (slice(12, 24), False)):
        changed = state.clone()
        changed[..., channels] += 1
        out = body(dataclasses.replace(batch, activations={**batch.activations, "blocks.1": changed}))
        assert torch.allclose(out[0, 0], before[0, 0], atol=1e-9) is not seen


@pytest.mark.parametrize("arch", [PRE, POST, dataclasses.replace(PRE, layer_scale=False)])
@pytest.mark.parametrize("reduction", [1, 3, 4])
@both_ways_down
def test_the_docstring_formula_counts_the_parameters(arch: Architecture, reduction: int, rank: int | None) -> None:
    number, d, s, f, e = 3, 24, 24 // reduction, 16 // reduction, 24
    down = 0 if rank is None else number * (d * rank + rank * s + 2 * s)
    block = 4 * (s * s + s) + 2 * s * f + f + s + 4 * s + (2 * s if arch.layer_scale else 0)
    formula = down + number * s + number * block + 2 * s + s * e + e + e
    assert sum(p.numel() for p in SideNetwork(arch, WIDTHS, reduction, rank).parameters()) == formula


def test_the_side_network_of_a_causal_backbone_is_causal(tiny_clip_text: Backbone, tiny_bert: Backbone) -> None:
    for backbone in (tiny_clip_text, tiny_bert):
        layers = QST().layers(backbone.arch)
        widths = dict.fromkeys(layers, backbone.arch.width)
        torch.manual_seed(0)
        body = QST().build(backbone.arch, widths, lambda: pytest.fail("it starts from no backbone weights"))
        states = {s: torch.randn(1, 5, backbone.arch.width) for s in layers}
        changed = {s: torch.cat([v[:, :4], v[:, 4:] + torch.randn(32)], dim=1) for s, v in states.items()}
        mask = torch.ones(1, 5, dtype=torch.bool)
        same = torch.equal(body(Batch(mask, states))[:, :4], body(Batch(mask, changed))[:, :4])
        assert same == backbone.arch.causal


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        ({"norm": None}, Config(), "side blocks"),
        ({"activation": "maxout"}, Config(), "maxout"),
        ({}, Config(), "no side width of 4 or more"),
        ({}, Config(reduction=0), "no side width"),
        ({}, Config(reduction=4, rank=0), "1 or more"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, str], config: Config, said: str) -> None:
    assert said in str(QST(config).refusal(dataclasses.replace(PRE, **change)))  # type: ignore[arg-type]
    assert QST(Config(reduction=4)).refusal(PRE) is None


# --- quantised stores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "form"),
    [
        ("low_rank", {"dtype": "int8"}),
        ("mean_pool", {"dtype": "int8", "per_channel": True}),
        ("low_rank", {"dtype": "fp8"}),
        ("mean_pool", {"dtype": "fp8", "tokens": "proj:8"}),
    ],
)
def test_it_learns_from_a_quantised_store_what_it_learns_from_a_plain_one(
    tiny_bert: Backbone, text_examples: ToyExamples, tmp_path: Path, form: dict[str, object], way: str
) -> None:
    wide = {**form, "dtype": "float32", "per_channel": False}
    plain, small = (
        losses(ZarrStore(build_store(tiny_bert, text_examples, tmp_path, **options).folder), text_examples, way)
        for options in (wide, form)
    )
    assert small[0] == pytest.approx(plain[0], rel=0.02)
    assert plain[0] != small[0]
    assert small[-1] < 0.8 * small[0]
    assert small[-1] == pytest.approx(plain[-1], abs=0.1)


def losses(store: ZarrStore, examples: ToyExamples, way: str) -> list[float]:
    method = Case("qst", (("down", way),)).method()
    assert isinstance(method, QST)
    layers = method.layers(store.architecture)
    widths = {spec.layer: spec.width for spec in store.manifest.specs}
    torch.manual_seed(0)
    body = method.build(store.architecture, widths, lambda: pytest.fail("no weights needed"))
    learner = nn.ModuleList([body, nn.Linear(body.width, 2)])
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    read = store.read(np.arange(len(store)), layers)
    batch = Batch(read.mask, read.layers)
    assert all(isinstance(s, Quantised) is store.manifest.form.quantised for s in batch.activations.values())
    found = []
    for _ in range(25):
        logits = learner[1](masked_mean(learner[0](batch), batch.mask))
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(examples.targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


class Watched(Batch):
    """A batch that counts how many of the states it upcast are alive when the next one is asked for."""

    handed_out: ClassVar[list[weakref.ref[Tensor]]] = []
    alive: ClassVar[list[int]] = []

    def state(self, layer: str) -> Tensor:
        self.alive.append(sum(ref() is not None for ref in self.handed_out))
        wide = super().state(layer)
        self.handed_out.append(weakref.ref(wide))
        return wide


def quantised_batch() -> Watched:
    exact = random_states(LAYERS, WIDTHS, LENGTHS)
    states = {name: quantise(state, "int8") for name, state in exact.activations.items() if isinstance(state, Tensor)}
    return Watched(exact.mask, states)


@in_slices
def test_forward_upcasts_one_state_at_a_time_and_backward_two() -> None:
    Watched.handed_out.clear()
    Watched.alive.clear()
    body = SideNetwork(PRE, WIDTHS, REDUCTION, RANK)
    out = body(quantised_batch())
    assert len(Watched.alive) == 2 * 5  # slices times states
    assert max(Watched.alive) == 0
    out.sum().backward()
    assert len(Watched.alive) == 2 * 2 * 5
    assert max(Watched.alive) == 1


@in_slices
def test_forward_keeps_no_upcast_state_for_backward() -> None:
    batch = quantised_batch()
    known = {t.untyped_storage().data_ptr() for s in batch.activations.values() for t in tensors_of(s)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        SideNetwork(PRE, WIDTHS, REDUCTION, RANK)(copy.copy(batch))
    wide = [t for t in kept if t.ndim == 3 and t.shape[-1] == 24 and t.untyped_storage().data_ptr() not in known]
    assert wide == []
