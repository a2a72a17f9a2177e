"""Every backend against `reference`, and `reference` against int64 loops: the contract of `backends.base.Backend`."""

import copy
import os
import subprocess
import sys
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_int8 import backends, convert, numerics
from lightning_int8.backends import Counts, int_matmul, onednn
from lightning_int8.backends.base import plane_pairs
from lightning_int8.backends.cpu import gemm
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import Plane, Quantized
from lightning_int8.spec import CHANNEL_AXIS, CONTRACTIONS, OperandSpec, reduction_limit

SCALING_ULPS = 2
"""Wide operands: what two scales and the reference's own rounding to float32 bring, in ulps of the largest product."""

EXTREMES = st.sampled_from([0, 0, 1, -1])

examples = settings(deadline=None, max_examples=60)


ROUTES = ("im2col", "direct", "subpixel", "depthwise", "implicit")


@st.composite
def geometries(draw):
    dims = draw(st.integers(1, 3))
    kernel = draw(st.tuples(*[st.integers(1, 4)] * dims))
    dilation = draw(st.tuples(*[st.integers(1, 3)] * dims))
    padding = draw(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * dims))
    stride = draw(st.tuples(*[st.integers(1, 4)] * dims))
    smallest = [max(1, d * (k - 1) + 1 - sum(p)) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = tuple(draw(st.integers(s, s + 6)) for s in smallest)
    return ConvGeometry(
        input_size=size,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=draw(st.sampled_from([1, 1, 2, 3, 17])),
    )


def shapes(contraction, geometry, batch, per_group_in, per_group_out):
    if geometry is None:
        x, w, g = (batch, per_group_in), (per_group_out, per_group_in), (batch, per_group_out)
    else:
        groups = geometry.groups
        x = (batch, *geometry.input_size, per_group_in * groups)
        w = (per_group_out * groups, *geometry.kernel_size, per_group_in)
        g = (batch, *geometry.output_size, per_group_out * groups)
    return {"output": (x, w), "grad_input": (g, w), "grad_weight": (g, x)}[contraction]


def random_operand(rng, shape, bits, affine, axis, extreme):
    """Planes with random digits, or with the extreme digit of one sign (+1, -1) everywhere."""
    largest = numerics.largest_integer(bits)
    integers = rng.integers(-largest, largest, size=shape, endpoint=True)
    if extreme:
        integers = np.full(shape, extreme * largest)
    size = () if axis is None else (shape[axis],)
    zero = torch.from_numpy(rng.integers(-largest, largest, size=size)).float() if affine else None
    if extreme and affine:
        zero = torch.full(size, -extreme * float(largest))
    scale = torch.from_numpy(np.asarray(rng.uniform(1e-3, 1.0, size=size), dtype=np.float32))
    return numerics.from_integers(torch.from_numpy(np.asarray(integers, np.int32)), scale, zero, bits, axis)


@st.composite
def cases(draw, geometry):
    contraction, geometry = draw(st.sampled_from(CONTRACTIONS)), draw(geometry)
    batch, n_in, n_out = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    operands = []
    for side, shape in zip(("lhs", "rhs"), shapes(contraction, geometry, batch, n_in, n_out), strict=True):
        axis = CHANNEL_AXIS.get((contraction, side)) if draw(st.booleans()) else None
        bits, affine = draw(st.sampled_from([8, 8, 16, 24])), draw(st.booleans())
        operands.append(random_operand(rng, shape, bits, affine, axis, draw(EXTREMES)))
    return contraction, geometry, *operands


def check(contraction, geometry, a, b, fast=None):
    fast, truth = fast or backends.load("onednn"), backends.load("reference")
    for i, j in plane_pairs(a, b):
        sums = truth.accumulate(contraction, a.planes[i], b.planes[j], geometry)
        assert torch.equal(fast.accumulate(contraction, a.planes[i], b.planes[j], geometry).long(), sums)
    y, ref = (getattr(k, contraction)(a, b, geometry, Counts()) for k in (fast, truth))
    if len(a.planes) == len(b.planes) == 1:
        assert torch.equal(y, ref)
    else:
        assert (y - ref).abs().max() <= plane_sum_error(truth, contraction, a, b, geometry)


def plane_sum_error(truth, contraction, a, b, geometry):
    """What adding products of planes in float32 may bring: each time half an ulp of a sum less than twice as large."""
    biggest = max_plane_product(truth, contraction, a, b, geometry)
    ulp = torch.nextafter(biggest, torch.tensor(torch.inf)) - biggest
    return (SCALING_ULPS + len(plane_pairs(a, b))) * ulp


def max_plane_product(truth, contraction, a, b, geometry):
    parts = [
        getattr(truth, contraction)(
            Quantized((a.planes[i],), a.axis), Quantized((b.planes[j],), b.axis), geometry, Counts()
        )
        for i, j in plane_pairs(a, b)
    ]
    return torch.stack(parts).abs().max()


@examples
@given(cases(st.none()))
def test_onednn_linear_equals_reference(case):
    check(*case)


@examples
@given(cases(geometries()))
def test_onednn_convolution_equals_reference(case):
    check(*case)


@settings(deadline=None, max_examples=150)
@given(st.one_of(cases(st.none()), cases(geometries())))
def test_implicit_products_of_any_dimensions_equal_reference(case):
    check(*case, onednn.OneDNN(int_matmul.exact_matmul(), only="implicit"))


@st.composite
def image_cases(draw):
    """Convolutions as networks have them: two dimensions, no dilation; dense, in groups or depthwise."""
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = tuple((p, p) for p in draw(st.tuples(st.integers(0, 2), st.integers(0, 2))))
    groups = draw(st.sampled_from([1, 1, 2, 5, 16, 33]))
    size = tuple(k + draw(st.integers(1, 8)) for k in kernel)
    geometry = ConvGeometry(
        input_size=size, kernel_size=kernel, stride=stride, padding=padding, dilation=(1, 1), groups=groups
    )
    contraction, batch = draw(st.sampled_from(CONTRACTIONS)), draw(st.integers(1, 3))
    channels = (1, 1) if groups > 2 else draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    left, right = shapes(contraction, geometry, batch, *channels)
    axis = CHANNEL_AXIS.get((contraction, "rhs")) if draw(st.booleans()) else None
    a = random_operand(rng, left, draw(st.sampled_from([8, 16])), draw(st.booleans()), None, draw(EXTREMES))
    b = random_operand(rng, right, draw(st.sampled_from([8, 16])), draw(st.booleans()), axis, draw(EXTREMES))
    return contraction, geometry, a, b


@pytest.mark.parametrize("route", ROUTES)
@settings(deadline=None, max_examples=150)
@given(case=image_cases())
def test_every_route_equals_reference(route, case):
    check(*case, onednn.OneDNN(int_matmul.exact_matmul(), only=route))


# --- reference against int64 loops ---------------------------------------------------------------------------------


def int64_output(x, w, geometry, zero_x, zero_w):
    """Output sums by the definition, one product at a time (vectorised over samples and channels only)."""
    x, w = x - zero_x, w - zero_w
    lo = [(p[0], p[1]) for p in geometry.padding]
    x = np.pad(x, [(0, 0), *lo, (0, 0)])
    out = np.zeros((x.shape[0], *geometry.output_size, w.shape[0]), np.int64)
    per_in, per_out = w.shape[-1], w.shape[0] // geometry.groups
    for position in product(*map(range, geometry.output_size)):
        for tap in product(*map(range, geometry.kernel_size)):
            at = tuple(
                o * s + k * d for o, s, k, d in zip(position, geometry.stride, tap, geometry.dilation, strict=True)
            )
            for group in range(geometry.groups):
                outs = slice(group * per_out, (group + 1) * per_out)
                values = x[(slice(None), *at, slice(group * per_in, (group + 1) * per_in))]
                out[(slice(None), *position, outs)] += values @ w[(outs, *tap)].T
    return out


@settings(deadline=None, max_examples=40)
@given(geometries(), st.integers(0, 2**32 - 1), st.booleans())
def test_reference_output_equals_int64_loops(geometry, seed, affine):
    rng = np.random.default_rng(seed)
    x_shape, w_shape = shapes("output", geometry, 2, 3, 2)
    x, w = (random_operand(rng, s, 8, affine, None, 0).planes[0] for s in (x_shape, w_shape))
    zeros = [0 if p.zero_point is None else p.zero_point.item() for p in (x, w)]
    expected = int64_output(x.data.numpy().astype(np.int64), w.data.numpy().astype(np.int64), geometry, *zeros)
    assert np.array_equal(backends.load("reference").accumulate("output", x, w, geometry).numpy(), expected)


@settings(deadline=None, max_examples=40)
@given(geometries(), st.integers(0, 2**32 - 1), st.booleans())
def test_reference_gradients_are_the_transpose_of_the_output(geometry, seed, affine):
    """<g, x·w> = <grad_input(g, w), x> = <grad_weight(g, x), w> exactly, in integers."""
    rng = np.random.default_rng(seed)
    x, w = (random_operand(rng, s, 8, affine, None, 0).planes[0] for s in shapes("output", geometry, 2, 3, 2))
    g = random_operand(rng, shapes("grad_input", geometry, 2, 3, 2)[0], 8, affine, None, 0).planes[0]
    truth = backends.load("reference")

    def centred(p):
        return p.data.long() - (0 if p.zero_point is None else p.zero_point)

    def inner(a, b):
        return (a.long() * b).sum()

    expected = inner(truth.accumulate("output", x, w, geometry), centred(g))
    assert inner(truth.accumulate("grad_input", g, w, geometry), centred(x)) == expected
    assert inner(truth.accumulate("grad_weight", g, x, geometry), centred(w)) == expected


# --- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("affine", [False, True])
def test_sums_beyond_the_int32_limit_are_exact(sign, affine):
    length = 3 * gemm.RAW_LIMIT + 5
    assert length > reduction_limit(OperandSpec(affine=affine), OperandSpec())
    a = Plane(torch.full((length, 2), 127, dtype=torch.int8), torch.ones(()))
    zero = torch.tensor(-127 * sign, dtype=torch.int32) if affine else None
    b = Plane(torch.full((length, 3), 127 * sign, dtype=torch.int8), torch.ones(()), zero)
    sums = backends.load("onednn").accumulate("grad_weight", a, b, None)
    assert (sums == length * 127 * 127 * sign * (2 if affine else 1)).all()


def test_reduction_limits_are_those_of_the_operands():
    assert reduction_limit(OperandSpec(), OperandSpec()) == 133_144
    assert reduction_limit(OperandSpec(affine=True), OperandSpec()) == 66_572


def test_weight_gradient_over_many_samples_is_exact():
    """Chunks of the batch are summed beyond int32: 200,704 positions of ±127, as in a 224² stem at batch 16."""
    geometry = ConvGeometry(
        input_size=(448, 448), kernel_size=(1, 1), stride=(1, 1), padding=((0, 0),) * 2, dilation=(1, 1), groups=1
    )
    x, g = (Plane(torch.full((1, 448, 448, 2), v, dtype=torch.int8), torch.ones(())) for v in (-127, 127))
    sums = backends.load("onednn").accumulate("grad_weight", g, x, geometry)
    assert (sums == -127 * 127 * prod(geometry.input_size)).all()


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("cols", [1, 2, 17])
def test_products_of_any_strides_are_exact(rows, length, cols):
    """A single row or column leaves its stride free, and `torch._int_mm` does not take every value of it."""
    matmul = int_matmul.exact_matmul()
    for a_strides in ((length, 1), (1, rows), (length + 5, 1), (1, rows + 5)):
        for b_strides in ((cols, 1), (1, length), (cols + 5, 1), (1, length + 5)):
            a = torch.randint(-127, 128, (4096,), dtype=torch.int8).as_strided((rows, length), a_strides)
            b = torch.randint(-127, 128, (4096,), dtype=torch.int8).as_strided((length, cols), b_strides)
            assert torch.equal(matmul(a, b).long(), a.long() @ b.long()), (a_strides, b_strides)


# --- other instruction sets ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_this_file_passes_without_vnni(isa):
    """oneDNN reads the limit once per process, so the suite runs again in one of its own."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA"):
        pytest.skip("this is the inner run")
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_without_vnni_the_product_is_split_in_halves():
    code = "from lightning_int8.backends import int_matmul as m; print(m.exact_matmul().__name__)"
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "halves"


# --- whole layers --------------------------------------------------------------------------------------------------

CONV = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}


@st.composite
def conv_layers(draw):
    """A Conv layer of any geometry and padding mode, and an input of any memory format, batched or not."""
    dims = draw(st.integers(1, 3))
    kernel = draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from([0, 1, 2, "same", "valid"]))
    stride = 1 if padding == "same" else draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dilation = draw(st.integers(1, 2))
    layer = CONV[dims](4, 8, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()), padding_mode=mode)
    x = torch.randn(2, 4, *(draw(st.integers(6, 9)) for _ in range(dims)))
    if dims == 2 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    if dims == 2 and draw(st.booleans()):
        layer = layer.to(memory_format=torch.channels_last)
    return layer, x[0] if draw(st.booleans()) else x


def dims_of(layer):
    return len(layer.kernel_size)


@examples
@given(conv_layers())
def test_converted_layers_of_two_backends_are_bit_equal(case):
    layer, x = case
    results = []
    for backend in ("onednn", "reference"):
        model = torch.nn.Sequential(copy.deepcopy(layer))
        convert(model, backend=backend)
        x_own = x.clone().requires_grad_()
        y = model(x_own)
        y.backward(torch.sin(torch.arange(y.numel()).float()).reshape(y.shape))
        results.append((y, x_own.grad, model[0].weight.grad))
    expected = layer(x)
    assert results[0][0].shape == expected.shape
    if x.dim() == dims_of(layer) + 2:  # torch itself is not consistent about the memory format of an unbatched input
        assert results[0][0].is_contiguous() == expected.is_contiguous()
    for fast, truth in zip(*results, strict=True):
        assert torch.equal(fast, truth)
