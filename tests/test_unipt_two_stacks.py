"""UniPT on an encoder and its decoder against a naive float64 reference, and from a cache as beside the live T5."""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from toys import ToyExamples
from two_stacks import (
    check_a_cache_trains_as_the_live_backbone,
    check_a_step_is_predicted,
    check_the_loss_falls,
    lean_and_plain,
    numbers_kept,
    random_stacks,
)

from sidebench.adapters import _recompute
from sidebench.adapters._base import Batch, Body
from sidebench.adapters._unipt_parallel import confidences
from sidebench.adapters._unipt_two_stacks import SideStack, TwoStacks, read, taps
from sidebench.adapters.unipt import Config, UniPT
from sidebench.bench.choice import refusal
from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone
from sidebench.cache.configs import config_backbone
from sidebench.cache.form import Form

Vector = NDArray[np.float64]
ARCH = Architecture(
    "Toy", "text", blocks=4, width=6, prefix_tokens=0, final_layer="norm", decoder_blocks=5
)  # guides: 2 in the encoder, 3 in the decoder, its embeddings among them
ENCODER, DECODER = taps(ARCH)
WIDTHS = {**dict.fromkeys(ENCODER, 5), **dict.fromkeys(DECODER, 6), "decoder.blocks.1": 4}
TEXTS, TARGETS = (4, 7, 2), (3, 1, 4)  # tokens of each example in the encoder, and in a decoder that is padded too
states = partial(random_stacks, (ENCODER, TEXTS), (DECODER, TARGETS), WIDTHS)


def shaken(*, lean: bool = True, arch: Architecture = ARCH) -> TwoStacks:
    """In float64, with norms away from 1 and 0 so that every term shows."""
    torch.manual_seed(0)
    body = TwoStacks(arch, WIDTHS, 4, lean=lean).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return body


# --- the formula, one example at a time ------------------------------------------------------------------------------


def array(tensor: Tensor) -> Vector:
    return tensor.detach().numpy()


def linear(layer: nn.Linear, x: Vector) -> Vector:
    return array(layer.weight) @ x + array(layer.bias)


def normed(pair: nn.Module, x: Vector) -> Vector:
    """LN(Linear(x)) of one token."""
    layer, norm = pair  # type: ignore[misc]
    y = linear(layer, x)
    return (y - y.mean()) / np.sqrt(y.var() + 1e-5) * array(norm.weight) + array(norm.bias)


def raised(body: TwoStacks, x: Vector) -> Vector:
    return normed(body.up[1:], np.maximum(x, 0))


def naive_read(queries: list[Vector], keys: list[Vector]) -> list[Vector]:
    out = []
    for query in queries:
        scores = [max(float(query @ key), 0.0) for key in keys]
        out.append(sum(s / (sum(scores) + 1e-7) * key for s, key in zip(scores, keys, strict=True)))
    return out  # type: ignore[return-value]


def naive_stack(
    body: SideStack, tokens: dict[str, list[Vector]], memory: list[Vector] | None = None
) -> tuple[list[Vector], list[list[Vector]]]:
    """A + MLP(G), and the guides, of real tokens alone."""
    *guides, anchor = (
        [normed(down, x) for x in tokens[layer]]
        for down, layer in zip(body.down, (*body.guides, body.anchor), strict=True)
    )
    if memory is not None:
        assert isinstance(body, TwoStacks)
        for index, guide in enumerate(guides):
            found = naive_read(guide, memory)
            guides[index] = [x + normed(body.enrich[index], r) for x, r in zip(guide, found, strict=True)]
    logits = [float(linear(body.gate, np.mean(anchor, 0) * np.mean(guide, 0))[0]) for guide in guides]  # type: ignore[arg-type]
    shares = np.exp(logits) / np.exp(logits).sum()
    out = []
    for i, a in enumerate(anchor):
        met = [naive_read([a], guide)[0] + guide[i] for guide in guides]
        merged = sum(share * value for share, value in zip(shares, met, strict=True))
        hidden = np.maximum(linear(body.project[0], merged), 0)  # type: ignore[arg-type]
        out.append(a + normed(body.project[2:], hidden))
    return out, guides


def naive(body: TwoStacks, batch: Batch, row: int) -> list[list[Vector]]:
    """The levels of one example, the output last: each a list of D numbers per real token of the decoder."""
    real = {**dict.fromkeys(ENCODER, TEXTS[row]), **dict.fromkeys(DECODER, TARGETS[row])}
    tokens = {layer: [array(x) for x in batch.state(layer)[row, : real[layer]]] for layer in real}
    memory, _ = naive_stack(body.memory, tokens)
    out, guides = naive_stack(body, tokens, memory)
    return [[raised(body, x) for x in level] for level in (*guides, out)]


@lean_and_plain
def test_the_two_stack_form_equals_the_formula(lean: bool) -> None:
    body, batch = shaken(lean=lean), states()
    levels = body.levels(batch)
    assert len(levels) == 1 + len(body.guides) == 4
    assert torch.equal(levels[-1], body(batch))
    for row, real in enumerate(TARGETS):
        for found, wanted in zip(levels, naive(body, batch, row), strict=True):
            np.testing.assert_allclose(array(found)[row, :real], np.stack(wanted), atol=1e-10, rtol=1e-10)


def test_faint_guides_show_the_floor_of_the_denominator() -> None:
    body, batch = shaken(), states()
    with torch.no_grad():
        for stack in (body, body.memory):
            for parameter in stack.down.parameters():
                parameter *= 1e-3
    out = array(body(batch))
    for row, real in enumerate(TARGETS):
        np.testing.assert_allclose(out[row, :real], np.stack(naive(body, batch, row)[-1]), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("tokens", [1600, 9], ids=["one slice", "slices of an example"])
def test_lean_and_plain_have_the_same_gradients(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recompute, "TOKENS_AT_A_TIME", tokens)
    batch = states()
    assert len(list(_recompute.slices(batch))) == (1 if tokens == 1600 else 3)  # of the longer stack's tokens
    found = []
    for lean in (True, False):
        body = shaken(lean=lean)
        (body(batch) * torch.arange(6)).sum().backward()
        found.append({name: p.grad for name, p in body.named_parameters()})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, atol=1e-10, rtol=1e-10)
        assert gradient is not None
        assert bool(gradient.abs().max() > 1e-8) is not name.endswith("gate.bias"), name


def test_lean_keeps_the_sum_of_the_decoders_guides_and_its_normaliser() -> None:
    lean = len(TARGETS) * (max(TARGETS) * 4 + 1)
    assert numbers_kept(shaken(lean=True), states()) == lean
    assert numbers_kept(shaken(lean=False), states()) > 10 * lean


# --- its parts -------------------------------------------------------------------------------------------------------


def test_rows_of_the_map_sum_to_zero_or_one_and_masked_keys_weigh_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(20, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(5) < torch.randint(1, 6, (20, 1), generator=generator)
    keys[..., 0] = 1.0  # what is read there is the sum of a row
    sums = read(queries, keys, mask)[..., 0]
    alive = ((queries @ keys.mT > 0) & mask[:, None]).any(2)
    assert not alive.all()
    torch.testing.assert_close(sums, alive.double(), atol=1e-5, rtol=0)
    assert (sums[~alive] == 0).all()
    keys[~mask] = 100.0
    torch.testing.assert_close(read(queries, keys, mask)[..., 0], sums, atol=1e-12, rtol=0)


def test_the_confidences_of_each_stack_sum_to_one() -> None:
    body, batch = shaken(), states()
    for stack, number in ((body, 3), (body.memory, 2)):
        opened = stack.open(batch)
        shares = confidences([stack.look(index, opened, batch)[1] for index in range(stack.looks)])
        assert shares.shape == (3, number)
        torch.testing.assert_close(shares.sum(1), torch.ones(3, dtype=torch.float64))
        assert shares.std(1).min() > 1e-4


@lean_and_plain
def test_padding_changes_no_real_token(lean: bool) -> None:
    body = shaken(lean=lean)
    batch = states()
    for other in (states(more=3), states(more=3, noise=50.0)):
        found = body(other)[:, : max(TARGETS)]
        torch.testing.assert_close(found[batch.mask], body(batch)[batch.mask], atol=1e-10, rtol=1e-10)


def test_no_gradient_reaches_the_states() -> None:
    batch = states()
    shaken()(batch).sum().backward()
    assert all(state.grad is None and not state.requires_grad for state in batch.activations.values())


def test_matrices_start_as_xavier_and_biases_as_torch() -> None:
    torch.manual_seed(0)
    body = TwoStacks(MDETR, dict.fromkeys((*taps(MDETR)[0], *taps(MDETR)[1]), 256), 128)
    for module in body.modules():
        if isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.9 * bound < float(module.weight.detach().abs().max()) <= bound
            assert 0 < float(module.bias.detach().abs().max()) <= module.in_features**-0.5


# --- which layers, and how many numbers ------------------------------------------------------------------------------

MDETR = dataclasses.replace(ARCH, modality="image", blocks=6, decoder_blocks=6, width=256)


def test_of_six_layers_the_first_third_and_fifth_are_guides() -> None:
    assert UniPT().layers(MDETR) == (
        *("blocks.0", "blocks.2", "blocks.4", "blocks.5"),
        *("decoder.blocks.0", "decoder.blocks.2", "decoder.blocks.4", "norm"),
    )


def test_stacks_of_any_depth_have_guides() -> None:
    def layers(encoder: int, decoder: int, final: str = "norm") -> tuple[tuple[str, ...], tuple[str, ...]]:
        return taps(dataclasses.replace(ARCH, blocks=encoder, decoder_blocks=decoder, final_layer=final))

    assert layers(1, 2) == (("embeddings", "blocks.0"), ("decoder.blocks.0", "norm"))
    without_norm = ("decoder.embeddings", "decoder.blocks.1", "decoder.blocks.2")
    assert layers(2, 3, "decoder.blocks.2") == (("blocks.0", "blocks.1"), without_norm)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def built(arch: Architecture, **options: int) -> Body:
    method = UniPT(Config(**options))
    return method.build(arch, dict.fromkeys(method.layers(arch), arch.width), lambda: pytest.fail("no weights needed"))


def test_the_side_of_mdetr_has_481_666_parameters() -> None:
    assert count(built(MDETR)) == 481_666


def test_a_fourth_of_t5_base_is_the_share_that_is_reported() -> None:
    arch = config_backbone("t5-base", tower="both").arch
    assert count(built(arch, reduction=4)) == 3_039_746
    assert round(100 * 3_039_746 / 222_903_552, 2) == 1.36


def test_the_docstring_formula_counts_the_parameters() -> None:
    d, s, g, h = 30, 10, 2, 3
    shared = (g + h + 2) * (d * s + s + 2 * s) + 2 * (s + 1) + 2 * (s * d + d + d * s + s + 2 * s)
    formula = shared + h * (s**2 + s + 2 * s) + (s * d + d + 2 * d)
    assert count(built(dataclasses.replace(ARCH, width=d), reduction=3)) == formula


def test_the_forms_for_one_stack_say_so_on_two() -> None:
    assert refusal(UniPT(), ARCH, Form()) is None
    for form in ("mlp", "single_anchor"):
        said = refusal(UniPT(Config(form=form)), ARCH, Form())  # type: ignore[arg-type]
        assert said is not None
        assert f"form {form}" in said
        assert "leave unipt.form at tokens" in said


# --- on T5 -----------------------------------------------------------------------------------------------------------


def test_a_cache_of_t5_trains_it_as_the_live_backbone_does(
    tiny_t5: Backbone, text_examples: ToyExamples, tmp_path: Path
) -> None:
    assert UniPT().layers(tiny_t5.arch) == ("embeddings", "blocks.1", "blocks.2", "decoder.blocks.0", "norm")
    check_a_cache_trains_as_the_live_backbone(UniPT(), tiny_t5, text_examples, tmp_path)


def test_the_loss_falls_on_t5_though_the_head_stands_still(tiny_t5: Backbone, text_examples: ToyExamples) -> None:
    check_the_loss_falls(UniPT(), tiny_t5, text_examples, 40)


@lean_and_plain
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_t5_is_predicted(
    tiny_t5: Backbone, text_examples: ToyExamples, tmp_path: Path, lean: bool, precision: str
) -> None:
    check_a_step_is_predicted(UniPT(Config(lean=lean)), tiny_t5, text_examples, tmp_path, precision)
