"""Head2Toe against its two stages written out in loops and in float64, and its features against their definition."""

import math
from pathlib import Path

import pytest
import torch
from outcomes import spawning, write_texts
from torch import Tensor

from sidebench.adapters.head2toe import Config, Head, Head2Toe, count, from_zero
from sidebench.bench import launch as launching
from sidebench.bench.compare import compare
from sidebench.bench.device_memory import DeviceMeter
from sidebench.bench.measure import measure_fit
from sidebench.bench.outcome import Request
from sidebench.bench.predict_fit import predict_fit
from sidebench.bench.prepare import Inputs
from sidebench.cache.architecture import Architecture

Rows = list[list[float]]
ARCH = Architecture("Toy", "text", blocks=2, width=6, prefix_tokens=0, final_layer="norm")


def toy(examples: int = 24, width: int = 10, classes: int = 3, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Only features 2 and 7 know the class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(examples) % classes
    features = torch.randn(examples, width, generator=generator, dtype=torch.float64)
    features[:, 2] += 3.0 * (targets == 0)
    features[:, 7] += 3.0 * (targets == 1)
    return features, targets


def softmax(x: list[float]) -> list[float]:
    exps = [math.exp(v - max(x)) for v in x]
    return [e / sum(exps) for e in exps]


def naive_logits(weight: Rows, bias: list[float], row: list[float]) -> list[float]:
    return [sum(row[i] * weight[i][k] for i in range(len(row))) + bias[k] for k in range(len(bias))]


def naive_gradient(weight: Rows, bias: list[float], x: Rows, y: list[int], lasso: float) -> tuple[Rows, list[float]]:
    """Of mean cross-entropy + lasso * sum over features i of |weight[i]|."""
    d_weight, d_bias = [[0.0] * len(bias) for _ in weight], [0.0] * len(bias)
    for row, target in zip(x, y, strict=True):
        for k, p in enumerate(softmax(naive_logits(weight, bias, row))):
            error = (p - (k == target)) / len(x)
            d_bias[k] += error
            for i, value in enumerate(row):
                d_weight[i][k] += error * value
    for i, group in enumerate(weight):
        length = math.sqrt(sum(w * w for w in group))
        for k, w in enumerate(group):
            d_weight[i][k] += lasso * w / length if length > 0 else 0.0
    return d_weight, d_bias


def naive_descent(x: Rows, y: list[int], classes: int, lr: float, steps: int, lasso: float) -> tuple[Rows, list[float]]:
    """Adam from zero (beta 0.9 and 0.999, epsilon 1e-8) along half a cosine: weight (D, K) and bias (K)."""
    values = [[0.0] * classes for _ in range(len(x[0]) + 1)]  # the bias is the last row
    first = [[0.0] * classes for _ in values]
    second = [[0.0] * classes for _ in values]
    for step in range(steps):
        rate = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        d_weight, d_bias = naive_gradient(values[:-1], values[-1], x, y, lasso)
        for i, gradient in enumerate([*d_weight, d_bias]):
            for k, g in enumerate(gradient):
                first[i][k] = 0.9 * first[i][k] + 0.1 * g
                second[i][k] = 0.999 * second[i][k] + 0.001 * g * g
                mean, square = first[i][k] / (1 - 0.9 ** (step + 1)), second[i][k] / (1 - 0.999 ** (step + 1))
                values[i][k] -= rate * mean / (math.sqrt(square) + 1e-8)
    return values[:-1], values[-1]


@pytest.mark.parametrize("lasso", [0.0, 0.05])
def test_both_stages_equal_the_formulas(lasso: float) -> None:
    (features, targets), val = toy(), toy(9, seed=1)
    config = Config(lasso=lasso, learning_rate=0.05, steps=12, largest_fraction=0.3, candidates=1)
    head, chosen = Head2Toe(config).fit((features, targets), val, 3)
    x, y = features.tolist(), targets.tolist()
    weight, _ = naive_descent(x, y, 3, 0.05, 12, lasso)
    linear = from_zero(10, 3, features.dtype, features.device)
    Head2Toe(config)._descend(linear, features, targets, lasso)
    torch.testing.assert_close(linear.weight.mT, torch.tensor(weight, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    scores = [sum(w * w for w in group) for group in weight]
    ranked = Head2Toe(config)._ranked(features, targets, 3)
    assert ranked.tolist() == sorted(range(10), key=lambda i: -scores[i])
    kept = sorted(sorted(range(10), key=lambda i: -scores[i])[:3])
    assert head.kept.tolist() == kept
    fresh, bias = naive_descent([[row[i] for i in kept] for row in x], y, 3, 0.05, 12, 0.0)
    naive = [naive_logits(fresh, bias, [row[i] for i in kept]) for row in val[0].tolist()]
    torch.testing.assert_close(head(val[0]), torch.tensor(naive, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    assert chosen["features_kept"] == 3
    assert chosen["val_score"] == pytest.approx(float((head(val[0]).argmax(1) == val[1]).double().mean()))


def test_the_telling_features_come_first() -> None:
    features, targets = toy(120)
    order = Head2Toe(Config(lasso=0.05))._ranked(features, targets, 3)
    assert set(order[:2].tolist()) == {2, 7}
    head, _ = Head2Toe(Config(lasso=0.05, largest_fraction=0.2, candidates=1)).fit((features, targets), toy(30), 3)
    assert head.kept.tolist() == [2, 7]


def test_the_share_is_the_best_on_validation() -> None:
    train, val = toy(40), toy(60, seed=1)
    config = Config(smallest_fraction=0.1, largest_fraction=1.0, candidates=4)
    _, chosen = Head2Toe(config).fit(train, val, 3)
    scores = {}
    for fraction in Head2Toe(config)._grid():
        alone, _ = Head2Toe(Config(largest_fraction=fraction, candidates=1)).fit(train, val, 3)
        scores[fraction] = float((alone(val[0]).argmax(1) == val[1]).double().mean())
    assert len(set(scores.values())) > 1
    assert chosen["val_score"] == max(scores.values()) == scores[chosen["fraction"]]


def test_of_shares_that_score_alike_the_one_with_the_smallest_loss_is_taken() -> None:
    train, val = toy(40), toy(12, seed=1)
    config = Config(smallest_fraction=0.2, largest_fraction=1.0, candidates=4, steps=40)
    _, chosen = Head2Toe(config).fit(train, val, 3)
    losses = {}
    for fraction in Head2Toe(config)._grid():
        alone, found = Head2Toe(Config(largest_fraction=fraction, candidates=1, steps=40)).fit(train, val, 3)
        if found["val_score"] == chosen["val_score"]:
            losses[fraction] = float(torch.nn.functional.cross_entropy(alone(val[0]), val[1]).detach())
    assert len(losses) == 3
    assert chosen["fraction"] == min(losses, key=lambda fraction: losses[fraction]) == sorted(losses)[1]


def test_validation_chooses_but_does_not_teach() -> None:
    train, val = toy(40), toy(20, seed=1)
    one_share = Head2Toe(Config(candidates=1))
    (first, _), (second, _) = one_share.fit(train, val, 3), one_share.fit(train, (9 * val[0], val[1].flip(0)), 3)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_the_shares_tried_run_from_the_largest_to_the_smallest() -> None:
    assert Head2Toe()._grid() == pytest.approx([0.2, 0.0736806, 0.0271442, 0.01], rel=1e-5)
    assert Head2Toe(Config(candidates=1))._grid() == [0.2]


def test_a_share_is_one_feature_at_least() -> None:
    assert [count(fraction, 40) for fraction in (1.0, 0.2, 0.01, 1e-9)] == [40, 8, 1, 1]
    assert [count(0.2, width) for width in (7, 8)] == [1, 2]  # 1.4 and 1.6: the nearest number


def test_the_count_is_m_k_plus_k() -> None:
    head, chosen = Head2Toe(Config(steps=2)).fit(toy(), toy(), 3)
    assert sum(p.numel() for p in head.parameters()) == chosen["features_kept"] * 3 + 3


def test_features_are_both_rows_of_every_state_each_of_length_one() -> None:
    method = Head2Toe()
    layers = method.layers(ARCH)
    assert layers == ("embeddings", "blocks.0", "blocks.1")
    generator = torch.Generator().manual_seed(0)
    widths = (6, 4, 6)
    rows = [torch.randn(5, 2, width, generator=generator).half() for width in widths]
    pooled = dict(zip(layers, rows, strict=True))
    found = method.features(pooled, 0)
    assert found.dtype == torch.float32
    assert found.shape == (5, 2 * sum(widths))
    assert torch.equal(found, method.features(pooled, 1))
    for example in range(5):
        naive = []
        for row in [row for both in rows for row in both[example].tolist()]:
            length = math.sqrt(sum(v * v for v in row))
            naive += [v / length for v in row]
        torch.testing.assert_close(found[example].double(), torch.tensor(naive, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_zero_row_is_no_nan() -> None:
    assert torch.equal(Head2Toe().features({"embeddings": torch.zeros(2, 2, 3)}, 0), torch.zeros(2, 6))


@pytest.mark.parametrize(("examples", "width", "classes"), [(200, 320, 5), (64, 100, 20)])
def test_its_memory_is_predicted_to_the_byte(examples: int, width: int, classes: int) -> None:
    features = torch.randn(examples, width, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(examples) % classes
    tracked = measure_fit(Head2Toe(), (features, targets), classes, DeviceMeter(torch.device("cpu")))
    found = predict_fit(Head2Toe(), examples=examples, width=width, num_outputs=classes, semantics="cpu")
    assert found.peak.peak_bytes == tracked.values["peak_tracked_bytes"] > features.nbytes
    assert found.trainable_params == count(0.2, width) * classes + classes


def test_a_task_of_numbers_is_fitted_and_predicted() -> None:
    features = torch.randn(120, 100, generator=torch.Generator().manual_seed(0))
    numbers = 2 + 3 * features[:, 5] - features[:, 60]
    head, chosen = Head2Toe().fit((features[:100], numbers[:100]), (features[100:], numbers[100:]), 1)
    assert head(features[100:]).shape == (20, 1)
    assert chosen["val_score"] == -float((head(features[100:])[:, 0] - numbers[100:]).square().mean().detach()) > -0.05
    assert {5, 60} <= set(head.kept.tolist())
    tracked = measure_fit(Head2Toe(), (features, numbers), 1, DeviceMeter(torch.device("cpu")))
    found = predict_fit(Head2Toe(), examples=120, width=100, num_outputs=1, semantics="cpu")
    assert found.peak.peak_bytes == tracked.values["peak_tracked_bytes"]


def test_a_comparison_stores_and_reads_the_rows_of_every_state(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "spawn", spawning())
    write_texts(tmp_path / "reviews.jsonl", 60)
    inputs = Inputs(f"hf:{models / 'bert'}", f"jsonl:{tmp_path / 'reviews.jsonl'}", device="cpu")
    request = Request(inputs, ("head2toe",), {"head2toe": {"steps": "5"}}, seeds=(0,))
    found = compare(request, home=tmp_path, cache_dir=tmp_path / "caches", runs_dir=tmp_path / "runs")
    assert found.store is not None
    assert found.store["layers"] == ["embeddings", "blocks.0", "blocks.1"]
    (record,) = found.records["head2toe"]
    assert record.error is None
    kept = count(record.measured["fraction"], 3 * 2 * 32)  # L states, two rows each, D
    assert record.measured["features_kept"] == kept
    assert record.measured["trainable_params"] == kept * 2 + 2
    assert record.measured["predicted_peak_bytes"] == record.measured["peak_tracked_bytes"]


def test_the_brief_form_takes_the_memory_of_the_whole() -> None:
    method = Head2Toe(Config(steps=20))

    class Whole(Head2Toe):
        def brief(self) -> "Whole":
            return self

    train = toy(200, 50)
    brief, whole = (
        measure_fit(m, train, 3, DeviceMeter(torch.device("cpu"))).values["peak_tracked_bytes"]
        for m in (method, Whole(method.config))
    )
    assert brief == whole


def test_the_brief_form_tries_the_largest_share_alone_for_three_steps_at_most() -> None:
    brief = Head2Toe(Config(lasso=0.5, largest_fraction=0.3)).brief()
    assert brief.config == Config(lasso=0.5, largest_fraction=0.3, candidates=1, steps=3)
    assert Head2Toe(Config(steps=2)).brief().config.steps == 2
    _, chosen = brief.fit(toy(), toy(), 3)
    assert (chosen["fraction"], chosen["features_kept"]) == (0.3, brief.kept(10)) == (0.3, 3)


@pytest.mark.parametrize(
    "config",
    [
        Config(smallest_fraction=0.0),
        Config(smallest_fraction=0.5),
        Config(largest_fraction=1.5),
        Config(candidates=0),
        Config(steps=0),
        Config(learning_rate=0.0),
    ],
)
def test_options_that_make_no_sense_are_refused(config: Config) -> None:
    assert Head2Toe(config).refusal(ARCH)
    assert Head2Toe().refusal(ARCH) is None


def test_the_head_reads_its_features_in_order() -> None:
    head = Head(torch.tensor([4, 1]), 2, torch.float64)
    assert head.kept.tolist() == [1, 4]
    head.linear.weight.data.copy_(torch.eye(2))
    assert head(torch.arange(5.0, dtype=torch.float64)[None]).tolist() == [[1.0, 4.0]]
