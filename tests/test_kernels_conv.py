"""Convolutions of every family against `reference`: sums and scaled results bit for bit."""

from math import prod

import numpy as np
import pytest
import torch
from emulator import Machine
from emulator.device import EmulatedDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import SCHEDULES, SMALL, expected_sums, needs_compiler, random_plane, scaled
from test_conformance import geometries, shapes

from lightning_int8.geometry import ConvGeometry
from lightning_int8.kernels import convolution as launches
from lightning_int8.kernels import split, variants
from lightning_int8.kernels.convolution import convolution
from lightning_int8.kernels.parameters import fast_divisor
from lightning_int8.kernels.result import Result
from lightning_int8.numerics import INT8_MAX, LOWER_PLANE_MAX
from lightning_int8.spec import CHANNEL_AXIS, CONTRACTIONS, INT32_MAX

pytestmark = needs_compiler


def geometry_2d(size=9, kernel=3, stride=1, padding=1, dilation=1, groups=1):
    both = {"kernel_size": (kernel,) * 2, "stride": (stride,) * 2, "dilation": (dilation,) * 2}
    return ConvGeometry(input_size=(size, size + 1), padding=((padding, padding),) * 2, groups=groups, **both)


def operands(contraction, geometry, n_in, n_out, per_channel=(False, False), affine=(False, False), extreme=(0, 0)):
    planes = []
    for i, (side, shape) in enumerate(zip(("lhs", "rhs"), shapes(contraction, geometry, 2, n_in, n_out), strict=True)):
        axis = CHANNEL_AXIS.get((contraction, side)) if per_channel[i] else None
        planes.append(random_plane(shape, None if axis is None else shape[axis], affine[i], extreme[i]))
    return planes


def check(device, variant, contraction, geometry, a, b):
    sums = expected_sums(contraction, a, b, geometry)
    assert torch.equal(convolution(device, contraction, a, b, geometry, Result(dtype=torch.int64), variant), sums)
    expected = scaled(sums, contraction, a, b, geometry)
    assert torch.equal(convolution(device, contraction, a, b, geometry, None, variant), expected)


@pytest.mark.parametrize(("schedule", "copies"), SCHEDULES)
@pytest.mark.parametrize("contraction", CONTRACTIONS)
@pytest.mark.parametrize("family", SMALL)
def test_every_schedule(family, contraction, schedule, copies):
    arch, variant = SMALL[family]
    device = EmulatedDevice(arch, Machine(schedule=schedule, copies=copies))
    torch.manual_seed(schedule)
    geometry = geometry_2d(stride=2, groups=2)
    check(device, variant, contraction, geometry, *operands(contraction, geometry, 32, 16))


@st.composite
def cases(draw):
    contraction, geometry = draw(st.sampled_from(CONTRACTIONS)), draw(geometries())
    torch.manual_seed(draw(st.integers(0, 2**31)))
    wide = [1, 3, 16, 20] if geometry.groups == 1 else [1, 2, 16]
    n_in, n_out = draw(st.sampled_from(wide)), draw(st.sampled_from(wide))
    flags = [draw(st.tuples(st.booleans(), st.booleans())) for _ in range(2)]
    extreme = draw(st.tuples(st.sampled_from([0, 1, -1]), st.sampled_from([0, 1, -1])))
    a, b = operands(contraction, geometry, n_in, n_out, *flags, extreme)
    return draw(st.sampled_from(sorted(SMALL))), contraction, geometry, a, b, draw(st.integers(1, 20))


@settings(deadline=None, max_examples=100)
@given(cases())
def test_every_geometry_scale_and_zero_point(case):
    family, contraction, geometry, a, b, multiprocessors = case
    arch, variant = SMALL[family]
    check(EmulatedDevice(arch, multiprocessors=multiprocessors), variant, contraction, geometry, a, b)


@pytest.mark.slow
@pytest.mark.parametrize("contraction", CONTRACTIONS)
@pytest.mark.parametrize(
    ("arch", "variant"),
    [
        ("sm_80", variants.IMMA_WIDE),
        ("sm_75", variants.IMMA_SM75_LARGE),
        ("sm_61", variants.DP4A_LARGE),
        ("sm_90a", variants.WGMMA_WIDE),
    ],
)
def test_large_tiles(arch, variant, contraction):
    geometry = geometry_2d(size=12)
    check(EmulatedDevice(arch), variant, contraction, geometry, *operands(contraction, geometry, 40, 130))


@pytest.mark.parametrize("family", SMALL)
def test_stride_two_does_no_work_on_inserted_zeros(family):
    """Each residue of a 3x3 kernel is summed over the taps that reach it: 4 + 2 + 2 + 1, nine in all."""
    arch, variant = SMALL[family]
    geometry = geometry_2d(size=8, stride=2)
    taps = [prod(len(d.taps) for d in residue.dims) for residue in geometry.residues()]
    assert sorted(taps) == [1, 2, 2, 4]
    device = EmulatedDevice(arch)
    g, w = operands("grad_input", geometry, 16, 16)
    convolution(device, "grad_input", g, w, geometry, None, variant)
    assert device.launches == ["conv_grad_input"] * 4


def test_positions_that_no_tap_reaches_show_a_nan_scale():
    geometry = geometry_2d(kernel=1, stride=3, padding=0)
    g, w = operands("grad_input", geometry, 3, 5)
    w.scale.fill_(torch.nan)
    assert convolution(EmulatedDevice(), "grad_input", g, w, geometry).isnan().all()


@pytest.mark.parametrize("groups", [1, 3, 16])
def test_long_sums_of_grad_weight_are_split(groups, monkeypatch):
    """Lowered limits stand for many positions: the slabs are those of long sums, only shorter."""
    monkeypatch.setattr(split, "RAW_LIMIT", 100)
    monkeypatch.setattr(launches, "DIRECT_LIMIT", 100)
    geometry = geometry_2d(size=18, groups=groups)
    device = EmulatedDevice()
    a, b = operands("grad_weight", geometry, 2, 2, (True, True), (True, True), (1, -1))
    check(device, variants.IMMA_SMALL, "grad_weight", geometry, a, b)
    assert "conv_grad_weight_finish" in device.launches


def test_the_limit_of_direct_sums_is_that_of_int32():
    largest = (LOWER_PLANE_MAX + INT8_MAX) ** 2
    assert launches.DIRECT_LIMIT * largest <= INT32_MAX < (launches.DIRECT_LIMIT + 1) * largest


def test_bias_and_narrow_results():
    geometry = geometry_2d()
    x, w = operands("output", geometry, 4, 6, (False, True))
    bias = torch.randn(6)
    expected = scaled(expected_sums("output", x, w, geometry), "output", x, w, geometry) + bias
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = convolution(EmulatedDevice(), "output", x, w, geometry, Result(dtype=dtype, bias=bias))
        assert torch.equal(got, expected.to(dtype))


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_division_by_multiplication_is_exact(divisor, dividend):
    for n in (dividend, dividend // divisor * divisor, max(dividend // divisor * divisor - 1, 0)):
        fields = fast_divisor(divisor)
        high = (n * fields["multiplier"]) >> 32
        assert (n if divisor == 1 else high >> fields["shift"]) == n // divisor
        assert all(0 <= v < 2**32 for v in fields.values())


@pytest.mark.parametrize(
    ("contraction", "file", "text", "replacement"),
    [
        ("output", "conv_sources.cuh", "return image.fill ? image.fill + channel : nullptr;", "return nullptr;"),
        ("output", "conv_sources.cuh", "tap = row;", "tap = row + 1;"),
        (
            "grad_input",
            "conv_sources.cuh",
            "h * weight.step[1] + w * weight.step[2]",
            "w * weight.step[1] + h * weight.step[2]",
        ),
        ("grad_weight", "conv_parameters.cuh", "group * t.group_channels + channel,", "channel,"),
    ],
    ids=["padding is not the zero point", "wrong tap", "taps transposed", "scale of another group"],
)
def test_planted_bugs_are_seen(contraction, file, text, replacement):
    torch.manual_seed(0)
    geometry = geometry_2d(stride=2 if contraction == "grad_input" else 1, groups=2)
    a, b = operands(contraction, geometry, 16, 16, (True, True), (True, True))
    device = EmulatedDevice(edits={file: (text, replacement)})
    got = convolution(device, contraction, a, b, geometry, None, variants.IMMA_SMALL)
    assert not torch.equal(got, scaled(expected_sums(contraction, a, b, geometry), contraction, a, b, geometry))


def test_random_planes_reach_the_ends_of_int8():
    values = np.unique(random_plane((100, 100)).data.numpy())
    assert (values[0], values[-1]) == (-128, 127)
