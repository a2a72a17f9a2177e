"""An exponential average of the largest magnitude: one outlier batch does not set the range alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_int8.magnitudes import STATISTICS, Statistics
from lightning_int8.ranges import check_every, check_fraction


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Clip value = decay · previous + (1 - decay) · max|x|; max|x| at the first refresh.

    Attributes:
        every: Optimizer steps between refreshes; None takes the interval of the conversion.
        decay: Weight of the past, in [0, 1).
    """

    every: int | None = None
    decay: float = 0.9

    def __post_init__(self) -> None:
        check_every(self.every)
        check_fraction("decay", self.decay)

    def clip_value(
        self, x: Tensor, axis: int | None, previous: Tensor | None, bits: int, statistics: Statistics = STATISTICS
    ) -> Tensor:
        """See ``RangeRule.clip_value``."""
        current = statistics.absmax(x, axis)
        return current if previous is None else self.decay * previous + (1.0 - self.decay) * current
