"""The gradient of a maximum over windows, gathered: every position asks the windows that cover it."""

from __future__ import annotations

import numpy as np

from lightning_int8.backends.cpu.compiler import compiled, wide_vectors
from lightning_int8.backends.cpu.floats import get


@compiled
def unpool(gradient, taps, windows, start, count, out):
    """Elements ``start`` to ``start + count`` of the gradient of the windows' input; whole positions.

    Args:
        gradient: Floats, see ``floats``, flat ``(N, *out, C)``.
        taps: uint8, as ``gradient``: the tap of each window, in row-major order, that had the maximum.
        windows: int64: height, width and channels of the input, height and width of the output, then kernel, stride and
            padding in both directions.
        start: Index of the first element.
        count: Number of elements.
        out: float32, room for them.
    """
    height, width, channels, out_height, out_width = windows[0], windows[1], windows[2], windows[3], windows[4]
    kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w = windows[5:11]
    position = start // channels
    for done in range(0, count, channels):
        own = out[done : done + channels]
        _clear(own)
        row, w = position // width, position % width
        sample, h = row // height, row % height
        first_h = max(0, (h + pad_h - kernel_h + stride_h) // stride_h)
        first_w = max(0, (w + pad_w - kernel_w + stride_w) // stride_w)
        for oh in range(first_h, min(out_height, (h + pad_h) // stride_h + 1)):
            for ow in range(first_w, min(out_width, (w + pad_w) // stride_w + 1)):
                tap = (h + pad_h - oh * stride_h) * kernel_w + (w + pad_w - ow * stride_w)
                at = ((sample * out_height + oh) * out_width + ow) * channels
                _add_where(gradient[at : at + channels], taps[at : at + channels], np.uint8(tap), own)
        position += 1


@compiled
def _clear(out):
    for i in range(out.size):
        out[i] = np.float32(0.0)


@compiled
def _add_where(gradient, taps, tap, out):
    wide_vectors()
    for i in range(out.size):
        out[i] += get(gradient, i) if taps[i] == tap else np.float32(0.0)
