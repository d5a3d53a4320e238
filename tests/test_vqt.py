"""VQT: the queries run apart give what the backbone's own blocks give for appended ones (arXiv 2212.03220)."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from method_cases import FAMILIES, Exact, batch_of, random_states
from torch import Tensor, nn
from torch.nn import functional

from sidebench.adapters import _recompute
from sidebench.adapters._base import Batch, trained
from sidebench.adapters._blocks import SideBlock
from sidebench.adapters.vqt import VQT, Config, FrozenBlock, QueriedBlocks
from sidebench.bench.choice import refusal
from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone
from sidebench.cache.block_weights import BackboneWeights, BlockWeights, read_weights
from sidebench.cache.errors import SidebenchError
from sidebench.cache.form import Form
from sidebench.cache.pooling import masked_mean

T = 3
attend: Callable[..., Tensor] = functional.scaled_dot_product_attention
lean_and_plain = pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """In float64."""
    own: Backbone = copy.deepcopy(request.getfixturevalue(f"tiny_{request.param}"))
    own.module.double()
    return own


@pytest.fixture
def inputs(backbone: Backbone) -> dict[str, Tensor]:
    """Four examples; of texts one is short, so that its row is padded."""
    if backbone.arch.modality == "image":
        shape = backbone.preprocess.dummy(backbone.device)["pixel_values"].shape[1:]
        return {"pixel_values": torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    texts = ["good", "the film is very bad", "a plot and cast", "was not the mess is dull a joy"]
    return backbone.preprocess.collate(backbone.preprocess.prepare(texts))[0]


def body_of(backbone: Backbone, **options: Any) -> QueriedBlocks:
    """In float64, the queries as large as tokens are."""
    method = VQT(Config(queries=T, **options))
    widths = dict.fromkeys(method.layers(backbone.arch), backbone.arch.width)
    torch.manual_seed(0)
    body = method.build(backbone.arch, widths, lambda: read_weights(backbone)).double()
    assert isinstance(body, QueriedBlocks)
    with torch.no_grad():
        body.queries += torch.randn(body.queries.shape, generator=torch.Generator().manual_seed(1))
    return body


def cached(backbone: Backbone, inputs: dict[str, Tensor]) -> Exact:
    states = backbone.capture(inputs, backbone.layers)
    tokens = states[backbone.final_layer]
    mask = inputs.get("attention_mask", torch.ones(tokens.shape[:2]))
    return Exact(mask.bool(), {name: state.clone() for name, state in states.items()})


# --- the joint form: queries appended to the frozen stream, in the backbone's own blocks -----------------------------


def attend_without_query_keys(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
    """Attention in which the last T tokens are queries alone, which see what the token before them may see."""
    n = k.shape[2] - T
    if attn_mask is None and options.pop("is_causal", False):
        attn_mask = torch.ones(n, n, dtype=torch.bool).tril()
    if attn_mask is not None:
        attn_mask = attn_mask[..., :n, :n]
        if attn_mask.shape[-2] > 1:
            attn_mask = torch.cat([attn_mask, attn_mask[..., -1:, :].expand(*attn_mask.shape[:-2], T, n)], dim=-2)
    return attend(q, k[:, :, :n], v[:, :, :n], attn_mask=attn_mask, **options)


@contextmanager
def joined(backbone: Backbone, queries: Tensor) -> Iterator[list[Tensor]]:
    """While inside, every block runs its queries (T, D) along with the stream; what leaves in their places is kept."""
    left: list[Tensor] = []

    def append(index: int) -> Callable[..., Any]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            stream = args[0] if args else kwargs["hidden_states"]
            both = torch.cat([stream, queries[index].expand(len(stream), -1, -1)], dim=1)
            return ((both, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": both})

        return before

    def split(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        both = output[0] if isinstance(output, tuple) else output
        left.append(both[:, -T:])
        return (both[:, :-T], *output[1:]) if isinstance(output, tuple) else both[:, :-T]

    hooks = [b.register_forward_pre_hook(append(i), with_kwargs=True) for i, b in enumerate(backbone.blocks)]
    hooks += [b.register_forward_hook(split) for b in backbone.blocks]
    functional.scaled_dot_product_attention = attend_without_query_keys
    try:
        yield left
    finally:
        functional.scaled_dot_product_attention = attend
        for hook in hooks:
            hook.remove()


@lean_and_plain
def test_summaries_and_gradients_are_those_of_queries_appended_to_the_stream(
    backbone: Backbone, inputs: dict[str, Tensor], lean: bool
) -> None:
    body, batch = body_of(backbone, lean=lean), cached(backbone, inputs)
    vector = body(batch)
    queries = body.queries.detach().clone().requires_grad_()
    with joined(backbone, queries) as left:
        stream = backbone.tokens(inputs)
    # The frozen stream runs as if no query were there.
    torch.testing.assert_close(stream, batch.state(backbone.final_layer), atol=1e-12, rtol=1e-12)
    place = batch.mask.sum(1) - 1 if backbone.arch.causal else torch.zeros(len(stream), dtype=torch.long)
    summary = stream[torch.arange(len(stream)), place][:, None]
    joint = torch.cat([summary, *left], dim=1)
    assert joint.shape == (4, 1 + backbone.arch.blocks * T, backbone.arch.width)
    found = vector.unflatten(1, (-1, backbone.arch.width))
    assert torch.equal(found[:, 0], batch.state(backbone.final_layer)[torch.arange(4), place])
    torch.testing.assert_close(found, joint, atol=1e-12, rtol=1e-12)
    weights = torch.randn(joint.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (found * weights).sum().backward()
    (joint * weights).sum().backward()
    torch.testing.assert_close(body.queries.grad, queries.grad, atol=1e-10, rtol=1e-10)
    assert float(body.queries.grad.abs().amax((1, 2)).min()) > 1e-3  # type: ignore[union-attr]


def test_training_leaves_the_states_and_the_blocks_as_they_were(backbone: Backbone, inputs: dict[str, Tensor]) -> None:
    body, batch = body_of(backbone), cached(backbone, inputs)
    states = {name: batch.state(name).clone() for name in batch.activations}
    frozen = {name: p.clone() for name, p in body.named_parameters() if name != "queries"}
    assert list(trained(body)) == ["queries"]
    optimizer = torch.optim.AdamW(trained(body).values(), lr=1e-2, weight_decay=0.1)
    before = body.queries.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        (body(batch) ** 2).sum().backward()
        optimizer.step()
    assert not torch.equal(body.queries, before)
    assert all(torch.equal(batch.state(name), state) for name, state in states.items())
    assert all(torch.equal(body.get_parameter(name), p) for name, p in frozen.items())


def test_a_query_sees_every_real_token_and_no_padding(backbone: Backbone, inputs: dict[str, Tensor]) -> None:
    body, batch = body_of(backbone), cached(backbone, inputs)
    entering = batch.state("embeddings")
    for token in range(entering.shape[1]):
        moved = entering.clone()
        moved[:, token] += torch.randn(entering.shape[2], dtype=torch.float64)
        out = body(dataclasses.replace(batch, activations={**batch.activations, "embeddings": moved}))
        changed = (out != body(batch)).any(1)
        assert torch.equal(changed, batch.mask[:, token])


def test_the_final_tokens_can_be_summed_up_by_their_mean(tiny_dinov2: Backbone) -> None:
    backbone = copy.deepcopy(tiny_dinov2)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = batch_of(VQT(), backbone, list(pixels))
    for prefix_tokens in (1, 3):  # the class token alone, and with two registers
        arch = dataclasses.replace(backbone.arch, prefix_tokens=prefix_tokens)
        body = VQT(Config(summary="mean")).build(arch, WIDTHS32, lambda: read_weights(backbone))
        torch.testing.assert_close(body(batch)[:, :32], batch.state("norm")[:, prefix_tokens:].mean(1))
    texts = random_states(("embeddings", "blocks.0", "norm"), WIDTHS32, (2, 4))
    arch = dataclasses.replace(backbone.arch, prefix_tokens=0)
    body = VQT(Config(summary="mean")).build(arch, WIDTHS32, lambda: read_weights(backbone)).double()
    torch.testing.assert_close(body(texts)[:, :32], masked_mean(texts.state("norm"), texts.mask))


WIDTHS32 = dict.fromkeys(("embeddings", "blocks.0", "blocks.1", "norm"), 32)


def test_summaries_can_be_normalised_each_by_itself(tiny_vit: Backbone) -> None:
    backbone = copy.deepcopy(tiny_vit)
    batch = batch_of(VQT(), backbone, list(torch.randn(2, 3, 16, 16)))
    plain, normalised = (body_of(backbone, normalise=on).float()(batch).unflatten(1, (-1, 32)) for on in (False, True))
    torch.testing.assert_close(normalised, plain / plain.norm(dim=-1, keepdim=True))


# --- sizes -----------------------------------------------------------------------------------------------------------

BASE = Architecture(
    "ViT-B",
    "image",
    blocks=12,
    width=768,
    prefix_tokens=1,
    final_layer="norm",
    heads=12,
    mlp_width=3072,
    norm="pre",
    activation="gelu",
)
SMALL = dataclasses.replace(BASE, blocks=4, width=32, heads=4, mlp_width=128)
POST = dataclasses.replace(SMALL, norm="post", modality="text", final_layer="blocks.3")


def weights_of(arch: Architecture, fan_in: int = 768, device: str = "cpu") -> BackboneWeights:
    generator = None if device == "meta" else torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) / shape[-1] ** 0.5

    def block() -> BlockWeights:
        d, f = arch.width, arch.mlp_width or 0
        four = [(drawn(d, d), drawn(d)) for _ in range(4)]
        mlp = (drawn(f, d), drawn(f)), (drawn(d, f), drawn(d))
        return BlockWeights(*four, *mlp, (1 + drawn(d), drawn(d)), (1 + drawn(d), drawn(d)), None)

    return BackboneWeights(drawn(fan_in, arch.width), tuple(block() for _ in range(arch.blocks)), None)


def test_a_vit_b_trains_9_216_parameters_and_hands_out_9_984_numbers() -> None:
    body = QueriedBlocks(BASE, weights_of(BASE, device="meta"), 1)
    assert sum(p.numel() for p in trained(body).values()) == 9_216
    assert body.width == 9_984
    d, f = 768, 3072
    frozen = sum(p.numel() for p in body.parameters() if not p.requires_grad)
    assert frozen == 12 * (4 * (d * d + d) + 2 * d * f + f + d + 4 * d)


@pytest.mark.parametrize(
    ("modality", "rows", "bound"),
    [
        ("image", 3 * 16**2, (6 / (3 * 16**2 + 768)) ** 0.5),
        ("image", 3 * 8**2, (6 / (3 * 8**2 + 768)) ** 0.5),
        ("text", 30_522, (6 / 1536) ** 0.5),
    ],
)
def test_queries_start_uniform_within_the_bound_of_the_patch_embedding(modality: str, rows: int, bound: float) -> None:
    arch = dataclasses.replace(BASE, modality=modality)
    queries = QueriedBlocks(arch, weights_of(arch, rows, "meta"), 2).queries.detach()
    assert 0.99 * bound < float(queries.abs().max()) <= bound
    assert float(queries.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


class Joint(nn.Module):
    """The released code's form: each block on all tokens and the queries together, queries masked as keys."""

    def __init__(self, body: QueriedBlocks, arch: Architecture) -> None:
        super().__init__()
        self.queries, self.inputs, self.final = body.queries, body.inputs, body.final
        self.blocks = nn.ModuleList(SideBlock(arch, 1) for _ in body.blocks).requires_grad_(False)
        for mine, theirs in zip(self.blocks, body.blocks, strict=True):
            mine.load_state_dict(theirs.state_dict())

    def forward(self, batch: Batch) -> Tensor:
        stream, found = batch.state(self.inputs[0]), [batch.state(self.final)[:, :1]]
        mask = torch.cat([batch.mask, torch.zeros(len(stream), self.queries.shape[1], dtype=torch.bool)], dim=1)
        for block, queries in zip(self.blocks, self.queries, strict=True):
            both = block(torch.cat([stream, queries.expand(len(stream), -1, -1)], dim=1), mask)
            stream = both[:, : batch.mask.shape[1]]
            found.append(both[:, batch.mask.shape[1] :])
        return torch.cat(found, dim=1).flatten(1)


def saved_bytes(forward: Callable[[Batch], Tensor], batch: Batch, parameters: Iterator[Tensor]) -> int:
    """What forward keeps for backward beyond parameters and the stored activations."""
    known = {t.untyped_storage().data_ptr() for t in (*parameters, *batch.activations.values(), batch.mask)}  # type: ignore[union-attr]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward(batch)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("arch", [SMALL, POST], ids=["pre", "post"])
def test_the_queries_apart_keep_a_fraction_of_what_the_joint_form_keeps(arch: Architecture) -> None:
    torch.manual_seed(0)
    body = QueriedBlocks(arch, weights_of(arch), 1)
    joint = Joint(body, arch)
    widths = dict.fromkeys((*arch.states, "norm"), 32)
    exact = random_states((*arch.states, "norm"), widths, (100, 100))
    states = {name: state.float() for name, state in exact.activations.items()}
    for index, block in enumerate(joint.blocks):  # what the stream would be
        states[f"blocks.{index}"] = block(states[arch.states[index]], exact.mask).detach()
    batch = Batch(exact.mask, states)
    torch.testing.assert_close(body(batch), joint(batch), atol=1e-5, rtol=1e-5)
    together = saved_bytes(joint, batch, joint.parameters())
    lean, plain = (
        saved_bytes(body, batch, body.parameters())
        for body in (VQT(Config(lean=on)).build(arch, widths, lambda: weights_of(arch)) for on in (True, False))
    )
    assert 8 * plain < together
    assert 20 * lean < plain


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    body = QueriedBlocks(SMALL, weights_of(SMALL), 2).double()
    layers = (*body.inputs, body.final)
    batch = random_states(layers, dict.fromkeys(layers, 32), (5, 3, 4, 5, 2))
    whole = body(batch)
    monkeypatch.setattr(_recompute, "TOKENS_AT_A_TIME", 10)
    torch.testing.assert_close(body(batch), whole, atol=1e-12, rtol=1e-12)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        ({"norm": None}, Config(), "none this code can copy"),
        ({"heads": 5}, Config(), "none this code can copy"),
        ({"activation": "maxout"}, Config(), "maxout"),
        ({"prefix_tokens": 0}, Config(), "vqt.summary=mean"),
        ({}, Config(queries=0), "1 or more"),
    ],
)
def test_what_cannot_be_run_is_refused(change: dict[str, Any], config: Config, said: str) -> None:
    assert said in str(VQT(config).refusal(dataclasses.replace(BASE, **change)))
    assert VQT().refusal(BASE) is None
    assert VQT(Config(summary="mean")).refusal(dataclasses.replace(BASE, prefix_tokens=0)) is None


@pytest.mark.parametrize("tokens", ["cls", "mean", "cls+mean", "grid:2", "first:4", "proj:8"])
def test_a_cache_without_every_token_is_refused(tokens: str) -> None:
    said = str(refusal(VQT(), BASE, Form(tokens=tokens, seed=0 if tokens == "proj:8" else None)))
    assert f"keeps --tokens {tokens}" in said
    for dtype in ("float16", "int8", "fp8"):
        assert refusal(VQT(), BASE, Form(dtype=dtype)) is None


def test_states_of_another_width_get_a_sentence() -> None:
    with pytest.raises(SidebenchError, match=r"width 32; the cache holds .*blocks\.0.: 8"):
        VQT().build(SMALL, {**dict.fromkeys(VQT().layers(SMALL), 32), "blocks.0": 8}, lambda: weights_of(SMALL))


def test_a_gated_mlp_gets_a_sentence() -> None:
    (block,) = weights_of(dataclasses.replace(SMALL, blocks=1)).blocks
    gated = dataclasses.replace(block, fc2=(torch.randn(32, 64), torch.randn(32)))  # SwiGLU halves what fc1 yields
    with pytest.raises(SidebenchError, match="gated"):
        FrozenBlock(SMALL, gated)
