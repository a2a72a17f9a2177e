"""Maximum over windows of an expression: its rows are computed once and never written to memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu.compiler import compiled, wide_vectors
from lightning_int8.backends.cpu.elementwise import block_values, new_buffers
from lightning_int8.backends.cpu.evaluation import source_of
from lightning_int8.backends.cpu.expression import MASK_BITS, Expression, Windows
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
        float32 and uint8 ``(N, *out, C)``.
    """
    samples, height, width, channels = expression.shape
    source = source_of(expression, None, block=width * channels)
    out = torch.empty(samples, *windows.size, channels)
    taps = torch.empty(out.shape, dtype=torch.uint8)
    geometry = np.array(windows.as_integers(), np.int64)
    values, where = out.view(samples, -1).numpy(), taps.view(samples, -1).numpy()

    def work(first: int, last: int) -> None:
        _max_pool(source, first, last, geometry, values, where)

    split(work, samples, -(-SMALLEST_PIECE // (height * width * channels)))
    return out, taps


@compiled
def _max_pool(source, first, last, windows, out, taps):
    height, width, channels, out_height, out_width = windows[0], windows[1], windows[2], windows[3], windows[4]
    kernel_h, stride_h, pad_h = windows[5], windows[7], windows[9]
    length = width * channels
    buffers = new_buffers(length)
    ring = np.empty((kernel_h, length), np.float32)
    largest, which = np.empty(channels, np.float32), np.empty(channels, np.int32)
    for n in range(first, last):
        oh = 0
        for h in range(height):
            ring[h % kernel_h] = block_values(source, (n * height + h) * length, length, buffers)
            while oh < out_height and min(oh * stride_h - pad_h + kernel_h, height) == h + 1:
                at = oh * out_width * channels
                end = at + out_width * channels
                _pool_row(ring, oh * stride_h - pad_h, windows, largest, which, out[n, at:end], taps[n, at:end])
                oh += 1


@compiled
def _pool_row(ring, top, windows, largest, which, out, taps):
    """One row of windows; row h of the input lies in ``ring[h % kernel]``."""
    height, width, channels, out_width = windows[0], windows[1], windows[2], windows[4]
    kernel_h, kernel_w, stride_w, pad_w = windows[5], windows[6], windows[8], windows[10]
    for ow in range(out_width):
        left = ow * stride_w - pad_w
        largest[:] = -np.inf
        which[:] = 0
        for h in range(max(top, 0), min(top + kernel_h, height)):
            row = ring[h % kernel_h]
            for w in range(max(left, 0), min(left + kernel_w, width)):
                tap = np.int32((h - top) * kernel_w + w - left)
                _take_larger(row[w * channels : (w + 1) * channels], tap, largest, which)
        _put(largest, which, out[ow * channels : (ow + 1) * channels], taps[ow * channels : (ow + 1) * channels])


@compiled
def _take_larger(x, tap, largest, which):
    wide_vectors()
    for i in range(x.size):
        # The first of equals, and what is no number, as torch does.
        larger = x[i] > largest[i] or x[i] != x[i]
        largest[i] = x[i] if larger else largest[i]
        which[i] = tap if larger else which[i]


@compiled
def _put(largest, which, out, taps):
    wide_vectors()
    for i in range(out.size):
        out[i] = largest[i]
        taps[i] = np.uint8(which[i])
