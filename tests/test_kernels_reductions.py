"""`absmax.cu` and `histogram.cu` exactly, `error_sums.cu` to the rounding of float64 sums."""

import pytest
import torch
from emulator import Machine
from emulator.device import EmulatedDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import needs_compiler

from lightning_int8 import numerics
from lightning_int8.kernels.quantize import quantize
from lightning_int8.kernels.reductions import BINS_PER_OCTAVE, OCTAVES, SUMS, absmax, error_sums, histogram
from lightning_int8.policies import WIDTHS
from lightning_int8.spec import OperandSpec

pytestmark = needs_compiler
RELATIVE_ERROR = 1e-12
"""Of float64 sums in another order, relative to the sum of magnitudes."""


@st.composite
def tensors(draw, special=(None, 0.0, float("nan"), float("inf"), -0.0)):
    shape = (*draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)), draw(st.integers(1, 150)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape) * 10 ** draw(st.floats(-3, 3))
    if draw(st.booleans()):
        x = x.abs() * draw(st.sampled_from([1, -1]))
    value = draw(st.sampled_from(special))
    if value is not None:
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    return x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


def devices(draw):
    return EmulatedDevice(machine=Machine(schedule=draw(st.integers(0, 3))), multiprocessors=draw(st.integers(1, 20)))


@settings(deadline=None, max_examples=100)
@given(st.data(), tensors(), st.sampled_from([None, 0, -1]))
def test_absmax_of_tensor_row_and_column(data, x, axis):
    device = devices(data.draw)
    assert torch.equal(absmax(device, x, axis).nan_to_num(-1.0), numerics.absmax(x, axis).nan_to_num(-1.0))
    expected = torch.stack([numerics.absmax(side, axis) for side in ((-x).clamp(min=0), x.clamp(min=0))])
    assert torch.equal(absmax(device, x, axis, sides=True).nan_to_num(-1.0), expected.nan_to_num(-1.0))


def expected_histogram(x, largest):
    """By the definition: octave and position within it, of each finite magnitude."""
    values = x.float().abs().double().flatten()
    values = values[torch.isfinite(values)]
    bottom = 2.0 ** (torch.frexp(largest.double()).exponent.item() - 1 - (OCTAVES - 1))
    mantissa, exponent = torch.frexp(values / bottom)  # mantissa in [0.5, 1)
    bins = (exponent - 1) * BINS_PER_OCTAVE + ((2 * mantissa - 1) * BINS_PER_OCTAVE).floor()
    bins = torch.where(values < bottom, 0.0, bins).long().clamp(0, OCTAVES * BINS_PER_OCTAVE - 1)
    return torch.bincount(bins, minlength=OCTAVES * BINS_PER_OCTAVE)


@settings(deadline=None, max_examples=60)
@given(st.data(), tensors(special=(None, 0.0, float("nan"), float("inf"), 1e-30)))
def test_histogram_counts_every_finite_magnitude_once(data, x):
    largest = numerics.absmax(x[torch.isfinite(x)].reshape(1, -1), None) if torch.isfinite(x).any() else torch.ones(())
    if largest == 0:
        largest = torch.ones(())
    counts = histogram(devices(data.draw), x, largest)
    assert torch.equal(counts.long(), expected_histogram(x, largest))
    assert counts.sum() == torch.isfinite(x).sum()


@settings(deadline=None, max_examples=60)
@given(st.data(), tensors(special=(None,)), st.sampled_from([None, 0, -1]), st.booleans(), st.sampled_from(WIDTHS))
def test_error_sums(data, x, axis, affine, bits):
    device = devices(data.draw)
    clip_value = absmax(device, x, axis, sides=affine) * 0.7
    made = quantize(device, x, clip_value, OperandSpec(bits=bits, affine=affine), axis, torch.zeros(3).long())
    sums = error_sums(device, x, made)
    g, e = x.double(), numerics.dequantize(made).double() - x.double()
    terms = (g * g, g * e, e * e, g.abs(), (g + e).abs())
    for name, term in zip(SUMS, terms, strict=True):
        scale = term.abs().sum().clamp(min=1e-300)
        assert (getattr(sums, name) - term.sum()).abs() <= RELATIVE_ERROR * scale


@pytest.mark.parametrize("multiprocessors", [1, 9])
def test_error_sums_have_one_order(multiprocessors):
    x = torch.randn(500, 33)
    device = EmulatedDevice(multiprocessors=multiprocessors)
    made = quantize(device, x, absmax(device, x, None), OperandSpec(), None, torch.zeros(3).long())
    first = error_sums(device, x, made)
    for schedule in range(4):
        again = EmulatedDevice(machine=Machine(schedule=schedule), multiprocessors=multiprocessors)
        assert all(torch.equal(getattr(error_sums(again, x, made), n), getattr(first, n)) for n in SUMS)


def test_the_empty_tensor():
    assert absmax(EmulatedDevice(), torch.zeros(0, 4), None) == 0
    assert histogram(EmulatedDevice(), torch.zeros(0, 4), torch.ones(())).sum() == 0
