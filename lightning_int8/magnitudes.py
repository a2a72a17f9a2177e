"""Statistics of |x| that range rules need beyond its maximum: plain tensor operations, fused passes on the CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_int8 import numerics

MANTISSA_BITS = 11
"""Bins per octave of the magnitude histogram, as a power of two: a bin is at most 2^-11 of its magnitude wide."""

OCTAVES = 24
"""Octaves below the largest magnitude that have bins of their own; what is smaller shares the last one."""

BINS = OCTAVES << MANTISSA_BITS

_SHIFT = 23 - MANTISSA_BITS


def histogram(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Count and mean magnitude of the occupied bins of |x|, smallest first, in one pass.

    Bins are the leading bits of the float32 pattern, hence logarithmic.

    Args:
        x: Any float dtype, finite.
        largest: max|x|, positive.

    Returns:
        Counts and mean magnitudes, float64 ``(bins,)``; zeros of ``x`` are left out.
    """
    top = (_pattern(largest) >> _SHIFT) + 1
    fused = _fused(x.device.type)
    if fused is not None:
        counts, sums = fused.histogram(x, top - BINS, BINS, _SHIFT)
    else:
        magnitude = x.abs().float().reshape(-1)
        index = ((magnitude.view(torch.int32) >> _SHIFT) - (top - BINS)).clamp(min=0).long()
        counts = torch.bincount(index * (magnitude > 0), weights=(magnitude > 0).double(), minlength=BINS)
        sums = torch.bincount(index * (magnitude > 0), weights=magnitude.double(), minlength=BINS)
    occupied = counts > 0
    return counts[occupied], sums[occupied] / counts[occupied]


def largest_and_share_beyond_sigma(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """max|x| and P(|x| > sigma), sigma the standard deviation: two passes.

    The share tells distributions apart: 0.42 uniform, 0.32 Gaussian, 0.24 Laplace, less for longer tails.

    Args:
        x: Any float dtype.
        axis: 0 or -1 for one value per index of that axis, None for one per tensor.

    Returns:
        Two float32 tensors, ``()`` or ``(C,)``; the largest magnitude is NaN where ``x`` has a NaN.
    """
    fused = _fused(x.device.type)
    if fused is not None:
        return fused.largest_and_share_beyond_sigma(x, axis)
    values = x.float()
    others = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
    sigma = values.double().std(others, correction=0, keepdim=True).float()
    return numerics.absmax(x, axis), (values.abs() > sigma).float().mean(others)


@cache
def _fused(device: str) -> Any:
    """The fused passes of the device, or None where there are none or numba cannot be imported."""
    if device != "cpu":
        return None
    try:
        from lightning_int8 import cpu_magnitudes
    except ImportError:
        return None
    return cpu_magnitudes


def _pattern(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))
