"""Depthwise contractions without a matrix product: channel by channel, int8 times int8 summed in int32.

A row of positions of the last spatial axis and its channels lie side by side in memory, so taps are sums of shifted
rows: long loops over (position, channel) that the compiler vectorizes, with the weight repeated along the row. A stride
along the last axis is taken out first by sorting the positions of the data by their remainder.
"""

from __future__ import annotations

import numpy as np

from lightning_int8.backends.cpu.compiler import compiled, wide_vectors
from lightning_int8.backends.cpu.scale import scale_block
from lightning_int8.backends.cpu.threads import split

Factors = tuple[np.float32, "np.ndarray | np.float32"]

BLOCK = 4096
"""Elements of a row that are summed at a time: their int32 sums and the weights stay in cache."""

_ROWS_AT_ONCE = 4  # rows that a gradient of the weight multiplies between two accesses to its sums
_SMALLEST_PIECE = 1 << 16  # elements of the result that are worth a thread


def correlate(
    data: np.ndarray, starts: np.ndarray, taps: np.ndarray, weight: np.ndarray, scales: Factors | None, out: np.ndarray
) -> None:
    """``out[r, k] = Σ_j data[starts[r] + taps[j] + k] · weight[j, k % block]``, times both scales where there are any.

    Args:
        data: int8, flat.
        starts: int64, where each row begins.
        taps: int64, where each tap begins, from there.
        weight: int16 holding int8 values, ``(taps, block)``: the weight of a position's channels, repeated.
        scales: float32 left factor, and right factor: a scalar, or repeated as the weight, ``(block,)``.
        out: ``(rows, length)``, int32 or, with scales, float32.
    """

    def work(first: int, last: int) -> None:
        if scales is None:
            _correlate(data, starts[first:last], taps, weight, out[first:last])
        else:
            _correlate_scaled(data, starts[first:last], taps, weight, *scales, out[first:last])

    split(work, len(out), -(-_SMALLEST_PIECE // out.shape[1]))


def grad_weight(
    data: np.ndarray, starts: np.ndarray, taps: np.ndarray, g: np.ndarray, block: int, limit: int
) -> np.ndarray:
    """``Σ_r Σ_k g[r, k] · data[starts[r] + taps[j] + k]`` over k with one remainder mod block, int64 ``(taps, block)``.

    Args:
        data: int8, flat.
        starts: int64, where the row of data begins that belongs to each row of g.
        taps: int64, where each tap begins, from there.
        g: int8 ``(rows, length)``.
        block: Multiple of the number of channels.
        limit: Number of products that an int32 sum holds.
    """
    rows_per_sum = max(_ROWS_AT_ONCE, limit // -(-g.shape[1] // block))

    def work(first: int, last: int) -> np.ndarray:
        total = np.zeros((len(taps), block), np.int64)
        for start in range(first, last, rows_per_sum):
            part = slice(start, min(start + rows_per_sum, last))
            sums = np.zeros((len(taps), block), np.int32)
            _grad_weight(data, starts[part], taps, g[part], sums)
            total += sums
        return total

    return np.sum(split(work, len(g), -(-_SMALLEST_PIECE // g.shape[1])), axis=0)


@compiled
def _correlate(data, starts, taps, weight, out):
    block = weight.shape[1]
    for r in range(starts.size):
        for k in range(0, out.shape[1], block):
            _sum_taps(data, starts[r] + k, taps, weight, out[r, k : k + block])


@compiled
def _correlate_scaled(data, starts, taps, weight, left, right, out):
    block = weight.shape[1]
    sums = np.empty(block, np.int32)
    for r in range(starts.size):
        for k in range(0, out.shape[1], block):
            count = min(block, out.shape[1] - k)
            _sum_taps(data, starts[r] + k, taps, weight, sums[:count])
            scale_block(sums[:count], left, right, out[r, k : k + count])


@compiled
def _sum_taps(data, start, taps, weight, sums):
    sums[:] = 0
    j = 0
    while j + 3 <= taps.size:
        x0, x1, x2 = data[start + taps[j] :], data[start + taps[j + 1] :], data[start + taps[j + 2] :]
        _add_three(sums, x0, x1, x2, weight[j], weight[j + 1], weight[j + 2])
        j += 3
    while j < taps.size:
        _add_one(sums, data[start + taps[j] :], weight[j])
        j += 1


@compiled
def _add_three(sums, x0, x1, x2, w0, w1, w2):
    wide_vectors()
    for i in range(sums.size):
        # A product of two int8 fits int16, of which a vector multiplies twice as many.
        p0, p1, p2 = np.int16(x0[i] * w0[i]), np.int16(x1[i] * w1[i]), np.int16(x2[i] * w2[i])
        sums[i] = np.int32(sums[i] + np.int32(p0) + np.int32(p1) + np.int32(p2))


@compiled
def _add_one(sums, x, w):
    wide_vectors()
    for i in range(sums.size):
        sums[i] = np.int32(sums[i] + np.int32(np.int16(x[i] * w[i])))


@compiled
def _grad_weight(data, starts, taps, g, sums):
    block, length = sums.shape[1], g.shape[1]
    whole = starts.size // 4 * 4
    for k in range(0, length, block):
        count = min(block, length - k)
        for r in range(0, whole, 4):
            g0, g1, g2, g3 = g[r, k:], g[r + 1, k:], g[r + 2, k:], g[r + 3, k:]
            for j in range(taps.size):
                s = taps[j] + k
                x0, x1 = data[starts[r] + s :], data[starts[r + 1] + s :]
                x2, x3 = data[starts[r + 2] + s :], data[starts[r + 3] + s :]
                _add_four(sums[j, :count], x0, x1, x2, x3, g0, g1, g2, g3)
        for r in range(whole, starts.size):
            for j in range(taps.size):
                _add_product(sums[j, :count], data[starts[r] + taps[j] + k :], g[r, k:])


@compiled
def _add_four(sums, x0, x1, x2, x3, g0, g1, g2, g3):
    wide_vectors()
    for i in range(sums.size):
        p0, p1 = np.int32(x0[i]) * np.int32(g0[i]), np.int32(x1[i]) * np.int32(g1[i])
        p2, p3 = np.int32(x2[i]) * np.int32(g2[i]), np.int32(x3[i]) * np.int32(g3[i])
        sums[i] = np.int32(sums[i] + np.int32(p0) + np.int32(p1) + np.int32(p2) + np.int32(p3))


@compiled
def _add_product(sums, x, g):
    wide_vectors()
    for i in range(sums.size):
        sums[i] = np.int32(sums[i] + np.int32(np.int32(x[i]) * np.int32(g[i])))
