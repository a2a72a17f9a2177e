"""Maximum over windows of an expression: its rows are computed once and never written to memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu.arrays import as_array
from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.compiler import compiled, wide_vectors
from lightning_int8.backends.cpu.elementwise import block_values, new_buffers
from lightning_int8.backends.cpu.evaluation import source_of
from lightning_int8.backends.cpu.expression import MASK_BITS, Expression, Windows
from lightning_int8.backends.cpu.floats import put
from lightning_int8.backends.cpu.threads import SMALLEST_PIECE, split


def supports(expression: Expression, windows: Windows) -> bool:
    """Whether rows are whole words of masks, and taps fit a byte."""
    _, _, width, channels = expression.shape
    return width * channels % MASK_BITS == 0 and windows.kernel[0] * windows.kernel[1] <= 256


def max_pool(expression: Expression, windows: Windows) -> tuple[Tensor, Tensor]:
    """The largest value of each window, and its tap.

    Args:
        expression: ``(N, H, W, C)``.
        windows: Of the same shape.

    Returns:
        ``(N, *out, C)`` in the dtype of the expression, and uint8.
    """
    samples, height, width, channels = expression.shape
    source = source_of(expression, None)
    out = empty(samples, *windows.size, channels, dtype=expression.dtype)
    taps = empty(*out.shape, dtype=torch.uint8)
    geometry = np.array(windows.as_integers(), np.int64)
    values, where = as_array(out).reshape(samples, -1), taps.view(samples, -1).numpy()

    def work(first: int, last: int) -> None:
        _max_pool(source, first, last, geometry, values, where)

    split(work, samples, -(-SMALLEST_PIECE // (height * width * channels)))
    return out, taps


@compiled
def _max_pool(source, first, last, windows, out, taps):
    """Maxima over rows first, which neighbouring windows share, then over columns of those."""
    height, width, channels, out_height, out_width = windows[0], windows[1], windows[2], windows[3], windows[4]
    kernel_h, kernel_w, stride_h, pad_h = windows[5], windows[6], windows[7], windows[9]
    length, out_length = width * channels, out_width * channels
    buffers, sorted_row = new_buffers(source, length), np.empty((windows[8], length), np.float32)
    ring, columns = np.empty((kernel_h, out_length), np.float32), np.empty((kernel_h, out_length), np.int32)
    largest, which = np.empty(out_length, np.float32), np.empty(out_length, np.int32)
    for n in range(first, last):
        oh = 0
        for h in range(height):
            row = block_values(source, (n * height + h) * length, length, buffers)
            _pool_row(row, windows, sorted_row, ring[h % kernel_h], columns[h % kernel_h])
            while oh < out_height and min(oh * stride_h - pad_h + kernel_h, height) == h + 1:
                top = oh * stride_h - pad_h
                largest[:] = -np.inf
                which[:] = -1
                for k in range(max(top, 0), h + 1):
                    own = k % kernel_h
                    _take_larger(ring[own], columns[own], np.int32((k - top) * kernel_w), largest, which)
                at = oh * out_length
                _put(largest, which, out[n, at : at + out_length], taps[n, at : at + out_length])
                oh += 1


@compiled
def _pool_row(row, windows, sorted_row, largest, columns):
    """Maxima of one row over the width of each window, and how far from its left edge they are."""
    width, channels, out_width, kernel_w = windows[1], windows[2], windows[4], windows[6]
    stride, pad = windows[8], windows[10]
    # Positions sorted by their remainder mod the stride: those of one tap lie side by side, and loops are long.
    for w in range(width):
        at = w // stride * channels
        _copy(row[w * channels : (w + 1) * channels], sorted_row[w % stride, at : at + channels])
    largest[:] = -np.inf
    columns[:] = -1
    for k in range(kernel_w):
        of_stride, shift = (k - pad) % stride, (k - pad) // stride
        first, stop = max(0, -shift), min(out_width, (width - 1 - of_stride) // stride + 1 - shift)
        if first < stop:
            own = slice(first * channels, stop * channels)
            x = sorted_row[of_stride, (first + shift) * channels : (stop + shift) * channels]
            _take_right(x, np.int32(k), largest[own], columns[own])


@compiled
def _copy(x, out):
    wide_vectors()
    for i in range(out.size):
        out[i] = x[i]


@compiled
def _take_right(x, column, largest, columns):
    wide_vectors()
    for i in range(x.size):
        # The first of equals, be they -inf, and what is no number, as torch does.
        larger = x[i] > largest[i] or x[i] != x[i] or columns[i] < 0
        largest[i] = x[i] if larger else largest[i]
        columns[i] = column if larger else columns[i]


@compiled
def _take_larger(x, columns, tap, largest, which):
    wide_vectors()
    for i in range(x.size):
        larger = x[i] > largest[i] or x[i] != x[i] or which[i] < 0
        largest[i] = x[i] if larger else largest[i]
        which[i] = tap + columns[i] if larger else which[i]


@compiled
def _put(largest, which, out, taps):
    wide_vectors()
    for i in range(out.size):
        put(out, i, largest[i])
        taps[i] = np.uint8(which[i])
