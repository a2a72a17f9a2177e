"""Maximum over windows of an expression: its rows are computed once and never written to memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu import team
from lightning_int8.backends.cpu.arrays import as_array
from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.compiler import compiled
from lightning_int8.backends.cpu.elementwise import block_values, new_buffers, whole
from lightning_int8.backends.cpu.evaluation import source_of
from lightning_int8.backends.cpu.expression import MASK_BITS, Expression, Windows
from lightning_int8.backends.cpu.threads import SMALLEST_PIECE, ends
from lightning_int8.backends.cpu.vectors import LANES, larger, load, plus, splat, store, store_small, where_larger


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
    values, where = as_array(out), taps.view(-1).numpy()

    pieces = ends(samples, -(-SMALLEST_PIECE // (height * width * channels)))
    team.run(_max_pool, (source, geometry, values, where), pieces)
    return out, taps


@compiled
def _pooled(source, windows, out, taps, first, last, piece):
    """Maxima over columns first, which neighbouring windows share, then over rows of those."""
    height, width, channels, out_height, out_width = windows[0], windows[1], windows[2], windows[3], windows[4]
    kernel_h, kernel_w, stride_h, pad_h = windows[5], windows[6], windows[7], windows[9]
    length, out_length = width * channels, out_width * channels
    buffers, room = new_buffers(source, length), whole(out_length)
    largest, columns = np.empty(kernel_h * room, np.float32), np.empty(kernel_h * room, np.float32)
    for n in range(first, last):
        oh = 0
        for h in range(height):
            row = block_values(source, (n * height + h) * length, length, buffers)
            _pool_row(row, windows, h % kernel_h * room, largest, columns)
            while oh < out_height and min(oh * stride_h - pad_h + kernel_h, height) == h + 1:
                at = (n * out_height + oh) * out_length
                _pool_column(largest, columns, oh * stride_h - pad_h, h, kernel_h, kernel_w, at, out_length, out, taps)
                oh += 1
    return np.int32(0)


_pool_in_team = team.in_team(_pooled)


@compiled
def _max_pool(arguments, ends, results, runtime):
    """``_pooled``, for ``team.run``."""
    _pool_in_team(arguments, ends, results, runtime)


@compiled
def _pool_row(row, windows, at, largest, columns):
    """Maxima of one row over the width of each window, and how far from its left edge they are, from ``at`` on."""
    width, channels, out_width, kernel = windows[1], windows[2], windows[4], windows[6]
    stride, pad = windows[8], windows[10]
    for ow in range(out_width):
        left = ow * stride - pad
        first, stop = max(left, 0), min(left + kernel, width)
        for c in range(0, channels, LANES):
            room = min(LANES, channels - c)
            top, column = load(row, first * channels + c, room), splat(np.float32(first - left))
            for w in range(first + 1, stop):
                # The first of equals, and what is no number, as torch does.
                v = load(row, w * channels + c, room)
                column = where_larger(v, top, splat(np.float32(w - left)), column)
                top = larger(v, top)
            store(largest, at + c, room, top)
            store(columns, at + c, room, column)
        at += channels


@compiled
def _pool_column(largest, columns, top, bottom, kernel_h, kernel_w, at, count, out, taps):
    """Maxima of the rows from ``top``, or the first one, to ``bottom``, and their taps."""
    room, first = largest.size // kernel_h, max(top, 0)
    for i in range(0, count, LANES):
        own = first % kernel_h * room + i
        value = load(largest, own, LANES)
        tap = plus(load(columns, own, LANES), splat(np.float32((first - top) * kernel_w)))
        for k in range(first + 1, bottom + 1):
            own = k % kernel_h * room + i
            v = load(largest, own, LANES)
            of_row = plus(load(columns, own, LANES), splat(np.float32((k - top) * kernel_w)))
            tap = where_larger(v, value, of_row, tap)
            value = larger(v, value)
        store(out, at + i, count - i, value)
        store_small(taps, at + i, count - i, tap)
