"""DTL and DTL+ against their formulas in loops and float64, and against the whole network run live (arXiv
2312.07856)."""

import copy
import dataclasses
import gc
import math

import pytest
import torch
from method_cases import batch_of, build
from restarts import batch_for, bytes_kept, deep_backbones
from torch import Tensor, nn
from toys import make_images

from sidebench.adapters._base import Batch, trained
from sidebench.adapters.dtl import DTL, CompactSide, Config, ConvolvedSide, WrittenBack
from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone
from sidebench.cache.errors import SidebenchError
from sidebench.cache.suffix import ENTERING, MASK, Suffix

VIT_B = Architecture(
    "ViT-B", "image", blocks=12, width=768, prefix_tokens=1, final_layer="norm", heads=12, mlp_width=3072, norm="pre"
)
Rows = list[list[float]]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    return deep_backbones(tmp_path_factory.mktemp("deep"), 6)


def moved(body: nn.Module) -> None:
    """Away from the zeros it starts with, so that every term shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained(body).values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def theta(e: float, beta: float) -> float:
    return e / (1 + math.exp(-beta * e))


def naive_added(side: CompactSide, xs: list[Rows]) -> Rows:
    """theta(e_i) of one example, token by token, from what entered blocks 0 … i."""
    state = [[0.0] * len(row) for row in xs[0]]
    for block, x in enumerate(xs):
        a, b = side.down[block].tolist(), side.up[block].tolist()
        for token, row in enumerate(x):
            hidden = [sum(w * v for w, v in zip(weights, row, strict=True)) for weights in a]
            for channel in range(len(row)):
                state[token][channel] += sum(h * weights[channel] for h, weights in zip(hidden, b, strict=True))
    return [[theta(e, side.beta) for e in row] for row in state]


def naive_convolved(side: ConvolvedSide, added: Rows, width: int) -> Rows:
    """The patches of one example convolved in a square of `width`, the tokens before them as they are."""
    prefix = side.prefix_tokens
    kernel = side.convolution.weight[:, 0].tolist()
    out = [list(row) for row in added]
    for y in range(width):
        for x in range(width):
            for channel, weights in enumerate(kernel):
                near = 0.0
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        if 0 <= y + dy < width and 0 <= x + dx < width:
                            token = prefix + (y + dy) * width + x + dx
                            near += weights[dy + 1][dx + 1] * added[token][channel]
                out[prefix + y * width + x][channel] = near
    return out


@pytest.mark.parametrize("plus", [False, True])
def test_what_is_added_equals_the_formula(plus: bool) -> None:
    torch.manual_seed(0)
    side = CompactSide(blocks=4, width=5, rank=2, beta=3.0).double()
    if plus:
        side = ConvolvedSide(side, prefix_tokens=2).double()
    moved(side)
    xs = [torch.randn(2, 11, 5, dtype=torch.float64) for _ in range(3)]  # 2 + 3 x 3 tokens
    out = side.added(*(side.note(block, x) for block, x in enumerate(xs)))
    for example in range(2):
        expected = naive_added(side, [x[example].tolist() for x in xs])
        if isinstance(side, ConvolvedSide):
            expected = naive_convolved(side, expected, 3)
        torch.testing.assert_close(out[example], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-9)


CASES = [
    pytest.param("vit", Config(), 4, id="vit-half"),
    pytest.param("vit", Config(plus=True, write_back=5), 2, id="vit-plus-five"),
    pytest.param("vit", Config(write_back=6), 1, id="vit-all"),
    pytest.param("bert", Config(write_back=2), 5, id="bert-two"),
    pytest.param("t5", Config(), 2, id="t5"),
]


def live(whole: Backbone, side: CompactSide, written: int, inputs: dict[str, Tensor]) -> Tensor:
    """The whole network with hooks on every block: nothing cached, nothing restarted, nothing recomputed."""
    notes: list[Tensor] = []

    def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
        notes.append(side.note(len(notes), args[0] if args else kwargs["hidden_states"]))

    def add(_: nn.Module, __: tuple, out: Tensor | tuple) -> Tensor | tuple:
        if len(notes) <= len(whole.blocks) - written:
            return out
        added = side.added(*notes)
        return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

    for block in whole.blocks:
        block.register_forward_pre_hook(note, with_kwargs=True)
        block.register_forward_hook(add)
    return whole.tokens(inputs)


@pytest.mark.parametrize(("family", "config", "first"), CASES)
def test_it_equals_the_whole_network_run_live_bit_for_bit_gradients_included(
    deep: dict[str, Backbone], family: str, config: Config, first: int
) -> None:
    method, whole = DTL(config), copy.deepcopy(deep[family])
    assert method.first_block(whole.arch) == first
    inputs, batch = batch_for(whole, method)
    torch.manual_seed(0)
    body = build(method, whole)
    assert isinstance(body, WrittenBack)
    moved(body)
    other = copy.deepcopy(body.side)
    there, here = live(whole, other, len(whole.blocks) - first + 1, inputs), body(batch)
    assert torch.equal(here[batch.mask], there[batch.mask])
    for out in (here, there):
        weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape) * batch.mask[..., None]
        (out * weights).sum().backward()
    for mine, theirs in zip(body.side.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("family", ["vit", "bert", "t5"])
@pytest.mark.parametrize("plus", [False, True])
def test_training_starts_at_the_frozen_function(deep: dict[str, Backbone], family: str, plus: bool) -> None:
    whole = deep[family]
    method = DTL(Config(plus=plus))
    if method.refusal(whole.arch):
        pytest.skip("texts have no patches")
    inputs, batch = batch_for(whole, method)
    with torch.no_grad():
        out, expected = build(method, whole)(batch), whole.tokens(inputs)
    assert torch.equal(out[batch.mask], expected[batch.mask])


@pytest.mark.parametrize(("plus", "published"), [(False, 36_864), (True, 43_776)])
def test_a_vit_b_has_as_many_parameters_as_published(plus: bool, published: int) -> None:
    side = CompactSide(12, 768, 2, 100.0)
    if plus:
        side = ConvolvedSide(side, 1)
    assert sum(p.numel() for p in side.parameters()) == published


def test_of_twelve_blocks_seven_inputs_are_cached_and_five_blocks_held() -> None:
    method = DTL()
    assert method.first_block(VIT_B) == 7
    assert method.layers(VIT_B) == ("embeddings", *(f"blocks.{i}" for i in range(7)))


@pytest.mark.parametrize(("blocks", "first"), [(2, 1), (3, 2), (6, 4), (7, 5), (24, 13)])
def test_half_of_the_blocks_are_written_to_and_two_at_least(blocks: int, first: int) -> None:
    arch = Architecture("Toy", "text", blocks=blocks, width=8, prefix_tokens=0, final_layer="norm", mlp_width=16)
    assert DTL().refusal(arch) is None
    assert DTL().first_block(arch) == first


def test_the_maps_start_as_kaimings_and_zeros() -> None:
    torch.manual_seed(0)
    side = CompactSide(12, 768, 2, 100.0)
    assert not side.up.any()
    assert float(side.down.detach().abs().max()) <= 768**-0.5
    assert float(side.down.detach().std()) == pytest.approx((768 * 3) ** -0.5, rel=0.02)


def test_nothing_is_held_after_a_step(deep: dict[str, Backbone]) -> None:
    whole = deep["vit"]
    method = DTL(Config(plus=True))
    _, batch = batch_for(whole, method)
    body = build(method, whole)
    moved(body)
    tensors_of_now = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
    before = [dict(m._forward_hooks) | dict(m._forward_pre_hooks) for m in body.modules()]
    body(batch).sum().backward()
    assert [dict(m._forward_hooks) | dict(m._forward_pre_hooks) for m in body.modules()] == before
    for parameter in body.parameters():
        parameter.grad = None
    shape = batch.inputs[ENTERING].shape
    known = {id(t) for t in tensors_of_now}
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.shape == shape]
    assert {id(t) for t in tensors} - known == set()


def test_hooks_go_when_the_forward_fails(deep: dict[str, Backbone]) -> None:
    method, whole = DTL(), deep["vit"]
    _, batch = batch_for(whole, method)
    body = build(method, whole)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in body.modules())
    broken = Batch(batch.mask, batch.activations, {ENTERING: batch.inputs[ENTERING]})
    with pytest.raises(KeyError, match=MASK):
        body(broken)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in body.modules()) == hooks


def test_a_frozen_block_costs_backward_its_note_alone(deep: dict[str, Backbone]) -> None:
    """Six blocks against two, two written to in both: four more frozen states, of which r numbers a token are kept."""
    whole = deep["vit"]
    method = DTL(Config(write_back=2))
    batch = batch_of(method, whole, whole.preprocess.prepare(list(make_images(8).raw)))
    body = build(method, whole)
    moved(body)
    early = body.first  # type: ignore[union-attr]
    with torch.no_grad():
        state = batch.state("embeddings")
    kept = bytes_kept(body, batch)
    body.first = 1  # type: ignore[union-attr]
    body.states = (body.states[0], body.states[early])  # type: ignore[union-attr]
    fewer = bytes_kept(body, batch)
    a_note = state.shape[0] * state.shape[1] * 2 * 4
    assert 0 < kept - fewer <= 4 * (early - 1) * a_note
    assert 4 * (early - 1) * a_note < (early - 1) * state.nbytes


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Config(write_back=1), "neither 0 nor 2 to the 12"),
        (Config(write_back=13), "neither 0 nor 2 to the 12"),
        (Config(rank=0), "adds nothing"),
        (Config(beta=0.0), "adds nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(config: Config, said: str) -> None:
    assert said in str(DTL(config).refusal(VIT_B))


def test_dtl_plus_wants_images_in_a_square(deep: dict[str, Backbone]) -> None:
    texts = Architecture("Toy", "text", blocks=2, width=8, prefix_tokens=0, final_layer="norm", mlp_width=16)
    assert "patches of an image" in str(DTL(Config(plus=True)).refusal(texts))
    whole = copy.deepcopy(deep["vit"])
    whole.arch = dataclasses.replace(whole.arch, prefix_tokens=2)  # 3 patches
    method = DTL(Config(plus=True))
    assert method.refusal(whole.arch) is None
    with pytest.raises(SidebenchError, match=r"a square of patches, and .* has 3"):
        method.build(Suffix(whole, method.first_block(whole.arch)))


def test_one_block_is_too_few() -> None:
    arch = Architecture("Toy", "text", blocks=1, width=8, prefix_tokens=0, final_layer="norm", mlp_width=16)
    assert "has 1 blocks" in str(DTL().refusal(arch))
