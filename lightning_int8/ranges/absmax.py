"""The largest magnitude: nothing saturates at the step that measured it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_int8 import numerics
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

    def clip_value(self, x: Tensor, axis: int | None, previous: Tensor | None, bits: int) -> Tensor:
        """See ``RangeRule.clip_value``."""
        return numerics.absmax(x, axis)
