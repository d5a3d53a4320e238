"""The one training loop: against AdamW written by hand in float64, what it asks its source for, and what it selects."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from numpy.typing import NDArray
from torch import Tensor, nn

from sidebench.adapters._base import Batch, Body
from sidebench.bench import training
from sidebench.bench.learner import CachedSource, Learner, LiveSource, longest_batch
from sidebench.bench.tasks.base import Pooling
from sidebench.bench.training import Diverged, Settings, load_trained, predict, snapshot, train
from sidebench.cache.backbone import Backbone
from sidebench.cache.feed import batches_of, epoch_order
from sidebench.cache.zarr_store import ZarrStore

N, D, K = 10, 3, 2
TRAIN, VAL, TEST = np.arange(0, 10), np.arange(10, 14), np.arange(14, 20)


@dataclass
class Recorded:
    """Vectors (N, D) as a source that remembers which examples it was asked for."""

    vectors: Tensor
    asked: list[list[int]] = field(default_factory=list)
    views: int = 0

    def batches(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[Batch]:
        for index in batches:
            self.asked.append(index.tolist())
            yield Batch(torch.ones(len(index), 1, dtype=torch.bool), {"x": self.vectors[torch.from_numpy(index)]})

    def lengths(self) -> NDArray[np.int64]:
        return np.ones(len(self.vectors), dtype=np.int64)


class Plain(Body):
    """The vector as it stands: only the head trains."""

    width = D

    def forward(self, batch: Batch) -> Tensor:
        return batch.activations["x"]


class Deep(Body):
    """A network with dropout that remembers in which mode it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 5
        self.layers = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Dropout(0.5))
        self.modes: list[bool] = []

    def forward(self, batch: Batch) -> Tensor:
        self.modes.append(self.layers[2].training)
        return self.layers(batch.activations["x"])


def _learner(body: Body, seed: int = 0) -> Learner:
    torch.manual_seed(seed)
    return Learner(body, K, "mean", 0)


def _vectors(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(20, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def _targets() -> Tensor:
    return (_vectors().sum(1) > 0).long()


def _settings(**changes: Any) -> Settings:
    usual = {"seed": 0, "epochs": 4, "batch_size": 4, "lr": 0.05, "weight_decay": 0.1, "precision": "fp32"}
    return Settings(**(usual | changes))


def _train(learner: Learner, source: Any, settings: Settings, **more: Any) -> training.Trained:
    return train(learner, source, _targets(), TRAIN, VAL, settings, **more)


def _by_hand(head: nn.Linear, settings: Settings) -> tuple[list[float], NDArray[Any], NDArray[Any]]:
    """Logistic regression by AdamW (Loshchilov & Hutter, algorithm 2) with warm-up and cosine, all of it in float64."""
    x, y = _vectors(torch.float64).numpy(), _targets().numpy()
    w, b = head.weight.detach().double().numpy().copy(), head.bias.detach().double().numpy().copy()
    moments = [np.zeros_like(w), np.zeros_like(w), np.zeros_like(b), np.zeros_like(b)]
    steps = settings.epochs * math.ceil(len(TRAIN) / settings.batch_size)
    warm = max(round(0.1 * steps), 1)
    means, t = [], 0
    for epoch in range(settings.epochs):
        total = 0.0
        for index in batches_of(epoch_order(TRAIN, seed=settings.seed, epoch=epoch), settings.batch_size):
            logits = x[index] @ w.T + b
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            total += float(-np.log(p[np.arange(len(index)), y[index]]).sum())
            error = (p - np.eye(K)[y[index]]) / len(index)
            lr = settings.lr * min((t + 1) / warm, 1) * (1 + math.cos(math.pi * t / steps)) / 2
            t += 1
            for i, (value, gradient) in enumerate(((w, error.T @ x[index]), (b, error.sum(0)))):
                m, v = moments[2 * i], moments[2 * i + 1]
                value *= 1 - lr * settings.weight_decay
                m += 0.1 * (gradient - m)
                v += 0.001 * (gradient**2 - v)
                value -= lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        means.append(total / len(TRAIN))
    return means, w, b


@pytest.mark.parametrize("batch_size", [N, 4], ids=["one-step-per-epoch", "a-short-last-batch"])
def test_the_loop_is_adamw_with_warm_up_and_cosine(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter(range(100))
    monkeypatch.setattr(training, "score_of", lambda *_: float(next(scores)))  # the last epoch is the best
    settings = _settings(epochs=12, batch_size=batch_size)
    learner = _learner(Plain()).double()
    losses, weight, bias = _by_hand(learner.head, settings)
    found = _train(learner, Recorded(_vectors(torch.float64)), settings)
    assert found.losses == pytest.approx(losses, rel=1e-6)
    np.testing.assert_allclose(found.state["head.weight"].numpy(), weight, rtol=1e-6)
    np.testing.assert_allclose(found.state["head.bias"].numpy(), bias, rtol=1e-6)


def test_the_epoch_kept_is_the_best_on_validation_and_the_earliest_of_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.75, 0.75, 0.25])
    monkeypatch.setattr(training, "score_of", lambda *_: next(scores))
    learner, after = _learner(Plain()), []
    found = _train(learner, Recorded(_vectors()), _settings(), progress=lambda _: after.append(snapshot(learner)))
    assert (found.best_epoch, found.val_score) == (1, 0.75)
    assert torch.equal(found.state["head.weight"], after[1]["head.weight"])
    assert not torch.equal(found.state["head.weight"], after[3]["head.weight"])


def test_training_asks_for_training_and_validation_examples_only() -> None:
    source = Recorded(_vectors())
    _train(_learner(Plain()), source, _settings(epochs=2))
    epochs = [source.asked[:4], source.asked[4:]]
    for asked in epochs:
        assert sorted(chain(*asked[:3])) == TRAIN.tolist()  # every training example once
        assert asked[3] == VAL.tolist()
    assert epochs[0][:3] != epochs[1][:3]  # in another order each time


def test_training_reads_augmented_views_and_validation_the_plain_examples() -> None:
    source, count = Recorded(_vectors().repeat(4, 1), views=3), len(_vectors())
    _train(_learner(Plain()), source, _settings(epochs=2))
    epochs = [source.asked[:4], source.asked[4:]]
    for asked in epochs:
        items = list(chain(*asked[:3]))
        assert sorted(i % count for i in items) == TRAIN.tolist()
        assert all(count <= i < 4 * count for i in items)
        assert asked[3] == VAL.tolist()
    views = [{i % count: i // count for i in chain(*asked[:3])} for asked in epochs]
    assert views[0] != views[1]  # drawn anew in each epoch


def test_a_view_is_trained_towards_the_target_of_its_example() -> None:
    """Views lie far out, each class on its own side, so only right targets can be learned."""
    far = 50 * (2.0 * _targets()[:, None] - 1)
    source = Recorded(torch.cat([_vectors(), *(_vectors() + far for _ in range(3))]), views=3)
    assert _train(_learner(Plain()), source, _settings(epochs=8)).losses[-1] < 0.1


def test_every_method_sees_the_same_examples_in_the_same_order() -> None:
    sources = [Recorded(_vectors()), Recorded(_vectors())]
    for source, body in zip(sources, (Plain(), Deep()), strict=True):
        _train(_learner(body), source, _settings())
    assert sources[0].asked == sources[1].asked


def test_the_same_seed_gives_the_same_numbers_and_another_one_others() -> None:
    runs = [_train(_learner(Plain()), Recorded(_vectors()), _settings(seed=seed)) for seed in (3, 3, 4)]
    assert runs[0].losses == runs[1].losses
    assert torch.equal(runs[0].state["head.weight"], runs[1].state["head.weight"])
    assert runs[0].losses != runs[2].losses


def test_dropout_is_on_in_training_and_off_in_prediction() -> None:
    body = Deep()
    _train(_learner(body), Recorded(_vectors()), _settings(epochs=2))
    assert body.modes == [True, True, True, False] * 2


def test_predictions_come_in_the_order_asked() -> None:
    learner = _learner(Plain())
    logits = predict(learner, Recorded(_vectors()), TEST[::-1].copy(), _settings())
    torch.testing.assert_close(logits, learner.head(_vectors()[TEST[::-1].copy()]))


def test_a_loss_that_is_not_finite_is_a_sentence_that_names_the_learning_rate() -> None:
    vectors = _vectors()
    vectors[5] = math.inf
    with pytest.raises(Diverged, match=r"the loss is nan in epoch 1 at learning rate 0\.05; try a smaller --lr"):
        _train(_learner(Plain()), Recorded(vectors), _settings())


def test_bf16_computes_in_bfloat16_and_keeps_parameters_and_logits_in_float32() -> None:
    learner, seen = _learner(Deep()), []
    learner.head.register_forward_hook(lambda *found: seen.append(found[-1].dtype))
    settings = _settings(precision="bf16")
    found = _train(learner, Recorded(_vectors()), settings)
    assert all(math.isfinite(loss) for loss in found.losses)
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in found.state.values()} == {torch.float32}
    assert predict(learner, Recorded(_vectors()), TEST, settings).dtype == torch.float32


def test_a_snapshot_is_a_copy_and_goes_back_bit_for_bit() -> None:
    learner = _learner(Deep())
    before = snapshot(learner)
    kept = {name: value.clone() for name, value in before.items()}
    _train(learner, Recorded(_vectors()), _settings())
    assert all(torch.equal(before[name], value) for name, value in kept.items())
    load_trained(learner, before)
    assert all(torch.equal(p, kept[name]) for name, p in learner.named_parameters())


class Tokens(Body):
    """Fixed tokens (B, T, D)."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.width = tokens.shape[-1]
        self.tokens = tokens

    def forward(self, batch: Batch) -> Tensor:
        return self.tokens


def _pooled(body: Body, pooling: Pooling, prefix: int, mask: Tensor) -> Tensor:
    learner = Learner(body, 2, pooling, prefix)
    learner.head = nn.Identity()  # type: ignore[assignment]
    return learner(Batch(mask))


def test_the_mean_leaves_out_padding_and_the_class_token_of_an_image() -> None:
    tokens = torch.tensor([[[100.0], [1.0], [3.0], [5.0]], [[100.0], [2.0], [4.0], [999.0]]])
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
    assert _pooled(Tokens(tokens), "mean", 1, mask).flatten().tolist() == [3.0, 3.0]
    assert _pooled(Tokens(tokens), "mean", 0, mask).flatten().tolist() == [109 / 4, pytest.approx(106 / 3)]


def test_cls_is_the_first_token_and_a_vector_is_taken_as_it_is() -> None:
    tokens, mask = torch.arange(6.0).reshape(2, 3, 1), torch.ones(2, 3, dtype=torch.bool)
    assert _pooled(Tokens(tokens), "cls", 1, mask).flatten().tolist() == [0.0, 3.0]
    for pooling in ("cls", "mean"):
        vector = Tokens(torch.tensor([[7.0], [8.0]]))
        assert _pooled(vector, pooling, 1, mask).flatten().tolist() == [7.0, 8.0]  # type: ignore[arg-type]


def test_the_longest_batch_holds_the_longest_examples_and_the_shortest() -> None:
    lengths = np.array([5, 9, 2, 7, 3, 8])
    examples = np.array([0, 1, 3, 4, 5])  # example 2 is not of this part
    assert longest_batch(examples, lengths, 3).tolist() == [4, 5, 1]
    assert longest_batch(examples, lengths, 100).tolist() == [4, 0, 3, 5, 1]


def test_a_longest_batch_of_one_is_the_longest_example() -> None:
    assert longest_batch(np.array([0, 1, 2]), np.array([5, 9, 2]), 1).tolist() == [1]


def test_cached_and_live_runs_meet_the_same_tokens_and_measure_the_same_batch(
    tiny_bert: Backbone, text_examples: toys.ToyExamples, tmp_path: Path
) -> None:
    store = ZarrStore(toys.build_store(tiny_bert, text_examples, tmp_path).folder)
    cached = CachedSource(store, (tiny_bert.final_layer,), torch.device("cpu"), store.lengths())
    live = LiveSource(tiny_bert, text_examples)
    assert cached.lengths().tolist() == live.lengths().tolist()
    index = longest_batch(np.arange(40), live.lengths(), 8)
    (stored,), (computed,) = cached.batches([index]), live.batches([index])
    assert torch.equal(stored.mask, computed.mask)
    assert not bool(stored.mask.all())  # a padded row, so that no attention kernel is spared its mask
    with torch.no_grad():
        tokens = tiny_bert.tokens(dict(computed.inputs))
    torch.testing.assert_close(stored.state(tiny_bert.final_layer), tokens * computed.mask[..., None])


def test_a_live_source_of_images_gives_one_mask_entry_per_token(
    tiny_vit: Backbone, image_examples: toys.ToyExamples
) -> None:
    source = LiveSource(tiny_vit, image_examples)
    (batch,) = source.batches([np.array([3, 1])])
    with torch.no_grad():
        assert batch.mask.shape == tiny_vit.tokens(dict(batch.inputs)).shape[:2]
    assert source.lengths().tolist() == [batch.mask.shape[1]] * len(image_examples)
