"""The methods that train through the backbone, against the same function written out by hand."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from method_cases import FAMILIES, Case, Run, batch_of, build
from torch import Tensor, nn
from toys import make_images

from sidebench.adapters._base import Batch, Body, trained
from sidebench.adapters._registry import find_method
from sidebench.adapters.bitfit import BitFit
from sidebench.adapters.full import FullFineTuning
from sidebench.adapters.lora import Config as LoRAConfig
from sidebench.adapters.lora import LoRA
from sidebench.adapters.vpt import VPT, PromptedBody
from sidebench.adapters.vpt import Config as VPTConfig
from sidebench.bench.choice import refusal
from sidebench.cache.backbone import Backbone
from sidebench.cache.block_weights import attention_projections
from sidebench.cache.errors import SidebenchError
from sidebench.cache.form import Form
from sidebench.cache.suffix import Suffix

WIDTH, BLOCKS = 32, 2


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return copy.deepcopy(request.getfixturevalue(f"tiny_{request.param}"))


def prepared_for(backbone: Backbone) -> list[Tensor]:
    if backbone.arch.modality == "image":
        return backbone.preprocess.prepare(list(make_images(3).raw))
    return backbone.preprocess.prepare(["good", "the film was very dull and not good", "a plot"])


def frozen_tokens(backbone: Backbone, prepared: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return backbone.tokens(backbone.preprocess.collate(prepared)[0])


def count(body: nn.Module) -> int:
    return sum(p.numel() for p in trained(body).values())


@pytest.mark.parametrize("name", ["lora", "bitfit", "full"])
def test_training_starts_at_the_frozen_function(name: str, backbone: Backbone) -> None:
    prepared = prepared_for(backbone)
    expected = frozen_tokens(backbone, prepared)
    method = Case(name).method()
    out = build(method, backbone)(batch_of(method, backbone, prepared))
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["lora", "bitfit", "full", "vpt"])
def test_frozen_dropout_stays_off_while_training(name: str, backbone: Backbone) -> None:
    for module in backbone.module.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5  # CLIP's attention keeps a number
    prepared = prepared_for(backbone)
    method = Case(name).method()
    body = build(method, backbone)
    batch = batch_of(method, backbone, prepared)
    body.eval()
    expected = body(batch)
    assert torch.equal(body.train()(batch), expected)
    nn.Sequential(body).train()  # a loop that trains body and head as one
    assert torch.equal(body(batch), expected)
    assert not any(module.training for module in backbone.module.modules())


# --- LoRA ------------------------------------------------------------------------------------------------------------


def test_lora_adds_exactly_the_low_rank_product(backbone: Backbone) -> None:
    prepared = prepared_for(backbone)
    by_hand = copy.deepcopy(backbone)
    body = LoRA(LoRAConfig(rank=3, alpha=12.0)).build(backbone)
    assert count(body) == 2 * BLOCKS * 2 * WIDTH * 3
    parameters = trained(body)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in parameters.items():
        if "lora_B" in name:
            assert not parameter.any()
            nn.init.normal_(parameter, std=0.3, generator=generator)
        else:
            assert parameter.any()
    touched = 0
    for index, block in enumerate(by_hand.blocks):
        for path, linear in attention_projections(block, ("query", "value")).items():
            prefix = f"module.{backbone.blocks_path}.{index}.{path}.lora_"
            a, b = (parameters[f"{prefix}{which}.default.weight"] for which in "AB")
            assert a.shape == (3, WIDTH)
            assert b.shape == (WIDTH, 3)
            with torch.no_grad():
                linear.weight += 12.0 / 3 * b @ a
            touched += 2
    assert touched == len(parameters)
    out = body(Batch(torch.ones(3, 1), {}, backbone.preprocess.collate(prepared)[0]))
    torch.testing.assert_close(out, frozen_tokens(by_hand, prepared), atol=1e-5, rtol=1e-4)


QUERY_AND_VALUE = {
    "bert": {"attention.self.query", "attention.self.value"},
    "clip_vision": {"self_attn.q_proj", "self_attn.v_proj"},
    "clip_text": {"self_attn.q_proj", "self_attn.v_proj"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_query_and_value_are_found_in_every_family(family: str, request: pytest.FixtureRequest) -> None:
    backbone: Backbone = request.getfixturevalue(f"tiny_{family}")
    for block in backbone.blocks:
        found = attention_projections(block, ("query", "value"))
        assert len(found) == 2
        assert found.keys() == QUERY_AND_VALUE.get(family, found.keys())
        assert {path.rsplit(".", 1)[-1][0] for path in found} == {"q", "v"}


@pytest.fixture(scope="session")
def t5_block() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).encoder.block[0]


def test_query_and_value_are_found_in_t5(t5_block: nn.Module) -> None:
    found = attention_projections(t5_block, ("query", "value"))
    assert [path.rsplit(".", 1)[-1] for path in found] == ["q", "v"]


def test_a_block_without_query_says_which_names_it_looked_for() -> None:
    with pytest.raises(SidebenchError, match=r"no query projection in Sequential: looked for .*q_proj.*found 0"):
        attention_projections(nn.Sequential(nn.Linear(2, 2)))


# --- VPT -------------------------------------------------------------------------------------------------------------


def prompted(backbone: Backbone, prompts: int, *, deep: bool) -> PromptedBody:
    body = VPT(VPTConfig(prompts=prompts, deep=deep)).build(backbone)
    assert isinstance(body, PromptedBody)
    return body


@pytest.mark.parametrize("deep", [True, False])
def test_each_block_sees_the_prompts_behind_the_first_token(backbone: Backbone, deep: bool) -> None:
    prepared = prepared_for(backbone)
    tokens = frozen_tokens(backbone, prepared).shape[1]
    body = prompted(backbone, 5, deep=deep)
    assert count(body) == (BLOCKS if deep else 1) * 5 * WIDTH
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    for block in backbone.blocks:
        block.register_forward_hook(note, with_kwargs=True)
    out = body(Batch(torch.ones(3, 1), {}, backbone.preprocess.collate(prepared)[0]))
    assert out.shape == (3, tokens, WIDTH)
    assert [tuple(x.shape) for x in seen] == [(3, 5 + tokens, WIDTH)] * BLOCKS
    for index, x in enumerate(seen):
        fresh = deep or index == 0
        assert torch.equal(x[1, 1:6], body.prompts[index if deep else 0]) is fresh


@pytest.mark.parametrize("deep", [True, False])
def test_vpt_on_images_equals_concatenating_by_hand(tiny_vit: Backbone, deep: bool) -> None:
    prepared = prepared_for(tiny_vit)
    inputs, _ = tiny_vit.preprocess.collate(prepared)
    module: Any = tiny_vit.module
    backbone = copy.deepcopy(tiny_vit)
    body = prompted(backbone, 4, deep=deep)
    with torch.no_grad():
        x = module.embeddings(inputs["pixel_values"])
        patches = x[:, 1:]
        if not deep:
            patches = torch.cat([body.prompts[0].expand(3, -1, -1), patches], dim=1)
        x = torch.cat([x[:, :1], patches], dim=1)
        for index, block in enumerate(tiny_vit.blocks):
            if deep:
                x = torch.cat([x[:, :1], body.prompts[index].expand(3, -1, -1), patches], dim=1)
            x = block(x)
            patches = x[:, 5:]
        x = module.layernorm(x)
        expected = torch.cat([x[:, :1], x[:, 5:]], dim=1)
    torch.testing.assert_close(body(Batch(torch.ones(3, 1), {}, inputs)), expected, atol=1e-5, rtol=1e-5)


def hand_prompted_text(
    backbone: Backbone, inputs: dict[str, Tensor], prompts: Tensor, *, deep: bool, causal: bool
) -> Tensor:
    """Blocks called one by one with an explicit additive mask: padding is hidden, prompts are seen by all."""
    module: Any = backbone.module
    mask = inputs["attention_mask"].bool()
    count_, tokens = mask.shape
    p = prompts.shape[1]
    visible = torch.zeros(count_, 1, tokens + p, tokens + p, dtype=torch.bool)
    for example in range(count_):
        for query in range(tokens + p):
            for key in range(tokens + p):
                if 1 <= key <= p:
                    visible[example, 0, query, key] = True
                    continue
                place = key if key == 0 else key - p
                asking = 0 if query <= p else query - p  # a prompt sees what the first token sees
                visible[example, 0, query, key] = bool(mask[example, place]) and (not causal or place <= asking)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    x = module.embeddings(input_ids=inputs["input_ids"])
    if not deep:
        x = torch.cat([x[:, :1], prompts[0].expand(count_, -1, -1), x[:, 1:]], dim=1)
    for index, block in enumerate(backbone.blocks):
        if deep:
            rest = x[:, 1:] if index == 0 else x[:, 1 + p :]
            x = torch.cat([x[:, :1], prompts[index].expand(count_, -1, -1), rest], dim=1)
        x = block(x, attention_mask=additive)
    if causal:
        x = module.final_layer_norm(x)
    return torch.cat([x[:, :1], x[:, 1 + p :]], dim=1)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("texts", [["good", "the film was very dull", "a plot"], ["good film", "bad film"]])
@pytest.mark.parametrize("family", ["bert", "clip_text"])
def test_vpt_on_texts_equals_concatenating_by_hand(
    family: str, texts: list[str], deep: bool, request: pytest.FixtureRequest
) -> None:
    original: Backbone = request.getfixturevalue(f"tiny_{family}")
    inputs, mask = original.preprocess.collate(original.preprocess.prepare(texts))
    assert mask is not None
    body = prompted(copy.deepcopy(original), 3, deep=deep)
    nn.init.normal_(body.prompts, generator=torch.Generator().manual_seed(0))
    out = body(Batch(mask, {}, inputs))
    with torch.no_grad():
        expected = hand_prompted_text(original, inputs, body.prompts, deep=deep, causal=family == "clip_text")
    torch.testing.assert_close(out[mask], expected[mask], atol=1e-4, rtol=1e-4)


def test_prompts_start_within_the_stated_bound(tiny_vit: Backbone, tiny_bert: Backbone) -> None:
    for backbone, fan_in in ((tiny_vit, 3 * 8 * 8), (tiny_bert, WIDTH)):
        torch.manual_seed(0)
        prompts = prompted(copy.deepcopy(backbone), 100, deep=True).prompts.detach()
        bound = (6 / (fan_in + WIDTH)) ** 0.5
        assert 0.98 * bound < float(prompts.abs().max()) <= bound
        assert float(prompts.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_prompts_start_as_published_for_a_vit_b() -> None:
    assert pytest.approx(0.0625) == (6 / (3 * 16**2 + 768)) ** 0.5


# --- BitFit and full -------------------------------------------------------------------------------------------------


def test_bitfit_trains_every_used_bias_and_nothing_else(backbone: Backbone) -> None:
    names = {name for name, _ in backbone.module.named_parameters() if name.endswith("bias")}
    body = BitFit().build(backbone)
    found = {name.removeprefix("module.") for name in trained(body)}
    assert found <= names
    unused = {name for name in names - found if "pooler" not in name and "post_layernorm" not in name}
    assert unused == set()


def test_full_trains_all_but_what_the_tokens_do_not_depend_on(backbone: Backbone) -> None:
    body = FullFineTuning().build(backbone)
    left_out = {name for name, _ in backbone.module.named_parameters()} - {
        n.removeprefix("module.") for n in trained(body)
    }
    assert all(any(part in name for part in ("pooler", "mask_token", "post_layernorm")) for name in left_out), left_out


def test_full_leaves_the_pooler_out(tiny_bert: Backbone, tiny_vit: Backbone) -> None:
    for original in (tiny_bert, tiny_vit):
        backbone = copy.deepcopy(original)
        pooler = {id(p) for name, p in backbone.module.named_parameters() if "pooler" in name}
        assert pooler
        body: Body = FullFineTuning().build(backbone)
        assert not pooler & {id(p) for p in trained(body).values()}


class Biases(nn.Module):
    """Two blocks without a bias between a stem and a pooler that nothing reads, of which some have one."""

    def __init__(self, *, stem: bool = False, last: bool = False, pooler: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1, bias=stem)
        self.blocks = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=last))
        self.pooler = nn.Linear(3, 3, bias=pooler)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.blocks(self.stem(pixels))
        self.pooler(tokens.flatten(2).mean(2))
        return tokens


def biases_of(**which: bool) -> Backbone:
    from sidebench.cache.preprocess import ImagePreprocess, PlainImageProcessor

    return Backbone(Biases(**which), ImagePreprocess(PlainImageProcessor(4), 4, None, input_name="pixels"))


@pytest.mark.parametrize("which", [{}, {"pooler": True}], ids=["none", "one that nothing reads"])
def test_bitfit_is_refused_where_there_is_no_bias(which: dict[str, bool]) -> None:
    arch = biases_of(**which).arch
    for name in ("bitfit", "bitfit@last1"):
        said = refusal(find_method(name).configured({}), arch, Form())
        assert "the output of Biases depends on no bias" in str(said)


@pytest.mark.parametrize("which", ["stem", "last"])
def test_bitfit_takes_a_bias_wherever_the_output_depends_on_it(which: str) -> None:
    backbone = biases_of(pooler=True, **{which: True})
    assert refusal(BitFit(), backbone.arch, Form()) is None
    path = "stem" if which == "stem" else "blocks.1"
    assert set(trained(BitFit().build(backbone))) == {f"module.{path}.bias"}


def test_bitfit_on_blocks_behind_the_last_bias_gets_a_sentence() -> None:
    with pytest.raises(SidebenchError, match="what it holds of Biases has no bias"):
        BitFit().build(Suffix(biases_of(stem=True), 1))


def test_a_run_changes_no_frozen_weight(backbone: Backbone) -> None:
    prepared = prepared_for(backbone)
    run = Run(Case("vpt").method(), backbone)
    before = {name: p.detach().clone() for name, p in run.backbone.module.named_parameters()}
    for _ in range(2):
        run.step(run.batch(prepared), torch.tensor([0, 1, 0]))
    assert all(torch.equal(p, before[name]) for name, p in run.backbone.module.named_parameters())


@pytest.mark.parametrize(
    ("name", "settings", "change", "said"),
    [
        ("lora", {"rank": "0"}, {}, "no rank"),
        ("lora", {}, {"blocks": 0}, "attention blocks"),
        ("lora", {}, {"mlp_width": None}, "attention blocks"),
        ("vpt", {"prompts": "0"}, {}, "0 prompts are none"),
        ("vpt", {}, {"norm": None}, "plain attention blocks"),
        ("adaptformer", {"scale": "0"}, {}, "times 0 adds nothing"),
        ("adaptformer", {}, {"norm": None}, "before or after the sum"),
    ],
)
def test_what_has_no_place_for_it_is_refused(
    tiny_vit: Backbone, name: str, settings: dict[str, str], change: dict[str, Any], said: str
) -> None:
    arch = tiny_vit.arch
    assert find_method(name).configured({}).refusal(arch) is None
    assert said in str(find_method(name).configured(settings).refusal(dataclasses.replace(arch, **change)))


@pytest.mark.parametrize("name", ["lora", "dora", "houlsby", "pfeiffer", "adaptformer", "prefix_tuning", "ssf", "vpt"])
def test_no_module_holds_an_activation_after_forward(name: str, tiny_vit: Backbone) -> None:
    def held(body: nn.Module) -> set[tuple[str, str]]:
        """Tensors that are attributes, neither parameters nor buffers."""
        found = ((path, vars(module).items()) for path, module in body.named_modules())
        return {(path, key) for path, items in found for key, value in items if isinstance(value, Tensor)}

    backbone, method = copy.deepcopy(tiny_vit), Case(name).method()
    body = build(method, backbone)
    before = held(body)
    body(batch_of(method, backbone, prepared_for(backbone)))
    assert held(body) <= before


def test_adaptformer_adds_a_tenth_of_its_bottleneck_unless_told_otherwise(tiny_vit: Backbone) -> None:
    backbone, tenth = copy.deepcopy(tiny_vit), copy.deepcopy(tiny_vit)
    inputs = backbone.preprocess.collate(prepared_for(backbone))[0]
    body = build(Case("adaptformer").method(), backbone)
    with torch.no_grad():
        for index, block in enumerate(tenth.blocks):
            body.get_parameter(f"adapters.{index}.up.bias").copy_(torch.linspace(-3, 3, WIDTH))
            block.get_parameter("mlp.fc2.bias").add_(torch.linspace(-0.3, 0.3, WIDTH))
    out = body(Batch(torch.ones(3, 1), {}, inputs))
    torch.testing.assert_close(out, tenth.tokens(inputs), atol=1e-5, rtol=1e-5)
