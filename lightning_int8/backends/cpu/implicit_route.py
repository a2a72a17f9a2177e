"""Convolutions and matrix products by ``implicit_gemm``, on CPUs that have the instruction its kernel is made of.

The three contractions are operators of their own, so that whoever watches operations sees INT8 products here as well.
"""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.correlation import (
    grid_offsets,
    output_correlation,
    residue_correlation,
    transposed_weight,
)
from lightning_int8.backends.cpu.gemm import CENTRED_LIMIT, RAW_LIMIT
from lightning_int8.backends.cpu.passes import compiled_pass
from lightning_int8.backends.cpu.route import Route, Scales
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import INT8_MAX, LOWER_PLANE_MAX, Plane

IMPLICIT = compiled_pass("implicit_conv")
"""The compiled products, or None where numba cannot be imported."""


class Implicit(Route):
    """All three contractions, in any number of dimensions, none included."""

    name = "implicit"
    multiplies_matrices = True

    def supports(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scaled: bool) -> bool:
        """See ``Route.supports``."""
        if not is_exact() or a.data.numel() == 0 or b.data.numel() == 0:
            return False
        # A zero point of the operand whose windows are read: data, or the input of grad_weight.
        shifted, plain = (b, a) if contraction == "grad_weight" else (a, b)
        if plain.zero_point is not None or (shifted.zero_point is not None and shifted.zero_point.dim() > 0):
            return False
        length = b.data.shape[-1] if contraction == "output" else b.data.shape[0] // geometry.groups
        sums = prod(geometry.output_size) if contraction == "grad_weight" else geometry.taps * length
        return sums <= _longest(shifted.zero_point)

    def run(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scales: Scales | None = None) -> Tensor:
        """See ``Route.run``."""
        operator = getattr(torch.ops.lightning_int8, f"implicit_conv_{contraction}")
        zero = (b if contraction == "grad_weight" else a).zero_point
        left, right = (None, None) if scales is None else scales
        return operator(a.data, b.data, *_numbers(geometry), zero, left, right)


def _longest(zero: Tensor | None) -> int:
    """Longest sum of products that int32 holds for certain."""
    return RAW_LIMIT if zero is None else CENTRED_LIMIT


def _most_samples(zero: Tensor | None, positions: int) -> int:
    """Samples of so many positions over which int32 holds the sums of a grad_weight for certain."""
    return max(1, _longest(zero) // positions)


def _numbers(geometry: ConvGeometry) -> tuple[Any, ...]:
    g = geometry
    padding = [n for pair in g.padding for n in pair]
    return list(g.input_size), list(g.kernel_size), list(g.stride), padding, list(g.dilation), g.groups


def geometry_of(
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> ConvGeometry:
    """The geometry of which the operators take the numbers."""
    return ConvGeometry(
        input_size=tuple(input_size),
        kernel_size=tuple(kernel_size),
        stride=tuple(stride),
        padding=tuple(zip(padding[::2], padding[1::2], strict=True)),
        dilation=tuple(dilation),
        groups=groups,
    )


@torch.library.custom_op("lightning_int8::implicit_conv_output", mutates_args=(), device_types="cpu")
def implicit_conv_output(
    x: Tensor,
    w: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    zero: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
) -> Tensor:
    """Output of int8 x ``(N, *in, C)`` and w ``(Co, *kernel, C / groups)``; x is contiguous, none is empty.

    Args:
        x: See above.
        w: See above.
        input_size: See ``ConvGeometry``; padding is (before, after) axis by axis.
        kernel_size: Likewise.
        stride: Likewise.
        padding: Likewise.
        dilation: Likewise.
        groups: Likewise.
        zero: Zero point of x, or None.
        left: See ``Scales``; None for the sums.
        right: Likewise.

    Returns:
        ``(N, *out, Co)``, float32 with scales, else int32.
    """
    correlation = output_correlation(geometry_of(input_size, kernel_size, stride, padding, dilation, groups))
    scales = _scales(left, right)
    result = empty(len(x), *correlation.size, len(w), dtype=_dtype(scales))
    assert IMPLICIT is not None
    IMPLICIT.correlate(x, zero, w, correlation, scales, _grid(correlation.size, result.stride()[1:-1]), result)
    return result


@torch.library.custom_op("lightning_int8::implicit_conv_grad_input", mutates_args=(), device_types="cpu")
def implicit_conv_grad_input(
    g: Tensor,
    w: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    zero: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
) -> Tensor:
    """grad_input ``(N, *in, C)`` of int8 g ``(N, *out, Co)``, contiguous, and w; see ``implicit_conv_output``."""
    geometry = geometry_of(input_size, kernel_size, stride, padding, dilation, groups)
    scales = _scales(left, right)
    result = empty(len(g), *input_size, w.shape[-1] * groups, dtype=_dtype(scales))
    residues = geometry.residues()
    reached = [r for r in residues if all(d.taps for d in r.dims)]
    if len(reached) < len(residues):
        result.zero_()  # input positions that no tap reaches
    assert IMPLICIT is not None
    strides = result.stride()[1:-1]
    for residue in reached:
        steps = tuple(d.stride * s for d, s in zip(residue.dims, strides, strict=True))
        begin = sum(d.first * s for d, s in zip(residue.dims, strides, strict=True))
        targets = _grid(tuple(d.size for d in residue.dims), steps) + begin
        weight = transposed_weight(Plane(w, torch.ones(())), residue, groups).data
        IMPLICIT.correlate(g, zero, weight, residue_correlation(residue, groups), scales, targets, result)
    return result


@torch.library.custom_op("lightning_int8::implicit_conv_grad_weight", mutates_args=(), device_types="cpu")
def implicit_conv_grad_weight(
    g: Tensor,
    x: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    zero: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
) -> Tensor:
    """grad_weight ``(Co, *kernel, C / groups)`` of int8 g and x; without scales int64 where int32 may not do.

    For the rest see ``implicit_conv_output``.
    """
    correlation = output_correlation(geometry_of(input_size, kernel_size, stride, padding, dilation, groups))
    scales = _scales(left, right)
    assert IMPLICIT is not None
    samples = _most_samples(zero, correlation.positions)
    if len(g) <= samples:
        result = IMPLICIT.grad_weight(g, x, zero, correlation, scales)
    else:
        parts = zip(g.split(samples), x.split(samples), strict=True)
        result = torch.stack([IMPLICIT.grad_weight(*part, zero, correlation, None).long() for part in parts]).sum(0)
        if scales is not None:
            result = result.to(torch.float32).mul_(scales.left.reshape(-1, 1)).mul_(scales.right)
    return result.view(g.shape[-1], *kernel_size, -1)


def _scales(left: Tensor | None, right: Tensor | None) -> Scales | None:
    return None if left is None or right is None else Scales(left, right)


def _dtype(scales: Scales | None) -> torch.dtype:
    return torch.int32 if scales is None else torch.float32


@lru_cache(maxsize=1024)
def _grid(sizes: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    return grid_offsets(sizes, strides).numpy()


# --- Fakes, self-check -----------------------------------------------------------------------------------------------


@implicit_conv_output.register_fake
def _(x: Tensor, w: Tensor, *numbers: Any) -> Tensor:
    *of_geometry, _, left, right = numbers
    return x.new_empty(len(x), *geometry_of(*of_geometry).output_size, len(w), dtype=_dtype(_scales(left, right)))


@implicit_conv_grad_input.register_fake
def _(g: Tensor, w: Tensor, input_size: list[int], *numbers: Any) -> Tensor:
    *_, groups, _, left, right = numbers
    return g.new_empty(len(g), *input_size, w.shape[-1] * groups, dtype=_dtype(_scales(left, right)))


@implicit_conv_grad_weight.register_fake
def _(g: Tensor, x: Tensor, input_size: list[int], kernel_size: list[int], *numbers: Any) -> Tensor:
    *_, groups, zero, left, right = numbers
    dtype = _dtype(_scales(left, right))
    if dtype == torch.int32 and len(g) > _most_samples(zero, prod(g.shape[1:-1])):
        dtype = torch.int64
    return g.new_empty(g.shape[-1], *kernel_size, x.shape[-1] // groups, dtype=dtype)


@cache
def is_exact() -> bool:
    """Whether the kernel runs here and its output is exact where a saturating instruction betrays itself.

    All three contractions go through this one instruction; ``Choice`` checks each problem that it times.
    """
    if IMPLICIT is None or not IMPLICIT.is_available():
        return False
    return all(_agrees(*case) for case in product((1, 70), (1, 17, 66), (None, -INT8_MAX, INT8_MAX), (1, -1)))


def _agrees(channels: int, out_channels: int, zero: int | None, sign: int) -> bool:
    geometry = ConvGeometry(
        input_size=(5, 6), kernel_size=(3, 3), stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), groups=1
    )
    data = torch.full((2, 5, 6, channels), sign * INT8_MAX, dtype=torch.int8)
    data[:, ::2, ::3] = -LOWER_PLANE_MAX
    weight = torch.full((out_channels, 3, 3, channels), INT8_MAX, dtype=torch.int8)
    weight[1::2] = -LOWER_PLANE_MAX
    one, offset = torch.ones(()), None if zero is None else torch.tensor(zero, dtype=torch.int32)
    sums = Implicit().run("output", Plane(data, one, offset), Plane(weight, one), geometry)
    centred = (data.double() - (zero or 0)).movedim(-1, 1)
    expected = torch.nn.functional.conv2d(centred, weight.movedim(-1, 1).double(), padding=1).movedim(1, -1)
    return torch.equal(sums.double(), expected)
