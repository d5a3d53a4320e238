"""GPO against VSE-infinity's formula (arXiv 2011.04305), written out in loops and in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sidebench.bench.goals.gpo import GPO

Row = list[float]
LENGTHS, WIDTH = (3, 7, 1, 5), 6


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def times(matrix: list[Row], x: Row) -> Row:
    return [sum(w * v for w, v in zip(row, x, strict=True)) for row in matrix]


def gru(cell: Any, steps: list[Row]) -> list[Row]:
    """All outputs of a GRU from zero: gates reset, update, new in this order, as torch documents them."""
    size = cell.hidden_size
    of_input, of_state = cell.weight_ih_l0.tolist(), cell.weight_hh_l0.tolist()
    input_bias, state_bias = cell.bias_ih_l0.tolist(), cell.bias_hh_l0.tolist()
    state, found = [0.0] * size, []
    for x in steps:
        a = [v + b for v, b in zip(times(of_input, x), input_bias, strict=True)]
        h = [v + b for v, b in zip(times(of_state, state), state_bias, strict=True)]
        new = []
        for i in range(size):
            reset, update = sigmoid(a[i] + h[i]), sigmoid(a[size + i] + h[size + i])
            candidate = math.tanh(a[2 * size + i] + reset * h[2 * size + i])
            new.append((1 - update) * candidate + update * state[i])
        state = new
        found.append(state)
    return found


def position(rank: int, width: int) -> Row:
    code = []
    for pair in range(width // 2):
        angle = rank / 10_000 ** (2 * pair / width)
        code += [math.sin(angle), math.cos(angle)]
    return code


def naive(pool: Any, tokens: list[Row], padded: int) -> Row:
    """One example: its real tokens, and how many positions the batch has."""
    real = len(tokens)
    codes = [position(rank, pool.positions) for rank in range(real)]
    onward, back = gru(pool.onward, codes), gru(pool.backward_, codes[::-1])[::-1]
    scores = [-10_000.0] * padded
    for rank in range(real):
        mean = [(f + b) / 2 for f, b in zip(onward[rank], back[rank], strict=True)]
        scores[rank] = times(pool.score.weight.tolist(), mean)[0]
    shares = [math.exp((score - max(scores)) / 0.1) for score in scores]
    out = []
    for channel in zip(*tokens, strict=True):
        ranked = sorted(channel, reverse=True)
        out.append(sum(share / sum(shares) * value for share, value in zip(shares, ranked, strict=False)))
    return out


def made() -> GPO:
    torch.manual_seed(0)
    pool = GPO().double()
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return pool


def batch(longest: int = max(LENGTHS)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(len(LENGTHS), max(LENGTHS), WIDTH, generator=generator, dtype=torch.float64)
    tokens = torch.nn.functional.pad(tokens, (0, 0, 0, longest - max(LENGTHS)), value=123.0)
    mask = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    return torch.where(mask[..., None], tokens, 99.0), mask


def test_it_equals_the_formula() -> None:
    pool, (tokens, mask) = made(), batch()
    out = pool(tokens, mask)
    assert out.shape == (len(LENGTHS), WIDTH)
    for row, real in enumerate(LENGTHS):
        expected = naive(pool, tokens[row, :real].tolist(), tokens.shape[1])
        torch.testing.assert_close(out[row].detach(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)


def test_it_has_as_many_parameters_as_published() -> None:
    assert sum(p.numel() for p in GPO().parameters()) == 12_704


def test_padding_changes_nothing() -> None:
    pool = made()
    torch.testing.assert_close(pool(*batch(longest=11)), pool(*batch()), atol=1e-12, rtol=1e-12)


def test_the_order_of_the_tokens_changes_nothing_and_each_channel_is_sorted_alone() -> None:
    pool, (tokens, mask) = made(), batch()
    shuffled = tokens.clone()
    for channel in range(WIDTH):
        for row, real in enumerate(LENGTHS):
            order = torch.randperm(real, generator=torch.Generator().manual_seed(channel))
            shuffled[row, :real, channel] = tokens[row, :real, channel][order]
    torch.testing.assert_close(pool(shuffled, mask), pool(tokens, mask))


def test_the_weights_are_shares_of_the_real_ranks() -> None:
    pool, (_, mask) = made(), batch()
    weights = pool.weights(mask, mask.sum(1, keepdim=True))
    torch.testing.assert_close(weights.sum(1), torch.ones(len(LENGTHS), dtype=torch.float64))
    assert not weights[~mask].any()


def test_one_token_is_its_own_pooling() -> None:
    tokens, mask = batch()
    torch.testing.assert_close(made()(tokens, mask)[2], tokens[2, 0])


def test_every_parameter_learns_and_padding_gets_no_gradient() -> None:
    pool, (tokens, mask) = made(), batch()
    tokens.requires_grad_()
    pool(tokens, mask).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in pool.parameters())
    assert tokens.grad is not None
    assert not tokens.grad[~mask].any()
    assert torch.isfinite(tokens.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_runs_on_fake_tensors_and_in_mixed_precision(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        tokens, mask = batch()
        assert torch.isfinite(made().float()(tokens.float(), mask)).all()
    with FakeTensorMode():
        out = GPO()(torch.zeros(2, 9, WIDTH), torch.ones(2, 9, dtype=torch.bool))
        out.sum().backward()
        assert out.shape == (2, WIDTH)
