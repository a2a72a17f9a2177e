"""The kernels as operators of torch: whoever watches operations or traces them sees INT8 products by their names.

They are defined through ``torch.library.Library``: a call costs 3 µs more than the function alone, and one through
``torch.library.custom_op`` 15 µs (CPU, torch 2.13), several times in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_int8.geometry import ConvGeometry
from lightning_int8.kernels import reductions
from lightning_int8.kernels.convolution import convolution, result_shape
from lightning_int8.kernels.device import Device
from lightning_int8.kernels.gemm import gemm, product_shape
from lightning_int8.kernels.planes import pitch
from lightning_int8.kernels.quantize import quantize
from lightning_int8.kernels.result import Result
from lightning_int8.magnitudes import BINS
from lightning_int8.numerics import Plane, plane_count

_library = torch.library.Library("lightning_int8", "FRAGMENT")
_machines: list[Callable[[Tensor], Device]] = []

_PLANES = "Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? a_zero, Tensor? b_zero"


def number_of(device_of: Callable[[Tensor], Device]) -> int:
    """What an operator's argument ``machine`` must be for ``device_of`` to say which device computes with a tensor."""
    if device_of not in _machines:
        _machines.append(device_of)
    return _machines.index(device_of)


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lightning_int8::{name}", fake, lib=_library)
        return getattr(torch.ops.lightning_int8, name).default

    return define


def _fake_quantize(
    x: Tensor, clip_value: Tensor, key: Tensor | None, bits: int, affine: bool, axis: int | None, machine: int
) -> tuple[Tensor, Tensor, Tensor]:
    count, maps = plane_count(bits), 1 if axis is None else x.shape[axis]
    planes = x.new_empty((count, *x.shape[:-1], pitch(x.shape[-1])), dtype=torch.int8)
    zeros = x.new_empty((count if affine else 0, maps), dtype=torch.int32)
    return planes, x.new_empty((count, maps), dtype=torch.float32), zeros


@_operator(
    "cupy_quantize(Tensor x, Tensor clip_value, Tensor? key, int bits, bool affine, int? axis, int machine)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_quantize,
)
def cupy_quantize(
    x: Tensor, clip_value: Tensor, key: Tensor | None, bits: int, affine: bool, axis: int | None, machine: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``quantize.quantize``; the key is None for rounding to nearest."""
    return quantize(_machines[machine](x), x, clip_value, bits, affine, axis, key)


def _fake_gemm(contraction: str, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    return a.new_empty(product_shape(contraction, a, b)[:2], dtype=_dtype(rest[5]))


@_operator(
    f"cupy_gemm(str contraction, {_PLANES}, Tensor? addend, bool scaled, int machine) -> Tensor",
    _fake_gemm,
)
def cupy_gemm(
    contraction: str,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    addend: Tensor | None,
    scaled: bool,
    machine: int,
) -> Tensor:
    """See ``gemm.gemm``; the sums themselves, int64, where not ``scaled``."""
    left, right = Plane(a, a_scale, a_zero), Plane(b, b_scale, b_zero)
    return gemm(_machines[machine](a), contraction, left, right, Result(dtype=_dtype(scaled), addend=addend))


def _fake_convolution(contraction: str, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    return a.new_empty(result_shape(contraction, a, b, unpacked(*rest[4:7])), dtype=_dtype(rest[8]))


@_operator(
    f"cupy_convolution(str contraction, {_PLANES}, int[] sizes, int[] windows, int groups, Tensor? addend, bool scaled,"
    " int machine) -> Tensor",
    _fake_convolution,
)
def cupy_convolution(
    contraction: str,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    sizes: list[int],
    windows: list[int],
    groups: int,
    addend: Tensor | None,
    scaled: bool,
    machine: int,
) -> Tensor:
    """See ``convolution.convolution``; ``packed`` makes the arguments of a geometry."""
    left, right = Plane(a, a_scale, a_zero), Plane(b, b_scale, b_zero)
    result = Result(dtype=_dtype(scaled), addend=addend)
    return convolution(_machines[machine](a), contraction, left, right, unpacked(sizes, windows, groups), result)


@_operator(
    "cupy_absmax(Tensor x, int? axis, int machine) -> Tensor",
    lambda x, axis, machine: x.new_empty(() if axis is None else (x.shape[axis],), dtype=torch.float32),
)
def cupy_absmax(x: Tensor, axis: int | None, machine: int) -> Tensor:
    """See ``reductions.absmax``."""
    return reductions.absmax(_machines[machine](x), x, axis)


@_operator(
    "cupy_histogram(Tensor x, Tensor largest, int machine) -> Tensor",
    lambda x, largest, machine: x.new_empty(BINS, dtype=torch.int32),
)
def cupy_histogram(x: Tensor, largest: Tensor, machine: int) -> Tensor:
    """See ``reductions.histogram``."""
    return reductions.histogram(_machines[machine](x), x, largest)


@_operator(
    "cupy_error_sums(Tensor x, Tensor clip_values, int[] bits, bool affine, int? axis, int machine) -> Tensor",
    lambda x, clip_values, bits, *_: x.new_empty((len(bits), reductions.SUMS), dtype=torch.float64),
)
def cupy_error_sums(
    x: Tensor, clip_values: Tensor, bits: list[int], affine: bool, axis: int | None, machine: int
) -> Tensor:
    """See ``reductions.error_sums``."""
    return reductions.error_sums(_machines[machine](x), x, clip_values, bits, affine, axis)


def packed(geometry: ConvGeometry) -> tuple[list[int], list[int], int]:
    """A geometry as arguments of an operator, which takes flat lists of integers."""
    g = geometry
    windows = (*g.stride, *g.dilation, *(n for pair in g.padding for n in pair))
    return [*g.input_size, *g.kernel_size], list(windows), g.groups


def unpacked(sizes: Sequence[int], windows: Sequence[int], groups: int) -> ConvGeometry:
    """Inverse of ``packed``."""
    dims = len(sizes) // 2
    pads = windows[2 * dims :]
    return ConvGeometry(
        input_size=tuple(sizes[:dims]),
        kernel_size=tuple(sizes[dims:]),
        stride=tuple(windows[:dims]),
        dilation=tuple(windows[dims : 2 * dims]),
        padding=tuple(zip(pads[::2], pads[1::2], strict=True)),
        groups=groups,
    )


def _dtype(scaled: bool) -> torch.dtype:
    return torch.float32 if scaled else torch.int64
