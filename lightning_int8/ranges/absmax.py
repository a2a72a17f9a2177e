"""The largest magnitude: nothing saturates at the step that measured it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_int8.magnitudes import STATISTICS, Statistics
from lightning_int8.ranges import check_every


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Clip value = max|x|.

    Attributes:
        every: Optimizer steps between refreshes; None takes the interval of the conversion.
    """

    every: int | None = None

    def __post_init__(self) -> None:
        check_every(self.every)

    def clip_value(
        self, x: Tensor, axis: int | None, previous: Tensor | None, bits: int, statistics: Statistics = STATISTICS
    ) -> Tensor:
        """See ``RangeRule.clip_value``."""
        return statistics.absmax(x, axis)
