"""Predicted memory: on a CPU the bytes that are tracked, under CUDA semantics an independent prototype's figures."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from method_cases import Case, batch_of, build, fitted_cases, trained_cases
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from toys import build_store, make_images, make_texts

from sidebench.adapters._base import Batch, Body, CachedMethod, FittedMethod, LiveMethod
from sidebench.adapters._registry import find_method, known_methods
from sidebench.bench.assemble import seeded
from sidebench.bench.cuda_semantics import CudaSemantics, use_foreach
from sidebench.bench.device_memory import DeviceMeter
from sidebench.bench.learner import CachedSource, Learner
from sidebench.bench.measure import measure_fit, measure_training
from sidebench.bench.predict import Prediction, Unpredictable, predict
from sidebench.bench.predict_fit import predict_fit
from sidebench.bench.step import Step, batch_for
from sidebench.bench.training import Settings, loss_of, make_optimizer
from sidebench.cache.backbone import Backbone
from sidebench.cache.configs import config_backbone, without_weights
from sidebench.cache.errors import SidebenchError
from sidebench.cache.form import Form
from sidebench.cache.preprocess import ImagePreprocess, PlainImageProcessor
from sidebench.cache.zarr_store import ZarrStore

CPU = torch.device("cpu")
MIB = 2**20
CLASSES = 3
PLAIN = Form(dtype="float32")


def _prepared(backbone: Backbone) -> list[Tensor]:
    """Eight examples; of texts the first is short, so that its row is padded."""
    if backbone.arch.modality == "image":
        return backbone.preprocess.prepare(list(make_images(8).raw))
    return backbone.preprocess.prepare(["good", *["the film is very bad and dull"] * 3, *["a plot"] * 4])


def _settings(method: CachedMethod | LiveMethod, precision: str) -> Settings:
    return Settings(0, 1, 8, method.config.lr, method.config.weight_decay, precision)


def _tracked(case: Case, backbone: Backbone, precision: str) -> tuple[dict, int]:
    """What `measure_training` tracks of the real thing, and how many tokens its longest text has."""
    method = case.method()
    own = copy.deepcopy(backbone)
    batch = batch_of(method, own, _prepared(own))
    with seeded(0):
        learner = Learner(build(method, own), CLASSES, "mean", own.arch.prefix_tokens)
    if backbone.arch.modality == "text":
        assert not batch.mask.all(), "no row is padded"
    targets = torch.arange(8) % CLASSES
    memory = measure_training(learner, batch, targets, _settings(method, precision), DeviceMeter(CPU))
    return memory.values, batch.mask.shape[1]


@pytest.fixture(params=["vit", "bert"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return request.getfixturevalue(f"tiny_{request.param}")


def _predicted(case: Case, backbone: Backbone, precision: str, tokens: int) -> Prediction:
    step = Step(8, CLASSES, precision, "cpu", form=PLAIN, max_length=tokens)
    return predict(case.method(), backbone, step)


@pytest.mark.parametrize("case", trained_cases(), ids=str)
def test_every_method_is_predicted_to_the_byte_in_fp32(case: Case, backbone: Backbone) -> None:
    if refused := case.method().refusal(backbone.arch):
        pytest.skip(f"refused: {refused}")
    tracked, tokens = _tracked(case, backbone, "fp32")
    found = _predicted(case, backbone, "fp32", tokens)
    assert found.peak.by_category == tracked["memory_by_category"]
    assert found.peak.by_phase == tracked["memory_by_phase"]
    assert found.peak.peak_bytes == tracked["peak_tracked_bytes"]
    assert found.peak.at == tracked["memory_peak_at"]


@pytest.mark.parametrize("case", trained_cases(), ids=str)
def test_every_method_is_predicted_within_three_per_mille_in_bf16(case: Case, backbone: Backbone) -> None:
    if refused := case.method().refusal(backbone.arch):
        pytest.skip(f"refused: {refused}")
    tracked, tokens = _tracked(case, backbone, "bf16")
    found = _predicted(case, backbone, "bf16", tokens)
    assert found.peak.peak_bytes == pytest.approx(tracked["peak_tracked_bytes"], rel=0.003)


def test_a_text_batch_is_predicted_with_its_mask_whatever_the_mask_says(tiny_bert: Backbone) -> None:
    """An all-ones mask lets transformers drop it: the prediction is of the padded batch, which takes more."""
    case, own = Case("full"), copy.deepcopy(tiny_bert)
    texts = ["the film is good"] * 8
    batch = batch_of(case.method(), own, own.preprocess.prepare(texts))
    assert batch.mask.all()
    learner = Learner(build(case.method(), own), CLASSES, "mean", 0)
    targets = torch.zeros(8, dtype=torch.long)
    memory = measure_training(learner, batch, targets, _settings(case.method(), "fp32"), DeviceMeter(CPU))
    found = _predicted(case, tiny_bert, "fp32", batch.mask.shape[1])
    assert found.peak.peak_bytes > memory.values["peak_tracked_bytes"]


@pytest.mark.parametrize(("dtype", "per_channel"), [("float16", False), ("bfloat16", False), ("int8", True)])
@pytest.mark.parametrize("name", ["unipt", "lst"])
def test_a_batch_read_from_a_store_is_predicted_to_the_byte(
    tiny_bert: Backbone, tmp_path: Path, name: str, dtype: str, per_channel: bool
) -> None:
    built = build_store(tiny_bert, make_texts(16), tmp_path, dtype=dtype, per_channel=per_channel)
    store = ZarrStore(built.folder)
    method = find_method(name).configured({})
    assert isinstance(method, CachedMethod)
    with seeded(0):
        learner = Learner(build(method, copy.deepcopy(tiny_bert)), CLASSES, "mean", 0)
    source = CachedSource(store, method.layers(tiny_bert.arch), CPU, store.lengths())
    batch = next(iter(source.batches([np.arange(8)])))
    targets = torch.zeros(8, dtype=torch.long)
    memory = measure_training(learner, batch, targets, _settings(method, "fp32"), DeviceMeter(CPU))
    form = Form(dtype=dtype, per_channel=per_channel)
    step = Step(8, CLASSES, semantics="cpu", form=form, max_length=batch.mask.shape[1])
    found = predict(method, tiny_bert, step).peak
    # One centre and spread per channel: the store hands the same two rows to every batch.
    assert found.by_category == memory.values["memory_by_category"]
    assert found.peak_bytes == memory.values["peak_tracked_bytes"]


def test_predicting_leaves_the_backbone_as_it_was(tiny_vit: Backbone) -> None:
    before = {name: p.clone() for name, p in tiny_vit.module.state_dict().items()}
    for name in ("full", "lora", "vpt"):
        predict(find_method(name).configured({}), tiny_vit, Step(4, 2))
    after = tiny_vit.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert nn.Module._apply.__module__ == "torch.nn.modules.module"


class Redrawing(CachedMethod):
    """A method whose initialisation looks at values, and which moves itself."""

    paper = "none"

    def build(self, arch: Any, widths: Any, weights: Any) -> Body:
        body = Mean(arch.width)
        nn.init.trunc_normal_(body.linear.weight)
        return body.to("cpu", torch.float32)


class Mean(Body):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(width, width)

    def forward(self, batch: Batch) -> Tensor:
        return self.linear(batch.state("blocks.0"))


class Peeking(Redrawing):
    """A method whose step depends on a value."""

    def build(self, arch: Any, widths: Any, weights: Any) -> Body:
        return Peek(arch.width)


class Peek(Mean):
    def forward(self, batch: Batch) -> Tensor:
        out = super().forward(batch)
        return out * 2 if float(out.detach().sum()) > 0 else out


def test_an_initialisation_that_looks_at_values_is_no_obstacle(tiny_vit: Backbone) -> None:
    width = tiny_vit.arch.width
    found = predict(Redrawing(), tiny_vit, Step(4, 2, semantics="cpu"))
    assert found.trainable_params == width * width + width + 2 * width + 2


def test_a_step_that_depends_on_values_is_named_unpredictable(tiny_vit: Backbone) -> None:
    with pytest.raises(Unpredictable, match="depends on values"):
        predict(Peeking(), tiny_vit, Step(4, 2))


@pytest.fixture(scope="module")
def vit_base() -> Backbone:
    return config_backbone("vit-base")


PROTOTYPE_MIB = {  # an independent prototype's, ViT-B/16, batch 64, 224 px, 100 classes: requested, allocated, reserved
    ("full", "fp32"): (8316, 8323, 8606),
    ("lora", "fp32"): (5559, 5565, 5740),
    ("vpt", "fp32"): (5383, 5401, 5766),
    ("bitfit", "fp32"): (5141, 5147, 5420),
    ("full", "bf16"): (5777, None, None),
    ("lora", "bf16"): (3788, None, None),
    ("vpt", "bf16"): (3522, None, None),
    ("bitfit", "bf16"): (3396, None, None),
}


@pytest.mark.parametrize(("name", "precision"), PROTOTYPE_MIB)
def test_vit_base_takes_on_cuda_what_an_independent_prototype_found(
    vit_base: Backbone, name: str, precision: str
) -> None:
    requested, allocated, reserved = PROTOTYPE_MIB[name, precision]
    found = predict(find_method(name).configured({}), vit_base, Step(64, 100, precision))
    assert found.peak.peak_bytes / MIB == pytest.approx(requested, rel=0.01)
    assert found.allocator is not None
    assert found.allocator.requested_bytes == found.peak.peak_bytes
    if allocated is not None:
        assert found.allocator.allocated_bytes / MIB == pytest.approx(allocated, rel=0.01)
        assert found.allocator.reserved_bytes / MIB == pytest.approx(reserved, rel=0.03)


def test_the_parameters_optimizer_and_inputs_of_vit_base_are_counted_by_hand(vit_base: Backbone) -> None:
    """12 blocks of 4 (D² + D) + 2·4D² + 4D + D + 2·2D, patches, class token, positions, final norm; and the pooler."""
    width, blocks, head = 768, 12, 768 * 100 + 100
    block = 4 * (width**2 + width) + 8 * width**2 + 5 * width + 4 * width
    used = blocks * block + (3 * 16**2 * width + width) + width + 197 * width + 2 * width
    pooler = width**2 + width
    found = predict(find_method("full").configured({}), vit_base, Step(4, 100))
    assert found.trainable_params == used + head
    assert found.head_params == head
    assert found.peak.by_category["parameters"] == 4 * (used + head + pooler)
    assert found.peak.by_category["optimizer"] == 2 * 4 * (used + head)  # the step counters are on the host
    assert found.peak.by_category["inputs"] == 4 * 3 * 224**2 * 4 + 4 * 197 + 4 * 8


def test_the_math_kernel_takes_more_than_the_efficient_one(vit_base: Backbone) -> None:
    method = find_method("lora").configured({})
    efficient, math = (predict(method, vit_base, Step(4, 100, attention=kernel)).peak for kernel in ("auto", "math"))
    maps = 12 * 4 * 12 * 197**2 * 4  # blocks x examples x heads x tokens² x float32, saved for backward
    # The efficient kernel saves its output and the row sums instead; the frozen projection behind it saves no input.
    instead = 12 * 4 * (197 * 768 + 12 * 224) * 4
    more = math.by_category["activations"] - efficient.by_category["activations"]
    assert maps - 1.1 * instead <= more <= maps


def test_flash_refuses_what_it_cannot_do(vit_base: Backbone, tiny_bert: Backbone) -> None:
    method = find_method("bitfit").configured({})
    with pytest.raises(SidebenchError, match="float32"):
        predict(method, vit_base, Step(2, 2, attention="flash"))
    with pytest.raises(SidebenchError, match="mask"):
        predict(method, tiny_bert, Step(2, 2, "bf16", attention="flash"))
    with pytest.raises(SidebenchError, match="efficient"):
        predict(method, vit_base, Step(2, 2, attention="eficient"))


def _saved_by(work: Callable[[], Tensor], *inputs: Tensor, autocast: bool = False) -> dict[str, int]:
    """Activation bytes and dtype counts of what a forward saves under CUDA semantics."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with CudaSemantics(), context, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = work()
    given = {id(t.untyped_storage()) for t in inputs}
    parts = {id(t.untyped_storage()): t for t in kept if id(t.untyped_storage()) not in given}
    names = sorted(str(t.dtype).removeprefix("torch.") for t in parts.values())
    return {"bytes": sum(t.untyped_storage().nbytes() for t in parts.values()), "dtypes": names, "out": out.dtype}


def test_dropout_saves_one_byte_per_element() -> None:
    with FakeTensorMode():
        x = torch.empty(100, 7, requires_grad=True)
        saved = _saved_by(lambda: functional.dropout(x, 0.1, True), x)
        assert (saved["bytes"], saved["dtypes"]) == (700, ["bool"])
        assert _saved_by(lambda: functional.dropout(x, 0.1, False), x)["bytes"] == 0


def test_the_efficient_kernel_saves_its_output_and_a_row_sum_padded_to_32() -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 3, 50, 8, requires_grad=True) for _ in range(3))
        saved = _saved_by(lambda: functional.scaled_dot_product_attention(q, k, v), q, k, v)
        out, row_sums, random_state = 2 * 3 * 50 * 8 * 4, 2 * 3 * 64 * 4, 2 * 8
        assert saved["bytes"] == out + row_sums + random_state


@pytest.mark.parametrize(("keys", "kept_keys"), [(48, 48), (50, 56)])
def test_a_mask_becomes_floats_with_rows_of_a_multiple_of_8(keys: int, kept_keys: int) -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 3, keys, 8, requires_grad=True) for _ in range(3))
        mask = torch.ones(2, 1, keys, keys, dtype=torch.bool)
        plain = _saved_by(lambda: functional.scaled_dot_product_attention(q, k, v), q, k, v)
        masked = _saved_by(lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask), q, k, v)
        assert masked["bytes"] - plain["bytes"] == 2 * keys * kept_keys * 4


def test_under_autocast_norms_and_softmax_are_float32_and_products_bfloat16() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 16, dtype=torch.bfloat16, requires_grad=True)
        norm, linear = nn.LayerNorm(16), nn.Linear(16, 16)
        assert _saved_by(lambda: norm(x), x, autocast=True)["out"] == torch.float32
        assert _saved_by(lambda: x.softmax(-1), x, autocast=True)["out"] == torch.float32
        assert _saved_by(lambda: x.sum(0), x, autocast=True)["out"] == torch.float32
        assert _saved_by(lambda: x.pow(2), x, autocast=True)["out"] == torch.float32
        assert _saved_by(lambda: linear(x), x, autocast=True)["out"] == torch.bfloat16
        assert _saved_by(lambda: torch.mv(x.float(), x[0].float()), x, autocast=True)["out"] == torch.bfloat16
        assert _saved_by(lambda: norm(x.float()), x)["out"] == torch.float32


def test_the_semantics_hold_where_backward_runs_forward_again() -> None:
    """A checkpointed block draws its masks again in backward: the CPU's path there would save floats."""
    seen: list[torch.dtype] = []

    def block(x: Tensor) -> Tensor:
        kept = functional.dropout(x, 0.5, True)
        (mask,) = [t for t in _tensors_saved(kept) if t.dtype is torch.bool] or [torch.empty(0)]
        seen.append(mask.dtype)
        return kept.relu()

    with FakeTensorMode(), CudaSemantics():
        x = torch.empty(10, 10, requires_grad=True)
        checkpoint(block, x, use_reentrant=False).sum().backward()
    assert seen == [torch.bool, torch.bool]


def _tensors_saved(tensor: Tensor) -> list[Tensor]:
    node = tensor.grad_fn
    names = [name for name in dir(node) if name.startswith("_saved")]
    return [value for name in names if isinstance(value := getattr(node, name), Tensor)]


def test_adamw_steps_all_parameters_at_once() -> None:
    """Its temporaries for all parameters together are the peak of full fine-tuning with a small batch."""
    optimizer = torch.optim.AdamW([torch.zeros(3, requires_grad=True)])
    use_foreach(optimizer)
    assert optimizer.param_groups[0]["foreach"] is True
    fused = torch.optim.AdamW([torch.zeros(3, requires_grad=True)], fused=True)
    use_foreach(fused)
    assert fused.param_groups[0]["foreach"] is None


def test_a_planted_leak_raises_the_prediction_by_exactly_its_bytes(tiny_vit: Backbone) -> None:
    plain, leaking = (
        predict(method, tiny_vit, Step(4, 2, semantics="cpu")).peak for method in (Redrawing(), Leaking())
    )
    assert leaking.peak_bytes - plain.peak_bytes == 2 * 1000 * 4  # one per step


class Leaking(Redrawing):
    """Keeps a tensor of every step."""

    def build(self, arch: Any, widths: Any, weights: Any) -> Body:
        return Leak(arch.width)


class Leak(Mean):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.kept: list[Tensor] = []

    def forward(self, batch: Batch) -> Tensor:
        self.kept.append(torch.zeros(1000))
        return super().forward(batch)


@pytest.mark.parametrize("iterations", [10, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize(("examples", "width", "classes"), [(200, 32, 5), (64, 64, 20)])
def test_a_solver_is_predicted_up_to_the_vectors_of_a_line_search(
    examples: int, width: int, classes: int, iterations: int
) -> None:
    """Ill-conditioned, so that its history fills."""
    method = find_method("linear_probe").configured({"max_iterations": str(iterations)})
    assert isinstance(method, FittedMethod)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(examples, width, generator=generator).cumsum(1)
    targets = torch.arange(examples) % classes
    tracked = measure_fit(method, (features, targets), classes, DeviceMeter(CPU)).values["peak_tracked_bytes"]
    found = predict_fit(method, examples=examples, width=width, num_outputs=classes, semantics="cpu")
    vector = (width * classes + classes) * 8
    assert abs(found.peak.peak_bytes - tracked) <= 4 * vector
    assert found.trainable_params == width * classes + classes
    assert found.allocator is None


def test_a_solver_that_keeps_something_unknown_is_named_unpredictable() -> None:
    with pytest.raises(Unpredictable, match="no product"):
        predict_fit(Odd(), examples=10, width=4, num_outputs=2)


@dataclass(frozen=True)
class Nothing:
    """A Config without options."""


class Odd(FittedMethod):
    """Keeps a square of the number of examples."""

    Config: ClassVar[type] = Nothing
    paper = "none"

    def fit(self, train: Any, val: Any, num_outputs: int) -> tuple[nn.Module, dict[str, Any]]:
        gram = train[0] @ train[0].mT
        return nn.Linear(len(gram[0][: train[0].shape[1]]), num_outputs), {}


def test_every_known_method_is_predicted_or_solved() -> None:
    cases = {case.name.partition("@")[0] for case in (*trained_cases(), *fitted_cases())}
    assert cases == set(known_methods())


def test_a_fitted_method_is_not_predicted_in_steps(tiny_vit: Backbone) -> None:
    with pytest.raises(Unpredictable, match="not trained in steps"):
        predict(find_method("linear_probe").configured({}), tiny_vit, Step(4, 2))


def test_real_and_fake_backbones_give_one_prediction(tiny_vit: Backbone) -> None:
    method = find_method("lora").configured({})
    assert predict(method, tiny_vit, Step(4, 2)) == predict(method, without_weights(tiny_vit), Step(4, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted({case.name for case in trained_cases()}))
def test_a_gpu_requests_what_was_predicted_within_three_per_cent(name: str, precision: str) -> None:
    """requested_bytes.all.peak of the second step above what was held before; library workspaces are warmed up."""
    from transformers import ViTConfig, ViTModel

    cuda = torch.device("cuda")
    module = ViTModel(ViTConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536))
    facts = {"norm": "pre", "heads": 6, "activation": "gelu"}
    real = Backbone(module, ImagePreprocess(PlainImageProcessor(224), 224, 16), **facts)  # type: ignore[arg-type]
    method, step = find_method(name).configured({}), Step(32, 100, precision)
    predicted = predict(method, real, step).peak.peak_bytes
    for dtype in (torch.float32, torch.bfloat16):
        warm = torch.zeros(256, 256, device=cuda, dtype=dtype, requires_grad=True)
        (warm @ warm).sum().backward()
    del warm
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    batch, targets = batch_for(method, real, step), step.aim.blank_targets(step.batch_size)  # type: ignore[arg-type]
    real.module.to(cuda)
    learner = Learner(build(method, real), 100, "mean", real.arch.prefix_tokens).to(cuda).train()
    batch = Batch(
        batch.mask.to(cuda),
        {layer: state.to(cuda) for layer, state in batch.activations.items()},
        {key: value.to(cuda) for key, value in batch.inputs.items()},
    )
    if isinstance(method, CachedMethod):
        real.module.to("cpu")
    optimizer = make_optimizer(learner, _settings(method, precision))  # type: ignore[arg-type]
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        loss_of(learner, batch, targets.to(cuda), precision).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    measured = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert predicted == pytest.approx(measured, rel=0.03)
