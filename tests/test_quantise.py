"""int8 and fp8 activations against a reference in float64: no element is off by more than half a step."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from sidebench.cache.quantise import Quantised, channels_of, quantise

LIMITS = {"int8": 127.0, "fp8": 448.0}
TINY = 2.0**-126  # the smallest normal float32
ROUNDING = 1e-5  # of the float32 arithmetic, as a share of the largest magnitude in reach


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def _by_hand(value: Tensor, dtype: str, channels: Tensor | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """(read back, largest error allowed) of (n, D) in float64, token by token."""
    x = value.double().numpy()
    centre, spread = (np.zeros(x.shape[1]), np.ones(x.shape[1])) if channels is None else channels.double().numpy().T
    back, allowed = np.zeros_like(x), np.zeros_like(x)
    for row, token in enumerate(x):
        y = (token - centre) / spread
        largest = max(abs(y))
        scale = 1.0 if largest == 0 else max(largest / LIMITS[dtype], TINY)
        steps = y / scale
        if dtype == "int8":
            rounded, half = np.round(steps), np.full_like(y, 0.5)
        else:  # three bits of mantissa; below 2^-6 the steps are 2^-9 apart
            exponent = np.floor(np.log2(np.maximum(abs(steps), 2.0**-6)))
            step = 2.0 ** (np.minimum(exponent, 8) - 3)
            rounded, half = np.round(steps / step) * step, step / 2
        back[row] = rounded * scale * spread + centre
        allowed[row] = half * scale * spread + ROUNDING * (largest * spread + abs(centre))
    return back, allowed


CHANNELS = torch.stack([torch.linspace(-3, 3, 16), torch.logspace(-2, 2, 16)], 1)


@pytest.mark.parametrize("channels", [None, CHANNELS], ids=["tokens", "channels"])
@pytest.mark.parametrize("dtype", LIMITS)
def test_no_element_is_off_by_more_than_half_a_step(dtype: str, channels: Tensor | None) -> None:
    value = _draw(200, 16) if channels is None else _draw(200, 16) * channels[:, 1] + channels[:, 0]
    read = quantise(value, dtype, channels).float().double().numpy()
    back, allowed = _by_hand(value, dtype, channels)
    assert (abs(read - value.double().numpy()) <= allowed).all()
    # And it is the same rounding, but for ties that float32 sees on the other side.
    assert (abs(read - back) <= allowed * 1e-3 + ROUNDING * abs(back).max()).mean() > 0.99


@pytest.mark.parametrize("dtype", LIMITS)
def test_the_largest_of_every_token_takes_the_whole_range(dtype: str) -> None:
    made = quantise(_draw(50, 16), dtype)
    assert made.values.float().abs().amax(-1).tolist() == [LIMITS[dtype]] * 50
    wanted = _draw(50, 16).double().abs().amax(-1) / LIMITS[dtype]
    torch.testing.assert_close(made.scales.double(), wanted, rtol=1e-6, atol=0)


def test_int8_leaves_the_fill_value_to_what_was_never_written() -> None:
    made = quantise(torch.tensor([[-1.0, 1.0, 0.5], [-3e38, 3e38, 0.0]]), "int8")
    assert made.values.tolist()[0] == [-127, 127, 64]  # 63.5 rounds to even
    assert int(made.values.min()) == -127


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_token_of_zeros_stays_one_and_is_no_padding(dtype: str) -> None:
    made = quantise(torch.zeros(3, 16), dtype)
    assert made.scales.tolist() == [1.0, 1.0, 1.0]
    assert not made.float().any()


@pytest.mark.parametrize("dtype", LIMITS)
def test_padding_is_exactly_zero_also_where_channels_have_a_centre(dtype: str) -> None:
    made = quantise(_draw(4, 16), dtype, CHANNELS)
    padded = Quantised(made.values.clone(), made.scales.clone(), made.channels)
    padded.scales[1] = 0
    assert not padded.float()[1].any()
    assert torch.equal(padded.float()[2], made.float()[2])


@pytest.mark.parametrize("magnitude", [1e30, 3e38, 1.0, 1e-30, 1e-37, 1e-39, 1e-42, 1.4e-45])
@pytest.mark.parametrize("dtype", LIMITS)
def test_huge_and_denormal_magnitudes_keep_to_half_a_step(dtype: str, magnitude: float) -> None:
    value = _draw(20, 16)
    value = (value / value.abs().amax() * magnitude).float()
    made = quantise(value, dtype)
    assert bool(torch.isfinite(made.scales).all())
    _, allowed = _by_hand(value, dtype, None)
    assert (abs(made.float().double() - value.double()).numpy() <= allowed + 2.0**-149).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels", [None, CHANNELS], ids=["tokens", "channels"])
@pytest.mark.parametrize("dtype", LIMITS)
def test_what_is_not_finite_shows_in_its_token_s_scale_and_in_no_other(
    dtype: str, channels: Tensor | None, value: float
) -> None:
    tokens = _draw(5, 16)
    tokens[2, 7] = value
    made = quantise(tokens, dtype, channels)
    assert torch.isfinite(made.scales).tolist() == [True, True, False, True, True]
    assert not bool(torch.isfinite(made.float()[2]).all())


def test_int8_loses_about_a_hundredth_and_less_where_channels_were_normalised() -> None:
    value = _draw(500, 384)
    uneven = value * torch.logspace(-1, 1, 384) + torch.linspace(-2, 2, 384)

    def lost(x: Tensor, dtype: str, channels: Tensor | None = None) -> float:
        return float((quantise(x, dtype, channels).float() - x).double().norm() / x.double().norm())

    assert 3e-3 < lost(value, "int8") < 2e-2
    assert 3e-3 < lost(uneven, "int8") < 5e-2
    assert lost(uneven, "int8", channels_of(uneven)) < 0.6 * lost(uneven, "int8")
    assert lost(value, "int8") < lost(value, "fp8") < 5e-2


# Channels


def test_channels_are_the_mean_and_the_deviation_over_tokens() -> None:
    value = _draw(300, 8) * torch.logspace(-0.3, 0.3, 8) + 5
    wide = value.double().numpy()
    wanted = np.stack([wide.mean(0), np.sqrt(((wide - wide.mean(0)) ** 2).mean(0))], 1)
    torch.testing.assert_close(channels_of(value).double(), torch.from_numpy(wanted), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3, 1e30, 1e-40])
@pytest.mark.parametrize("dtype", LIMITS)
def test_where_every_channel_is_constant_each_comes_back(dtype: str, constant: float) -> None:
    value = torch.full((33, 4), constant)
    channels = channels_of(value)
    assert bool((channels[:, 1] > 0).all())
    torch.testing.assert_close(quantise(value, dtype, channels).float(), value, rtol=1e-6, atol=1e-6)


def test_a_channel_constant_in_the_sample_does_not_drown_the_others_where_it_is_not() -> None:
    sample = _draw(100, 64)
    sample[:, 3] = 0.1 + 1e-8 * sample[:, 3]  # constant but for rounding
    channels = channels_of(sample)
    other = _draw(100, 64, seed=1)
    other[:, 3] = 0.2
    read = quantise(other, "int8", channels).float()
    assert float((read - other).norm() / other.norm()) < 0.1


@given(
    values=st.lists(
        st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3),
        min_size=1,
        max_size=6,
    ),
    dtype=st.sampled_from(sorted(LIMITS)),
    normalised=st.booleans(),
)
def test_whatever_is_finite_comes_back_within_half_a_step(
    values: list[list[float]], dtype: str, normalised: bool
) -> None:
    value = torch.tensor(values, dtype=torch.float32)
    channels = channels_of(value) if normalised else None
    made = quantise(value, dtype, channels)
    _, allowed = _by_hand(value, dtype, channels)
    assert bool(torch.isfinite(made.scales).all())
    assert (abs(made.float().double() - value.double()).numpy() <= allowed + 2.0**-149).all()
    assert int(made.values.float().abs().max()) <= LIMITS[dtype]


@given(power=st.integers(-60, 60), seed=st.integers(0, 1000), dtype=st.sampled_from(sorted(LIMITS)))
def test_a_power_of_two_only_moves_the_scale(power: int, seed: int, dtype: str) -> None:
    value = _draw(3, 8, seed=seed)
    one, two = quantise(value, dtype), quantise(value * 2.0**power, dtype)
    assert torch.equal(one.values.float(), two.values.float())
    assert torch.equal(one.scales * 2.0**power, two.scales)


def test_the_numbers_lie_in_memory_as_they_come_back_from_disk() -> None:
    """A convolution's tokens come transposed; a sum over them would round otherwise than over rows from disk."""
    for channels in (None, CHANNELS):
        made = quantise(_draw(5, 16, 9).mT, "int8", channels)
        assert made.values.is_contiguous()
        assert made.float().is_contiguous()


def test_selecting_and_counting_go_along_the_tokens() -> None:
    made = quantise(_draw(4, 3, 16), "fp8", CHANNELS)
    assert (made.shape, len(made), made[1:3].shape) == ((4, 3, 16), 4, (2, 3, 16))
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[1, 2] = mask[3, 0] = True
    assert torch.equal(made[mask].float(), made.float()[mask])
    assert sum(1 for _ in made.tensors()) == 3
