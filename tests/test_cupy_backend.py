"""The CuPy backend, launchers included, on the emulated machine: the contract, and whole layers."""

import copy
import sys

import pytest
import torch
from emulator.device import EmulatedDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import needs_compiler, random_plane
from lightning_int8.kernels import cuda_device
from test_conformance import cases, check, conv_layers, geometries

from lightning_int8 import backends, convert, gemm_counts
from lightning_int8.backends.cupy import CuPy
from lightning_int8.geometry import ConvGeometry

pytestmark = needs_compiler


@pytest.fixture(params=["sm_61", "sm_75", "sm_80"], scope="module")
def backend(request):
    device = EmulatedDevice(request.param)
    made = CuPy(lambda tensor: device)
    made.device = device
    return made


@settings(deadline=None, max_examples=25)
@given(st.data(), st.booleans())
def test_the_contract(backend, data, linear):
    check(*data.draw(cases(st.none() if linear else geometries())), fast=backend)


def test_a_convolution_of_one_tap_is_a_matrix_product(backend):
    geometry = ConvGeometry(
        input_size=(5, 6), kernel_size=(1, 1), stride=(1, 1), padding=((0, 0),) * 2, dilation=(1, 1), groups=1
    )
    backend.device.launches.clear()
    x, w, g = random_plane((2, 5, 6, 7)), random_plane((9, 1, 1, 7)), random_plane((2, 5, 6, 9))
    truth = backends.load("reference")
    for contraction, a, b in (("output", x, w), ("grad_input", g, w), ("grad_weight", g, x)):
        sums = truth.accumulate(contraction, a, b, geometry)
        assert torch.equal(backend.accumulate(contraction, a, b, geometry), sums)
    assert backend.device.launches == ["gemm_nt", "gemm_nn", "gemm_tn"]


def results_of(layer, x, backend, monkeypatch):
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: backend if name == "cupy" else load(name))
    model = torch.nn.Sequential(copy.deepcopy(layer))
    convert(model, backend="cupy")
    x_own = x.clone().requires_grad_()
    y = model(x_own)
    y.backward(torch.sin(torch.arange(y.numel()).float()).reshape(y.shape))
    return y, x_own.grad, model[0].weight.grad, gemm_counts(model)


@settings(deadline=None, max_examples=10)
@given(conv_layers())
def test_converted_convolutions_equal_those_of_the_cpu(backend, case):
    layer, x = case
    with pytest.MonkeyPatch.context() as monkeypatch:
        fast = results_of(layer, x, backend, monkeypatch)
    model = torch.nn.Sequential(copy.deepcopy(layer))
    convert(model, backend="reference")
    x_own = x.clone().requires_grad_()
    y = model(x_own)
    y.backward(torch.sin(torch.arange(y.numel()).float()).reshape(y.shape))
    for made, truth in zip(fast[:3], (y, x_own.grad, model[0].weight.grad), strict=True):
        assert torch.equal(made, truth)
    assert fast[3] == {"0": {"output": 1, "grad_input": 1, "grad_weight": 1}}


def test_a_tensor_elsewhere_is_refused():
    plane = random_plane((4, 4))
    with pytest.raises(RuntimeError, match="backend 'cupy' computes on NVIDIA GPUs, and a tensor is on 'cpu'"):
        backends.load("cupy").accumulate("output", plane, plane, None)


def test_a_missing_cupy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"CuPy cannot be imported .*pip install 'lightning-int8\[cuda1[23]\]'"):
        cuda_device.CudaDevice(0)
