"""Direct, shift and constant quantization against NumPy twins of the paper's formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_int8.generator import random_bits
from lightning_int8.grids import (
    constant_quantize,
    direct_quantize,
    grid_step,
    power_of_two_range,
    shift_quantize,
)

KEY = torch.tensor([5, 2, 9])
STANDARD_ERRORS = 4.0
SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=3)


def numpy_range(x):
    """R(x) = 2^round(log2 max|x|)."""
    return 2.0 ** np.round(np.log2(np.abs(x).max()))


def numpy_q(x, k):
    return np.round(x * 2.0 ** (k - 1)) / 2.0 ** (k - 1)


def numpy_sq(x, k):
    d, r = 2.0 ** (1 - k), numpy_range(x)
    return r * np.clip(numpy_q(x / r, k), -1 + d, 1 - d)


def numpy_cq(x, dr, k, key):
    """Clip(Sr(dr·x / R), -dr + 1, dr - 1) / 2^(k - 1); Sr rounds the magnitude up where 16 bits fall below the rest."""
    y = dr * x / numpy_range(x)
    whole = np.floor(np.abs(y))
    up = random_bits(key, x.size, torch.device("cpu")).numpy().reshape(x.shape) / 2**16 < np.abs(y) - whole
    return np.clip(np.sign(y) * (whole + up), -dr + 1, dr - 1) / 2.0 ** (k - 1)


def draw(shape, seed, exponent):
    """Gaussian values at some power of two, float64."""
    return np.random.default_rng(seed).standard_normal(shape) * 2.0**exponent


@given(SHAPES, st.integers(0, 99), st.integers(-40, 20), st.sampled_from((2, 8, 13, 16, 24)))
@settings(deadline=None)
def test_the_formulas(shape, seed, exponent, bits):
    x = draw(shape, seed, exponent)
    t = torch.from_numpy(x)
    assert power_of_two_range(t).item() == numpy_range(x)
    np.testing.assert_array_equal(direct_quantize(t, bits).numpy(), numpy_q(x, bits))
    np.testing.assert_array_equal(shift_quantize(t, bits).numpy(), numpy_sq(x, bits))
    for dr in (128, 100, 2):
        np.testing.assert_array_equal(constant_quantize(t, dr, bits, KEY).numpy(), numpy_cq(x, dr, bits, KEY))
    np.testing.assert_array_equal(t.numpy(), draw(shape, seed, exponent))  # the argument stays as it was


@pytest.mark.parametrize("exponent", range(-149, 128))
def test_the_range_is_an_exact_power_of_two_at_every_size(exponent):
    # The square root of 2 times a power lies between two floats: below it log2 rounds down, above it up.
    assert power_of_two_range(torch.tensor([-(2.0**exponent)])).item() == 2.0**exponent
    if -120 < exponent < 127:
        below, above = np.float32(math.sqrt(2)), np.nextafter(np.float32(math.sqrt(2)), np.float32(2))
        assert float(below) < math.sqrt(2) < float(above)
        for factor, expected in ((below, exponent), (above, exponent + 1)):
            x = torch.tensor([0.0, float(factor) * 2.0**exponent])
            assert power_of_two_range(x).item() == 2.0**expected


def test_direct_quantization_does_not_clip_and_ties_go_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 300.25]) / 128
    assert (direct_quantize(x, 8) * 128).tolist() == [0, 2, 2, 0, -2, 300]


def test_shift_quantization_saturates_at_127_steps():
    x = torch.tensor([1.3, -1.3, 1.0, 127.4 / 128, 0.5])
    assert (shift_quantize(x, 8) * 128).tolist() == [127, -127, 127, 127, 64]


def test_constant_quantization_is_unbiased_and_drops_the_magnitude():
    count = 40_000
    x = torch.full((count,), -0.7013)
    x[0] = 1.0  # sets the range
    steps = constant_quantize(x, 128, 15, KEY)[1:] * 2**14
    expected = -0.7013 * 128
    assert set(steps.tolist()) == {math.floor(expected), math.ceil(expected)}
    assert abs(steps.mean().item() - expected) < STANDARD_ERRORS * 0.5 / math.sqrt(count)
    assert torch.equal(constant_quantize(x * 2**-30, 128, 15, KEY)[1:], steps / 2**14)


def test_zeros_stay_zeros_and_what_is_not_finite_shows():
    zeros = torch.zeros(3, 2)
    assert power_of_two_range(zeros) == 0
    assert power_of_two_range(torch.empty(0)) == 0
    for quantize in (lambda x: shift_quantize(x, 8), lambda x: constant_quantize(x, 128, 15, KEY)):
        assert torch.equal(quantize(zeros), zeros)
        assert quantize(torch.empty(0, 4)).shape == (0, 4)
        for bad in (math.inf, -math.inf, math.nan):
            assert quantize(torch.tensor([1.0, bad, 0.0])).isnan().all()
    assert direct_quantize(torch.tensor([math.nan]), 8).isnan().all()


@pytest.mark.parametrize("bits", [1, 25, 8.0, "8", None])
def test_widths_are_checked(bits):
    with pytest.raises(ValueError, match=r"bits: .* is not an integer from 2 to 24"):
        grid_step(bits)
