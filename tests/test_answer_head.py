"""The head and the loss of questions, against loops in float64, and the published number of trained parameters."""

import math

import numpy as np
import pytest
import torch

from sidebench.bench.goals.answer_head import AnswerHead, answer_loss, soft_targets
from sidebench.bench.tasks.base import Answers


def _head(width: int = 4, answers: int = 3) -> AnswerHead:
    torch.manual_seed(0)
    return AnswerHead(width, answers, (torch.randn(width, width), torch.randn(width)))


def test_what_is_trained_has_the_published_number_of_parameters() -> None:
    head = AnswerHead(768, 3129, (torch.empty(768, 768), torch.empty(768)))
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == 5_993_529


def test_the_head_is_the_first_token_through_pooler_and_layers() -> None:
    head = _head().double()
    first, _, norm, last = head.layers
    assert isinstance(norm, torch.nn.LayerNorm)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
        first.bias.uniform_(-1, 1)
        last.bias.uniform_(-1, 1)
    tokens = torch.randn(2, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        logits = head(tokens)

    def linear(x: list[float], weight: torch.Tensor, bias: torch.Tensor) -> list[float]:
        return [
            math.fsum(w * v for w, v in zip(row, x, strict=True)) + b
            for row, b in zip(weight.tolist(), bias.tolist(), strict=True)
        ]

    for example, of_example in zip(tokens.tolist(), logits.tolist(), strict=True):
        pooled = linear(example[0], head.weight, head.bias)
        hidden = [h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in linear(pooled, first.weight, first.bias)]
        mean = math.fsum(hidden) / len(hidden)
        spread = math.sqrt(math.fsum((h - mean) ** 2 for h in hidden) / len(hidden) + 1e-12)
        scale, shift = norm.weight.tolist(), norm.bias.tolist()
        normed = [(h - mean) / spread * w + b for h, w, b in zip(hidden, scale, shift, strict=True)]
        assert of_example == pytest.approx(linear(normed, last.weight, last.bias), abs=1e-9)


def test_the_pooler_is_kept_and_never_trained() -> None:
    weight, bias = torch.randn(4, 4), torch.randn(4)
    head = AnswerHead(4, 3, (weight, bias))
    head(torch.randn(2, 5, 4)).sum().backward()
    assert head.weight is not None
    assert not head.weight.requires_grad
    assert {"weight", "bias"} <= head.state_dict().keys()
    weight.zero_()
    assert head.weight.abs().sum() > 0  # its own copy


def test_without_a_pooler_the_first_token_or_a_vector_goes_straight_to_the_layers() -> None:
    head, tokens = AnswerHead(4, 3), torch.randn(2, 5, 4)
    assert torch.equal(head(tokens), head.layers(tokens[:, 0]))
    assert torch.equal(head(tokens[:, 0]), head(tokens))
    assert not dict(head.named_buffers())


def test_trained_weights_begin_as_those_of_bert() -> None:
    first, _, norm, last = AnswerHead(64, 200).layers
    for linear in (first, last):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not linear.bias.any()
    assert (norm.weight == 1).all()


def test_the_loss_is_summed_over_answers_and_averaged_over_questions() -> None:
    torch.manual_seed(0)
    logits, wanted = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)
    total = 0.0
    for row, right in zip(logits.tolist(), wanted.tolist(), strict=True):
        for logit, target in zip(row, right, strict=True):
            yes = 1 / (1 + math.exp(-logit))
            total -= target * math.log(yes) + (1 - target) * math.log(1 - yes)
    assert answer_loss(logits, wanted).item() == pytest.approx(total / 3, abs=1e-12)
    assert answer_loss(logits, wanted, 500).item() == pytest.approx(total / 15 * 500, abs=1e-9)


def test_soft_targets_are_the_labels_of_the_examples_asked_for() -> None:
    labels = Answers(
        np.array([0, 2, 2, 3]), np.array([4, 1, 0]), np.array([1.0, 0.3, 0.6], dtype=np.float32)
    )  # {4: 1, 1: 0.3}, {}, {0: 0.6}
    wanted = soft_targets(labels, np.array([2, 0, 1, 0]), 5)
    rows = [[0.6, 0, 0, 0, 0], [0, 0.3, 0, 0, 1], [0] * 5, [0, 0.3, 0, 0, 1]]
    assert torch.equal(wanted, torch.tensor(rows))
    assert soft_targets(labels, np.array([1]), 5).shape == (1, 5)
