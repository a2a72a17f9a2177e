"""Matrix products of every family against `reference`: sums and scaled results bit for bit."""

import pytest
import torch
from emulator import Machine
from emulator.device import EmulatedDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import SCHEDULES, SMALL, expected_sums, needs_compiler, random_plane, scaled

from lightning_int8.kernels import split, variants
from lightning_int8.kernels.gemm import LAYOUTS, gemm
from lightning_int8.kernels.result import Result
from lightning_int8.numerics import LOWER_PLANE_MAX
from lightning_int8.spec import INT32_MAX

pytestmark = needs_compiler


def operands(contraction, m, n, k, per_channel=(False, False), affine=(False, False), extreme=(0, 0)):
    left = random_plane(
        (k, m) if contraction == "grad_weight" else (m, k), m if per_channel[0] else None, affine[0], extreme[0]
    )
    right = random_plane(
        (n, k) if contraction == "output" else (k, n), n if per_channel[1] else None, affine[1], extreme[1]
    )
    return left, right


def check(device, variant, contraction, a, b):
    sums = expected_sums(contraction, a, b)
    assert torch.equal(gemm(device, contraction, a, b, Result(dtype=torch.int64), variant), sums)
    assert torch.equal(gemm(device, contraction, a, b, None, variant), scaled(sums, contraction, a, b))


@pytest.mark.parametrize(("schedule", "copies"), SCHEDULES)
@pytest.mark.parametrize("contraction", LAYOUTS)
@pytest.mark.parametrize("family", SMALL)
def test_every_schedule(family, contraction, schedule, copies):
    arch, variant = SMALL[family]
    device = EmulatedDevice(arch, Machine(schedule=schedule, copies=copies))
    torch.manual_seed(schedule)
    check(device, variant, contraction, *operands(contraction, 80, 72, 700))  # more tiles than buffers


@st.composite
def cases(draw):
    contraction = draw(st.sampled_from(sorted(LAYOUTS)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    m, n, k = draw(st.integers(1, 140)), draw(st.integers(1, 140)), draw(st.integers(1, 300))
    flags = [draw(st.tuples(st.booleans(), st.booleans())) for _ in range(2)]
    per_channel = (flags[0][0] and contraction == "grad_weight", flags[0][1])
    extreme = draw(st.tuples(st.sampled_from([0, 1, -1]), st.sampled_from([0, 1, -1])))
    a, b = operands(contraction, m, n, k, per_channel, flags[1], extreme)
    return draw(st.sampled_from(sorted(SMALL))), contraction, a, b, draw(st.integers(1, 20))


@settings(deadline=None, max_examples=60)
@given(cases())
def test_every_shape_scale_and_zero_point(case):
    family, contraction, a, b, multiprocessors = case
    arch, variant = SMALL[family]
    check(EmulatedDevice(arch, multiprocessors=multiprocessors), variant, contraction, a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "variant"),
    [
        ("sm_80", variants.IMMA_WIDE),
        ("sm_80", variants.IMMA_LARGE),
        ("sm_86", variants.IMMA_LARGE_3),
        ("sm_75", variants.IMMA_SM75_LARGE),
        ("sm_61", variants.DP4A_LARGE),
        ("sm_90a", variants.WGMMA_WIDE),
        ("sm_90a", variants.WGMMA_LARGE),
    ],
)
@pytest.mark.parametrize("contraction", LAYOUTS)
def test_large_tiles(contraction, arch, variant):
    check(EmulatedDevice(arch), variant, contraction, *operands(contraction, 150, 300, 200))


@pytest.mark.parametrize("family", SMALL)
def test_result_types_bias_and_earlier_planes(family):
    arch, variant = SMALL[family]
    a, b = operands("output", 70, 35, 90, (False, True))
    addend, bias = torch.randn(70, 35), torch.randn(35)
    total = addend + scaled(expected_sums("output", a, b), "output", a, b) + bias
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = gemm(EmulatedDevice(arch), "output", a, b, Result(dtype=dtype, addend=addend, bias=bias), variant)
        assert torch.equal(got, total.to(dtype))


def test_a_nan_scale_reaches_every_element():
    a, b = operands("output", 9, 10, 64)
    a.scale.fill_(torch.nan)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert gemm(EmulatedDevice(), "output", a, b, Result(dtype=dtype)).isnan().all()


@pytest.mark.parametrize("family", SMALL)
def test_split_sums_are_exact_beyond_int32(family, monkeypatch):
    """A lowered limit stands for a long sum: the slabs are those of 131,071 products, only shorter."""
    monkeypatch.setattr(split, "RAW_LIMIT", 1000)
    arch, variant = SMALL[family]
    device = EmulatedDevice(arch)
    a, b = operands("grad_weight", 70, 35, 2500, (True, True), (True, True), (1, -1))
    check(device, variant, "grad_weight", a, b)
    assert "gemm_finish" in device.launches


def test_the_limit_of_a_slab_is_that_of_int32():
    largest = LOWER_PLANE_MAX * LOWER_PLANE_MAX
    assert split.RAW_LIMIT * largest <= INT32_MAX < (split.RAW_LIMIT + 1) * largest


@given(st.integers(1, 10**4), st.integers(1, 10**7), st.sampled_from([32, 64, 128]), st.integers(1, 150))
def test_slices_cover_the_sum_and_fit_int32(tiles, length, depth, multiprocessors):
    device = EmulatedDevice(multiprocessors=multiprocessors)
    plan = split.plan_split(device, torch.device("cpu"), tiles, (1, 1), length, depth)
    assert plan.slices * plan.depth >= length > (plan.slices - 1) * plan.depth
    assert plan.depth % depth == 0
    assert plan.depth * plan.slices_per_slab <= split.RAW_LIMIT or (plan.slices, plan.slabs) == (1, None)
    assert plan.slices == 1 or plan.slabs.shape[0] * plan.slices_per_slab >= plan.slices
    assert plan.slices > 1 or length <= split.RAW_LIMIT


def test_operands_may_have_any_strides():
    x = torch.randint(-127, 128, (300, 90), dtype=torch.int8)
    for data in (x, x.t().contiguous().t(), x[::2, 3:70], x[5:6].expand(40, 90)):
        a, b = random_plane((1, 1)), random_plane((20, data.shape[1]))
        a = type(a)(data, a.scale)
        check(EmulatedDevice(), variants.IMMA_SMALL, "output", a, b)


def test_an_operand_beyond_32_bit_offsets_is_refused():
    data = torch.zeros(1, 1, dtype=torch.int8).expand(2**20, 2**11)
    with pytest.raises(ValueError, match=r"shape \(1048576, 2048\) is larger"):
        gemm(EmulatedDevice(), "output", type(random_plane((1, 1)))(data, torch.ones(())), random_plane((1, 2048)))


@pytest.mark.parametrize(
    ("arch", "family"),
    [("sm_61", "dp4a"), ("sm_70", "dp4a"), ("sm_75", "imma"), ("sm_90", "imma"), ("sm_90a", "wgmma")],
)
def test_families_by_architecture(arch, family):
    candidates = variants.variants(arch)
    assert {v.family for v in candidates} == {family}
    assert variants.choose(candidates, 4096, 4096, 1, 80) == candidates[0]
    assert variants.choose(candidates, 64, 64, 1, 80) == candidates[-1]


def test_architectures_without_an_int8_product_are_refused():
    with pytest.raises(ValueError, match="sm_60 has no INT8 dot product"):
        variants.variants("sm_60")
