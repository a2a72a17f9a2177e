"""The statistics of ``magnitudes`` in fused passes over memory (numba)."""

from __future__ import annotations

import numba as nb
import numpy as np
import torch
from torch import Tensor

_jit = nb.njit(nogil=True, error_model="numpy", cache=True)

_MAGNITUDE, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)


def histogram(x: Tensor, first: int, bins: int, shift: int) -> Tensor:
    """Counts of |x|, int64 ``(bins,)``, by ``(bit pattern >> shift) - first``; see ``magnitudes.Statistics``."""
    patterns = x.detach().float().contiguous().view(-1).view(torch.int32).numpy().view(np.uint32)
    counts = np.zeros(bins, np.int64)
    _histogram(patterns, first, np.uint32(shift), counts)
    return torch.from_numpy(counts)


def largest_and_share_beyond_sigma(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """See ``magnitudes.Statistics.largest_and_share_beyond_sigma``."""
    values = x.detach().float().contiguous()
    if axis == -1:
        matrix = values.view(-1, values.shape[-1]).numpy()
        largest, share = _columns(matrix)
    else:
        matrix = values.view(1 if axis is None else values.shape[0], -1).numpy()
        largest, share = _rows(matrix)
    shape = () if axis is None else (-1,)
    return torch.from_numpy(largest).reshape(shape), torch.from_numpy(share).reshape(shape)


def absmax(x: Tensor, axis: int | None) -> Tensor:
    """See ``magnitudes.Statistics.absmax``; of contiguous float32, not empty."""
    patterns = x.detach().view(torch.int32)
    if axis is not None and axis % x.dim() == x.dim() - 1:
        largest = _largest_of_columns(patterns.view(-1, x.shape[-1]).numpy())
    else:
        largest = _largest_of_rows(patterns.view(1 if axis is None else x.shape[0], -1).numpy())
    shape = () if axis is None else (-1,)
    return torch.from_numpy(largest).view(torch.float32).reshape(shape)


def absmax_of_both(x: Tensor) -> tuple[Tensor, Tensor]:
    """``absmax`` along axis 0 and along axis -1."""
    patterns = x.detach().view(torch.int32).view(x.shape[0], -1, x.shape[-1]).numpy()
    rows, columns = _largest_of_both(patterns)
    return torch.from_numpy(rows), torch.from_numpy(columns)


# As integers, the patterns of magnitudes are in the order of magnitudes, and what is no number is largest.


@_jit
def _largest_of_rows(patterns):
    largest = np.empty(patterns.shape[0], np.int32)
    for r in range(patterns.shape[0]):
        largest[r] = _largest(patterns[r])
    return largest


@_jit
def _largest(patterns):
    largest = np.int32(0)
    for i in range(patterns.size):
        largest = max(largest, np.int32(patterns[i] & 0x7FFFFFFF))
    return largest


@_jit
def _largest_of_columns(patterns):
    largest = np.zeros(patterns.shape[1], np.int32)
    for r in range(patterns.shape[0]):
        _take_larger(patterns[r], largest)
    return largest


@_jit
def _largest_of_both(patterns):
    rows, columns = np.empty(patterns.shape[0], np.int32), np.zeros(patterns.shape[2], np.int32)
    for r in range(patterns.shape[0]):
        rows[r] = 0
        for k in range(patterns.shape[1]):
            rows[r] = max(rows[r], _largest(patterns[r, k]))
            _take_larger(patterns[r, k], columns)
    return rows.view(np.float32), columns.view(np.float32)


@_jit
def _take_larger(patterns, largest):
    for i in range(largest.size):
        largest[i] = max(largest[i], np.int32(patterns[i] & 0x7FFFFFFF))


@_jit
def _histogram(patterns, first, shift, counts):
    for i in range(patterns.size):
        pattern = patterns[i] & _MAGNITUDE
        if pattern < _INFINITY:
            counts[min(max(np.int64(pattern >> shift) - first, 0), counts.size - 1)] += 1


@_jit
def _rows(x):
    rows, columns = x.shape
    largest, share = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for r in range(rows):
        total = squares = 0.0
        top = np.float32(0.0)
        for c in range(columns):
            v = x[r, c]
            total += v
            squares += np.float64(v) * v
            top = _maximum(top, abs(v))
        sigma = _sigma(total, squares, columns)
        beyond = 0
        for c in range(columns):
            beyond += abs(x[r, c]) > sigma
        largest[r], share[r] = top, beyond / columns
    return largest, share


@_jit
def _columns(x):
    rows, columns = x.shape
    total, squares = np.zeros(columns), np.zeros(columns)
    largest, sigma = np.zeros(columns, np.float32), np.empty(columns, np.float32)
    beyond = np.zeros(columns, np.int64)
    for r in range(rows):
        for c in range(columns):
            v = x[r, c]
            total[c] += v
            squares[c] += np.float64(v) * v
            largest[c] = _maximum(largest[c], abs(v))
    for c in range(columns):
        sigma[c] = _sigma(total[c], squares[c], rows)
    for r in range(rows):
        for c in range(columns):
            beyond[c] += abs(x[r, c]) > sigma[c]
    return largest, (beyond / rows).astype(np.float32)


@_jit
def _maximum(a, b):
    """The larger one; NaN once one of them is."""
    return a if a >= b or a != a else b


@_jit
def _sigma(total, squares, count):
    mean = total / count
    return np.float32(np.sqrt(max(squares / count - mean * mean, 0.0)))
