"""Predicted training memory of T5-base on GLUE beside published figures for it.

The setting is that of Sung, Cho, Bansal: LST, Ladder Side-Tuning (NeurIPS 2022, arXiv 2206.06522), and of its released
scripts: batch 100, 128 source and 5 target tokens, float32, dropout 0.1, eager attention. AdamW is foreach, the
semantics are CUDA's, the step is the second. Nothing is downloaded: networks are made on fake tensors.

The published figures are second-hand: those that MP-ISMoE (arXiv 2605.04058) prints for these methods.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.models.t5.modeling_t5 import T5LayerNorm

from sidebench.adapters._base import Batch as StateBatch
from sidebench.adapters._lst_two_stacks import Attention, SideStack, SlimBlock
from sidebench.adapters.lst import LST, Config
from sidebench.bench.allocator import AllocatorPeaks
from sidebench.bench.fake_building import building
from sidebench.bench.predict import predict_steps
from sidebench.bench.tracker import TrackedPeak
from sidebench.cache.backbone import Backbone
from sidebench.cache.block_weights import BackboneWeights
from sidebench.cache.configs import TextShapes
from sidebench.cache.load import family_facts
from sidebench.cache.preprocess import FirstStep

MIB = 2**20
PAPER_GB = 2**20 * 1000  # what LST, UniPT and SHERL print as "GB": bytes / 1024^2 / 1000
BATCH, SOURCE, TARGET = 100, 128, 5
T5_BASE = {
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_layers": 12,
    "num_heads": 12,
    "dropout_rate": 0.1,
    "decoder_start_token_id": 0,
}
T5_BASE_PARAMS = 222_903_552
BOTTLENECK = 48  # of the adapters: 768 / 16
LORA_RANK = 32
LORA_DROPOUT = 0.1  # on the input of each pair; LST's repository states it for CLIP-ViL, its T5 value was not found
LADDER = Config(reduction=8, keep="1,2,3,5,6,7,9,10,11", init="random", lean=False)

Batch = dict[str, Tensor]
Loss = Callable[[slice], Tensor]


@dataclass(frozen=True)
class Published:
    """A row of the table as it is quoted; None where there is none."""

    trainable_percent: float | None
    paper_gb: float | None


@dataclass(frozen=True)
class Found:
    """A prediction; `allocator` is None where only the sum of tensors was asked for."""

    trainable_params: int
    peak: TrackedPeak
    allocator: AllocatorPeaks | None


PUBLISHED = {
    "full": Published(100.0, 17.6),
    "adapters": Published(1.63, 13.0),
    "lora": Published(1.71, 12.6),
    "bitfit": Published(0.13, 10.7),
    "lst": Published(1.74, 5.5),
    "lst cached (ours)": Published(None, None),
}


def t5_base() -> nn.Module:
    """T5-base with a language-model head, tied as in the first release of T5."""
    return T5ForConditionalGeneration(T5Config(**T5_BASE, attn_implementation="eager"))


def full() -> nn.Module:
    """Every weight is trained."""
    return t5_base()


def adapters() -> nn.Module:
    """A bottleneck behind each self-attention and each MLP; layer norms are trained as well."""
    network = t5_base().requires_grad_(False)
    for name, module in list(network.named_modules()):
        if name.endswith(("SelfAttention.o", "DenseReluDense")):
            module.adapter = Bottleneck(T5_BASE["d_model"], BOTTLENECK)
            module.register_forward_hook(lambda m, _, out: m.adapter(out))
        elif isinstance(module, T5LayerNorm):
            module.requires_grad_(True)
    return network


class Bottleneck(nn.Module):
    """Houlsby's adapter."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.activation = ACT2FN["gelu_new"]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return x + self.up(self.activation(self.down(x)))


def lora() -> nn.Module:
    """Rank 32 on queries and values, and the biases."""
    network = _with_biases(t5_base())
    config = LoraConfig(r=LORA_RANK, lora_alpha=32, lora_dropout=LORA_DROPOUT, target_modules=["q", "v"])
    network = get_peft_model(network, config)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora" in name or "bias" in name)  # so the relative position table, too, as released
    return network


def bitfit() -> nn.Module:
    """The biases alone."""
    network = _with_biases(t5_base())
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.endswith(".bias"))
    return network


def _with_biases(network: nn.Module) -> nn.Module:
    """T5 has no biases: LST's code gives one to every linear layer, layer norm and the head where they are trained."""
    for module in list(network.modules()):
        if isinstance(module, nn.Linear):
            module.bias = nn.Parameter(torch.zeros(module.out_features))
        elif isinstance(module, T5LayerNorm):
            module.bias = nn.Parameter(torch.zeros(len(module.weight)))
            module.register_forward_hook(lambda m, _, out: out + m.bias)
    return network


class CachedLadder(nn.Module):
    """Ours: LST's side network from stored states, with the frozen head, which T5 scales by the full width."""

    def __init__(self, network: nn.Module, config: Config = LADDER) -> None:
        super().__init__()
        arch, method = backbone_of(network).arch, LST(config)
        self.layers = method.layers(arch)
        self.side = method.build(arch, dict.fromkeys(self.layers, arch.width), read_none)
        self.dropout = nn.Dropout(network.config.dropout_rate)
        for part in self.side.modules():
            self._drop_as_t5(part)
        self.lm_head = network.lm_head

    def forward(self, attention_mask: Tensor, labels: Tensor, **states: Tensor) -> Tensor:
        """The loss; `states` by layer: of each stack the embeddings, then each kept block's output."""
        masks = {layer: attention_mask.bool() for layer in self.layers if not layer.startswith("decoder.")}
        side = self.side(StateBatch(torch.ones_like(labels, dtype=torch.bool), states, masks=masks))
        logits = self.lm_head(side * self.side.width**-0.5)
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    def _drop_as_t5(self, part: nn.Module) -> None:
        """Dropout where LST's code has it; the product leaves it out."""
        if isinstance(part, SlimBlock):
            part.fc2.register_forward_pre_hook(lambda _, given: self.dropout(given[0]))
        behind = {SideStack: ("norm",), Attention: ("softmax", "out"), SlimBlock: ("fc2",)}
        for name in behind.get(type(part), ()):
            part.get_submodule(name).register_forward_hook(lambda _, __, out: self.dropout(out))


class LiveLadder(CachedLadder):
    """LST as its own script measures it: the frozen backbone runs beside it, without a graph."""

    def __init__(self, network: nn.Module, config: Config = LADDER) -> None:
        super().__init__(network, config)
        self.network = network
        self.backbone = backbone_of(network)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The loss."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        states: dict[str, Tensor] = {}
        with torch.no_grad():
            started = {**inputs, "decoder_input_ids": self.network._shift_right(labels)}
            self.backbone.run(started, self.layers, states.__setitem__)
        return super().forward(attention_mask, labels, **states)


def backbone_of(network: nn.Module) -> Backbone:
    """The network, frozen, with named layers of both stacks."""
    first_step = FirstStep(TextShapes(SOURCE), network.config.decoder_start_token_id)
    return Backbone(network, first_step, forward_options={"use_cache": False}, **family_facts(network.config, "both"))


def read_none() -> BackboneWeights:
    """The side network's start does not matter here."""
    raise AssertionError("it starts at random")


def lst() -> nn.Module:
    """The ladder beside the live backbone."""
    return LiveLadder(t5_base())


def lst_cached() -> nn.Module:
    """The ladder alone."""
    return CachedLadder(t5_base())


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "full": full,
    "adapters": adapters,
    "lora": lora,
    "bitfit": bitfit,
    "lst": lst,
    "lst cached (ours)": lst_cached,
}


def batch_of(network: nn.Module) -> Batch:
    """A batch without padding: token ids and labels, or stored states."""
    batch = {
        "attention_mask": torch.ones(BATCH, SOURCE, dtype=torch.long),
        "labels": torch.zeros(BATCH, TARGET, dtype=torch.long),
    }
    if type(network) is not CachedLadder:
        return {"input_ids": torch.zeros(BATCH, SOURCE, dtype=torch.long), **batch}
    for layer in network.layers:
        tokens = TARGET if layer.startswith("decoder.") else SOURCE
        batch[layer] = torch.zeros(BATCH, tokens, T5_BASE["d_model"], dtype=torch.float16)
    return batch


def predict(name: str, *, as_released: bool = False) -> Found:
    """The second step of a row; `as_released` keeps what LST's released script and its libraries kept (`_held`)."""
    with FakeTensorMode():
        with building():
            network = BUILDERS[name]().train()
        batch = batch_of(network)
        trained = [p for p in network.parameters() if p.requires_grad]
        optimizer = (KeepsGradients if as_released else torch.optim.AdamW)(trained)
        with _held(network if as_released else nn.Module()) as held:

            def loss(rows: slice) -> Tensor:
                part = {key: value[rows] for key, value in batch.items()}
                ladder = isinstance(network, CachedLadder)
                found = network(**part) if ladder else network(**part, use_cache=False).loss
                held.clear()
                return found

            peak, allocator, _ = predict_steps(network, optimizer, list(batch.values()), loss)
    return Found(sum(p.numel() for p in trained), peak, None if as_released else allocator)


class KeepsGradients(torch.optim.AdamW):
    """`zero_grad` as it was before PyTorch 2: gradients become zero and stay."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Keep them, whatever is asked."""
        super().zero_grad(set_to_none=False)


@contextmanager
def _held(network: nn.Module) -> Iterator[list[Tensor]]:
    """Every key and value of a decoder lives until the loss is there (T5's use_cache, on unless switched off).

    They are the outputs of the linear layers; what autograd saves of them are copies, which batched products make.
    """
    held: list[Tensor] = []

    def keep(module: nn.Module, given: Any, found: Tensor) -> None:
        held.append(found)

    handles = [
        module.register_forward_hook(keep)
        for name, module in network.named_modules()
        if "decoder" in name and name.endswith((".k", ".v", ".key", ".value"))
    ]
    yield held
    for handle in handles:
        handle.remove()


def table(found: Mapping[str, Found]) -> list[list[str]]:
    """Rows of text: predicted beside published, and the ratios to full fine-tuning of both."""
    head = ["method", "trainable %", "published %", "bytes", "MiB", "allocated MiB", '"GB"', 'published "GB"']
    rows = [[*head, "/ full", "published / full"]]
    whole, whole_published = found["full"].peak.peak_bytes, PUBLISHED["full"].paper_gb
    assert whole_published is not None
    for name, one in found.items():
        size, published = one.peak.peak_bytes, PUBLISHED[name]
        gb = published.paper_gb
        rows.append(
            [
                name,
                f"{100 * one.trainable_params / T5_BASE_PARAMS:.2f}",
                "" if published.trainable_percent is None else f"{published.trainable_percent:g}",
                f"{size}",
                f"{size / MIB:.0f}",
                "" if one.allocator is None else f"{one.allocator.allocated_bytes / MIB:.0f}",
                f"{size / PAPER_GB:.2f}",
                "" if gb is None else f"{gb:.1f}",
                f"{size / whole:.3f}",
                "" if gb is None else f"{gb / whole_published:.3f}",
            ]
        )
    return rows


def show(title: str, found: Mapping[str, Found]) -> None:
    """Print the table and what was alive at each peak."""
    rows = table(found)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(f"\n{title}")
    for name, *cells in rows:
        aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([f"  {name:<{widths[0]}}", *aligned]))
    for name, one in found.items():
        parts = ", ".join(f"{part} {size / MIB:.0f}" for part, size in one.peak.by_category.items())
        print(f"  {name}: MiB of {parts}; {one.peak.at}", flush=True)


def main() -> None:
    """Predict every row twice."""
    show("predicted, requested bytes of the second step", {name: predict(name) for name in BUILDERS})
    live = [name for name in BUILDERS if PUBLISHED[name].paper_gb is not None]
    show(
        "the same, had gradients been zeroed and not freed, and the decoder's keys and values kept until the loss",
        {name: predict(name, as_released=True) for name in live},
    )


if __name__ == "__main__":
    main()
