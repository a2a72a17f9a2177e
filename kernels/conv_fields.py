"""Fields of the structures in ``conv_parameters.cuh``, by contraction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_int8.geometry import ConvGeometry, Residue
from lightning_int8.kernels import conv_sums
from lightning_int8.kernels.device import pointer
from lightning_int8.kernels.parameters import fast_divisor
from lightning_int8.kernels.planes import ALIGNMENT, matrix_fields, pitch
from lightning_int8.numerics import Plane

_NO_DIVISORS = [fast_divisor(1)] * 3
_NO_MATRIX = {"data": 0, "pitch": 0}
_NO_TAP_MATRIX = _NO_MATRIX | {
    "first": 0,
    "step": (0,) * 3,
    "taps": _NO_DIVISORS,
    "outputs": fast_divisor(1),
    "group_outputs": 0,
}


@dataclass(frozen=True)
class Product:
    """One matrix product that a contraction of a convolution consists of.

    Attributes:
        entry: Kernel, without the end of its second pass.
        m: Rows of a group.
        n: Columns of a group.
        k: Summed index of a group, padding included.
        products: Products of one sum, padding not included.
        image: The operand that is seen through the window.
        aligned: Whether the channels of every group start at a multiple of 16.
        left_sums: Sums of the rows of the left operand, int64.
        right_sums: Sums of the columns of the right operand, int64.
        fields: Of ``parameters.CONV``, without those of the split and the epilogue.
    """

    entry: str
    m: int
    n: int
    k: int
    products: int
    image: Plane
    aligned: bool
    left_sums: Callable[[], Tensor]
    right_sums: Callable[[], Tensor]
    fields: dict[str, Any]


def output_product(x: Plane, w: Plane, geometry: ConvGeometry) -> Product:
    """x through the window, times the weight."""
    outputs, group_channels = w.data.shape[0], w.data.shape[-1]
    padding = [lo for lo, _ in geometry.padding]
    positions = x.data.shape[0] * prod(geometry.output_size)
    m, n, k = positions, outputs // geometry.groups, geometry.taps * pitch(group_channels)
    fields = {
        "image": _image(
            x, geometry.input_size, geometry.output_size, geometry.stride, padding, geometry, group_channels
        ),
        "matrix": {"data": pointer(w.data), "pitch": w.data.stride(0)},
        "weight": _NO_TAP_MATRIX,
        "target": _target(outputs, group_channels),
    }
    return Product(
        "conv_output",
        m,
        n,
        k,
        products=geometry.taps * group_channels,
        image=x,
        aligned=_aligned(group_channels, n),
        left_sums=lambda: conv_sums.window_sums(x, geometry),
        right_sums=lambda: conv_sums.weight_sums(w),
        fields=_with_shape(fields, m, n, k),
    )


def grad_weight_product(g: Plane, x: Plane, geometry: ConvGeometry) -> Product:
    """The gradient, times x through the window."""
    outputs, group_channels = g.data.shape[-1], x.data.shape[-1] // geometry.groups
    padding = [lo for lo, _ in geometry.padding]
    positions = x.data.shape[0] * prod(geometry.output_size)
    m, n, k = outputs // geometry.groups, geometry.taps * pitch(group_channels), positions
    fields = {
        "image": _image(
            x, geometry.input_size, geometry.output_size, geometry.stride, padding, geometry, group_channels
        ),
        "matrix": matrix_fields(g.data),
        "weight": _NO_TAP_MATRIX,
        "target": _target(outputs, group_channels),
    }
    return Product(
        "conv_grad_weight",
        m,
        n,
        k,
        products=positions,
        image=x,
        aligned=_aligned(group_channels, m),
        left_sums=lambda: conv_sums.gradient_sums(g),
        right_sums=lambda: conv_sums.position_sums(x, geometry),
        fields=_with_shape(fields, m, n, k),
    )


def grad_input_product(g: Plane, w: Plane, geometry: ConvGeometry, residue: Residue) -> Product:
    """The gradient through the taps that reach one residue of the input, times the weight at those taps."""
    outputs, group_channels = w.data.shape[0], w.data.shape[-1]
    group_outputs, taps = outputs // geometry.groups, [len(d.taps) for d in residue.dims]
    sizes = [d.size for d in residue.dims]
    m, n, k = g.data.shape[0] * prod(sizes), group_channels, prod(taps) * pitch(group_outputs)
    window = ConvGeometry(
        input_size=geometry.output_size,
        kernel_size=tuple(taps),
        stride=(1,) * len(taps),
        padding=((0, 0),) * len(taps),
        dilation=tuple(d.tap_step for d in residue.dims),
        groups=geometry.groups,
    )
    offsets = [-d.offset for d in residue.dims]
    fields = {
        "image": _image(g, geometry.output_size, sizes, window.stride, offsets, window, group_outputs),
        "matrix": _NO_MATRIX,
        "weight": _tap_matrix(w.data, geometry, residue, group_outputs),
        "target": _target(group_channels * geometry.groups, group_channels)
        | {
            "size": _three(geometry.input_size, 1),
            "stride": _three([d.stride for d in residue.dims], 1),
            "first": _three([d.first for d in residue.dims], 0),
        },
    }
    return Product(
        "conv_grad_input",
        m,
        n,
        k,
        products=prod(taps) * group_outputs,
        image=g,
        aligned=_aligned(group_channels, group_outputs),
        left_sums=lambda: conv_sums.residue_sums(g, geometry, residue),
        right_sums=lambda: conv_sums.residue_weight_sums(w, geometry, residue),
        fields=_with_shape(fields, m, n, k),
    )


def fill_of(plane: Plane) -> Tensor | None:
    """What lies outside an image: its zero points, int8 ``(padded channels,)``; None for zeros."""
    if plane.zero_point is None:
        return None
    channels = plane.data.shape[-1]
    zeros = plane.zero_point.expand(channels).to(torch.int8)
    return torch.nn.functional.pad(zeros, (0, pitch(channels) - channels))


def _aligned(*channels: int) -> bool:
    return all(n % ALIGNMENT == 0 for n in channels)


def _image(
    plane: Plane,
    size: Sequence[int],
    grid: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    window: ConvGeometry,
    group_channels: int,
) -> dict[str, Any]:
    return {
        "data": pointer(plane.data),
        "fill": 0,
        "pitch": pitch(plane.data.shape[-1]),
        "size": _three(size, 1),
        "positions": plane.data.shape[0] * prod(grid),
        "grid": [fast_divisor(n) for n in _three(grid, 1)],
        "stride": _three(stride, 1),
        "origin": _three([-p for p in padding], 0),
        "dilation": _three(window.dilation, 1),
        "taps": [fast_divisor(max(1, n)) for n in _three(window.kernel_size, 1)],  # k is 0 where there is no tap
        "channels": fast_divisor(pitch(group_channels)),
    }


def _tap_matrix(w: Tensor, geometry: ConvGeometry, residue: Residue, group_outputs: int) -> dict[str, Any]:
    first, steps = 0, []
    for dim, stride in zip(residue.dims, w.stride()[1:-1], strict=True):
        taps = dim.taps or (0,)
        first += taps[0] * stride
        steps.append((taps[1] - taps[0]) * stride if len(taps) > 1 else 0)
    return {
        "data": pointer(w),
        "pitch": w.stride(0),
        "first": first,
        "step": _three(steps, 0),
        "taps": [fast_divisor(max(1, n)) for n in _three([len(d.taps) for d in residue.dims], 1)],
        "outputs": fast_divisor(pitch(group_outputs)),
        "group_outputs": group_outputs,
    }


def _target(channels: int, group_channels: int) -> dict[str, Any]:
    return {
        "size": (1,) * 3,
        "stride": (1,) * 3,
        "first": (0,) * 3,
        "channels": channels,
        "group_channels": group_channels,
        "padded_channels": fast_divisor(pitch(group_channels)),
    }


def _three(values: Sequence[int], leading: int) -> tuple[int, ...]:
    """Values of the three spatial dimensions; those that are missing come first."""
    return (leading,) * (3 - len(values)) + tuple(values)


def _with_shape(fields: dict[str, Any], m: int, n: int, k: int) -> dict[str, Any]:
    return fields | {"m": m, "n": n, "k": k}
