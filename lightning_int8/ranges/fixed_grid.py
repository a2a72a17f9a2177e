"""A grid that never moves: the direct quantization of full-integer training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_int8 import numerics
from lightning_int8.magnitudes import STATISTICS, Statistics
from lightning_int8.ranges import check_every


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Scale = 2^(integer_bits - (bits - 1)), whatever the values: Q(x, k) of Yang et al. 2019 (WAGEUBN) for 0.

    INT8 planes saturate at largest integer · scale (0.992 · 2^integer_bits at 8 bits, 0.996 at 16 and 24), where the
    paper's float carrier goes on.

    Attributes:
        every: Optimizer steps between refreshes; the clip value is the same at each.
        integer_bits: Bits before the binary point, sign not counted; negative for values well below 1.
    """

    every: int | None = None
    integer_bits: int = 0

    def __post_init__(self) -> None:
        check_every(self.every)
        if not isinstance(self.integer_bits, int) or not -32 <= self.integer_bits <= 32:
            raise ValueError(f"integer_bits: {self.integer_bits!r} is not an integer from -32 to 32")

    def clip_value(
        self, x: Tensor, axis: int | None, previous: Tensor | None, bits: int, statistics: Statistics = STATISTICS
    ) -> Tensor:
        """See ``RangeRule.clip_value``."""
        largest = numerics.largest_integer(bits)
        clip_value = largest * 2.0 ** (self.integer_bits - largest.bit_length())
        shape = () if axis is None else (x.shape[axis],)
        return torch.full(shape, clip_value, dtype=torch.float32, device=x.device)
