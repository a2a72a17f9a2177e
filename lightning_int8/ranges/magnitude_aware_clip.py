"""Clipping by the shape of the distribution: none for Gaussian gradients, an average for sharp, long-tailed ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_int8.magnitudes import STATISTICS, Statistics
from lightning_int8.ranges import check_every, check_fraction


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Magnitude-aware clipping of Zhao et al. 2021, with its two-class test per channel (or per tensor).

    With m = max|x| and P = P(|x| > sigma): Gaussian class (P > threshold): clip value = m. Inverted-T class: clip value
    = (1 - k·A) · previous + A · m; m at the first refresh and after nothing but zeros. The average may exceed the
    present maximum, and may clip hard after a spike, as published.

    Attributes:
        every: Optimizer steps between refreshes; None takes the interval of the conversion.
        threshold: lambda of the test; a Gaussian has P = 0.317, a Laplace distribution 0.243.
        slope: A.
        ratio: k.
    """

    every: int | None = None
    threshold: float = 0.3
    slope: float = 0.8
    ratio: float = 1.0

    def __post_init__(self) -> None:
        check_every(self.every)
        check_fraction("threshold", self.threshold)
        for field in ("slope", "ratio"):
            if not isinstance(getattr(self, field), int | float):
                raise ValueError(f"{field}: {getattr(self, field)!r} is not a number")
        if not 0.0 < self.slope <= 1.0:
            raise ValueError(f"slope: {self.slope!r} is not in (0, 1]")
        if not 0.0 <= self.ratio * self.slope <= 1.0:
            raise ValueError(f"ratio: {self.ratio!r} times slope {self.slope!r} is not in [0, 1]")

    def clip_value(
        self, x: Tensor, axis: int | None, previous: Tensor | None, bits: int, statistics: Statistics = STATISTICS
    ) -> Tensor:
        """See ``RangeRule.clip_value``."""
        largest, share = statistics.largest_and_share_beyond_sigma(x, axis)
        if previous is None:
            return largest
        average = (1.0 - self.ratio * self.slope) * previous + self.slope * largest
        return torch.where((share > self.threshold) | (previous == 0), largest, average)
