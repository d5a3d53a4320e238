"""LST's table predicted: networks of the published sizes, LST's side network, a document that is up to date."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5Config, T5ForConditionalGeneration

from sidebench.bench.fake_building import building
from sidebench.bench.plan import PlanRequest, plan

ROOT = Path(__file__).parent.parent
MIB = 2**20


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published", ROOT / "benchmarks" / "published.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["published"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


published = _script()
SIDE = dataclasses.replace(published.LADDER, reduction=2, keep="1,3")


@pytest.mark.parametrize("name", published.BUILDERS)
def test_as_much_is_trained_as_was_published(name: str) -> None:
    quoted = published.PUBLISHED["lst" if "lst" in name else name].trainable_percent
    with FakeTensorMode(), building():
        network = published.BUILDERS[name]()
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert 100 * trainable / published.T5_BASE_PARAMS == pytest.approx(quoted, abs=0.006)


@pytest.fixture
def tiny() -> nn.Module:
    """A T5 with real weights, all of them large enough to matter."""
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 4, "num_heads": 4, "vocab_size": 50}
    torch.manual_seed(0)
    network = T5ForConditionalGeneration(
        T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, attn_implementation="eager")
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return network


@pytest.fixture
def ladder(tiny: nn.Module) -> Any:
    torch.manual_seed(1)
    return published.LiveLadder(tiny, SIDE)


def _batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    ids = torch.randint(1, 50, (2, 7), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(1, 50, (2, 3), generator=generator)}


def test_gradients_reach_all_of_the_side_network_and_nothing_of_the_backbone(ladder: Any) -> None:
    ladder(**_batch()).backward()
    for name, parameter in ladder.named_parameters():
        belongs = name.startswith("side.")
        assert parameter.requires_grad == belongs, name
        assert (parameter.grad is not None) == belongs, name


def test_dropout_is_where_lsts_code_has_it(ladder: Any) -> None:
    """Of a block behind each softmax, each attention, the ReLU and the MLP; and behind each stack's norm."""
    dropped: list[Tensor] = []
    ladder.dropout.register_forward_hook(lambda _, __, out: dropped.append(out))
    assert ladder.train().dropout.training
    ladder(**_batch())
    assert len(dropped) == 2 * (2 + 2) + 1 + 2 * (4 + 2) + 1
    assert sum(out.ndim == 4 for out in dropped) == 2 * 1 + 2 * 2
    assert sum(out.shape[-1] == 20 for out in dropped) == 2 + 2


def test_from_stored_states_the_ladder_gives_the_live_loss_and_gradients(ladder: Any, tiny: nn.Module) -> None:
    cached = published.CachedLadder(tiny, SIDE)
    cached.load_state_dict(ladder.state_dict(), strict=False)
    batch, states = _batch(), _states(tiny)
    live = ladder(**batch)
    again = cached(attention_mask=batch["attention_mask"], labels=batch["labels"], **states)
    torch.testing.assert_close(again, live)
    live.backward()
    again.backward()
    theirs = dict(ladder.named_parameters())
    for name, parameter in cached.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name)


def _states(network: nn.Module) -> dict[str, Tensor]:
    """Embeddings and the kept blocks' raw outputs, of both stacks, written down by hooks of this test."""
    states: dict[str, Tensor] = {}
    handles = []
    for prefix, stack in (("", network.encoder), ("decoder.", network.decoder)):
        handles.append(
            stack.block[0].register_forward_pre_hook(
                lambda _, given, key=f"{prefix}embeddings": states.update({key: given[0]})
            )
        )
        for index in (1, 3):
            handles.append(
                stack.block[index].register_forward_hook(
                    lambda _, given, found, key=f"{prefix}blocks.{index}": states.update({key: found[0]})
                )
            )
    with torch.no_grad():
        network(**_batch())
    for handle in handles:
        handle.remove()
    return states


# --- the figures of docs/memory.md -----------------------------------------------------------------------------------


def rows_below(command: str, nth: int = 0) -> dict[str, list[str]]:
    """The `nth` table below a command in docs/memory.md: the cells behind each row's first."""
    text = (ROOT / "docs" / "memory.md").read_text("utf-8")
    assert command in text, f"docs/memory.md does not state the command {command}"
    tables = re.findall(r"(?:^\|.*\n)+", text.split(command, 1)[1], flags=re.M)
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in tables[nth].splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.long
@pytest.mark.parametrize("as_released", [False, True])
def test_the_document_states_what_is_predicted_for_lsts_table(as_released: bool) -> None:
    written = rows_below("python benchmarks/published.py", int(as_released))
    names = [name for name in published.BUILDERS if not as_released or published.PUBLISHED[name].paper_gb is not None]
    found = {name: published.predict(name, as_released=as_released) for name in names}
    header, *lines = published.table(found)
    assert list(written) == [line[0] for line in lines]
    for line in lines:
        assert written[line[0]] == [cell for name, cell in zip(header, line, strict=True) if name != "method"]
    if not as_released:
        whole = found["full"].peak.peak_bytes
        assert found["lora"].peak.peak_bytes / whole == pytest.approx(0.704, abs=0.02)
        assert found["lst"].peak.peak_bytes / whole == pytest.approx(0.278, abs=0.02)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_document_states_what_is_planned_for_vit_base(precision: str, tmp_path: Path) -> None:
    command = f"bench plan --backbone hf-config:vit-base --methods all --batch-size 64 --precision {precision} --json"
    request = PlanRequest("hf-config:vit-base", ("all",), batch_size=64, precision=precision)
    document = plan(request, home=tmp_path, cache_dir=tmp_path, say=lambda _: None)
    figures = ("predicted_peak_bytes", "predicted_allocated_bytes", "predicted_reserved_bytes")
    written = rows_below(command)
    planned = {
        row["method"]: [
            row["kind"],
            f"{row['trainable_params']:,}",
            *(f"{row[key] / MIB:,.0f}" for key in figures),
            *(
                [""] * 6
                if row["by_category"] is None
                else (f"{size / MIB:,.0f}" for size in row["by_category"].values())
            ),
        ]
        for row in document["methods"]
    }
    assert written == planned
