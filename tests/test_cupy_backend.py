"""The CuPy backend, launchers included, on each machine: the contract, and whole layers."""

import copy
import dataclasses
import re
import sys
import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import needs_compiler, random_plane
from machines import emulated, moved
from test_conformance import cases, conv_layers, geometries, plane_sum_error

from lightning_int8 import backends, convert, gemm_counts, measures
from lightning_int8.backends import Counts, cupy
from lightning_int8.backends.base import plane_pairs
from lightning_int8.backends.cupy import in_memory_order
from lightning_int8.geometry import ConvGeometry
from lightning_int8.kernels import cuda_device, planes
from lightning_int8.numerics import Quantized


def check(machine, contraction, geometry, a, b):
    fast, truth = machine.backend, backends.load("reference")
    on_device = [moved(q, machine.place) for q in (a, b)]
    for i, j in plane_pairs(a, b):
        sums = truth.accumulate(contraction, a.planes[i], b.planes[j], geometry)
        made = fast.accumulate(contraction, on_device[0].planes[i], on_device[1].planes[j], geometry)
        assert torch.equal(made.cpu(), sums)
    counts = Counts()
    y = getattr(fast, contraction)(*on_device, geometry, counts).cpu()
    ref = getattr(truth, contraction)(a, b, geometry, Counts())
    assert counts == {("cupy", contraction): len(plane_pairs(a, b))}
    assert y.shape == ref.shape
    if len(a.planes) == len(b.planes) == 1:
        assert torch.equal(y, ref)
    else:
        assert (y - ref).abs().max() <= plane_sum_error(truth, contraction, a, b, geometry)


@settings(deadline=None, max_examples=25)
@given(st.data(), st.booleans())
def test_the_contract(machine, data, linear):
    check(machine, *data.draw(cases(st.none() if linear else geometries())))


def test_a_convolution_of_one_tap_is_a_matrix_product(machine):
    geometry = ConvGeometry(
        input_size=(5, 6), kernel_size=(1, 1), stride=(1, 1), padding=((0, 0),) * 2, dilation=(1, 1), groups=1
    )
    x, w, g = (Quantized((random_plane(s),)) for s in ((2, 5, 6, 7), (9, 1, 1, 7), (2, 5, 6, 9)))
    with machine.launches() as launches:
        for contraction, a, b in (("output", x, w), ("grad_input", g, w), ("grad_weight", g, x)):
            (a,), (b,) = (moved(q, machine.place).planes for q in (a, b))
            machine.backend.accumulate(contraction, a, b, geometry)
    assert launches == ["gemm_nt", "gemm_nn", "gemm_tn"]


@pytest.mark.parametrize("kernel", [1, 3])
def test_an_activation_behind_a_layer_may_work_in_place(machine, kernel):
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, kernel), torch.nn.ReLU(inplace=True)).to(machine.place)
    x = torch.randn(2, 4, 5, 5).to(machine.place, memory_format=torch.channels_last).requires_grad_()
    with machine.chosen():
        convert(model, backend="cupy")
        model(x).sum().backward()
    assert x.grad.isfinite().all()


def results_of(layer, x, backend, place):
    model = torch.nn.Sequential(copy.deepcopy(layer)).to(place)
    convert(model, backend=backend)
    x_own = x.clone().to(place).requires_grad_()
    y = model(x_own)
    y.backward(torch.sin(torch.arange(y.numel()).float()).reshape(y.shape).to(place))
    return [t.cpu() for t in (y, x_own.grad, model[0].weight.grad)], gemm_counts(model)


@settings(deadline=None, max_examples=10)
@given(conv_layers())
def test_converted_convolutions_equal_those_of_the_cpu(machine, case):
    layer, x = case
    with machine.chosen():
        fast, counts = results_of(layer, x, "cupy", machine.place)
    truth, _ = results_of(layer, x, "reference", torch.device("cpu"))
    for made, expected in zip(fast, truth, strict=True):
        assert torch.equal(made, expected)
    assert counts == {"0": {"output": 1, "grad_input": 1, "grad_weight": 1}}


# --- ranges --------------------------------------------------------------------------------------------------------


def measuring(machine, recipe):
    """Kernels that measure, in the first step of a Linear layer."""
    model = torch.nn.Sequential(torch.nn.Linear(70, 80)).to(machine.place)
    x = torch.randn(90, 70).to(machine.place).requires_grad_()
    with machine.chosen():
        convert(model, recipe=recipe, backend="cupy")
        with machine.launches() as launches:
            model(x).square().sum().backward()
    kinds = ("absmax", "histogram", "error_sums")
    return Counter(kind for name in launches for kind in kinds if name.startswith(kind))


@pytest.mark.parametrize(
    ("recipe", "passes"),
    [
        ("default", {"absmax": 4}),  # x, g, and w along each of its channel axes
        ("unified", {"absmax": 3, "histogram": 1, "error_sums": 1}),
        ("fixed_point", {"absmax": 3 * 3, "error_sums": 3}),  # g of both contractions is one operand
        ("scalable", {"absmax": 7}),  # two sides of x, w and g, and g again in 16 bits
    ],
)
def test_a_range_costs_one_pass_and_so_do_errors_at_several_widths(machine, recipe, passes):
    assert measuring(machine, recipe) == passes


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_statistics_are_those_of_the_cpu(machine, axis):
    x = torch.randn(5, 4, 60, 33)
    for layout in (x, x.movedim(1, -1), x.bfloat16().movedim(1, -1)):
        made, truth = machine.backend.statistics, backends.load("reference").statistics
        on_device = layout.to(machine.place)
        largest = truth.absmax(layout, axis)
        assert torch.equal(made.absmax(on_device, axis).cpu(), largest)
        if axis is None:
            counts = made.histogram(on_device, largest.to(machine.place))
            assert torch.equal(counts.cpu().long(), truth.histogram(layout, largest))
        clips, bits = [largest * 0.9, largest], [8, 16]
        error = machine.backend.quantization_error(on_device, [c.to(machine.place) for c in clips], bits, False, axis)
        expected = measures.quantization_error(layout, clips, bits, False, axis)
        for field in dataclasses.fields(expected):
            torch.testing.assert_close(getattr(error, field.name).cpu(), getattr(expected, field.name))


def test_any_dense_memory_format_is_measured_where_it_is():
    weight = torch.randn(8, 4, 3, 5)
    for dense in (weight, weight.to(memory_format=torch.channels_last), weight.movedim(1, -1)):
        for axis in (None, 0):
            assert in_memory_order(dense, axis).data_ptr() == dense.data_ptr()
    assert in_memory_order(weight, -1).shape == (8, 4, 3, 5)
    gaps = in_memory_order(weight[:, ::2], 0)
    assert gaps.is_contiguous()
    assert gaps.data_ptr() != weight.data_ptr()


# --- where INT8 is not to be had -----------------------------------------------------------------------------------


@needs_compiler
def test_operands_too_large_for_the_kernels_are_computed_by_reference_and_said_to_be(monkeypatch):
    monkeypatch.setattr(planes, "MOST_BYTES", 16 * 100)
    cupy._too_large.cache_clear()
    machine = emulated("imma")
    a, b = (Quantized((random_plane(shape), random_plane(shape))) for shape in ((101, 9), (20, 9)))
    counts = Counts()
    with pytest.warns(UserWarning, match=r"'reference' backend computes .* not counted as INT8") as warned:
        made = [machine.backend.output(a, b, None, counts) for _ in range(2)]
    assert len(warned) == 1
    assert all(torch.equal(y, backends.load("reference").output(a, b, None, Counts())) for y in made)
    assert counts == {("reference", "output"): 8}
    small = Quantized(tuple(dataclasses.replace(p, data=p.data[:100]) for p in a.planes))
    machine.backend.output(small, b, None, counts)
    assert counts["cupy", "output"] == 4


@pytest.mark.parametrize(
    ("capability", "name", "message"),
    [
        ((6, 0), "reference", r"cuda:0: .* no INT8 product.*'reference' backend instead.*not counted as INT8"),
        ((7, 0), "cupy", r"cuda:0: INT8 gains no time here: .* half the rate.* run in INT8 all the same"),
        ((10, 3), "cupy", r"cuda:0: INT8 gains no time here: .* run in INT8 all the same"),
        ((6, 1), "cupy", None),
        ((8, 6), "cupy", None),
    ],
)
def test_one_warning_where_int8_gains_nothing(monkeypatch, capability, name, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    backends._gpu.cache_clear()
    tensor = SimpleNamespace(device=torch.device("cuda", 0))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        chosen = [backends.backend_for(tensor, "cupy") for _ in range(2)]
    backends._gpu.cache_clear()
    assert {backend.name for backend in chosen} == {name}
    assert [bool(re.search(message or "", str(w.message))) for w in warned] == [True] * (message is not None)


def test_a_tensor_elsewhere_is_refused():
    plane = random_plane((4, 4))
    with pytest.raises(RuntimeError, match="backend 'cupy' computes on NVIDIA GPUs, and a tensor is on 'cpu'"):
        backends.load("cupy").accumulate("output", plane, plane, None)


def test_a_missing_cupy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"CuPy cannot be imported .*pip install 'lightning-int8\[cuda1[23]\]'"):
        cuda_device.CudaDevice(0)
