"""What holds for every method file, found by listing them: a new file is tested by existing."""

import ast
import contextlib
import copy
import dataclasses
import gc
import re
import types
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch
from method_cases import FAMILIES, TEXT_FAMILIES, Case, Run, build, every_case, fitted_cases, trained_cases
from torch import Tensor, nn
from toys import ToyExamples, make_images

import sidebench.adapters
from sidebench.adapters._base import Batch, CachedMethod, FittedMethod, LiveMethod, Method, TrainingConfig, trained
from sidebench.adapters._registry import describe, find_method, known_methods
from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone
from sidebench.cache.block_weights import BackboneWeights, BlockWeights
from sidebench.cache.errors import SidebenchError
from sidebench.cache.preprocess import ImagePreprocess, PlainImageProcessor

# A softmax cannot see what shifts all its inputs alike: UniPT's gate bias over layers, every key bias over keys.
UNSEEN_BY_A_SOFTMAX = re.compile(r"^gate\.bias$|(^|\.)(key|k_proj)\.bias$")
# Nor a batch norm a shift of all it sees: what is left of the gradient is rounding.
UNSEEN_BY_A_BATCH_NORM = re.compile(r"(^|\.)linear\.bias$")
NEAR_ZERO = 1e-6  # of the largest gradient


def named(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


@pytest.fixture(params=(*FAMILIES, "resnet"))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backbone(request: pytest.FixtureRequest, family: str) -> Backbone:
    return copy.deepcopy(request.getfixturevalue(f"tiny_{family}"))


@pytest.fixture
def prepared(backbone: Backbone) -> list[Tensor]:
    """Eight examples; the first is short where length varies."""
    return prepared_for(backbone)


def prepared_for(backbone: Backbone) -> list[Tensor]:
    if backbone.arch.modality == "image":
        return backbone.preprocess.prepare(list(make_images(8).raw))
    texts = ["good", "bad"]
    for filler in ("the film is very", "a plot and cast", "was not the mess is dull a"):
        texts += [f"{filler} good", f"{filler} bad joy"]
    return backbone.preprocess.prepare(texts)


TARGETS = torch.arange(8) % 2


def run_of(case: Case, backbone: Backbone, seed: int = 0) -> Run:
    method = case.method()
    refused = method.refusal(backbone.arch)
    if refused:
        pytest.skip(f"refused: {refused}")
    return Run(method, backbone, seed=seed)


def test_every_file_is_a_known_method() -> None:
    files = {path.stem for path in method_files()}
    assert files <= set(known_methods())
    assert {case.name.partition("@")[0] for case in trained_cases() + fitted_cases()} == set(known_methods())


@named(trained_cases())
def test_the_output_is_a_vector_or_a_token_sequence(case: Case, backbone: Backbone, prepared: list[Tensor]) -> None:
    run = run_of(case, backbone)
    batch = run.batch(prepared)
    out = run.body(batch)
    tokens = backbone.tokens(backbone.preprocess.collate(prepared)[0])
    wanted = (8, run.body.width) if out.ndim == 2 else (*tokens.shape[:2], run.body.width)
    assert out.shape == wanted
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()


@named(trained_cases())
def test_the_loss_falls_though_the_head_stands_still(case: Case, backbone: Backbone, prepared: list[Tensor]) -> None:
    run = run_of(case, backbone)
    batch = run.batch(prepared)
    losses = [run.step(batch, TARGETS) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0], losses


@named(trained_cases())
def test_gradients_reach_every_trained_parameter_and_no_frozen_one(
    case: Case, backbone: Backbone, prepared: list[Tensor]
) -> None:
    unreached: dict[str, float] = {}
    for seed in range(8):  # SHERL weighs layers with a ReLU, which may close some of them for one start, not for all
        run = run_of(case, backbone, seed)
        batch = run.batch(prepared)
        for _ in range(5):  # LoRA's A has no gradient while B is zero, LST's queries next to none while inputs are tiny
            run.step(batch, TARGETS)
        run.optimizer.zero_grad()
        out = run.body(batch)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        largest = {n: grad_size(p) for n, p in trained(run.body).items() if not UNSEEN_BY_A_BATCH_NORM.search(n)}
        scale = max(largest.values())
        unseen = {name for name in largest if UNSEEN_BY_A_SOFTMAX.search(name)}
        assert {n: v for n, v in largest.items() if n in unseen and v > NEAR_ZERO * scale} == {}
        frozen = [p for p in (*run.body.parameters(), *run.backbone.module.parameters()) if not p.requires_grad]
        assert all(p.grad is None for p in frozen)
        assert all(not state.requires_grad for state in batch.activations.values())
        small = {n: v for n, v in largest.items() if n not in unseen and not v > NEAR_ZERO * scale}
        unreached = small if seed == 0 else {n: v for n, v in small.items() if n in unreached}
        if not unreached:
            return
    assert unreached == {}


def grad_size(parameter: nn.Parameter) -> float:
    return float("nan") if parameter.grad is None else float(parameter.grad.abs().max())


@named(trained_cases())
def test_the_same_seed_gives_the_same_numbers(case: Case, backbone: Backbone, prepared: list[Tensor]) -> None:
    first, second = (run_of(case, backbone, seed=3) for _ in range(2))
    for run in (first, second):
        for _ in range(2):
            run.step(run.batch(prepared), TARGETS)
    assert torch.equal(first.body(first.batch(prepared)), second.body(second.batch(prepared)))
    for one, other in zip(first.body.parameters(), second.body.parameters(), strict=True):
        assert torch.equal(one, other)


@named(trained_cases())
def test_the_trained_part_survives_a_state_dict(case: Case, backbone: Backbone, prepared: list[Tensor]) -> None:
    taught, fresh = run_of(case, backbone, seed=0), run_of(case, backbone, seed=1)
    batch = taught.batch(prepared)
    for _ in range(2):
        taught.step(batch, TARGETS)
    saved = {name: p.detach().clone() for name, p in trained(taught.body).items()}
    assert not torch.equal(taught.body(batch), fresh.body(batch))
    loaded = fresh.body.load_state_dict(saved, strict=False)
    assert loaded.unexpected_keys == []
    assert not set(loaded.missing_keys) & set(trained(fresh.body))
    assert torch.equal(taught.body(batch), fresh.body(batch))


@named(trained_cases())
def test_the_printed_count_is_the_count_that_trains(case: Case, backbone: Backbone, prepared: list[Tensor]) -> None:
    run = run_of(case, backbone)
    batch = run.batch(prepared)
    before = {name: p.detach().clone() for name, p in run.body.named_parameters()}
    for _ in range(2):
        run.step(batch, TARGETS)
    moved = {name for name, p in run.body.named_parameters() if not torch.equal(p, before[name])}
    printed = trained(run.body)
    assert moved <= set(printed)
    unseen = (UNSEEN_BY_A_SOFTMAX, UNSEEN_BY_A_BATCH_NORM)
    assert {name for name in printed if not any(pattern.search(name) for pattern in unseen)} <= moved
    in_the_optimizer = sum(state["exp_avg"].numel() for state in run.optimizer.state.values())
    assert sum(p.numel() for p in printed.values()) == in_the_optimizer > 0


@named(every_case(CachedMethod))
def test_a_cached_method_holds_nothing_of_the_backbone(case: Case, backbone: Backbone) -> None:
    run = run_of(case, backbone)
    held = list(run.body.state_dict(keep_vars=True).values())
    tensors = run.backbone.module.state_dict(keep_vars=True).values()
    frozen = [tensor for tensor in tensors if tensor.is_floating_point()]  # not the counters of batch norms
    assert not {t.untyped_storage().data_ptr() for t in held} & {t.untyped_storage().data_ptr() for t in frozen}
    same = [one for one in held for other in frozen if one.shape == other.shape and torch.equal(one, other)]
    assert bool(same) is run.method.runs_blocks  # type: ignore[attr-defined]
    assert not any(one.requires_grad for one in same)
    forbidden = {id(run.backbone), *map(id, run.backbone.module.modules()), *map(id, frozen)}
    assert not [thing for thing in reachable(run.body, run.method) if id(thing) in forbidden]
    assert not any(isinstance(thing, Backbone) for thing in reachable(run.body, run.method))


def reachable(*roots: object) -> Iterator[object]:
    """Everything the roots hold, without going through classes, modules and the globals of functions."""
    seen: set[int] = set()
    waiting: list[object] = list(roots)
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | types.ModuleType):
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, types.FunctionType):
            waiting += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__]
        else:
            waiting += gc.get_referents(thing)


@pytest.mark.parametrize("family", TEXT_FAMILIES, indirect=True)
@named(trained_cases())
def test_padding_does_not_change_real_positions(case: Case, backbone: Backbone, prepared: list[Tensor]) -> None:
    run = run_of(case, backbone)
    for _ in range(2):  # away from a start that may be the frozen function
        run.step(run.batch(prepared), TARGETS)
    short, longer = prepared[0], prepared[-1]
    assert len(short) < len(longer)
    with torch.no_grad():
        alone = run.body(run.batch([short]))[0]
        padded = run.body(run.batch([short, longer]))[0]
    real = padded[: len(short)] if padded.ndim == 2 else padded
    torch.testing.assert_close(real, alone, atol=1e-5, rtol=1e-5)


@named(fitted_cases())
def test_a_fitted_method_separates_a_separable_toy(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(60) % 2
    features = torch.randn(60, 12, generator=generator)
    features[:, 0] += 8.0 * targets
    method = case.method()
    assert isinstance(method, FittedMethod)
    first, second = (method.fit((features[:40], targets[:40]), (features[40:], targets[40:]), 2) for _ in range(2))
    logits = first[0](features)
    assert logits.shape == (60, 2)
    assert (logits[:40].argmax(1) == targets[:40]).float().mean() == 1.0
    assert torch.equal(logits, second[0](features))
    assert first[1] == second[1]
    fresh = copy.deepcopy(first[0])
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(first[0].state_dict())
    assert torch.equal(logits, fresh(features))


def method_files() -> list[Path]:
    folder = Path(sidebench.adapters.__file__).parent
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))


def test_no_two_method_files_are_the_same_code() -> None:
    shapes = {path.stem: shape_of_code(path.read_text("utf-8")) for path in method_files()}
    same = [(one, other) for one, other in combinations(shapes, 2) if shapes[one] == shapes[other]]
    assert same == []


def test_renaming_and_new_comments_do_not_hide_a_copy() -> None:
    one = 'class A:\n    """One."""\n    lr = 1.0\n    def f(self, x):\n        return x + self.lr\n'
    other = 'class B:\n    """Two."""\n    rate = 2.0  # faster\n    def g(self, y):\n        return y + self.rate\n'
    assert shape_of_code(one) == shape_of_code(other)
    assert shape_of_code(one) != shape_of_code(one.replace("+", "*"))


def shape_of_code(source: str) -> str:
    """The syntax tree without docstrings, names in order of first use, constants by their type."""
    numbers: dict[str, str] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    for node in ast.walk(tree):
        for attribute in ("name", "id", "attr", "arg", "asname", "module"):
            text = getattr(node, attribute, None)
            if isinstance(text, str):
                setattr(node, attribute, numbers.setdefault(text, f"name{len(numbers)}"))
        if isinstance(node, ast.Constant):
            node.value = type(node.value).__name__
    return ast.dump(tree)


@pytest.mark.parametrize("name", known_methods())
def test_a_method_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    described = describe(name)
    assert re.search(r"\d{4}", described["paper"])
    assert re.fullmatch(r"[A-Z].{20,}\.", described["summary"])
    assert described["kind"] in ("cached", "prefix", "live")
    assert all(len(option["help"]) > 10 for option in described["config"].values())
    assert find_method(name).cls.__doc__ not in {kind.__doc__ for kind in (CachedMethod, FittedMethod, LiveMethod)}


@pytest.mark.parametrize("name", sorted({case.name.partition("@")[0] for case in trained_cases()}))
def test_a_default_learning_rate_names_its_source(name: str) -> None:
    config_class = find_method(name).cls.Config
    assert issubclass(config_class, TrainingConfig)
    ours, common = (describe_lr(c) for c in (config_class, TrainingConfig))
    assert ours != common
    assert re.search(r"\(.+\)", ours)


def describe_lr(config_class: type) -> str:
    return next(f.metadata["help"] for f in dataclasses.fields(config_class) if f.name == "lr")


USUAL = Architecture(
    "Toy", "text", blocks=2, width=32, prefix_tokens=0, final_layer="norm", heads=4, mlp_width=64, norm="pre"
)
ODD = {
    "usual": USUAL,
    "no_blocks": dataclasses.replace(USUAL, blocks=0, heads=None, mlp_width=None, norm=None),
    "unknown_norm": dataclasses.replace(USUAL, norm=None),
    "no_heads": dataclasses.replace(USUAL, heads=None),
    "indivisible_width": dataclasses.replace(USUAL, width=30, heads=5),
    "indivisible_mlp": dataclasses.replace(USUAL, mlp_width=61),
    "narrow": dataclasses.replace(USUAL, width=1, heads=1, mlp_width=1),
    "unknown_activation": dataclasses.replace(USUAL, activation="maxout"),
    "images_without_a_class_token": dataclasses.replace(USUAL, modality="image"),
}


@pytest.mark.parametrize("arch", ODD.values(), ids=ODD)
@named(trained_cases() + fitted_cases())
def test_a_refusal_is_a_sentence(case: Case, arch: Architecture) -> None:
    refused = case.method().refusal(arch)
    assert refused is None or re.fullmatch(r".{15,}", refused)


@pytest.mark.parametrize("arch", ODD.values(), ids=ODD)
@named(every_case(CachedMethod))
def test_what_is_not_refused_can_be_built(case: Case, arch: Architecture) -> None:
    method = case.method()
    assert isinstance(method, CachedMethod)
    if method.refusal(arch):
        return
    layers = method.layers(arch)
    body = method.build(arch, dict.fromkeys(layers, arch.width), lambda: random_weights(arch))
    states = {layer: torch.randn(2, 3, arch.width) for layer in layers}
    assert torch.isfinite(body(Batch(torch.ones(2, 3, dtype=torch.bool), states))).all()


# The one convolves patches, the other is for two stacks of blocks (tests/test_mdetr_methods.py).
NOT_FOR_TEXTS = {"dtl-plus=true", "sherl_two_stacks", "sherl_two_stacks-lean=false"}


def test_every_trained_method_accepts_the_usual_backbone() -> None:
    refused = {str(case) for case in trained_cases() + fitted_cases() if case.method().refusal(USUAL)}
    assert refused == NOT_FOR_TEXTS


def random_weights(arch: Architecture) -> BackboneWeights:
    width, hidden = arch.width, arch.mlp_width or 1
    square = (torch.randn(width, width), torch.randn(width))
    up, down = (torch.randn(hidden, width), torch.randn(hidden)), (torch.randn(width, hidden), torch.randn(width))
    norm = (torch.randn(width), torch.randn(width))
    block = BlockWeights(square, square, square, square, up, down, norm, norm, None)
    weights = BackboneWeights(torch.randn(20, width), (block,) * arch.blocks, norm)
    return dataclasses.replace(weights, importance=weights)


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, stride=8, bias=False)
        self.stages = nn.Sequential(ConvBlock(), ConvBlock())

    def forward(self, pixels: Tensor) -> Tensor:
        return self.stages(self.stem(pixels)).mean((2, 3))


@pytest.fixture
def convolutional() -> Backbone:
    torch.manual_seed(0)
    return Backbone(ConvNet(), ImagePreprocess(PlainImageProcessor(16), 16, None, input_name="pixels"))


@named(trained_cases())
def test_a_network_without_attention_works_or_gets_a_sentence(case: Case, convolutional: Backbone) -> None:
    method = case.method()
    if method.refusal(convolutional.arch):
        return
    with contextlib.suppress(SidebenchError):  # anything else fails the test
        assert trained(build(method, convolutional))


def test_toy_examples_are_what_the_methods_see(text_examples: ToyExamples, tiny_bert: Backbone) -> None:
    method: Method = every_case(CachedMethod)[0].method()
    run = Run(method, tiny_bert)
    batch = run.batch(tiny_bert.preprocess.prepare(list(text_examples.raw[:3])))
    assert batch.mask.shape[0] == 3
    assert set(batch.activations) == set(method.layers(tiny_bert.arch))  # type: ignore[attr-defined]
