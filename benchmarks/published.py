"""Predicted training memory of T5-base on GLUE beside published figures for it.

The setting is that of Sung, Cho, Bansal: LST, Ladder Side-Tuning (NeurIPS 2022, arXiv 2206.06522), and of its released
scripts: batch 100, 128 source and 5 target tokens, float32, dropout 0.1, eager attention. AdamW is foreach, the
semantics are CUDA's, the step is the second. Nothing is downloaded: networks are made on fake tensors.

The published figures are second-hand: those that MP-ISMoE (arXiv 2605.04058) prints for these methods.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm

from sidebench.bench.allocator import AllocatorPeaks
from sidebench.bench.fake_building import building
from sidebench.bench.predict import predict_steps
from sidebench.bench.tracker import TrackedPeak

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
REDUCTION = 8  # of LST
DROPPED = (0, 4, 8)  # blocks without a side block, in the encoder and in the decoder
GATE_TEMPERATURE = 0.1

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


class SideStack(nn.Module):
    """LST's side network beside an encoder or a decoder, every width divided by r; it climbs one backbone block a call.

    s_0 = W_e embeddings;  s_i = Block_i(mu_i s_(i-1) + (1 - mu_i) W_i b_i) at the kept blocks, s_i = s_(i-1) elsewhere.
    """

    def __init__(self, config: T5Config, reduction: int, dropped: Sequence[int]) -> None:
        super().__init__()
        width = config.d_model // reduction
        slim = {"d_model": width, "d_kv": config.d_kv // reduction, "d_ff": config.d_ff // reduction}
        side = type(config)(**{**config.to_dict(), **slim}, attn_implementation="eager")
        side.is_decoder = config.is_decoder
        kept = [index for index in range(config.num_layers) if index not in dropped]
        self.first = nn.Linear(config.d_model, width)
        self.down = nn.ModuleDict({str(i): nn.Linear(config.d_model, width) for i in kept})
        self.alpha = nn.Parameter(torch.zeros(config.num_layers))  # a dropped block's gate is there and unused
        # The first kept block owns the table of relative positions.
        self.blocks = nn.ModuleDict({str(i): T5Block(side, i == kept[0], layer_idx=i) for i in kept})
        self.norm = T5LayerNorm(width, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def begin(self, embeddings: Tensor) -> None:
        """Take the backbone's embeddings (B, T, D)."""
        self.side = self.first(embeddings)  # (B, T, S)
        self.positions: tuple[Tensor | None, Tensor | None] = (None, None)

    def climb(self, index: int, state: Tensor, mask: Tensor, memory: Tensor | None, memory_mask: Any) -> None:
        """Take the output (B, T, D) of backbone block `index`; `memory` is the encoder's side output (B, T, S)."""
        if str(index) not in self.blocks:
            return
        gate = torch.sigmoid(self.alpha[index] / GATE_TEMPERATURE)
        mixed = gate * self.side + (1 - gate) * self.down[str(index)](state)
        own, across = self.positions
        self.side, *positions = self.blocks[str(index)](mixed, mask, own, memory, memory_mask, across)
        self.positions = (positions[0], positions[1])

    def end(self) -> Tensor:
        """The output (B, T, S); the stack keeps nothing of the climb."""
        found = self.dropout(self.norm(self.side))
        del self.side, self.positions
        return found


class Ladder(nn.Module):
    """Both side stacks, the projection up and the frozen head, which T5 scales by the full width."""

    def __init__(self, network: nn.Module, reduction: int = REDUCTION, dropped: Sequence[int] = DROPPED) -> None:
        super().__init__()
        self.width = network.config.d_model
        self.encoder_side = SideStack(network.encoder.config, reduction, dropped)
        self.decoder_side = SideStack(network.decoder.config, reduction, dropped)
        self.up = nn.Linear(self.width // reduction, self.width)
        self.lm_head = network.lm_head

    def logits(self, side: Tensor) -> Tensor:
        """(B, T, S) -> (B, T, vocabulary)."""
        return self.lm_head(self.up(side) * self.width**-0.5)


class LiveLadder(Ladder):
    """LST as its own script measures it: the frozen backbone runs beside it, without a graph."""

    def __init__(self, network: nn.Module, reduction: int = REDUCTION, dropped: Sequence[int] = DROPPED) -> None:
        super().__init__(network.requires_grad_(False), reduction, dropped)
        self.network = network
        self.memory: Tensor | None = None
        for stack, side in ((network.encoder, self.encoder_side), (network.decoder, self.decoder_side)):
            for index, block in enumerate(stack.block):
                block.register_forward_hook(self._climb(side, index))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The loss."""
        with torch.no_grad():
            memory = self.network.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            with torch.enable_grad():
                self.memory = self.encoder_side.end()
            self.network.decoder(
                input_ids=self.network._shift_right(labels),
                encoder_hidden_states=memory,
                encoder_attention_mask=attention_mask,
                use_cache=False,
            )
        self.memory = None
        return _loss(self.logits(self.decoder_side.end()), labels)

    def _climb(self, side: SideStack, index: int) -> Callable[..., None]:
        def hook(block: nn.Module, given: tuple[Any, ...], found: tuple[Tensor, ...]) -> None:
            with torch.enable_grad():
                if index == 0:
                    side.begin(given[0])
                side.climb(index, found[0], given[1], self.memory, given[4])

        return hook


class CachedLadder(Ladder):
    """Ours: the same side network from stored activations; of the backbone only the frozen head is there."""

    def __init__(self, network: nn.Module, reduction: int = REDUCTION, dropped: Sequence[int] = DROPPED) -> None:
        super().__init__(network, reduction, dropped)
        self.lm_head.requires_grad_(False)

    def forward(self, attention_mask: Tensor, labels: Tensor, **states: Tensor) -> Tensor:
        """The loss; `states` are enc_0, enc_1, …: embeddings, then each kept block's output."""
        mask = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        causal = torch.full((labels.shape[1], labels.shape[1]), torch.finfo(torch.float32).min).triu(1)[None, None]
        memory = self._run(self.encoder_side, states, "enc", mask, None, None)
        return _loss(self.logits(self._run(self.decoder_side, states, "dec", causal, memory, mask)), labels)

    def _run(
        self, side: SideStack, states: Mapping[str, Tensor], name: str, mask: Tensor, memory: Any, memory_mask: Any
    ) -> Tensor:
        side.begin(states[f"{name}_0"].float())
        for place, index in enumerate(side.blocks, 1):
            side.climb(int(index), states[f"{name}_{place}"].float(), mask, memory, memory_mask)
        return side.end()


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


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def batch_of(network: nn.Module) -> Batch:
    """A batch without padding: token ids and labels, or stored states."""
    batch = {
        "attention_mask": torch.ones(BATCH, SOURCE, dtype=torch.long),
        "labels": torch.zeros(BATCH, TARGET, dtype=torch.long),
    }
    if not isinstance(network, CachedLadder):
        return {"input_ids": torch.zeros(BATCH, SOURCE, dtype=torch.long), **batch}
    for name, tokens, side in (("enc", SOURCE, network.encoder_side), ("dec", TARGET, network.decoder_side)):
        for place in range(len(side.blocks) + 1):
            batch[f"{name}_{place}"] = torch.zeros(BATCH, tokens, network.width, dtype=torch.float16)
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
                ladder = isinstance(network, Ladder)
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
        if "decoder" in name and name.endswith((".k", ".v"))
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
