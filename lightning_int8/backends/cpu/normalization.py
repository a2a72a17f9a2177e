"""What a batch norm computes for each channel, in one compiled call: a dozen small operations cost more than a pass."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lightning_int8.backends.cpu.arrays import as_array
from lightning_int8.backends.cpu.compiler import at, compiled

_ONE, _ZERO = np.float32(1), np.float32(0)


def affine(
    mean: np.ndarray, variance: np.ndarray, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The norm as ``factor · x + offset``.

    Args:
        mean: float64 ``(C,)``.
        variance: float64 ``(C,)``, biased.
        eps: Added to the variance.
        weight: float32 ``(C,)``, or None for 1.
        bias: float32 ``(C,)``, or None for 0.

    Returns:
        1 / sqrt(variance + eps), float64; factor and offset, float32.
    """
    return _affine(mean, variance, eps, _or(weight, _ONE), _or(bias, _ZERO))


def gradients(
    sums: np.ndarray, mean: np.ndarray, inverse: np.ndarray, weight: Tensor | None, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of a norm by the statistics of its input.

    Args:
        sums: float64 ``(2, C)``: Σ g, and Σ g · (x - mean).
        mean: float64 ``(C,)``.
        inverse: See ``affine``.
        weight: Likewise.
        count: Values of a channel.

    Returns:
        Five of float32 ``(C,)``: the gradients of weight and bias, and factor, slope and offset of that of x, which is
        ``factor · g + slope · x + offset``.
    """
    found = _gradients(sums[0], sums[1], mean, inverse, _or(weight, _ONE), count)
    return found[0], found[1], found[2], found[3], found[4]


def _or(vector: Tensor | None, otherwise: np.float32) -> np.ndarray | np.float32:
    return otherwise if vector is None else as_array(vector)


@compiled
def _affine(mean, variance, eps, weight, bias):
    inverse = np.empty(mean.size)
    factor, offset = np.empty(mean.size, np.float32), np.empty(mean.size, np.float32)
    for c in range(mean.size):
        inverse[c] = 1.0 / np.sqrt(variance[c] + eps)
        slope = inverse[c] * at(weight, c)
        factor[c], offset[c] = slope, at(bias, c) - mean[c] * slope
    return inverse, factor, offset


@compiled
def _gradients(total, along, mean, inverse, weight, count):
    out = np.empty((5, mean.size), np.float32)
    for c in range(mean.size):
        factor = inverse[c] * at(weight, c)
        # The statistics depend on x too: that takes its mean and its correlation with x out of the gradient.
        slope = -factor * inverse[c] * inverse[c] * along[c] / count
        out[0, c], out[1, c] = along[c] * inverse[c], total[c]
        out[2, c], out[3, c], out[4, c] = factor, slope, -factor * total[c] / count - slope * mean[c]
    return out
