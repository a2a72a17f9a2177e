"""The law of the planes: what every number becomes, how it is rounded, and that the fused pass gives the same bits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_int8 import numerics, ranges
from lightning_int8.backends import load, onednn
from lightning_int8.backends.base import Request
from lightning_int8.generator import random_bits
from lightning_int8.magnitudes import BothAxes
from lightning_int8.measures import quantization_error
from lightning_int8.numerics import MIN_CLIP_VALUE, TRUTH_TABLE, absmax, dequantize, from_integers, largest_integer
from lightning_int8.policies import WIDTHS
from lightning_int8.spec import OperandSpec

STANDARD_ERRORS = 4.0
"""Distance from the expected value that chance alone exceeds once in 16,000."""

KEY = torch.tensor([1234, 0, 7])
BITS = st.sampled_from(WIDTHS)


def fused(x, clip_value, *, bits=8, affine=False, axis=None, stochastic=False, key=KEY):
    """The CPU backend's one-pass quantization, with the arguments of ``numerics.quantize``."""
    spec = OperandSpec(bits=bits, affine=affine, rounding="stochastic" if stochastic else "nearest")
    return load("onednn").quantize(x, clip_value, spec, axis, key)


def eager(x, clip_value, **arguments):
    return numerics.quantize(x, clip_value, key=KEY, **arguments)


def integers_of(q):
    """The integers that the planes stand for, zero point included, int64."""
    total = torch.zeros(q.shape, dtype=torch.int64)
    for plane in q.planes:
        total = total * numerics.PLANE_BASE + plane.data.long()
    return total


def same(a, b):
    """Whether two optional tensors agree in dtype, shape and every bit, NaN included."""
    if a is None or b is None:
        return a is b
    if (a.dtype, a.shape) != (b.dtype, b.shape) or not torch.equal(a.isnan(), b.isnan()):
        return False
    return torch.equal(a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0))


def assert_bit_equal(a, b):
    assert a.axis == b.axis
    assert len(a.planes) == len(b.planes)
    assert all(same(s, t) for s, t in zip(a.tensors(), b.tensors(), strict=True)), (a, b)


# --- The truth table -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [eager, fused])
@pytest.mark.parametrize("row", TRUTH_TABLE, ids=lambda row: row.case)
def test_truth_table(row, quantize):
    q = quantize(torch.tensor([row.x]), torch.tensor(row.clip_value))
    (plane,) = q.planes
    assert plane.data.dtype == torch.int8
    assert plane.data.item() == row.integer
    assert plane.zero_point is None
    assert same(plane.scale, torch.tensor(row.scale, dtype=torch.float32))


@pytest.mark.parametrize("quantize", [eager, fused])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_not_finite_shows_in_every_scale(bad, quantize):
    x = torch.tensor([[1.0, 2.0], [bad, 4.0]])
    for plane in quantize(x, torch.tensor([4.0, 4.0]), axis=0, bits=16).planes:
        assert plane.scale.isnan().all()


def test_the_smallest_clip_value_keeps_scales_normal_at_every_width():
    for bits in numerics.BITS:
        m = numerics.affine_map(torch.tensor(0.0), bits, affine=False)
        assert m.scale == MIN_CLIP_VALUE / largest_integer(bits)
        assert m.scale >= torch.finfo(torch.float32).tiny
        assert torch.isfinite(m.inverse)


# --- Planes ----------------------------------------------------------------------------------------------------------


def test_largest_integers():
    assert [largest_integer(bits) for bits in (8, 16, 24)] == [127, 32639, 8355711]


@pytest.mark.parametrize("bits", numerics.BITS)
def test_the_inverse_of_the_scale_is_rounded_once(bits):
    torch.manual_seed(0)
    clip_value = torch.rand(10_000) + 0.1
    exact = torch.tensor(float(largest_integer(bits)), dtype=torch.float64) / clip_value.double()
    assert torch.equal(numerics.affine_map(clip_value, bits, affine=False).inverse, exact.float())


@pytest.mark.parametrize("quantize", [eager, fused])
@pytest.mark.parametrize("bits", WIDTHS)
def test_planes_recombine_to_the_rounded_integer(bits, quantize):
    largest = largest_integer(bits)
    steps = torch.cat([torch.arange(-1000, 1001), torch.linspace(-largest, largest, 5001).long()])
    steps = steps[steps.abs() <= largest]
    q = quantize(steps.float(), torch.tensor(float(largest)), bits=bits)
    assert torch.equal(integers_of(q), steps)
    assert [p.data.dtype for p in q.planes] == [torch.int8] * (bits // 8)
    assert [p.scale.item() for p in q.planes] == [256.0**p for p in reversed(range(bits // 8))]
    assert q.planes[0].data.abs().max() <= 127


@given(bits=BITS, data=st.data())
@settings(deadline=None, max_examples=100)
def test_digits_are_balanced_and_sum_to_the_integer(bits, data):
    largest = largest_integer(bits)
    values = data.draw(st.lists(st.integers(-largest, largest), min_size=1, max_size=20))
    digits = numerics.digits(torch.tensor(values, dtype=torch.int32), bits // 8)
    assert len(digits) == bits // 8
    assert digits[0].abs().max() <= 127
    assert all(d.min() >= -128 and d.max() <= 127 for d in digits[1:])
    total = sum(d.long() * 256**p for p, d in enumerate(reversed(digits)))
    assert total.tolist() == values


@given(bits=BITS, data=st.data())
@settings(deadline=None, max_examples=50)
def test_dequantize_inverts_from_integers(bits, data):
    largest = largest_integer(bits)
    whole = st.integers(-largest, largest)
    values = torch.tensor(data.draw(st.lists(whole, min_size=1, max_size=20)), dtype=torch.int32)
    zero = data.draw(whole)
    step = torch.tensor(0.1)
    q = from_integers(values, step, torch.tensor(float(zero)), bits, None)
    assert torch.equal(dequantize(q), ((values.double() - zero) * step.double()).float())
    assert q.planes[0].data.shape == q.shape == values.shape
    assert_bit_equal(numerics.Quantized.from_tensors(q.tensors(), q.axis), q)


@given(
    values=st.lists(st.floats(-3.0, 3.0, width=32), min_size=1, max_size=40),
    exponent=st.integers(-8, 8),
    stochastic=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_the_flag_format_is_a_coarse_or_a_fine_code(values, exponent, stochastic):
    """FlagQE2 of Yang et al. 2019, with the fine code clipped to ±127, against a NumPy twin."""
    x = np.array(values, np.float32) * np.float32(2.0**exponent)
    limit = np.float32(2.0**exponent)  # R; the coarse step is R / 128
    q = eager(torch.from_numpy(x), torch.tensor(limit * 127 / 128), bits=9, stochastic=stochastic)
    coarse, fine = (p.data.numpy() for p in q.planes)
    assert not (coarse.astype(bool) & fine.astype(bool)).any()
    assert [p.scale.item() for p in q.planes] == [limit / 128, limit / 128**2]
    y = np.clip(x / (limit / 128), -127, 127)
    is_fine = np.abs(y) < 1
    assert not coarse[is_fine].any()
    assert not fine[~is_fine].any()
    exact = np.where(is_fine, y * 128, y)
    code = np.where(is_fine, fine, coarse)
    if stochastic:
        assert (np.abs(code - exact) <= 1).all()
    else:
        assert np.array_equal(code, np.clip(np.rint(exact), -127, 127))


def test_the_flag_format_keeps_what_eight_bits_lose():
    """Shares of exact zeros and cosine distances of methods.md 4a, Student-t(3)."""
    torch.manual_seed(0)
    x = torch.distributions.StudentT(3.0).sample((1_000_000,))
    clip_value = ranges.make("power_of_two", rounding="nearest").clip_value(x, None, None, 9)
    errors = quantization_error(x, [clip_value, clip_value], [8, 9], affine=False, axis=None)
    zeros = [float((dequantize(eager(x, clip_value, bits=bits)) == 0).float().mean()) for bits in (8, 9)]
    assert 0.2 < zeros[0] < 0.5
    assert zeros[1] < 0.01
    assert errors.cosine_distance[1] < 0.5 * errors.cosine_distance[0]


# --- Nearest rounding and zero points --------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("bits", [8, 16])
def test_nearest_rounding_errs_by_half_a_step_at_most(bits, axis, affine):
    torch.manual_seed(bits)
    x = torch.randn(7, 5, 6) * torch.logspace(-3, 3, 7)[:, None, None] + 0.3
    clip_value = absmax(x, axis)
    if affine:
        clip_value = torch.stack([absmax((-x).clamp(min=0), axis), absmax(x.clamp(min=0), axis)])
    q = fused(x, clip_value, bits=bits, axis=axis, affine=affine)
    step = numerics.along(q.planes[-1].scale, axis, x.dim())
    # The zero point is rounded too, so one end of an affine range may lie a second half step outside.
    limit = 1.0 if affine else 0.5
    assert ((dequantize(q) - x).abs() <= step * (limit + 2 ** (bits - 23))).all()


@given(
    low=st.floats(-(2.0**60), 2.0**60, width=32),
    high=st.floats(-(2.0**60), 2.0**60, width=32),
    bits=BITS,
    stochastic=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_an_affine_range_always_holds_zero_exactly(low, high, bits, stochastic):
    x = torch.tensor([low, high, 0.0])
    clip_value = torch.stack([(-x).clamp(min=0).max(), x.clamp(min=0).max()])
    for quantize in (eager, fused):
        q = quantize(x, clip_value, bits=bits, affine=True, stochastic=stochastic)
        zero = integers_of(numerics.Quantized(tuple(numerics.Plane(p.zero_point, p.scale) for p in q.planes)))
        assert zero.abs() <= largest_integer(bits)
        assert integers_of(q)[2] == zero
        assert dequantize(q)[2] == 0.0


def test_an_affine_range_of_one_sign_spends_all_levels_on_it():
    x = torch.linspace(0.0, 1.0, 2001)
    q = fused(x, torch.tensor([0.0, 1.0]), affine=True)
    assert q.planes[0].zero_point.item() == -127
    assert q.planes[0].data.unique().tolist() == list(range(-127, 128))
    assert (dequantize(q) - x).abs().max() <= 0.5 / 254 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_absmax_is_exact_float32_and_keeps_nan(dtype):
    x = torch.tensor([[1.0, -3.0, 0.0], [2.0, 2.5, 0.0]], dtype=dtype)
    for axis, expected in (
        (None, torch.tensor(3.0)),
        (0, torch.tensor([3.0, 2.5])),
        (-1, torch.tensor([2.0, 3.0, 0.0])),
    ):
        assert same(absmax(x, axis), expected)
    x[0, 0] = math.nan
    assert absmax(x, None).isnan()
    assert absmax(x, 0).isnan().tolist() == [True, False]
    assert absmax(x, -1).isnan().tolist() == [True, False, False]


# --- Stochastic rounding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_stochastic_rounding_is_unbiased(fraction, sign):
    n = 1_000_000
    x = torch.full((n,), sign * (3.0 + fraction))
    integers = fused(x, torch.tensor(127.0), stochastic=True).planes[0].data
    assert integers.unique().tolist() == sorted({sign * 3, sign * 4})
    standard_error = math.sqrt(fraction * (1 - fraction) / n)
    assert abs(integers.double().mean().item() - sign * (3.0 + fraction)) < STANDARD_ERRORS * standard_error


def test_a_value_on_the_grid_never_moves():
    x = torch.arange(-127.0, 128.0).repeat(1000)
    assert torch.equal(fused(x, torch.tensor(127.0), stochastic=True).planes[0].data.float(), x)


def overshooting_clip_value(largest=127.0):
    """A clip value whose product with its own rounded inverse exceeds the largest integer by one ulp."""
    clip_value = torch.linspace(1.0, 2.0, 10_001)
    return clip_value[clip_value * (largest / clip_value) > largest][0]


def test_hundred_million_draws_at_and_below_the_clip_value_stay_within_127():
    calls, n = 12, 8_400_000
    clip_value = overshooting_clip_value()
    x = torch.linspace(-1.001, 1.001, n) * clip_value
    x[: n // 4], x[n // 4 : n // 2] = clip_value, -clip_value
    assert calls * n >= 10**8
    for call in range(calls):
        low, high = fused(x, clip_value, stochastic=True, key=torch.tensor([3, 1, call])).planes[0].data.aminmax()
        assert (low, high) == (-127, 127)


def draws(key, n=1 << 20):
    """Uniform draws of one key, centred and scaled to variance 1."""
    bits = random_bits(torch.tensor(key), n, torch.device("cpu")).double()
    return (bits / 65536 - 0.5 + 2**-17) * math.sqrt(12)


def correlation(a, b):
    """Correlation in standard errors of independent draws."""
    n = min(len(a), len(b))
    return abs((a[:n] * b[:n]).mean().item()) * math.sqrt(n)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 16, 64, 255, 256, 1024, 4096, 65536])
def test_neighbouring_draws_are_uncorrelated(lag):
    u = draws([11, 0, 5])
    assert correlation(u, u[lag:]) < STANDARD_ERRORS
    assert correlation(u**2 - 1, u[lag:] ** 2 - 1) < STANDARD_ERRORS


@pytest.mark.parametrize(
    "other",
    [[12, 0, 5], [11, 1, 5], [11, 0, 6], [11, 5, 0], [0, 11, 5], [11 + 2**32, 0, 5], [-11, 0, 5], [11, 0, 5 + 2**20]],
    ids=["seed", "rank", "call", "rank and call swapped", "seed and rank swapped", "high seed", "minus", "far call"],
)
def test_other_seeds_ranks_and_calls_draw_uncorrelated_noise(other):
    u, v = draws([11, 0, 5]), draws(other)
    for shift in (0, 1, 2, 3, 64):
        assert correlation(u, v[shift:]) < STANDARD_ERRORS
        assert correlation(v, u[shift:]) < STANDARD_ERRORS


def test_noise_averages_out_over_calls():
    n, calls = 1 << 14, 256
    total = sum(draws([5, 0, call], n) for call in range(calls))
    assert abs(total.var().item() / calls - 1) < STANDARD_ERRORS * math.sqrt(2 / n)


def test_draws_are_uniform():
    n = 1 << 22
    bits = random_bits(torch.tensor([2, 3, 4]), n, torch.device("cpu")).long()
    for part in (bits >> 8, bits & 255):
        counts = torch.bincount(part, minlength=256).double()
        chi_squared = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
        assert abs(chi_squared - 255) < STANDARD_ERRORS * math.sqrt(2 * 255)


@given(n=st.integers(1, 3000), more=st.integers(0, 3000), seed=st.integers(-(2**63), 2**63 - 1))
@settings(deadline=None, max_examples=30)
def test_a_draw_depends_on_key_and_index_alone(n, more, seed):
    key = torch.tensor([seed, 2, 9])
    alone = random_bits(key, n, torch.device("cpu"))
    assert torch.equal(alone, random_bits(key, n + more, torch.device("cpu"))[:n])


@pytest.mark.parametrize("quantize", [eager, fused])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_a_draw_does_not_depend_on_strides_or_shape(axis, quantize):
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, 8)
    clip_value = absmax(x, axis)
    expected = quantize(x, clip_value, axis=axis, stochastic=True)
    strided = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not strided.is_contiguous()
    assert_bit_equal(quantize(strided, clip_value, axis=axis, stochastic=True), expected)
    if axis is None:
        flat = quantize(x.reshape(-1), clip_value, stochastic=True)
        assert torch.equal(flat.planes[0].data.reshape(x.shape), expected.planes[0].data)


# --- The fused pass and the definition -------------------------------------------------------------------------------

SPECIAL = (0.0, -0.0, 1e-45, -1e-40, 2.0**-96, 0.5, 1.5, -2.5, 126.5, 127.0, -128.0, 65504.0, 3.4e38, -3.4e38)
NOT_FINITE = (math.inf, -math.inf, math.nan)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def quantizations(draw):
    """Arguments of a quantization: ordinary, tiny, huge and non-finite elements and clip values."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    axis, affine = draw(st.sampled_from([None, 0, -1])), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape) * 10.0 ** draw(st.integers(-40, 30))
    special = SPECIAL + (NOT_FINITE if draw(st.booleans()) else ())
    flat = x.reshape(-1)
    for value in draw(st.lists(st.sampled_from(special), max_size=4)):
        flat[draw(st.integers(0, len(flat) - 1))] = value
    x = x.to(draw(st.sampled_from(DTYPES)))
    parts = [(-x).clamp(min=0), x.clamp(min=0)] if affine else [x]
    clip_value = torch.stack([absmax(p, axis) for p in parts]) if affine else absmax(x, axis)
    clip_value = clip_value * draw(st.sampled_from([1.0, 0.3, 0.0, 2.0**-120, math.inf, math.nan]))
    bits = draw(BITS) if affine else draw(st.sampled_from(numerics.BITS))
    options = {"bits": bits, "affine": affine, "axis": axis, "stochastic": draw(st.booleans())}
    return x, clip_value, options


@given(quantizations())
@settings(deadline=None, max_examples=400)
def test_the_fused_pass_gives_the_bits_of_the_definition(case):
    x, clip_value, options = case
    assert_bit_equal(fused(x, clip_value, **options), eager(x, clip_value, **options))


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_a_weight_is_measured_and_rounded_along_both_axes_at_once(data):
    shape = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 4), st.sampled_from([1, 3, 16, 63, 64, 65, 200])))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x = torch.randn(shape) * 10.0 ** data.draw(st.integers(-40, 30))
    special = SPECIAL + (NOT_FINITE if data.draw(st.booleans()) else ())
    for value in data.draw(st.lists(st.sampled_from(special), max_size=4)):
        x.view(-1)[data.draw(st.integers(0, x.numel() - 1))] = value
    statistics, requests = BothAxes(x), []
    for axis in (0, -1):
        clip_value = statistics.absmax(x, axis)
        assert same(clip_value, absmax(x, axis))
        requests.append(Request(clip_value * data.draw(st.sampled_from([1.0, 0.3])), OperandSpec(), axis, KEY))
    for made, request in zip(load("onednn").quantize_both(x, *requests), requests, strict=True):
        assert_bit_equal(made, eager(x, request.clip_value, axis=request.axis))


@pytest.mark.parametrize("affine", [False, True])
def test_maps_that_a_validation_has_met_first_serve_training(affine):
    x, clip_value = torch.randn(4, 8), torch.rand(2 if affine else ())
    with torch.inference_mode():
        fused(x, clip_value, affine=affine)
    (plane,) = fused(x, clip_value, affine=affine).planes  # found again by its clip value
    assert not plane.scale.is_inference()
    assert plane.zero_point is None or not plane.zero_point.is_inference()


@pytest.mark.parametrize("threads", [1, 3])
def test_both_planes_of_a_weight_take_one_walk(threads, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(onednn, "QUANTIZE", None)  # what walks once for each plane
    monkeypatch.setattr(numerics, "quantize", lambda *_, **__: pytest.fail("quantized by itself"))
    x = torch.randn(300, 3, 3, 70)
    specs = [OperandSpec(), OperandSpec(), OperandSpec(rounding="stochastic")]
    requests = [Request(absmax(x, a), s, a, KEY) for a, s in zip((0, -1, -1), specs, strict=True)]
    assert [q.axis for q in load("onednn").quantize_both(x, *requests[:2])] == [0, -1]
    whole = requests[1]._replace(clip_value=torch.tensor(3.0))  # one for all, as a range rule may decide
    for other in (requests[2], whole):
        with pytest.raises(pytest.fail.Exception):
            load("onednn").quantize_both(x, requests[0], other)


@pytest.mark.parametrize("axis", [0, -1])
def test_clip_values_may_have_any_strides_and_dtype(axis):
    x, pairs = torch.randn(8, 8), torch.rand(8, 2)
    for clip_value in (pairs.t(), pairs.bfloat16().t(), torch.rand(2, 1).expand(2, 8)):
        options = {"affine": True, "axis": axis}
        assert_bit_equal(fused(x, clip_value, **options), eager(x, clip_value.float(), **options))


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_the_fused_pass_agrees_on_a_large_tensor(axis, stochastic):
    torch.manual_seed(1)
    x = torch.randn(33, 17, 129).bfloat16()
    options = {"axis": axis, "stochastic": stochastic}
    assert_bit_equal(fused(x, absmax(x, axis), **options), eager(x, absmax(x, axis), **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_threads_share_the_fused_pass_and_draw_the_same(axis, dtype, monkeypatch):
    torch.manual_seed(1)
    x = torch.randn(301, 37, 13).to(dtype)
    options = {"axis": axis, "stochastic": True, "bits": 16}
    expected = fused(x, absmax(x, axis), **options)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # odd pieces: words are shared across their ends
    assert_bit_equal(fused(x, absmax(x, axis), **options), expected)
    assert_bit_equal(expected, eager(x, absmax(x, axis), **options))


def test_the_backend_uses_the_fused_pass_where_numba_is_installed():
    pytest.importorskip("numba")
    assert onednn.QUANTIZE is not None


def test_without_numba_the_backend_falls_back_to_the_definition(monkeypatch):
    x = torch.randn(9, 8)
    expected = fused(x, absmax(x, -1), axis=-1, stochastic=True)
    monkeypatch.setattr(onednn, "QUANTIZE", None)
    assert_bit_equal(fused(x, absmax(x, -1), axis=-1, stochastic=True), expected)
