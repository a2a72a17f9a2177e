"""`absmax.cu` and `histogram.cu` exactly, `error_sums.cu` to the rounding of float64 sums."""

import pytest
import torch
from emulator import Machine
from emulator.device import EmulatedDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import needs_compiler

from lightning_int8 import measures, numerics
from lightning_int8.kernels.reductions import absmax, error_sums, histogram
from lightning_int8.magnitudes import STATISTICS
from lightning_int8.numerics import BITS
from lightning_int8.policies import WIDTHS

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


@settings(deadline=None, max_examples=60)
@given(st.data(), tensors(special=(None, 0.0, float("nan"), float("inf"), 1e-30)))
def test_histogram_counts_every_finite_magnitude_once(data, x):
    largest = numerics.absmax(x[torch.isfinite(x)].reshape(1, -1), None) if torch.isfinite(x).any() else torch.ones(())
    if largest == 0:
        largest = torch.ones(())
    counts = histogram(devices(data.draw), x, largest)
    assert torch.equal(counts.long(), STATISTICS.histogram(x, largest))
    assert counts.sum() == torch.isfinite(x).sum()


@settings(deadline=None, max_examples=100)
@given(st.data(), tensors(special=(None, 0.0, float("nan"), float("inf"))), st.sampled_from([None, 0, -1]))
def test_errors_at_several_widths(data, x, axis):
    device, affine = devices(data.draw), data.draw(st.booleans())
    bits = data.draw(st.lists(st.sampled_from(WIDTHS if affine else BITS), min_size=1, max_size=3))
    shares = [data.draw(st.sampled_from([1.0, 0.7, 0.01, 0.0, float("nan")])) for _ in bits]
    clip_values = torch.stack([absmax(device, x.nan_to_num(0.0, 0.0, 0.0), axis, sides=affine) * s for s in shares])
    made = error_sums(device, x, clip_values, bits, affine, axis)
    if x.isfinite().all():
        expected = measures.error_sums(x, list(clip_values), bits, affine, axis)
        gg, _, ee, *others = expected.unbind(-1)
        magnitudes_of_terms = torch.stack([gg, (gg + ee) / 2, ee, *others], -1)
        assert torch.equal(made.isnan(), expected.isnan())
        assert not ((made - expected).abs() > RELATIVE_ERROR * magnitudes_of_terms).any()
    else:
        assert not made[:, :4].isfinite().any()


@pytest.mark.parametrize("multiprocessors", [1, 9])
def test_error_sums_have_one_order(multiprocessors):
    x = torch.randn(500, 33)
    first = None
    for schedule in range(4):
        device = EmulatedDevice(machine=Machine(schedule=schedule), multiprocessors=multiprocessors)
        sums = error_sums(device, x, absmax(device, x, None).expand(3), [8, 16, 24], False, None)
        first = sums if first is None else first
        assert torch.equal(sums, first)


def test_the_empty_tensor():
    assert absmax(EmulatedDevice(), torch.zeros(0, 4), None) == 0
    assert histogram(EmulatedDevice(), torch.zeros(0, 4), torch.ones(())).sum() == 0
