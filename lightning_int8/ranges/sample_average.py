"""The average over the batch of each sample's largest magnitude: one outlier sample does not set the range."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_int8.magnitudes import STATISTICS, Statistics
from lightning_int8.ranges import check_every, check_fraction


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Clip value = mean over samples of the sample's max|x|, averaged over time (Banner et al. 2018).

    An affine operand calls it once for each sign, which gives the mean minimum and the mean maximum of the samples.
    A sample is an index of the first axis: an image of a convolution, a row of a matrix product. With a clip value for
    each index of that axis there is nothing to average.

    Attributes:
        every: Optimizer steps between refreshes; None takes the interval of the conversion.
        decay: Weight of the past, in [0, 1).
    """

    every: int | None = None
    decay: float = 0.1

    def __post_init__(self) -> None:
        check_every(self.every)
        check_fraction("decay", self.decay)

    def clip_value(
        self, x: Tensor, axis: int | None, previous: Tensor | None, bits: int, statistics: Statistics = STATISTICS
    ) -> Tensor:
        """See ``RangeRule.clip_value``."""
        if axis == -1:
            samples = x.reshape(x.shape[0], -1, x.shape[-1])
            current = torch.maximum(-samples.amin(1), samples.amax(1)).float().mean(0)
        else:
            current = statistics.absmax(x.flatten(1), 0)
            current = current if axis == 0 else current.mean()
        return current if previous is None else self.decay * previous + (1.0 - self.decay) * current
