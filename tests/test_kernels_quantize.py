"""`quantize.cu` against `numerics.quantize`: planes, scales and zero points bit for bit."""

import pytest
import torch
from emulator.device import EmulatedDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import needs_compiler

from lightning_int8 import numerics
from lightning_int8.kernels.planes import pitch
from lightning_int8.kernels.quantize import quantize, quantized
from lightning_int8.numerics import BITS, FLAG_BITS, TRUTH_TABLE
from lightning_int8.policies import WIDTHS
from lightning_int8.spec import OperandSpec

pytestmark = needs_compiler
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def made_by(device, x, clip_value, spec, axis, key):
    key = key if spec.rounding == "stochastic" else None
    return quantized(*quantize(device, x, clip_value, spec.bits, spec.affine, axis, key), x.shape[-1], axis)


def check(x, clip_value, spec, axis, key, multiprocessors=1):
    made = made_by(EmulatedDevice(multiprocessors=multiprocessors), x, clip_value, spec, axis, key)
    stochastic = spec.rounding == "stochastic"
    expected = numerics.quantize(
        x, clip_value, bits=spec.bits, affine=spec.affine, axis=axis, stochastic=stochastic, key=key
    )
    equal_planes(made, expected)
    for plane in made.planes:
        storage = plane.data.as_strided((*x.shape[:-1], pitch(x.shape[-1])), plane.data.stride())
        assert not storage[..., x.shape[-1] :].any()  # the products of the padding must vanish


def equal_planes(made, expected):
    """Planes, scales and zero points of ``made``, on any device, are those of ``expected`` on the CPU."""
    assert made.axis == expected.axis
    assert len(made.planes) == len(expected.planes)
    for plane, truth in zip(made.planes, expected.planes, strict=True):
        assert torch.equal(plane.data.cpu(), truth.data)
        assert plane.scale.shape == truth.scale.shape
        assert torch.equal(plane.scale.cpu().nan_to_num(-1.0), truth.scale.nan_to_num(-1.0))
        assert (plane.zero_point is None) == (truth.zero_point is None)
        if truth.zero_point is not None:
            assert torch.equal(plane.zero_point.cpu(), truth.zero_point)


@st.composite
def cases(draw):
    shape = (*draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)), draw(st.integers(1, 70)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape) * 10 ** draw(st.floats(-12, 12))
    special = draw(st.sampled_from([None, None, None, 0.0, float("nan"), float("inf"), -float("inf")]))
    if special is not None:
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = special
    x = x.to(draw(st.sampled_from(DTYPES)))
    axis, affine = draw(st.sampled_from([None, 0, -1])), draw(st.booleans())
    sides = (x.float().nan_to_num(0.0).neg().clamp(min=0), x.float().nan_to_num(0.0).clamp(min=0))
    clips = [numerics.absmax(s.clamp(max=3e38), axis) for s in sides]
    clip_value = torch.stack(clips) if affine else torch.maximum(*clips)
    clip_value = clip_value * draw(st.sampled_from([1.0, 0.5, 0.01, 0.0, 2.0, float("nan"), float("inf")]))
    rounding = draw(st.sampled_from(["nearest", "stochastic"]))
    spec = OperandSpec(bits=draw(st.sampled_from(WIDTHS if affine else BITS)), affine=affine, rounding=rounding)
    key = torch.tensor([draw(st.integers(-(2**63), 2**63 - 1)), draw(st.integers(0, 7)), draw(st.integers(0, 2**40))])
    return x, clip_value, spec, axis, key, draw(st.integers(1, 5))


@settings(deadline=None, max_examples=150)
@given(cases())
def test_every_kind_of_operand(case):
    check(*case)


@pytest.mark.parametrize("row", TRUTH_TABLE, ids=lambda row: row.case)
def test_truth_table(row):
    check(torch.tensor([[row.x]]), torch.tensor(row.clip_value), OperandSpec(), None, torch.zeros(3, dtype=torch.int64))


def test_the_flag_format_where_coarse_and_fine_meet():
    steps = torch.tensor([[0.0, 0.004, 0.99, 0.999, 1.0, 1.001, 1.5, 126.5, 127.0, 128.0]])
    check(torch.cat((steps, -steps)), torch.tensor(127.0), OperandSpec(bits=FLAG_BITS), None, None)


def test_a_draw_does_not_depend_on_the_launch():
    x, key = torch.randn(301, 7), torch.tensor([1, 2, 3])
    drawn = [
        made_by(EmulatedDevice(multiprocessors=n), x, torch.tensor(3.0), OperandSpec(rounding="stochastic"), None, key)
        for n in (1, 50)
    ]
    assert torch.equal(drawn[0].planes[0].data, drawn[1].planes[0].data)


def test_an_empty_tensor_has_a_scale():
    check(torch.zeros(0, 5), torch.tensor(2.0), OperandSpec(), None, torch.zeros(3, dtype=torch.int64))


def test_a_wrong_multiplier_in_the_hash_would_be_seen():
    broken = EmulatedDevice(edits={"random_bits.cuh": ("0x846CA68Bu", "0x846CA68Du")})
    x, key, spec = torch.randn(40, 40), torch.tensor([1, 2, 3]), OperandSpec(rounding="stochastic")
    made = made_by(broken, x, torch.tensor(3.0), spec, None, key)
    expected = numerics.quantize(x, torch.tensor(3.0), stochastic=True, key=key)
    assert not torch.equal(made.planes[0].data, expected.planes[0].data)
