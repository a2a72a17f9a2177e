"""NVIDIA GPUs: the kernels of this package, compiled by NVRTC and launched through CuPy on torch's current stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_int8.backends.base import Backend, Counts, plane_pairs
from lightning_int8.backends.cpu.expression import Expression, values_of
from lightning_int8.geometry import ConvGeometry
from lightning_int8.kernels.convolution import convolution
from lightning_int8.kernels.cuda_device import cuda_device
from lightning_int8.kernels.device import Device
from lightning_int8.kernels.gemm import gemm
from lightning_int8.kernels.quantize import quantize
from lightning_int8.kernels.result import Result
from lightning_int8.numerics import Plane, Quantized
from lightning_int8.spec import OperandSpec


class CuPy(Backend):
    """INT8 products by tensor cores (wgmma on sm_90a, mma.sync from sm_75 on) and by DP4A before, down to sm_61.

    Args:
        device_of: The machine that computes with a tensor; the tests have one on the CPU.
    """

    name = "cupy"
    integer = True

    def __init__(self, device_of: Callable[[Tensor], Device]) -> None:
        self._device_of = device_of

    def route(self, convolution: bool) -> str:
        """See ``Backend.route``."""
        return "cupy: implicit INT8 product" if convolution else "cupy: INT8 product"

    def quantize(
        self, x: Tensor | Expression, clip_value: Tensor, spec: OperandSpec, axis: int | None, key: Tensor
    ) -> Quantized:
        """See ``Backend.quantize``."""
        x = values_of(x).detach().contiguous()
        return quantize(self._device_of(x), x, clip_value, spec, axis, key)

    def accumulate(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry | None) -> Tensor:
        """See ``Backend.accumulate``."""
        return self._product(contraction, a, b, geometry, Result(dtype=torch.int64))

    def _contract(
        self, contraction: str, a: Quantized, b: Quantized, geometry: ConvGeometry | None, counts: Counts
    ) -> Tensor:
        total: Tensor | None = None
        for i, j in plane_pairs(a, b):
            total = self._product(contraction, a.planes[i], b.planes[j], geometry, Result(addend=total))
            counts[self.name, contraction] += 1
        assert total is not None
        return total

    def _product(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry | None, result: Result) -> Tensor:
        device = self._device_of(a.data)
        if geometry is None:
            return gemm(device, contraction, a, b, result)
        if not _is_matrix_product(geometry):
            return convolution(device, contraction, a, b, geometry, result)
        rows_a, rows_b = (Plane(p.data.flatten(0, -2), p.scale, p.zero_point) for p in (a, b))
        addend = None if result.addend is None else result.addend.flatten(0, -2)
        out = gemm(device, contraction, rows_a, rows_b, Result(dtype=result.dtype, addend=addend))
        if contraction == "grad_weight":
            return out.reshape(out.shape[0], *geometry.kernel_size, -1)
        return out.reshape(*a.data.shape[:-1], -1)


def make() -> CuPy:
    """Build the backend; CuPy is imported with the first tensor."""
    return CuPy(_gpu_of)


def _gpu_of(tensor: Tensor) -> Device:
    if tensor.device.type != "cuda":
        raise RuntimeError(f"backend 'cupy' computes on NVIDIA GPUs, and a tensor is on {str(tensor.device)!r}")
    return cuda_device(tensor.device.index)


def _is_matrix_product(geometry: ConvGeometry) -> bool:
    """Whether the convolution has one tap at every position and nothing else."""
    plain = (geometry.taps, geometry.groups, *geometry.stride) == (1, 1, *(1 for _ in geometry.stride))
    return plain and not any(p for pair in geometry.padding for p in pair)
