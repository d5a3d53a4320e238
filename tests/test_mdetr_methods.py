"""Methods on MDETR: beside its two stacks from a cache, and inside the live network."""

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from joint_toys import JointToyExamples
from mdetr_toys import QUERIES, SIDE, WIDTH, make_scenes, save_mdetr
from method_cases import build, weights_of
from torch import Tensor, nn
from toys import build_store, prepare
from two_stacks import lean_and_plain, random_stacks

from sidebench.adapters._base import Batch, Body, CachedMethod, LiveMethod, trained
from sidebench.adapters._lst_detr import DetrBlock, DetrLadders, DetrStack
from sidebench.adapters._registry import find_method
from sidebench.adapters.sherl_two_stacks import EarlyRoute, MemoryAndQueries
from sidebench.bench.choice import refusal
from sidebench.bench.device_memory import DeviceMeter
from sidebench.bench.learner import Learner
from sidebench.bench.measure import measure_training
from sidebench.bench.predict import Unpredictable, predict_again
from sidebench.bench.step import Step
from sidebench.bench.training import Settings
from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone
from sidebench.cache.block_weights import read_weights
from sidebench.cache.configs import fake_mode
from sidebench.cache.errors import SidebenchError
from sidebench.cache.form import Form
from sidebench.cache.load import load_backbone
from sidebench.cache.mdetr_load import config_mdetr
from sidebench.cache.store import LiveStore
from sidebench.cache.zarr_store import ZarrStore


@pytest.fixture(scope="module")
def mdetr(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    uri = save_mdetr(tmp_path_factory.mktemp("mdetr"))
    return load_backbone(uri, home=Path(), device=torch.device("cpu"), image_size=SIDE)


@pytest.fixture(scope="module")
def scenes() -> JointToyExamples:
    return make_scenes(18)


@pytest.fixture(scope="module")
def base() -> Backbone:
    """The public checkpoints' sizes, without weights."""
    return config_mdetr("base", image_size=64)


# --- from a cache ----------------------------------------------------------------------------------------------------

CACHED = {
    "unipt": ("unipt", {}),
    "unipt-plain": ("unipt", {"lean": "false"}),
    "lst": ("lst", {"reduction": "2"}),
    "sherl": ("sherl_two_stacks", {}),
    "sherl-plain": ("sherl_two_stacks", {"lean": "false"}),
    "lst-dropped": ("lst", {"reduction": "2", "keep": "1", "merge_last": "true", "init": "random"}),
}


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_trains_as_the_live_backbone(
    mdetr: Backbone, scenes: JointToyExamples, tmp_path: Path, name: str
) -> None:
    """One step's output and gradients are equal, on images and texts of several sizes."""
    key, settings = CACHED[name]
    method = find_method(key).configured(settings)
    assert isinstance(method, CachedMethod)
    layers = method.layers(mdetr.arch)
    cached = ZarrStore(build_store(mdetr, scenes, tmp_path, layers=layers).folder)
    assert cached.architecture == mdetr.arch
    index, found = np.array([3, 0, 17, 8]), []
    for store in (cached, LiveStore(mdetr, prepare(mdetr, scenes), layers)):
        torch.manual_seed(5)
        body = build(method, mdetr)
        recorded = store.read(index, layers)
        batch = Batch(recorded.mask, recorded.layers, masks=recorded.masks)
        assert not batch.mask_of(layers[0]).all()
        assert batch.mask.shape == (4, QUERIES)
        out = body(batch)
        assert out.shape == (4, QUERIES, WIDTH)
        (out * torch.arange(WIDTH)).square().mean().backward()
        found.append((out, {name: p.grad for name, p in trained(body).items()}))
    (out, gradients), (live_out, live_gradients) = found
    torch.testing.assert_close(out, live_out, atol=1e-5, rtol=1e-5)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, live_gradients[parameter], atol=1e-4, rtol=1e-4)


def test_a_store_holds_real_tokens_and_every_query(mdetr: Backbone, scenes: JointToyExamples, tmp_path: Path) -> None:
    store = ZarrStore(build_store(mdetr, scenes, tmp_path).folder)
    counts = mdetr.preprocess.token_counts(scenes)  # type: ignore[attr-defined]
    assert store.lengths().tolist() == counts.tolist()
    read = store.read(np.array([3, 1]), ("blocks.3", "norm"))
    assert read.mask_of("blocks.3").sum(1).tolist() == counts[[3, 1]].tolist()
    for row, example in enumerate((3, 1)):
        inputs, _ = mdetr.preprocess.collate(prepare(mdetr, scenes)[example : example + 1])
        alone = mdetr.capture(inputs, ("blocks.3", "norm"))
        real = read.layers["blocks.3"][row, : counts[example]]
        assert isinstance(real, Tensor)
        torch.testing.assert_close(real, alone["blocks.3"][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(read.layers["norm"][row], alone["norm"][0], atol=1e-5, rtol=1e-5)


def test_unipt_reads_three_guides_a_stack_and_has_481_666_parameters(base: Backbone) -> None:
    method = find_method("unipt").configured({})
    assert isinstance(method, CachedMethod)
    blocks = ("blocks.0", "blocks.2", "blocks.4", "blocks.5")
    decoder = ("decoder.blocks.0", "decoder.blocks.2", "decoder.blocks.4", "norm")
    assert method.layers(base.arch) == (*blocks, *decoder)
    body = method.build(base.arch, dict.fromkeys(method.layers(base.arch), 256), lambda: weights_of(base))
    assert sum(p.numel() for p in body.parameters()) == 481_666


# --- LST -------------------------------------------------------------------------------------------------------------

ARCH = Architecture(
    "Toy",
    "image-text",
    blocks=4,
    width=16,
    prefix_tokens=0,
    final_layer="norm",
    heads=2,
    mlp_width=24,
    norm="post",
    activation="relu",
    norm_eps=1e-5,
    decoder_blocks=3,
)
S, F = 8, 12  # at reduction 2
ALL = ((0, 1, 2, 3), (0, 1, 2))
SCENES, SEEN = (4, 25, 2), (7, 7, 7)  # tokens of each example in the encoder, and queries
LAYERS = (*ARCH.states, *ARCH.decoder_states, "norm")
states = partial(
    random_stacks, (ARCH.states, SCENES), ((*ARCH.decoder_states, "norm"), SEEN), dict.fromkeys(LAYERS, 16)
)


def shaken(kept: Sequence[tuple[int, ...]] = ALL, **options: bool) -> DetrLadders:
    """In float64, every parameter moved, so that every term shows."""
    torch.manual_seed(0)
    body = DetrLadders(ARCH, dict.fromkeys(LAYERS, ARCH.width), 2, 0.1, kept=kept, **options).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            size = 0.05 if "alpha" in name else 0.3
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return body


def torch_layer(block: DetrBlock) -> nn.Module:
    """torch's own layer with the weights of a side block."""
    sizes = {"d_model": S, "nhead": 2, "dim_feedforward": F, "dropout": 0.0, "batch_first": True}
    across = block.across
    kind = nn.TransformerEncoderLayer if across is None else nn.TransformerDecoderLayer
    layer = kind(**sizes, dtype=torch.float64)  # type: ignore[arg-type]
    attentions = {"self_attn": block} if across is None else {"self_attn": block, "multihead_attn": across}
    state: dict[str, Tensor] = {}
    for name, part in attentions.items():
        for kind_of in ("weight", "bias"):
            fused = [getattr(linear, kind_of) for linear in (part.query, part.key, part.value)]
            state[f"{name}.in_proj_{kind_of}"] = torch.cat(fused)
            state[f"{name}.out_proj.{kind_of}"] = getattr(part.out, kind_of)
    norms = [block.norm1, *([] if across is None else [across.norm]), block.norm2]
    named = {"linear1": block.fc1, "linear2": block.fc2, **{f"norm{i + 1}": norm for i, norm in enumerate(norms)}}
    for name, module in named.items():
        state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    layer.load_state_dict(state)
    return layer.train()  # eval takes another path


def mixed(alpha: Tensor | None, ours: Tensor, frozen: Tensor) -> Tensor:
    if alpha is None:
        return ours + frozen
    mu = 1 / (1 + math.exp(-float(alpha.detach()) / 0.1))
    return mu * ours + (1 - mu) * frozen


def climbed(
    stack: DetrStack, kept: Sequence[int], tokens: Mapping[str, Tensor], prefix: str, *memory: Tensor
) -> Tensor:
    """(T, S) of one example's real tokens."""
    downs, blocks = iter(stack.down), iter(stack.blocks)
    side = next(downs)(tokens[f"{prefix}embeddings"])
    for index in range(stack.depth):
        if index in kept:
            alpha = None if stack.alpha is None else stack.alpha[index]
            entering = mixed(alpha, side, next(downs)(tokens[f"{prefix}blocks.{index}"]))
            block = next(blocks)
            assert isinstance(block, DetrBlock)
            side = torch_layer(block)(entering[None], *(each[None] for each in memory))[0]
    return side


def reference(body: DetrLadders, kept: Sequence[Sequence[int]], batch: Batch, row: int) -> Tensor:
    tokens = {layer: batch.state(layer)[row, : SCENES[row] if layer in ARCH.states else SEEN[row]] for layer in LAYERS}
    memory = climbed(body.encoder, kept[0], tokens, "")
    norm = body.decoder.norm
    side = climbed(body.decoder, kept[1], tokens, "decoder.", memory)
    centred = side - side.mean(1, keepdim=True)
    side = centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-5) * norm.weight + norm.bias
    out = body.up(side)
    return out if body.alpha_last is None else mixed(body.alpha_last, out, tokens["norm"])


@lean_and_plain
@pytest.mark.parametrize("kept", [ALL, ((1, 2), (1, 2)), ((0,), (0,))], ids=["all", "dropped", "one"])
@pytest.mark.parametrize("options", [{}, {"gated": False}, {"merge_last": True}], ids=["gated", "no_gate", "merged"])
def test_both_ladders_equal_torchs_layers_at_every_real_token(
    kept: Sequence[tuple[int, ...]], options: dict[str, bool], lean: bool
) -> None:
    body, batch = shaken(kept, lean=lean, **options), states()
    out = body(batch)
    for row in range(3):
        torch.testing.assert_close(out[row], reference(body, kept, batch, row), atol=1e-10, rtol=1e-10)


@lean_and_plain
def test_padding_changes_no_query(lean: bool) -> None:
    body, batch = shaken(lean=lean), states()
    encoder = {layer: state for layer, state in states(more=3, noise=50.0).activations.items() if layer in ARCH.states}
    longer = {layer: state for layer, state in states(more=3).masks.items() if layer in ARCH.states}
    other = type(batch)(batch.mask, {**batch.activations, **encoder}, {}, longer)
    torch.testing.assert_close(body(other), body(batch), atol=1e-10, rtol=1e-10)


def test_the_ladders_parameters_are_those_of_the_formula(base: Backbone) -> None:
    d, mlp, both = 256, 2048, 6
    for reduction, keep, kept in ((8, "all", 6), (4, "1,3,5", 3)):
        s, f = d // reduction, mlp // reduction
        encoder = (kept + 1) * (d * s + s) + both + kept * (4 * (s * s + s) + 2 * s * f + f + s + 4 * s)
        decoder = (kept + 1) * (d * s + s) + both + kept * (8 * (s * s + s) + 2 * s * f + f + s + 6 * s) + 2 * s
        method = find_method("lst").configured({"reduction": str(reduction), "keep": keep, "init": "random"})
        assert isinstance(method, CachedMethod)
        assert refusal(method, base.arch, Form()) is None
        body = method.build(base.arch, dict.fromkeys(method.layers(base.arch), d), lambda: weights_of(base))
        assert sum(p.numel() for p in body.parameters()) == encoder + decoder + s * d + d


def strongest(importance: Tensor, keep: int) -> list[int]:
    ranked = sorted(range(len(importance)), key=lambda i: float(importance[i]), reverse=True)
    return sorted(ranked[:keep])


def rows_to_keep(group: Sequence[Tensor], columns: list[int], keep: int) -> list[int]:
    product = torch.stack([matrix.double().abs()[:, columns] for matrix in group]).prod(0)
    return strongest(product.sum(1), keep)


def test_pruning_walks_up_the_encoder_and_on_up_the_decoder(mdetr: Backbone) -> None:
    method = find_method("lst").configured({"reduction": "2"})
    body = build(method, mdetr)
    assert isinstance(body, DetrLadders)
    state, half, inner = mdetr.module.state_dict(), WIDTH // 2, 16
    kept = strongest(state["input_proj.weight"].abs().sum((1, 2, 3)), half)
    for stack, prefix in ((body.encoder, "encoder"), (body.decoder, "decoder")):
        for index, block in enumerate(stack.blocks):
            at = f"transformer.{prefix}.layers.{index}"
            parts = [("self_attn", block, block.norm1, "norm1")]
            if prefix == "decoder":
                parts.append(("cross_attn_image", block.across, block.across.norm, "norm3"))
            for name, side, norm, norm_name in parts:
                group = [state[f"{at}.{name}.{part}_proj.weight"] for part in "qkv"]
                rows = rows_to_keep(group, kept, half)
                out = state[f"{at}.{name}.out_proj.weight"]
                leaving = rows_to_keep([out], rows, half)
                assert torch.equal(side.key.weight, group[1][rows][:, kept])
                assert torch.equal(side.value.bias, state[f"{at}.{name}.v_proj.bias"][rows])
                assert torch.equal(side.out.weight, out[leaving][:, rows])
                assert torch.equal(norm.bias, state[f"{at}.{norm_name}.bias"][leaving])
                kept = leaving
            first, second = (state[f"{at}.linear{i}.weight"] for i in (1, 2))
            rows = rows_to_keep([first], kept, inner)
            leaving = rows_to_keep([second], rows, half)
            assert torch.equal(block.fc1.weight, first[rows][:, kept])
            assert torch.equal(block.fc2.weight, second[leaving][:, rows])
            last = "norm4" if prefix == "decoder" else "norm2"
            assert torch.equal(block.norm2.weight, state[f"{at}.{last}.weight"][leaving])
            kept = leaving
    assert torch.equal(body.decoder.norm.weight, state["transformer.decoder.norm.weight"][kept])


def test_a_network_that_cannot_be_pruned_says_so(mdetr: Backbone) -> None:
    other = copy.deepcopy(mdetr)
    other.module.input_proj = nn.Linear(2, 2)
    with pytest.raises(SidebenchError, match="no input_proj as MDETR has"):
        read_weights(other)


# --- inside the network ----------------------------------------------------------------------------------------------


def live(backbone: Backbone, name: str, settings: Mapping[str, str]) -> Body:
    method = find_method(name).configured(dict(settings))
    assert isinstance(method, LiveMethod)
    assert refusal(method, backbone.arch, Form()) is None
    return method.network(backbone)


def test_lora_enters_self_and_cross_attention_of_both_stacks(mdetr: Backbone, scenes: JointToyExamples) -> None:
    own = copy.deepcopy(mdetr)
    body = live(own, "lora", {"rank": "2"})
    names = {name.split(".lora_")[0].removeprefix("module.") for name in trained(body)}
    assert len(names) == 2 * (4 + 3 + 3)
    assert {name.split(".")[1] for name in names} == {"encoder", "decoder"}
    assert {name.rsplit(".", 1)[1] for name in names} == {"q_proj", "v_proj"}
    inputs, _ = own.preprocess.collate(prepare(own, scenes)[:3])
    out = body(Batch(torch.ones(3, QUERIES, dtype=torch.bool), {}, inputs))
    torch.testing.assert_close(out, mdetr.capture(inputs, ["norm"])["norm"])  # its increment begins at zero
    out.square().sum().backward()
    assert all(p.grad is not None for p in trained(body).values())


def test_full_trains_all_that_the_queries_depend_on(mdetr: Backbone, scenes: JointToyExamples) -> None:
    """Not the heads, nor a batch norm; gradients reach the trunk and the text encoder."""
    own = copy.deepcopy(mdetr)
    body = live(own, "full", {})
    unused = {name.split(".")[0] for name, _ in own.module.named_parameters()} - {
        name.split(".")[1] for name in trained(body)
    }
    heads = {"class_embed", "bbox_embed", "contrastive_align_projection_image", "contrastive_align_projection_text"}
    assert unused == heads
    assert not any(".bn" in name for name in trained(body))
    inputs, _ = own.preprocess.collate(prepare(own, scenes)[:3])
    body(Batch(torch.ones(3, QUERIES, dtype=torch.bool), {}, inputs)).square().sum().backward()
    still = {name for name, p in trained(body).items() if p.ndim > 1 and p.grad is not None and not p.grad.any()}
    # The queries' states begin as zeros, all alike.
    assert {name.rsplit(".", 2)[0] for name in still} == {"module.transformer.decoder.layers.0.self_attn"}


def test_checkpointing_changes_no_gradient(mdetr: Backbone, scenes: JointToyExamples) -> None:
    found = []
    for checkpointing in ("false", "true"):
        own = copy.deepcopy(mdetr)
        body = live(own, "full", {"checkpointing": checkpointing})
        inputs, _ = own.preprocess.collate(prepare(own, scenes)[:2])
        body(Batch(torch.ones(2, QUERIES, dtype=torch.bool), {}, inputs)).square().sum().backward()
        found.append({name: p.grad for name, p in trained(body).items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


# --- SHERL -----------------------------------------------------------------------------------------------------------


def sherl(backbone: Backbone, **settings: str) -> MemoryAndQueries:
    method = find_method("sherl_two_stacks").configured(settings)
    assert refusal(method, backbone.arch, Form()) is None
    body = build(method, backbone)
    assert isinstance(body, MemoryAndQueries)
    return body


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-5) * norm.weight + norm.bias


def merged_by_hand(route: EarlyRoute, states: Sequence[Tensor]) -> Tensor:
    """u (D,) of one token's states (D,) each."""
    projected = []
    for (linear, norm), state in zip(route.down, states, strict=True):  # type: ignore[misc]
        projected.append(normed(norm, linear.weight @ state + linear.bias))
    *shallow, deep = projected
    total = shallow[0]
    if route.score is not None:
        raw = []
        for one in shallow:
            alike = [float(one @ two / (one.norm() + 1e-6) / (two.norm() + 1e-6)) for two in shallow]
            score = float(route.score.weight[0] @ (one * deep) + route.score.bias[0])
            raw.append(max(score, 0.0) / sum(max(cosine, 0.0) for cosine in alike))
        total = sum((w / (sum(raw) + 1e-6) * one for w, one in zip(raw, shallow, strict=True)), torch.zeros(()))
    first, _, second, behind = route.project
    z = deep + normed(behind, second.weight @ (first.weight @ total + first.bias).relu() + second.bias)  # type: ignore
    linear, norm = route.up
    up = normed(norm, linear.weight @ z.relu() + linear.bias)  # type: ignore[arg-type, operator]
    return up + math.tanh(float(route.gamma) / 0.1) * states[-1]


@pytest.mark.parametrize("count", [2, 4])
def test_sherls_early_route_is_what_the_formula_gives(count: int) -> None:
    torch.manual_seed(0)
    names = tuple(f"state.{i}" for i in range(count))
    route = EarlyRoute(names, 16, 8).double()
    with torch.no_grad():
        for parameter in route.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, dtype=torch.float64)
        batch = random_stacks((names, (5, 3)), (names[-1:], (5, 3)), dict.fromkeys(names, 16))
        out = route(batch)
        for row, length in enumerate((5, 3)):
            for token in range(length):
                wanted = merged_by_hand(route, [batch.state(name)[row, token] for name in names])
                torch.testing.assert_close(out[row, token], wanted, atol=1e-9, rtol=1e-9)


def test_sherl_reads_the_papers_states_and_trains_464_900_parameters(base: Backbone) -> None:
    method = find_method("sherl_two_stacks").configured({})
    assert isinstance(method, CachedMethod)
    encoder, decoder = ([f"blocks.{i}" for i in chosen] for chosen in ((0, 1, 3, 5), (0, 2, 3, 4)))
    assert method.layers(base.arch) == ("positions", *encoder, *(f"decoder.{name}" for name in decoder))
    with fake_mode(base) or nullcontext():
        body = method.build(base.arch, dict.fromkeys(method.layers(base.arch), 256), lambda: weights_of(base))
    assert sum(p.numel() for p in trained(body).values()) == 464_900


def test_the_last_block_is_the_backbones_own(mdetr: Backbone, scenes: JointToyExamples) -> None:
    """Fed with the frozen states in place of the sums it yields the backbone's own queries."""
    body, states = sherl(mdetr), ("blocks.3", "decoder.blocks.1", "positions", "norm")
    read = LiveStore(mdetr, prepare(mdetr, scenes), states).read(np.array([3, 0, 8]), states)
    batch = Batch(read.mask, read.layers, masks=read.masks)
    body.encoder.forward = lambda part: part.state("blocks.3")  # type: ignore[method-assign]
    body.decoder.forward = lambda part: part.state("decoder.blocks.1")  # type: ignore[method-assign]
    torch.testing.assert_close(body(batch), batch.state("norm"), atol=1e-5, rtol=1e-5)


@lean_and_plain
def test_sherls_auxiliary_level_is_what_enters_the_last_block(
    mdetr: Backbone, scenes: JointToyExamples, lean: bool
) -> None:
    body = sherl(mdetr, lean=str(lean).lower())
    layers = find_method("sherl_two_stacks").configured({}).layers(mdetr.arch)  # type: ignore[attr-defined]
    read = LiveStore(mdetr, prepare(mdetr, scenes), layers).read(np.array([3, 0, 8]), layers)
    batch, entered = Batch(read.mask, read.layers, masks=read.masks), []
    body.block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    auxiliary, out = body.levels(batch)
    torch.testing.assert_close(auxiliary, torch.cat(entered))
    torch.testing.assert_close(out, body(batch))


# --- what a step takes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize("index", [(1, 4, 7, 10), (1, 1)], ids=["padded texts", "all real"])
def test_a_live_step_on_images_of_one_size_is_predicted_to_the_byte(
    mdetr: Backbone, scenes: JointToyExamples, name: str, index: tuple[int, ...]
) -> None:
    method, own, examples = find_method(name).configured({}), copy.deepcopy(mdetr), prepare(mdetr, scenes)
    assert isinstance(method, LiveMethod)
    inputs, mask = mdetr.preprocess.collate([examples[i] for i in index])
    assert "sizes" not in inputs
    assert mask is not None
    assert bool(mask.all()) == (len(set(index)) == 1)
    batch = Batch(torch.ones(len(index), QUERIES, dtype=torch.bool), {}, inputs)
    found = predict_again(method, {"": mdetr}, batch, Step(len(index), 2, semantics="cpu")).peak
    learner, targets = Learner(method.network(own), 2, "mean", 0), torch.zeros(len(index), dtype=torch.long)
    settings = Settings(0, 1, len(index), method.config.lr, method.config.weight_decay, "fp32")
    measured = measure_training(learner, batch, targets, settings, DeviceMeter(torch.device("cpu"))).values
    assert found.by_category == measured["memory_by_category"]
    assert found.peak_bytes == measured["peak_tracked_bytes"]


def test_a_live_step_on_images_of_several_sizes_is_not_predicted(mdetr: Backbone, scenes: JointToyExamples) -> None:
    """Each is cut to its own size, and a size is a value."""
    inputs, _ = mdetr.preprocess.collate(prepare(mdetr, scenes)[:3])
    batch = Batch(torch.ones(3, QUERIES, dtype=torch.bool), {}, inputs)
    method = find_method("lora").configured({})
    assert isinstance(method, LiveMethod)
    with pytest.raises(Unpredictable, match="depends on values"):
        predict_again(method, {"": mdetr}, batch, Step(3, 2, semantics="cpu"))
