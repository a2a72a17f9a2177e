"""NVIDIA GPUs: the kernels of this package, compiled by NVRTC and launched through CuPy on torch's current stream."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from lightning_int8.backends.base import Backend, Counts, plane_pairs
from lightning_int8.backends.cpu.expression import Expression, values_of
from lightning_int8.backends.form import Form
from lightning_int8.backends.reference import Reference
from lightning_int8.geometry import ConvGeometry
from lightning_int8.kernels import operators
from lightning_int8.kernels.cuda_device import cuda_device
from lightning_int8.kernels.device import Device
from lightning_int8.kernels.planes import MOST_BYTES, fits
from lightning_int8.kernels.quantize import quantized
from lightning_int8.magnitudes import Statistics
from lightning_int8.measures import QuantizationError
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
        self._machine = operators.number_of(device_of)
        self.statistics = CuPyStatistics(self._machine)

    def route(self, convolution: bool) -> str:
        """See ``Backend.route``."""
        return "cupy: implicit INT8 product" if convolution else "cupy: INT8 product"

    def quantize(
        self, x: Tensor | Expression, clip_value: Tensor, spec: OperandSpec, axis: int | None, key: Tensor
    ) -> Quantized:
        """See ``Backend.quantize``."""
        x = values_of(x).detach().contiguous()
        drawn = key.to(x.device, non_blocking=True) if spec.rounding == "stochastic" else None
        planes, scales, zeros = operators.cupy_quantize(
            x, clip_value, drawn, spec.bits, spec.affine, axis, self._machine
        )
        return quantized(planes, scales, zeros, x.shape[-1], axis)

    def quantization_error(
        self, x: Tensor, clip_values: Sequence[Tensor], bits: Sequence[int], affine: bool, axis: int | None
    ) -> QuantizationError:
        """See ``Backend.quantization_error``."""
        clips = torch.stack(list(clip_values))
        sums = operators.cupy_error_sums(in_memory_order(x, axis), clips, list(bits), affine, axis, self._machine)
        return QuantizationError.from_sums(sums, x.numel())

    def accumulate(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry | None) -> Tensor:
        """See ``Backend.accumulate``."""
        return self._product(contraction, a, b, geometry, None, scaled=False)

    def _contract(
        self,
        contraction: str,
        a: Quantized,
        b: Quantized,
        geometry: ConvGeometry | None,
        counts: Counts,
        form: Form,
    ) -> Tensor:
        if not all(fits(q.planes[0].data) for q in (a, b)):
            return _too_large()._contract(contraction, a, b, geometry, counts, form)
        total: Tensor | None = None
        for i, j in plane_pairs(a, b):
            total = self._product(contraction, a.planes[i], b.planes[j], geometry, total, scaled=True)
            counts[self.name, contraction] += 1
        assert total is not None
        return form.finish(total)

    def _product(
        self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry | None, addend: Tensor | None, scaled: bool
    ) -> Tensor:
        maps = (a.scale, b.scale, a.zero_point, b.zero_point)
        how = (scaled, self._machine)
        if geometry is None:
            return operators.cupy_gemm(contraction, a.data, b.data, *maps, addend, *how)
        if not _is_matrix_product(geometry):
            window = operators.packed(geometry)
            return operators.cupy_convolution(contraction, a.data, b.data, *maps, *window, addend, *how)
        rows_a, rows_b = a.data.flatten(0, -2), b.data.flatten(0, -2)
        before = None if addend is None else addend.flatten(0, -2)
        out = operators.cupy_gemm(contraction, rows_a, rows_b, *maps, before, *how)
        lead = (len(out), *geometry.kernel_size) if contraction == "grad_weight" else a.data.shape[:-1]
        # Not a view to autograd: an activation behind the layer may work in place.
        return torch.ops.aten._unsafe_view(out, [*lead, out.shape[-1]])


class CuPyStatistics(Statistics):
    """One pass of a kernel for each; the share beyond sigma takes torch's operations."""

    def __init__(self, machine: int) -> None:
        self._machine = machine

    def absmax(self, x: Tensor, axis: int | None) -> Tensor:
        """See ``Statistics.absmax``."""
        return operators.cupy_absmax(in_memory_order(x, axis), axis, self._machine)

    def histogram(self, x: Tensor, largest: Tensor) -> Tensor:
        """See ``Statistics.histogram``."""
        return operators.cupy_histogram(in_memory_order(x, None), largest, self._machine)


def make() -> CuPy:
    """Build the backend; CuPy is imported with the first tensor."""
    return CuPy(_gpu_of)


@cache
def _too_large() -> Backend:
    """What computes in place of the kernels where an operand does not fit; warns once."""
    warnings.warn(
        f"an operand is larger than the {MOST_BYTES} bytes that the CUDA kernels can address: the 'reference' backend "
        "computes its contractions, exactly and slowly, and they are not counted as INT8; a smaller batch fits",
        stacklevel=2,
    )
    return Reference()


def in_memory_order(x: Tensor, axis: int | None) -> Tensor:
    """``x``, contiguous, its axes but ``axis`` (0 or -1) in any order: without a copy where it has no gaps."""
    x = x.detach()
    others = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
    others.sort(key=x.stride, reverse=True)
    own = [] if axis is None else [axis % x.dim()]
    return x.permute([*own, *others] if axis == 0 else [*others, *own]).contiguous()


def _gpu_of(tensor: Tensor) -> Device:
    if tensor.device.type != "cuda":
        raise RuntimeError(f"backend 'cupy' computes on NVIDIA GPUs, and a tensor is on {str(tensor.device)!r}")
    return cuda_device(tensor.device.index)


def _is_matrix_product(geometry: ConvGeometry) -> bool:
    """Whether the convolution has one tap at every position and nothing else."""
    plain = (geometry.taps, geometry.groups, *geometry.stride) == (1, 1, *(1 for _ in geometry.stride))
    return plain and not any(p for pair in geometry.padding for p in pair)
