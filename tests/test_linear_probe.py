"""The linear probe against an independent solver, and where features are not as one would wish."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidebench.adapters.linear_probe import Config, LinearProbe, Probe, solve


def clouds(count: int, classes: int, width: int = 6, *, spread: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return centres[targets] + spread * torch.randn(count, width, generator=generator), targets


def reference(features: Tensor, targets: Tensor, classes: int, l2: float) -> tuple[float, NDArray[np.float64]]:
    """Smallest value of mean cross-entropy + l2/2 |W|² on standardised features, by scipy, and its (W, b)."""
    x = features.double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    onehot = np.eye(classes)[targets.numpy()]
    width = x.shape[1]

    def value_and_gradient(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight, bias = flat[:-classes].reshape(classes, width), flat[-classes:]
        logits = x @ weight.T + bias
        logits -= logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        error = (np.exp(log_p) - onehot) / len(x)
        value = -(onehot * log_p).sum() / len(x) + l2 / 2 * (weight**2).sum()
        return value, np.concatenate([(error.T @ x + l2 * weight).ravel(), error.sum(0)])

    start = np.zeros(classes * width + classes)
    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-16, "gtol": 1e-11, "maxcor": 50}
    found = scipy.optimize.minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    return float(found.fun), found.x


def objective(probe: Probe, features: Tensor, targets: Tensor, l2: float) -> Tensor:
    loss = torch.nn.functional.cross_entropy(probe(features), targets)
    return loss + l2 / 2 * probe.linear.weight.square().sum()


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("l2", [1e2, 1e-1, 1e-3])
def test_the_solution_is_an_independent_solvers(classes: int, l2: float) -> None:
    features, targets = clouds(80, classes)
    probe = Probe(features.double(), classes)
    assert solve(probe, features.double(), targets, l2, 1000)
    value, solution = reference(features, targets, classes, l2)
    assert float(objective(probe, features, targets, l2).detach()) == pytest.approx(value, abs=1e-9)
    # A gradient of at most 1e-7 leaves the weights up to 1e-7 / l2 from the minimum.
    weight = solution[:-classes].reshape(classes, -1)
    torch.testing.assert_close(probe.linear.weight.detach(), torch.from_numpy(weight), atol=1e-4, rtol=1e-4)
    bias = torch.from_numpy(solution[-classes:])
    probabilities = ((features.double() - probe.mean) / probe.deviation @ torch.from_numpy(weight).T + bias).softmax(1)
    torch.testing.assert_close(probe(features).detach().softmax(1), probabilities, atol=max(1e-6, 1e-8 / l2), rtol=0)


@pytest.mark.parametrize("l2", [1e2, 1.0, 1e-2, 1e-4, 1e-6])
def test_the_gradient_vanishes_at_the_solution(l2: float) -> None:
    features, targets = clouds(90, 3, spread=2.0)
    probe = Probe(features.double(), 3)
    assert solve(probe, features.double(), targets, l2, 1000)
    gradients = torch.autograd.grad(objective(probe, features, targets, l2), list(probe.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-6


def test_an_unfinished_solution_is_said_to_be_unfinished() -> None:
    features, targets = clouds(90, 3)
    assert not solve(Probe(features.double(), 3), features.double(), targets, 1e-6, 2)
    _, chosen = LinearProbe(Config(max_iterations=2)).fit((features, targets), clouds(30, 3, seed=1), 3)
    assert len(chosen["unconverged_l2"]) > 0


def test_the_l2_weight_is_the_best_on_validation_and_the_strongest_of_equals() -> None:
    train, val = clouds(60, 4, spread=3.0), clouds(60, 4, spread=3.0, seed=1)
    config = Config(smallest_l2=1e-4, largest_l2=1e2, candidates=7)
    probe, chosen = LinearProbe(config).fit(train, val, 4)
    scores = {}
    for l2 in 10.0 ** np.arange(2, -5, -1):
        alone = Probe(train[0].double(), 4)
        assert solve(alone, train[0].double(), train[1], float(l2), 1000)
        scores[float(l2)] = float((alone(val[0]).argmax(1) == val[1]).double().mean())
    assert len(set(scores.values())) > 2
    best = max(scores.values())
    assert chosen["val_score"] == pytest.approx(best)
    assert chosen["l2"] == pytest.approx(max(l2 for l2, score in scores.items() if score == best))
    assert float((probe(val[0]).argmax(1) == val[1]).double().mean()) == pytest.approx(best)
    assert chosen["unconverged_l2"] == []


def test_validation_chooses_but_does_not_teach() -> None:
    train, val = clouds(60, 3), clouds(30, 3, seed=1)
    one_weight = Config(smallest_l2=1e-2, largest_l2=1e-2, candidates=1)
    first, _ = LinearProbe(one_weight).fit(train, val, 3)
    second, _ = LinearProbe(one_weight).fit(train, (100 * val[0], val[1].flip(0)), 3)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.3e5, 1e-7])
def test_a_constant_feature_weighs_nothing(constant: float) -> None:
    features, targets = clouds(77, 3)
    with_constant = torch.cat([features, torch.full((77, 1), constant)], dim=1)
    config = Config(candidates=3, smallest_l2=1e-3)
    plain, _ = LinearProbe(config).fit((features, targets), (features, targets), 3)
    probe, _ = LinearProbe(config).fit((with_constant, targets), (with_constant, targets), 3)
    torch.testing.assert_close(probe(with_constant), plain(features), atol=1e-4, rtol=1e-4)
    moved = with_constant.clone()
    moved[:, -1] += 1e-3 * max(abs(constant), 1.0)
    torch.testing.assert_close(probe(moved), probe(with_constant), atol=1e-3, rtol=1e-3)


def test_scale_and_offset_of_the_features_do_not_matter() -> None:
    train, val = clouds(80, 3), clouds(40, 3, seed=1)
    scale, offset = 10.0 ** torch.linspace(-6, 6, 6).double(), torch.linspace(-50, 50, 6).double()

    def moved(features: Tensor) -> Tensor:
        return (features.double() + offset) * scale

    plain, chosen = LinearProbe(Config(candidates=5)).fit(train, val, 3)
    other, also_chosen = LinearProbe(Config(candidates=5)).fit((moved(train[0]), train[1]), (moved(val[0]), val[1]), 3)
    assert also_chosen["l2"] == chosen["l2"]
    assert also_chosen["unconverged_l2"] == []
    torch.testing.assert_close(other(moved(val[0])), plain(val[0]), atol=1e-3, rtol=1e-3)


def test_half_precision_features_are_solved_in_float64() -> None:
    train, val = clouds(80, 3), clouds(40, 3, seed=1)
    probe, chosen = LinearProbe(Config(candidates=3)).fit((train[0].half(), train[1]), (val[0].half(), val[1]), 3)
    assert probe(val[0].half()).dtype == torch.float64
    assert chosen["unconverged_l2"] == []


def test_a_class_missing_from_validation_or_from_training_is_no_error() -> None:
    features, targets = clouds(90, 3)
    some = targets[60:] != 2
    _, chosen = LinearProbe(Config(candidates=3)).fit(
        (features[:60], targets[:60]), (features[60:][some], targets[60:][some]), 3
    )
    assert chosen["val_score"] > 0.5
    seen = targets != 1
    probe, _ = LinearProbe(Config(candidates=3)).fit((features[seen], targets[seen]), (features, targets), 3)
    logits = probe(features)
    assert logits.shape == (90, 3)
    assert torch.isfinite(logits).all()
    assert not (logits.argmax(1) == 1).any()


def test_the_count_is_d_k_plus_k() -> None:
    train = clouds(60, 4)
    probe, _ = LinearProbe(Config(candidates=1)).fit(train, train, 4)
    assert sum(p.numel() for p in probe.parameters()) == 6 * 4 + 4


def test_the_weights_tried_run_from_the_strongest_to_the_weakest() -> None:
    tried = LinearProbe()._grid()
    assert len(tried) == 17
    assert tried[0] == pytest.approx(1e2)
    assert tried[-1] == pytest.approx(1e-6)
    steps = np.diff([math.log10(l2) for l2 in tried])
    assert steps == pytest.approx(np.full(16, -0.5))


def test_a_tie_in_accuracy_goes_to_the_weight_of_smaller_validation_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 3, generator=generator)
    targets = (features[:, 0] > 0).long()
    # Every weight gets two of three right; the third is wrong on purpose, so that confidence costs something.
    val = (torch.tensor([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]]), torch.tensor([1, 0, 1]))
    _, chosen = LinearProbe(Config(candidates=5)).fit((features, targets), val, 2)
    losses = {}
    for l2 in torch.logspace(2, -6, 5).tolist():
        alone, _ = LinearProbe(Config(smallest_l2=l2, largest_l2=l2, candidates=1)).fit((features, targets), val, 2)
        losses[l2] = float(torch.nn.functional.cross_entropy(alone(val[0]).detach(), val[1]))
    assert chosen["l2"] == pytest.approx(min(losses, key=losses.__getitem__))
