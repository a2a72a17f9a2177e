"""Convolutions and matrix products by ``implicit_gemm``, on CPUs that have the instruction its kernel is made of.

They are an operator of its own, so that whoever watches operations sees INT8 products here as well.
"""

from __future__ import annotations

from functools import cache, lru_cache, partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_int8.backends.cpu.arrays import FLOAT_DTYPES
from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.correlation import (
    grid_offsets,
    output_correlation,
    residue_correlation,
    taps_of,
    transposed_weight,
    turned_axes,
)
from lightning_int8.backends.cpu.gemm import CENTRED_LIMIT, RAW_LIMIT
from lightning_int8.backends.cpu.passes import compiled_pass
from lightning_int8.backends.cpu.route import Route, Scales
from lightning_int8.backends.cpu.torch_operator import operator
from lightning_int8.backends.form import Form
from lightning_int8.geometry import ConvGeometry, Residue
from lightning_int8.numerics import INT8_MAX, LOWER_PLANE_MAX, Plane

_ONE = torch.ones(())

IMPLICIT = compiled_pass("implicit_conv")
"""The compiled output and grad_input, or None where numba cannot be imported."""

MICROKERNEL = compiled_pass("microkernel")
"""The tile that both are made of, or None likewise."""

GRADIENT = compiled_pass("implicit_gradient")
"""The compiled grad_weight, or None likewise."""


class Implicit(Route):
    """All three contractions, in any number of dimensions, none included."""

    name = "implicit"
    multiplies_matrices = True
    finishes = True

    def supports(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scaled: bool) -> bool:
        """See ``Route.supports``."""
        if not is_exact() or a.data.numel() == 0 or b.data.numel() == 0:
            return False
        # A zero point of the operand whose windows are read: data, or the input of grad_weight.
        shifted, plain = (b, a) if contraction == "grad_weight" else (a, b)
        if plain.zero_point is not None or (shifted.zero_point is not None and shifted.zero_point.dim() > 0):
            return False
        if contraction == "grad_weight":
            assert MICROKERNEL is not None
            sums = MICROKERNEL.QUAD * (1, *geometry.output_size)[-1]  # more are added to int64
        else:
            length = b.data.shape[-1] if contraction == "output" else b.data.shape[0] // geometry.groups
            sums = geometry.taps * length
        return sums <= _longest(shifted.zero_point)

    def run(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scales: Scales | None = None) -> Tensor:
        """See ``Route.run``."""
        zero = (b if contraction == "grad_weight" else a).zero_point
        how: tuple[Any, ...] = [], torch.int32, None, None
        if scales is not None:
            form = scales.form
            dtype = form.dtype if form.dtype in FLOAT_DTYPES else torch.float32
            how = [scales.left, scales.right], dtype, form.bias, form.moments
        result = _implicit_conv()(contraction, a.data, b.data, geometry.as_integers, zero, *how)
        return result if scales is None or result.dtype == scales.form.dtype else result.to(scales.form.dtype)


def _longest(zero: Tensor | None) -> int:
    """Longest sum of products that int32 holds for certain."""
    return RAW_LIMIT if zero is None else CENTRED_LIMIT


@cache
def _implicit_conv() -> Any:
    return torch.ops.lightning_int8.implicit_conv.default


@operator("moments")
def implicit_conv(
    contraction: str,
    a: Tensor,
    b: Tensor,
    geometry: list[int],
    zero: Tensor | None,
    scales: list[Tensor],
    dtype: torch.dtype,
    bias: Tensor | None,
    moments: Tensor | None,
) -> Tensor:
    """A contraction of int8 operands, see ``Backend.accumulate``; none is empty, and all but w are contiguous.

    Args:
        contraction: "output", "grad_input" or "grad_weight".
        a: Left operand.
        b: Right operand.
        geometry: The numbers of the ``ConvGeometry``.
        zero: Zero point of the operand whose windows are read, x or else g; or None.
        scales: Left and right, see ``Scales``; empty for the sums.
        dtype: float32 or bfloat16 of scaled sums; int32 of the sums themselves, where a grad_weight may be int64.
        bias: Of an output, see ``Form``; or None.
        moments: Likewise, to be filled.
    """
    own_scales = Scales(scales[0], scales[1], Form(dtype, bias, moments)) if scales else None
    compute = _grad_weight if contraction == "grad_weight" else partial(_windowed, contraction)
    return compute(a, b, ConvGeometry.of_integers(tuple(geometry)), zero, own_scales, dtype)


def _windowed(
    contraction: str,
    data: Tensor,
    w: Tensor,
    geometry: ConvGeometry,
    zero: Tensor | None,
    scales: Scales | None,
    dtype: torch.dtype,
) -> Tensor:
    """An "output" or a "grad_input"."""
    size, channels = geometry.output_size, w.shape[0]
    if contraction == "grad_input":
        size, channels = geometry.input_size, w.shape[-1] * geometry.groups
    result = empty(data.shape[0], *size, channels, dtype=dtype)
    parts, are_all = _parts(contraction, geometry, data.shape[-1], channels)
    if not are_all:
        result.zero_()
    assert IMPLICIT is not None
    for residue, plan in parts:
        weight = w
        if residue is not None and geometry.groups == 1:
            weight = taps_of(w, residue).transpose(0, -1)  # turned while it is packed
        elif residue is not None:
            weight = transposed_weight(Plane(w, _ONE), residue, geometry.groups).data
        IMPLICIT.correlate(data, zero, weight, plan, scales, result)
    return result


@lru_cache(maxsize=1024)
def _parts(
    contraction: str, geometry: ConvGeometry, channels: int, out_channels: int
) -> tuple[list[tuple[Residue | None, Any]], bool]:
    """The correlations that make up a contraction, planned, and whether they reach all of the result.

    A grad_input has one for each residue class of input positions that a tap reaches.
    """
    assert IMPLICIT is not None
    if contraction == "output":
        places = grid_offsets(geometry.output_size, _strides(geometry.output_size, out_channels)).numpy()
        plan = IMPLICIT.plan(output_correlation(geometry), geometry.input_size, channels, out_channels, places, ())
        return [(None, plan)], True
    residues, strides = geometry.residues(), _strides(geometry.input_size, out_channels)
    parts: list[tuple[Residue | None, Any]] = []
    for residue in residues:
        if all(d.taps for d in residue.dims):
            steps = [d.stride * s for d, s in zip(residue.dims, strides, strict=True)]
            begin = sum(d.first * s for d, s in zip(residue.dims, strides, strict=True))
            places = grid_offsets([d.size for d in residue.dims], steps).numpy() + begin
            correlation = residue_correlation(residue, geometry.groups)
            turned = tuple(turned_axes(residue)) if geometry.groups == 1 else ()
            plan = IMPLICIT.plan(correlation, geometry.output_size, channels, out_channels, places, turned)
            parts.append((residue, plan))
    return parts, len(parts) == len(residues)


def _strides(size: tuple[int, ...], channels: int) -> list[int]:
    """Distance of neighbours along each spatial axis of contiguous ``(*size, channels)``."""
    return [prod(size[axis + 1 :]) * channels for axis in range(len(size))]


def _grad_weight(
    g: Tensor, x: Tensor, geometry: ConvGeometry, zero: Tensor | None, scales: Scales | None, dtype: torch.dtype
) -> Tensor:
    assert GRADIENT is not None
    result = GRADIENT.grad_weight(g, x, zero, output_correlation(geometry), scales, dtype, _longest(zero))
    return result.view(g.shape[-1], *geometry.kernel_size, -1)


# --- Fakes, self-check -----------------------------------------------------------------------------------------------


@torch.library.register_fake("lightning_int8::implicit_conv")
def _(contraction: str, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    numbers, zero, _, dtype, _, _ = rest
    geometry = ConvGeometry.of_integers(tuple(numbers))
    if contraction == "output":
        return a.new_empty(len(a), *geometry.output_size, len(b), dtype=dtype)
    if contraction == "grad_input":
        return a.new_empty(len(a), *geometry.input_size, b.shape[-1] * geometry.groups, dtype=dtype)
    if dtype == torch.int32 and prod(a.shape[:-1]) > _longest(zero):
        dtype = torch.int64
    return a.new_empty(a.shape[-1], *geometry.kernel_size, b.shape[-1] // geometry.groups, dtype=dtype)


@cache
def is_exact() -> bool:
    """Whether the kernel runs here and its output is exact where a saturating instruction betrays itself.

    All three contractions go through this one instruction; ``Choice`` checks each problem that it times.
    """
    if MICROKERNEL is None or not MICROKERNEL.is_available():
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
