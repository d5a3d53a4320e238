"""What is known of a pretrained network: its shapes, and where its layers are, under one set of names.

Names are the same for every family: `embeddings` (what enters the first block), `blocks.0` … `blocks.L-1`, `norm` (the
final normalisation, where the family has one over all tokens). Any other dotted module path works too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from .examples import Modality

Norm = Literal["pre", "post"]

# Where the final normalisation over ALL tokens lives. CLIP's vision tower is left out on purpose: its post_layernorm
# sees the class token alone, so the last block is the last layer there.
_FINAL_NORMS = ("layernorm", "norm", "final_layer_norm", "final_layernorm", "ln_f", "encoder.final_layer_norm")
_STACK_NORMS = ("final_layer_norm", "layer_norm", "norm")  # inside the encoder or the decoder of an encoder-decoder
BEFORE_LAST = "before_last"
"""The layer that enters the last bottleneck of a convolutional network made of them."""

POSITIONS = "positions"
"""The layer of what DETR's blocks add to their keys."""


@dataclass(frozen=True)
class Architecture:
    """What a method may know of a backbone without holding it; stored in every manifest."""

    name: str
    modality: Modality
    blocks: int
    width: int
    prefix_tokens: int  # leading tokens that are no patches: class token, registers
    final_layer: str  # the layer whose tokens the backbone would hand to a head
    heads: int | None = None
    mlp_width: int | None = None
    norm: Norm | None = None  # where a block normalises; None: not a block this code can copy
    activation: str | None = None
    norm_eps: float = 1e-6
    layer_scale: bool = False
    causal: bool = False  # a token attends to those before it only, so the last real token sums a text up
    decoder_blocks: int = 0  # of an encoder-decoder, whose `blocks` are the encoder's
    t5_blocks: bool = False  # of an encoder-decoder: the blocks of both stacks are those of the first T5
    stages: tuple[tuple[int, int], ...] = ()  # (H, W) of each map `stages.0` … of a convolutional network
    bottlenecks: bool = False  # its stages are residual bottlenecks, and `before_last` is what enters the last of them
    biasless: bool = False  # the final tokens depend on no parameter called bias
    projected_from: int | None = None  # D of the blocks, where the final layer is one projected embedding (CLIP's)

    @property
    def state_width(self) -> int:
        """D of the hidden states."""
        return self.projected_from or self.width

    @property
    def detr_blocks(self) -> bool:
        """Whether the blocks of both stacks are DETR's: they normalise behind the sum and attend both ways."""
        return self.decoder_blocks > 0 and self.norm == "post" and not self.causal

    @property
    def states(self) -> tuple[str, ...]:
        """The L = blocks + 1 hidden states of the papers: what enters block 0, then each block's output.

        Of a convolutional network its stage maps, of an encoder-decoder those of the encoder.
        """
        return tuple(self.grids) or ("embeddings", *(f"blocks.{i}" for i in range(self.blocks)))

    @property
    def decoder_states(self) -> tuple[str, ...]:
        """The same of the decoder, where there is one."""
        inside = ("embeddings", *(f"blocks.{i}" for i in range(self.decoder_blocks)))
        return tuple(f"decoder.{state}" for state in inside) if self.decoder_blocks else ()

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        """(H, W) by layer: the T = H W tokens of a stage map, row by row. Empty where tokens lie in no grid."""
        return {f"stages.{i}": grid for i, grid in enumerate(self.stages)}


def find_taps(module: nn.Module, stacks: Sequence[str]) -> dict[str, tuple[str, str]]:
    """By name of every layer in forward order: the module's path, and which of its sides is the layer."""
    if not blocks_in(module, stacks[0]):
        return {}
    if len(stacks) == 1:
        return _stack_taps(module, stacks[0], _FINAL_NORMS)
    encoder, decoder = (_stack_taps(module, stack, _STACK_NORMS) for stack in stacks)
    if "norm" in encoder:
        encoder["encoder_norm"] = encoder.pop("norm")
    last = {"norm": decoder.pop("norm")} if "norm" in decoder else {}
    return {**encoder, **{f"decoder.{name}": tap for name, tap in decoder.items()}, **last}


def _stack_taps(module: nn.Module, stack: str, norms: Sequence[str]) -> dict[str, tuple[str, str]]:
    blocks = blocks_in(module, stack)
    assert blocks is not None
    taps = {"embeddings": (f"{blocks}.0", "input")}
    for name, _ in module.get_submodule(blocks).named_children():
        taps[f"blocks.{name}"] = (f"{blocks}.{name}", "output")
    names = dict(module.named_modules())
    paths = (f"{stack}.{norm}" if stack else norm for norm in norms)
    if found := next((path for path in paths if path in names), None):
        taps["norm"] = (found, "output")
    return taps


def blocks_in(module: nn.Module, stack: str) -> str | None:
    """Path of the blocks of a part of the network ("": of all of it)."""
    found = find_blocks(module.get_submodule(stack))
    return f"{stack}.{found}" if stack and found else found


def find_blocks(module: nn.Module) -> str | None:
    """Path of the longest list of children of one class: the transformer's (or the stages') blocks."""
    best: tuple[int, str] | None = None
    for path, child in module.named_modules():
        if not path or not isinstance(child, nn.ModuleList | nn.Sequential):
            continue
        if len({type(c) for c in child}) == 1 and (best is None or len(child) > best[0]):
            best = (len(child), path)
    return best[1] if best else None


def stage_taps(module: nn.Module, stages: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The same of a convolutional network, whose `stages` are paths of modules: their maps, and BEFORE_LAST."""
    taps = {f"stages.{i}": (path, "output") for i, path in enumerate(stages)}
    parts = [module.get_submodule(path) for path in stages]
    blocks = [list(part) for part in parts if isinstance(part, nn.Sequential)]
    inside = [name for part in parts[-1:] for name, _ in part.named_children()]
    whole = len(blocks) == len(parts) and all(_is_bottleneck(block) for part in blocks for block in part)
    if whole and len(inside) > 1:
        last = taps.popitem()
        taps |= {BEFORE_LAST: (f"{stages[-1]}.{inside[-2]}", "output"), last[0]: last[1]}
    return taps


def _is_bottleneck(block: nn.Module) -> bool:
    """As torchvision, CLIP and timm name its convolutions: 1 x 1, then larger, then 1 x 1."""
    convs = [getattr(block, f"conv{number}", None) for number in (1, 2, 3)]
    sizes = [conv.kernel_size for conv in convs if isinstance(conv, nn.Conv2d)]
    return len(sizes) == 3 and sizes[0] == sizes[2] == (1, 1) != sizes[1]


def is_bias(name: str) -> bool:
    """Whether a parameter of this dotted name is a bias."""
    return name.rsplit(".", 1)[-1] == "bias"


def has_bias(module: nn.Module) -> bool:
    """Whether a parameter inside is a bias."""
    return any(is_bias(name) for name, _ in module.named_parameters())


def mlp_width(blocks: list[nn.Module]) -> int | None:
    """The widest output of a matrix in a block: the MLP's first."""
    widths = [m.out_features for m in blocks[0].modules() if isinstance(m, nn.Linear)] if blocks else []
    return max(widths, default=None)


def norm_eps(blocks: list[nn.Module]) -> float:
    """Of the first LayerNorm in a block."""
    return next((m.eps for b in blocks for m in b.modules() if isinstance(m, nn.LayerNorm)), 1e-6)
