"""What `build` makes of a method's options, layers and start: the formulas' tests put their networks together by hand
and so do not see it."""

import dataclasses

import pytest
import torch
from method_cases import build, random_states
from torch import Tensor

from sidebench.adapters._base import Body, CachedMethod, trained
from sidebench.adapters.attentive_probe import AttentiveProbe, Queries
from sidebench.adapters.attentive_probe import Config as ProbeConfig
from sidebench.adapters.dtl import DTL, WrittenBack
from sidebench.adapters.dtl import Config as DTLConfig
from sidebench.adapters.res_tuning_bypass import Bypass, ResTuningBypass
from sidebench.adapters.res_tuning_bypass import Config as BypassConfig
from sidebench.adapters.sherl import Config as SherlConfig
from sidebench.adapters.sherl import Sherl
from sidebench.adapters.side_tuning import Blend, SideTuning
from sidebench.adapters.side_tuning import Config as SideConfig
from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone

ARCH = Architecture("Toy", "text", blocks=4, width=64, prefix_tokens=0, final_layer="norm", heads=4)
LAYERS = (*ARCH.states, "norm")
WIDTHS = dict.fromkeys(LAYERS, 64)


def built(method: CachedMethod, arch: Architecture = ARCH) -> Body:
    """In float64, from the seed that every run of a comparison would have."""
    torch.manual_seed(0)
    return method.build(arch, dict.fromkeys(method.layers(arch), 64), lambda: pytest.fail("no weights needed")).double()


def moved(body: Body) -> Body:
    """Away from the zeros it starts with, so that every term shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return body


def test_a_probes_queries_start_with_a_deviation_of_a_fiftieth() -> None:
    body = built(AttentiveProbe(ProbeConfig(queries=100)))
    assert isinstance(body, Queries)
    assert float(body.query.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert float(body.query.detach().mean()) == pytest.approx(0.0, abs=0.001)


def test_a_probe_reads_the_final_layer() -> None:
    states = random_states(LAYERS, WIDTHS, (2, 4))
    body = built(AttentiveProbe())
    alone = dataclasses.replace(states, activations={"norm": states.activations["norm"]})
    assert torch.equal(body(alone), body(states))


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_side_tuning_has_as_many_heads_as_asked_for(heads: int) -> None:
    body = built(SideTuning(SideConfig(depth=3, heads=heads)))
    assert isinstance(body, Blend)
    assert [block.heads for block in body.side.blocks] == [heads] * 3


def test_side_tuning_on_stage_maps_is_refused() -> None:
    maps = dataclasses.replace(ARCH, blocks=0, stages=((4, 4), (2, 2)), final_layer="stages.1")
    assert "stage maps" in str(SideTuning().refusal(maps))
    assert SideTuning().refusal(ARCH) is None


@pytest.mark.parametrize("final", ["norm", "blocks.3"])
def test_a_bypass_starts_as_the_final_layer_and_is_a_tuner_per_state(final: str) -> None:
    body = built(ResTuningBypass(BypassConfig(bottleneck=3)), dataclasses.replace(ARCH, final_layer=final))
    states = random_states(LAYERS, WIDTHS, (2, 4))
    assert torch.equal(body(states), states.state(final))
    number = 5  # the embeddings and what leaves each of four blocks
    assert sum(p.numel() for p in body.parameters()) == (2 * number - 1) * (2 * 64 * 3 + 3 + 64)


def test_a_lean_bypass_is_lean_and_another_is_not() -> None:
    def kept(body: Body) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert body(states).requires_grad
        return sum(storages.values())

    states = random_states(LAYERS, WIDTHS, (40, 40))
    lean, plain = (kept(built(ResTuningBypass(BypassConfig(lean=lean)))) for lean in (True, False))
    assert 2 * lean < plain


@pytest.mark.parametrize("number", range(2, 8))
def test_a_lean_chain_leaves_no_state_out_however_many_there_are(number: int) -> None:
    layers = ("embeddings", *(f"blocks.{i}" for i in range(number - 1)))
    states = random_states((*layers, "norm"), dict.fromkeys((*layers, "norm"), 6), (2, 4))
    torch.manual_seed(0)
    body = Bypass(layers, "norm", dict.fromkeys((*layers, "norm"), 6), 3).double()
    moved(body)
    chain = body.horizontal[0](states.state(layers[0]))
    for level, layer in enumerate(layers[1:]):
        chain = body.horizontal[level + 1](states.state(layer)) + chain + body.vertical[level](chain)
    torch.testing.assert_close(body(states), states.state("norm") + chain, atol=1e-12, rtol=1e-12)


def test_dtl_without_an_mlp_is_refused() -> None:
    assert "attention blocks" in str(DTL().refusal(dataclasses.replace(ARCH, mlp_width=None)))
    assert DTL().refusal(dataclasses.replace(ARCH, mlp_width=128)) is None


def test_sherl_is_as_wide_as_asked_for(tiny_vit: Backbone) -> None:
    d, m, count = 32, 32 // 4, tiny_vit.arch.blocks
    formula = count * (d * m + m + 2 * m) + (m + 1) * (count > 2) + (m * d + d + 2 * d) + 1
    body = build(Sherl(SherlConfig(reduction=4)), tiny_vit)
    assert sum(p.numel() for p in trained(body).values()) == formula


def test_dtl_has_the_rank_and_the_beta_asked_for(tiny_vit: Backbone) -> None:
    body = build(DTL(DTLConfig(rank=3, beta=7.0)), tiny_vit)
    assert isinstance(body, WrittenBack)
    assert sum(p.numel() for p in trained(body).values()) == 2 * tiny_vit.arch.blocks * 3 * tiny_vit.arch.width
    assert body.side.beta == 7.0
