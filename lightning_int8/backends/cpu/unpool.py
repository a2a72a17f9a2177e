"""The gradient of a maximum over windows, gathered: every position asks the windows that cover it."""

from __future__ import annotations

import numpy as np

from lightning_int8.backends.cpu.compiler import compiled
from lightning_int8.backends.cpu.vectors import LANES, keep_equal, load, plus, splat, store


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
    row, w = position // width, position % width
    sample, h = row // height, row % height
    first_h, last_h = _covering(h + pad_h, kernel_h, stride_h, out_height)
    for done in range(0, count, channels):
        first_w, last_w = _covering(w + pad_w, kernel_w, stride_w, out_width)
        for c in range(0, channels, LANES):
            room = min(LANES, channels - c)
            total = splat(np.float32(0.0))
            for oh in range(first_h, last_h):
                for ow in range(first_w, last_w):
                    tap = (h + pad_h - oh * stride_h) * kernel_w + (w + pad_w - ow * stride_w)
                    at = ((sample * out_height + oh) * out_width + ow) * channels + c
                    total = plus(total, keep_equal(load(gradient, at, room), taps, at, room, np.uint8(tap)))
            store(out, done + c, room, total)
        w += 1
        if w == width:
            w, h = 0, h + 1
            if h == height:
                h, sample = 0, sample + 1
            first_h, last_h = _covering(h + pad_h, kernel_h, stride_h, out_height)


@compiled
def _covering(place, kernel, stride, count):
    """First and behind the last of ``count`` windows that cover a place of the padded input."""
    return max(0, (place - kernel + stride) // stride), min(count, place // stride + 1)
