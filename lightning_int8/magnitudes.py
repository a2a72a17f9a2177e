"""Statistics of |x| that range rules are made of: plain tensor operations, fused passes on the CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_int8 import numerics

MANTISSA_BITS = 11
"""Bins per octave of the magnitude histogram, as a power of two: a bin is at most 2^-11 of its magnitude wide."""

OCTAVES = 23
"""Octaves that have bins of their own, that of the largest magnitude at the top; what is smaller shares the first bin.
"""

BINS = OCTAVES << MANTISSA_BITS

_SHIFT = 23 - MANTISSA_BITS
_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000


class Statistics:
    """What a range rule asks of a tensor; a backend has its own where its device is faster at it.

    Integers, maxima among them, are the same everywhere; sums of floats agree to their rounding.
    """

    def absmax(self, x: Tensor, axis: int | None) -> Tensor:
        """Largest magnitude, see ``numerics.absmax``."""
        fused = _fused(x.device.type) if _is_walked(x) else None
        if fused is not None:
            return fused.absmax(x, axis)
        return numerics.absmax(x, axis)

    def histogram(self, x: Tensor, largest: Tensor) -> Tensor:
        """Counts of magnitudes by the leading bits of their float32 patterns, in one pass.

        With e the exponent of ``largest`` and w = 2^-MANTISSA_BITS, bin b of octave o holds the magnitudes
        2^(e - OCTAVES + 1 + o) · [1 + b·w, 1 + (b + 1)·w); see ``bin_magnitudes``. Smaller ones, zeros among them, are
        in the first bin, elements that are not finite in none.

        Args:
            x: float32, bfloat16 or float16.
            largest: max|x|, float32 ``()``, on the device of ``x``.

        Returns:
            Integers ``(BINS,)``, the smallest magnitudes first.
        """
        first = ((largest.view(torch.int32) >> 23) - (OCTAVES - 1)) << MANTISSA_BITS
        fused = _fused(x.device.type)
        if fused is not None:
            return fused.histogram(x, int(first), BINS, _SHIFT)
        pattern = x.float().contiguous().view(torch.int32).flatten() & _MAGNITUDE
        index = ((pattern >> _SHIFT) - first).clamp_(0, BINS - 1)
        return torch.bincount(torch.where(pattern < _INFINITY, index, BINS), minlength=BINS + 1)[:BINS]

    def largest_and_share_beyond_sigma(self, x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
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
        return self.absmax(x, axis), (values.abs() > sigma).float().mean(others)


class BothAxes(Statistics):
    """``STATISTICS`` of a weight whose maxima are wanted along axis 0 and along axis -1: one pass finds both.

    Whoever asks twice gets the same tensor, which must not be changed in place.

    Args:
        x: The weight.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._largest: tuple[Tensor, Tensor] | None = None

    def absmax(self, x: Tensor, axis: int | None) -> Tensor:
        """See ``Statistics.absmax``."""
        fused = _fused(x.device.type) if x is self._x and axis in (0, -1) and _is_walked(x) else None
        if fused is None:
            return super().absmax(x, axis)
        if self._largest is None:
            self._largest = fused.absmax_of_both(x)
        of_rows, of_columns = self._largest
        return of_rows if axis == 0 else of_columns


def _is_walked(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.dim() > 1 and x.is_contiguous() and x.numel() > 0


STATISTICS = Statistics()
"""Those of torch and of the CPU."""


def bin_magnitudes(device: torch.device) -> Tensor:
    """The magnitude in the middle of each bin, in units of the power of two below the largest, float64 ``(BINS,)``.

    That of the first bin, which is mostly zeros, is 0.
    """
    bins = torch.arange(BINS, device=device)
    mantissa = 1.0 + ((bins & ((1 << MANTISSA_BITS) - 1)).double() + 0.5) / (1 << MANTISSA_BITS)
    middle = mantissa * torch.exp2(((bins >> MANTISSA_BITS) - (OCTAVES - 1)).double())
    middle[0] = 0.0
    return middle


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
