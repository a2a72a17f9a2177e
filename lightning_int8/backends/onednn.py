"""The CPU: every contraction as an INT8 matrix product of oneDNN; convolutions through im2col."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from lightning_int8 import numerics
from lightning_int8.backends import im2col, int_matmul
from lightning_int8.backends.base import Backend
from lightning_int8.backends.group_blocks import blocks
from lightning_int8.geometry import ConvGeometry, Residue
from lightning_int8.measures import QuantizationError
from lightning_int8.numerics import FLAG_BITS, LOWER_PLANE_MAX, Plane, Quantized
from lightning_int8.spec import INT32_MAX, OperandSpec

COLUMN_BYTES = 4 << 20
"""Size of the im2col buffer that one product reads: small enough to stay in cache, where a whole batch does not."""

RAW_LIMIT = INT32_MAX // (LOWER_PLANE_MAX * LOWER_PLANE_MAX)
"""Longest sum of plane products that int32 holds for certain; zero points are taken off afterwards, in int64."""


class OneDNN(Backend):
    """INT8 products by ``torch._int_mm``; quantization in one fused pass where numba can be imported."""

    name = "onednn"
    integer = True

    def __init__(self) -> None:
        self._matmul = int_matmul.exact_matmul()
        self.exact = self._matmul is not None
        self._fused_quantize, self._fused_error = _import_fused_passes()

    def route(self, convolution: bool) -> str:
        """See ``Backend.route``."""
        product = "INT8 product" if self._matmul is int_matmul.full_range else "INT8 product in two halves (no VNNI)"
        return f"onednn: im2col + {product}" if convolution else f"onednn: {product}"

    def quantize(self, x: Tensor, clip_value: Tensor, spec: OperandSpec, axis: int | None, key: Tensor) -> Quantized:
        """See ``Backend.quantize``."""
        if self._fused_quantize is None or spec.bits == FLAG_BITS:
            return super().quantize(x, clip_value, spec, axis, key)
        m = numerics.affine_map(clip_value, spec.bits, spec.affine)
        integers, finite = self._fused_quantize(x, m, spec, axis, key)
        scale = m.scale if finite else torch.full_like(m.scale, torch.nan)
        return numerics.from_integers(integers, scale, m.zero, spec.bits, axis)

    def quantization_error(
        self, x: Tensor, clip_values: Sequence[Tensor], bits: Sequence[int], affine: bool, axis: int | None
    ) -> QuantizationError:
        """See ``Backend.quantization_error``."""
        if self._fused_error is None or FLAG_BITS in bits:
            return super().quantization_error(x, clip_values, bits, affine, axis)
        return self._fused_error(x, clip_values, bits, affine, axis)

    def accumulate(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry | None) -> Tensor:
        """See ``Backend.accumulate``."""
        if geometry is None:
            left, right = {
                "output": (a.data, b.data.t()),
                "grad_input": (a.data, b.data),
                "grad_weight": (a.data.t(), b.data),
            }[contraction]
            return self._product(left, right, a.zero_point, b.zero_point)
        return {"output": self._output, "grad_input": self._grad_input, "grad_weight": self._grad_weight}[contraction](
            a, b, geometry
        )

    def _output(self, x: Plane, w: Plane, geometry: ConvGeometry) -> Tensor:
        batch, out_channels = x.data.shape[0], w.data.shape[0]
        spatial = len(geometry.kernel_size)
        cols = _columns(x, geometry)
        parts = []
        for block in blocks(geometry.groups, x.data.shape[-1], out_channels):
            weight = block.weight(w).reshape(block.out_count, -1).t()
            zero = None if w.zero_point is None else block.out(w.zero_point)
            rows = [
                self._product(_rows(cols[part][..., block.inputs], spatial), weight, x.zero_point, zero)
                for part in _chunks(cols, block.in_count)
            ]
            parts.append(_cat(rows, 0))
        return _cat(parts, 1).reshape(batch, *geometry.output_size, out_channels)

    def _grad_weight(self, g: Plane, x: Plane, geometry: ConvGeometry) -> Tensor:
        channels, out_channels = x.data.shape[-1], g.data.shape[-1]
        cols = _columns(x, geometry)
        spatial = len(geometry.kernel_size)
        fits_int32 = prod(g.data.shape[:-1]) <= RAW_LIMIT
        parts = []
        for block in blocks(geometry.groups, channels, out_channels):
            zero_g = None if g.zero_point is None else block.out(g.zero_point)
            zero_x = None if x.zero_point is None else block.columns(x.zero_point, geometry.taps)
            total: Tensor | None = None
            for part in _chunks(cols, block.in_count):
                left = g.data[part][..., block.outputs].reshape(-1, block.out_count).t()
                sums = self._product(left, _rows(cols[part][..., block.inputs], spatial), zero_g, zero_x)
                total = sums if total is None else _add(total, sums, fits_int32)
            assert total is not None
            parts.append(block.diagonal(total))
        return _cat(parts, 0).reshape(out_channels, *geometry.kernel_size, -1)

    def _grad_input(self, g: Plane, w: Plane, geometry: ConvGeometry) -> Tensor:
        channels = w.data.shape[-1] * geometry.groups
        residues = geometry.residues()
        reached = [(r, self._residue(g, w, geometry, r, channels)) for r in residues if all(d.taps for d in r.dims)]
        if len(residues) == len(reached) == 1:
            return reached[0][1]
        # Input positions that no tap reaches keep a gradient of 0.
        dtype = torch.int64 if any(sums.dtype == torch.int64 for _, sums in reached) else torch.int32
        result = torch.zeros(g.data.shape[0], *geometry.input_size, channels, dtype=dtype)
        for residue, sums in reached:
            positions = (slice(None), *(slice(d.first, None, d.stride) for d in residue.dims))
            result[positions] = sums
        return result

    def _residue(self, g: Plane, w: Plane, geometry: ConvGeometry, residue: Residue, channels: int) -> Tensor:
        """grad_input at one residue class of positions: a stride-1 correlation of g with the taps that reach it."""
        dims = residue.dims
        padded = im2col.pad(g.data, [d.padding for d in dims], g.zero_point)
        sizes = [d.size for d in dims]
        cols = im2col.windows(padded, sizes, [1] * len(dims), [len(d.taps) for d in dims], [d.tap_step for d in dims])
        selected = w.data
        for axis, dim in enumerate(dims, start=1):
            if dim.taps != tuple(range(selected.shape[axis])):
                selected = selected.index_select(axis, torch.tensor(dim.taps))
        taps = prod(len(d.taps) for d in dims)
        parts = []
        for block in blocks(geometry.groups, channels, g.data.shape[-1]):
            # (taps, out, in): rows in the order of the columns, (tap, output channel).
            weight = block.weight(Plane(selected, w.scale, w.zero_point)).reshape(block.out_count, taps, -1)
            weight = weight.transpose(0, 1).reshape(taps * block.out_count, -1)
            zero_w = None if w.zero_point is None else block.inner(w.zero_point)
            rows = [
                self._product(_rows(cols[part][..., block.outputs], len(dims)), weight, g.zero_point, zero_w)
                for part in _chunks(cols, block.out_count)
            ]
            parts.append(_cat(rows, 0))
        return _cat(parts, 1).reshape(g.data.shape[0], *sizes, channels)

    def _product(self, a: Tensor, b: Tensor, zero_a: Tensor | None, zero_b: Tensor | None) -> Tensor:
        """Σ (a - zero_a)(b - zero_b), exact: int8 ``(M, K)``, ``(K, N)`` to int32, or int64 where int32 may not do.

        ``zero_a`` is ``()`` or ``(M,)``, ``zero_b`` is ``()`` or ``(N,)``.
        """
        assert self._matmul is not None, "the self-check found no exact INT8 product"
        length = a.shape[1]
        if length <= RAW_LIMIT:
            sums = self._matmul(a, b)
        else:
            pieces = range(0, length, RAW_LIMIT)
            parts = [self._matmul(a[:, k : k + RAW_LIMIT], b[k : k + RAW_LIMIT]).long() for k in pieces]
            sums = torch.stack(parts).sum(0)
        if zero_a is None and zero_b is None:
            return sums
        sums = sums.long()
        left = 0 if zero_a is None else zero_a.long().reshape(-1, 1)
        right = 0 if zero_b is None else zero_b.long().reshape(1, -1)
        if zero_b is not None:
            sums = sums - right * a.sum(1, dtype=torch.int64)[:, None]
        if zero_a is not None:
            sums = sums - left * b.sum(0, dtype=torch.int64)[None, :]
        return sums + length * left * right


def make() -> OneDNN:
    """Build the backend; runs the self-check."""
    return OneDNN()


def _import_fused_passes() -> tuple[Callable[..., tuple[Tensor, bool]] | None, Callable[..., QuantizationError] | None]:
    """The fused passes, or None where numba cannot be imported."""
    try:
        from lightning_int8.backends.cpu_measures import quantization_error
        from lightning_int8.backends.cpu_quantize import quantize
    except ImportError:
        return None, None
    return quantize, quantization_error


def _columns(x: Plane, geometry: ConvGeometry) -> Tensor:
    """View ``(N, *out, *kernel, C)`` of the input of a convolution, padded with its zero point."""
    padded = im2col.pad(x.data, geometry.padding, x.zero_point)
    return im2col.windows(padded, geometry.output_size, geometry.stride, geometry.kernel_size, geometry.dilation)


def _rows(cols: Tensor, spatial: int) -> Tensor:
    """``(N, *size, *taps, C)`` to dense rows ``(N · size, taps · C)``."""
    # With one channel the windows of neighbours overlap in memory and `reshape` alone may leave them so.
    return cols.reshape(prod(cols.shape[: 1 + spatial]), -1).contiguous()


def _chunks(cols: Tensor, channels: int) -> Iterator[slice]:
    """Slices of the batch whose dense columns fit ``COLUMN_BYTES``."""
    per_sample = prod(cols.shape[1:-1]) * channels
    step = max(1, COLUMN_BYTES // max(1, per_sample))
    for start in range(0, cols.shape[0], step):
        yield slice(start, start + step)


def _add(total: Tensor, sums: Tensor, fits_int32: bool) -> Tensor:
    return total.add_(sums) if fits_int32 else total.long() + sums


def _cat(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
