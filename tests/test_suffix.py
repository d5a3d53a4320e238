"""Restarting a backbone at block k: the same numbers as the whole forward, without the weights before it."""

import copy
from collections.abc import Callable

import pytest
import torch
from method_cases import FAMILIES
from restarts import inputs_of, t5_encoder
from torch import Tensor, nn

from sidebench.adapters._base import BackboneBody, Batch, Body, LiveMethod
from sidebench.adapters._registry import find_method
from sidebench.cache.backbone import Backbone
from sidebench.cache.errors import SidebenchError
from sidebench.cache.preprocess import ImagePreprocess, Inputs, PlainImageProcessor
from sidebench.cache.suffix import ENTERING, MASK, Suffix, entering_layer


class LastBlocks(Backbone):
    """The whole backbone, of which a live method sees the last blocks only: what a suffix has to equal."""

    def __init__(self, whole: Backbone, first: int) -> None:
        vars(self).update(vars(whole))
        self.first = first

    @property
    def block_paths(self) -> list[str]:
        return super().block_paths[self.first :]


def conv_net() -> Backbone:
    torch.manual_seed(0)
    stages = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    net = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), stages)
    return Backbone(net, ImagePreprocess(PlainImageProcessor(16), 16, None, input_name="input"))


@pytest.fixture(params=[*FAMILIES, "t5", "conv"])
def whole(request: pytest.FixtureRequest) -> Backbone:
    made: dict[str, Callable[[], Backbone]] = {"t5": t5_encoder, "conv": conv_net}
    if request.param in made:
        return made[request.param]()
    return copy.deepcopy(request.getfixturevalue(f"tiny_{request.param}"))


def entered(backbone: Backbone, first: int) -> tuple[Inputs, Inputs, Tensor]:
    """Inputs of the whole network and of its suffix, and the real tokens (B, T)."""
    inputs, mask = inputs_of(backbone)
    state = backbone.capture(inputs, [entering_layer(first)])[entering_layer(first)]
    real = torch.ones(state.shape[:2], dtype=torch.bool) if mask is None else mask
    return inputs, {ENTERING: (state * real[..., None]).clone(), MASK: real}, real


def test_every_restart_gives_the_whole_forward_bit_for_bit(whole: Backbone) -> None:
    for first in range(len(whole.blocks)):
        inputs, mine, real = entered(whole, first)
        with torch.no_grad():
            expected = whole.tokens(inputs)
            found = Suffix(copy.deepcopy(whole), first).tokens(mine)
        assert torch.equal(found[real], expected[real])


def partial(backbone: Backbone) -> Body:
    """Train the blocks. Without T5's position bias: all blocks share it, the absent ones too, and while it trains torch
    takes another attention kernel."""
    for block in backbone.blocks:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_("relative_attention_bias" not in name)
    return BackboneBody(backbone)


def built(name: str, backbone: Backbone) -> Body:
    torch.manual_seed(0)
    if name == "partial":
        return partial(backbone)
    method = find_method(name).configured({})
    assert isinstance(method, LiveMethod)
    if method.refusal(backbone.arch):
        pytest.skip("refused")
    try:
        return method.build(backbone)
    except SidebenchError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["lora", "bitfit", "vpt", "partial"])
def test_gradients_are_those_of_the_whole_forward_bit_for_bit(whole: Backbone, name: str) -> None:
    first = len(whole.blocks) - 1
    inputs, mine, real = entered(whole, first)
    there, here = (
        gradients(built(name, backbone), Batch(real, inputs=given))
        for backbone, given in (
            (LastBlocks(copy.deepcopy(whole), first), inputs),
            (Suffix(copy.deepcopy(whole), first), mine),
        )
    )
    inside = {n for n in there if f".{whole.block_paths[first]}." in n or "prompts" in n}
    assert inside
    assert inside <= set(here) <= set(there)
    for n, gradient in here.items():
        assert torch.equal(gradient, there[n]), n


def gradients(body: Body, batch: Batch) -> dict[str, Tensor]:
    out = body(batch)[batch.mask]
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    return {name: p.grad for name, p in body.named_parameters() if p.grad is not None}


def test_the_weights_before_the_first_block_are_gone(tiny_bert: Backbone) -> None:
    suffix = Suffix(copy.deepcopy(tiny_bert), 1)
    block = sum(p.numel() for p in tiny_bert.blocks[1].parameters())
    assert sum(p.numel() for p in suffix.module.parameters()) == block
    assert suffix.block_paths == ["encoder.layer.1"]
    assert suffix.blocks == [suffix.module.get_submodule("encoder.layer.1")]


def test_t5_takes_its_position_bias_along() -> None:
    suffix = Suffix(t5_encoder(), 2)
    held = [name for name, p in suffix.module.named_parameters() if "relative_attention_bias" in name and p.numel()]
    assert held == ["encoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight"]


def test_running_a_suffix_twice_changes_nothing(tiny_vit: Backbone) -> None:
    suffix = Suffix(copy.deepcopy(tiny_vit), 1)
    _, mine, _ = entered(tiny_vit, 1)
    with torch.no_grad():
        assert torch.equal(suffix.tokens(mine), suffix.tokens(mine))
    with pytest.raises(SidebenchError, match="without an entering activation"):
        suffix.module(**inputs_of(tiny_vit)[0])


class Around(nn.Module):
    """A connection from the stem around all blocks, which no cached activation holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.stages = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        self.norm = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        stem = self.stem(pixels)
        return self.norm(self.stages(stem) + stem)


def test_a_network_with_a_connection_around_its_blocks_is_refused() -> None:
    around = Backbone(Around(), ImagePreprocess(PlainImageProcessor(16), 16, None, input_name="pixels"))
    with pytest.raises(SidebenchError, match="cannot be restarted at block 1"):
        Suffix(around, 1)


@pytest.mark.parametrize("first", [-1, 2, 7])
def test_a_block_that_is_not_there_is_refused(tiny_vit: Backbone, first: int) -> None:
    with pytest.raises(SidebenchError, match="blocks 0 to 1"):
        Suffix(copy.deepcopy(tiny_vit), first)
