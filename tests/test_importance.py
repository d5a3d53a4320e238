"""The squared gradients that an initialisation prunes by: what is summed, over what, and what a record says of it."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outcomes import spawning, write_texts
from torch import Tensor, nn
from toys import ToyExamples

from sidebench.adapters.linear_probe import Config, LinearProbe
from sidebench.adapters.lst import LST
from sidebench.adapters.lst import Config as LstConfig
from sidebench.bench import assemble, launch, worker
from sidebench.bench.compare import compare
from sidebench.bench.importance import L2, Measured, predicted_peak, squared_gradients
from sidebench.bench.learner import LiveSource
from sidebench.bench.outcome import Outcome, Request
from sidebench.bench.prepare import Inputs
from sidebench.bench.step import Step
from sidebench.bench.tasks.base import Pooling
from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone
from sidebench.cache.block_weights import BackboneWeights, read_weights
from sidebench.cache.store import Index

ORDER = np.array([5, 0, 17, 3, 30, 11])


def measured(
    backbone: Backbone, examples: ToyExamples, pooling: Pooling, targets: Tensor, order: Index = ORDER
) -> Measured:
    used_up = copy.deepcopy(backbone)
    source = LiveSource(used_up, examples)
    return squared_gradients(used_up, source, targets, order, 2, pooling)


def pooled(backbone: Backbone, raw: Any, pooling: Pooling) -> Tensor:
    inputs, _ = backbone.preprocess.collate(backbone.preprocess.prepare([raw]))
    tokens = backbone.tokens(inputs)[0]
    return tokens[0] if pooling == "cls" else tokens[backbone.arch.prefix_tokens :].mean(0)


def naive(backbone: Backbone, examples: ToyExamples, pooling: Pooling, targets: Tensor) -> dict[str, Tensor]:
    """By parameter, the sum over examples of the squared gradient, each from a backward of its own."""
    module = copy.deepcopy(backbone)
    with torch.no_grad():
        features = torch.stack([pooled(module, examples.raw[i], pooling) for i in ORDER])
    labelled = (features, targets[ORDER])
    probe, _ = LinearProbe(Config(smallest_l2=L2, largest_l2=L2, candidates=1)).fit(labelled, labelled, 2)
    module.module.requires_grad_(True)
    sums = {name: torch.zeros_like(p) for name, p in module.module.named_parameters()}
    for i in ORDER:
        module.module.zero_grad()
        logits = probe(pooled(module, examples.raw[i], pooling)[None])[0]
        (-torch.log_softmax(logits, 0)[targets[i]]).backward()
        for name, parameter in module.module.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad**2
    return sums


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("family", ["bert", "t5", "dinov2"])
def test_squared_gradients_of_one_example_after_the_other_are_summed(
    family: str, pooling: Pooling, request: pytest.FixtureRequest
) -> None:
    backbone: Backbone = request.getfixturevalue(f"tiny_{family}")
    examples: ToyExamples = request.getfixturevalue("image_examples" if family == "dinov2" else "text_examples")
    targets = torch.from_numpy(examples.targets)
    found = measured(backbone, examples, pooling, targets)
    expected = naive(backbone, examples, pooling, targets)
    assert found.weights.importance is not None
    with torch.no_grad():
        carrier = copy.deepcopy(backbone)
        for name, parameter in carrier.module.named_parameters():
            parameter.copy_(expected[name])
    pairs = list(zip(matrices(found.weights.importance), matrices(read_weights(carrier)), strict=True))
    for mine, theirs in pairs:
        assert bool((mine >= 0).all())
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.max()))
    zero = sum(float(theirs.max()) == 0 for _, theirs in pairs)
    assert zero == 2 * backbone.arch.decoder_blocks  # query and key of a lone token, which attends to itself alone
    for mine, theirs in zip(matrices(found.weights), matrices(read_weights(backbone)), strict=True):
        assert torch.equal(mine, theirs)


def matrices(weights: BackboneWeights) -> list[Tensor]:
    blocks = [getattr(b, name)[0] for b in weights.blocks for name in ("query", "key", "value", "out", "fc1", "fc2")]
    return [weights.embedding, *blocks]


def test_the_labels_matter(tiny_bert: Backbone, text_examples: ToyExamples) -> None:
    targets = torch.from_numpy(text_examples.targets)
    other = targets.clone()
    other[ORDER[0]] = 1 - other[ORDER[0]]
    one, two = (measured(tiny_bert, text_examples, "mean", t).weights.importance for t in (targets, other))
    assert one is not None
    assert two is not None
    assert not torch.allclose(one.blocks[0].fc1[0], two.blocks[0].fc1[0], rtol=0.05)


def test_dropout_is_off_in_whatever_mode_the_backbone_comes(tiny_bert: Backbone, text_examples: ToyExamples) -> None:
    assert tiny_bert.config_facts or any(isinstance(m, nn.Dropout) and m.p > 0 for m in tiny_bert.module.modules())
    targets = torch.from_numpy(text_examples.targets)
    training = copy.deepcopy(tiny_bert)
    training.module.train()
    one, two = (measured(b, text_examples, "mean", targets).weights.importance for b in (tiny_bert, training))
    assert one is not None
    assert two is not None
    assert all(torch.equal(a, b) for a, b in zip(matrices(one), matrices(two), strict=True))


def test_what_it_took_is_that_of_a_backward_through_the_whole_backbone(
    tiny_bert: Backbone, text_examples: ToyExamples
) -> None:
    targets = torch.from_numpy(text_examples.targets)
    found = measured(tiny_bert, text_examples, "mean", targets)
    weights = sum(p.numel() * p.element_size() for p in tiny_bert.module.parameters())
    assert found.facts() == {
        "examples": len(ORDER),
        "seconds": found.seconds,
        "peak_tracked_bytes": found.peak_tracked_bytes,
    }
    assert 2 * weights < found.peak_tracked_bytes < 3 * weights  # weights and sums; and a short text, not the gradients
    assert found.seconds > 0
    lengths = [len(text_examples.raw[i].split()) for i in ORDER]
    longest, shortest = ORDER[[np.argmax(lengths)]], ORDER[[np.argmin(lengths)]]
    peaks = [
        measured(tiny_bert, text_examples, "mean", targets, order).peak_tracked_bytes for order in (longest, shortest)
    ]
    assert peaks[0] == found.peak_tracked_bytes > peaks[1]


@pytest.mark.parametrize("family", ["bert", "t5", "dinov2"])
def test_the_peak_is_predicted(family: str, request: pytest.FixtureRequest) -> None:
    """To the byte, but for a mask that hides nothing: a backbone may do without it, and a prediction cannot know."""
    backbone: Backbone = request.getfixturevalue(f"tiny_{family}")
    examples: ToyExamples = request.getfixturevalue("image_examples" if family == "dinov2" else "text_examples")
    before = {name: p.clone() for name, p in backbone.module.named_parameters()}
    peak = measured(backbone, examples, "mean", torch.from_numpy(examples.targets)).peak_tracked_bytes
    prepared = backbone.preprocess.prepare([examples.raw[i] for i in ORDER])
    longest = None if family == "dinov2" else max(len(ids) for ids in prepared)
    predicted = predicted_peak(backbone, Step(32, 2, semantics="cpu", max_length=longest))
    assert peak <= predicted <= 1.02 * peak
    assert family != "dinov2" or predicted == peak
    assert all(torch.equal(p, before[name]) for name, p in backbone.module.named_parameters())


# --- in a comparison -------------------------------------------------------------------------------------------------


def test_a_run_prunes_by_the_gradients_of_its_training_examples_and_records_what_that_took(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[BackboneWeights] = []
    events: list[dict[str, Any]] = []
    original = assemble.Initial.__call__
    monkeypatch.setattr(assemble.Initial, "__call__", lambda *words: seen.append(original(*words)) or seen[-1])
    monkeypatch.setattr(worker, "emit", lambda event, **values: events.append({"event": event, **values}))
    fisher = compared(models, tmp_path, monkeypatch, init="fisher", fisher_examples="7")
    magnitude = compared(models, tmp_path, monkeypatch, init="magnitude")
    assert [weights.importance is None for weights in seen] == [False, True]
    (found,), (plain,) = fisher.runs[0].records, magnitude.runs[0].records
    assert found.measured is not None
    assert plain.measured is not None
    took = found.measured["initialisation"]
    assert took["examples"] == 7
    assert took["peak_tracked_bytes"] > found.measured["memory_by_category"]["parameters"]
    assert [e for e in events if e["event"] == "initialisation"] == [{"event": "initialisation", **took}]
    assert "initialisation" not in plain.measured
    assert found.measured["losses"] != plain.measured["losses"]


def test_a_run_with_more_examples_asked_for_than_there_are_takes_them_all(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = compared(models, tmp_path, monkeypatch, init="fisher")
    measured = outcome.runs[0].records[0].measured
    assert measured is not None
    assert measured["initialisation"]["examples"] == outcome.sizes["train"] > 7


def compared(models: Path, place: Path, monkeypatch: pytest.MonkeyPatch, **options: str) -> Outcome:
    if not (place / "texts.jsonl").exists():
        write_texts(place / "texts.jsonl", 60)

    monkeypatch.setattr(launch, "spawn", spawning())
    inputs = Inputs(f"hf:{models / 'bert'}", f"jsonl:{place / 'texts.jsonl'}", device="cpu")
    settings = {"lst": {"reduction": "2", **options}}
    request = Request(inputs, ("lst",), settings, seeds=(0,), epochs=1)
    return compare(request, home=place, cache_dir=place / "caches", runs_dir=place / "runs")


def test_imported_features_are_refused() -> None:
    # As cache.features describes them: nothing is known of a network.
    arch = Architecture("mine", "text", blocks=3, width=32, prefix_tokens=0, final_layer="blocks.2")
    assert "none this code can copy" in str(LST(LstConfig(init="fisher", reduction=2)).refusal(arch))


def test_no_method_asks_for_gradients_by_default() -> None:
    assert LST().gradient_examples == 0
    assert LST(LstConfig(init="random")).gradient_examples == 0
    assert LST(LstConfig(init="fisher")).gradient_examples == 1024
    assert LST(LstConfig(init="fisher", fisher_examples=0)).refusal(USUAL) is not None


USUAL = Architecture(
    "Toy", "text", blocks=2, width=32, prefix_tokens=0, final_layer="norm", heads=4, mlp_width=64, norm="pre"
)
