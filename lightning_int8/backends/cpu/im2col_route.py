"""Every convolution as matrix products of gathered windows; a pointwise one reads its data as it lies."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.columns import Columns
from lightning_int8.backends.cpu.correlation import Correlation, output_correlation
from lightning_int8.backends.cpu.correlation_route import CorrelationRoute
from lightning_int8.backends.cpu.gemm import RAW_LIMIT, Gemm
from lightning_int8.backends.cpu.route import Scales
from lightning_int8.backends.group_blocks import Block, blocks
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import Plane


class Im2col(CorrelationRoute):
    """The route for every shape, and the one that others are checked against."""

    name = "im2col"
    multiplies_matrices = True

    def __init__(self, gemm: Gemm) -> None:
        self._gemm = gemm

    def supports(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scaled: bool) -> bool:
        """See ``Route.supports``."""
        return True

    def correlate(self, data: Plane, weight: Plane, correlation: Correlation, scales: Scales | None) -> Tensor:
        """See ``Route.correlate``."""
        batch, channels, out_channels = data.data.shape[0], data.data.shape[-1], weight.data.shape[0]
        columns = Columns(data, correlation)
        length = prod(correlation.taps) * channels
        sums_dtype = self._gemm.dtype(length, data.zero_point, weight.zero_point)
        dtype = sums_dtype if scales is None else torch.float32
        result = empty(batch, *correlation.size, out_channels, dtype=dtype)
        for block in blocks(correlation.groups, channels, out_channels):
            matrix = block.weight(weight).movedim(0, -1).flatten(0, -2)  # (tap and channel, out)
            zero = None if weight.zero_point is None else block.out(weight.zero_point)
            own_scales = scales and scales._replace(right=block.out(scales.right))
            for samples in columns.chunks(block.in_count):
                out = result[samples].flatten(0, -2)[:, block.outputs]
                rows = columns.rows(samples, block.inputs)
                self._gemm.into(out, rows, matrix, data.zero_point, zero, own_scales)
        return result

    def grad_weight(self, g: Plane, x: Plane, geometry: ConvGeometry) -> Tensor:
        """See ``Route.grad_weight``."""
        channels, out_channels = x.data.shape[-1], g.data.shape[-1]
        columns = Columns(x, output_correlation(geometry))
        parts = [
            self._block_grad_weight(g, x, columns, b, geometry) for b in blocks(geometry.groups, channels, out_channels)
        ]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.reshape(out_channels, *geometry.kernel_size, -1)

    def _block_grad_weight(self, g: Plane, x: Plane, columns: Columns, block: Block, geometry: ConvGeometry) -> Tensor:
        zero_g = None if g.zero_point is None else block.out(g.zero_point)
        zero_x = None if x.zero_point is None else block.columns(x.zero_point, geometry.taps)
        fits_int32 = prod(g.data.shape[:-1]) <= RAW_LIMIT
        total: Tensor | None = None
        total_bytes = block.out_count * geometry.taps * block.in_count * torch.int32.itemsize
        for samples in columns.chunks(block.in_count, total_bytes):
            left = g.data[samples].flatten(0, -2)[:, block.outputs].t()
            sums = self._gemm.sums(left, columns.rows(samples, block.inputs), zero_g, zero_x)
            total = sums if total is None else total.add_(sums) if fits_int32 else total.long() + sums
        assert total is not None
        return block.diagonal(total)
