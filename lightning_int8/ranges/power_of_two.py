"""A scale that is a power of two, so that rescaling is a shift."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_int8 import numerics
from lightning_int8.magnitudes import STATISTICS, Statistics
from lightning_int8.ranges import check_every

ROUNDINGS = ("up", "nearest")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Clip value whose scale is a power of two near max|x| / largest integer.

    "up" is the resolution of Zhang et al. 2020: scale = 2^ceil(log2(max|x| / largest)); nothing saturates. "nearest" is
    the shift quantization of Yang et al. 2019 (WAGEUBN): R = 2^round(log2 max|x|), scale = R / 2^(bits - 1); magnitudes
    beyond largest integer · scale (0.992 R at 8 bits, 0.996 R at 16 and 24) saturate, at worst the top 29 % of the
    range. The scale of an affine operand, whose two sides differ, is no power of two; nor is one that ranks average
    (``sync_clip="mean"``).

    Attributes:
        every: Optimizer steps between refreshes; None takes the interval of the conversion.
        rounding: "up" or "nearest".
    """

    every: int | None = None
    rounding: str = "up"

    def __post_init__(self) -> None:
        check_every(self.every)
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding: {self.rounding!r} is not one of {', '.join(ROUNDINGS)}")

    def clip_value(
        self, x: Tensor, axis: int | None, previous: Tensor | None, bits: int, statistics: Statistics = STATISTICS
    ) -> Tensor:
        """See ``RangeRule.clip_value``."""
        largest = numerics.largest_integer(bits)
        limit = statistics.absmax(x, axis)
        if self.rounding == "up":
            mantissa, exponent = torch.frexp(limit / largest)  # mantissa in [0.5, 1)
            exponent = exponent - (mantissa == 0.5).int()
        else:
            mantissa, exponent = torch.frexp(limit)
            # In float64: rounded to float32, sqrt(0.5) would be below mantissas that are smaller than it.
            exponent = exponent - (mantissa.double() < math.sqrt(0.5)).int() - largest.bit_length()
        clip_value = torch.ldexp(torch.full_like(limit, largest), exponent)
        # frexp of 0, infinity and NaN has no useful exponent: pass them on.
        return torch.where(torch.isfinite(limit) & (limit > 0), clip_value, limit)
