"""The clip value that turns the gradient's direction least: smallest cosine distance between before and after."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_int8 import magnitudes, numerics
from lightning_int8.magnitudes import STATISTICS, Statistics
from lightning_int8.measures import cosine_distance_from_sums
from lightning_int8.ranges import check_every

GRID = 1000
"""Candidates are k / GRID of the largest magnitude."""

COARSE_STEP = 8
"""Every so many candidates are looked at first, then all around the best; small ones all, where they are far apart."""

BLOCK_VALUES = 1 << 18
"""Values of one evaluation: candidates are taken in blocks that stay in cache."""

EXACT_VALUES = 4096
"""Up to so many magnitudes all candidates are looked at: few values make the distance jagged."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Direction-sensitive gradient clipping of Zhu et al. 2019: argmin over c of cosine distance d(x, quantize(x; c)).

    The distance is that of nearest rounding, as a random draw would blur and bias it. It is computed from one magnitude
    histogram: two passes over the tensor, whatever the number of candidates. The host waits for the result.

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
        largest = statistics.absmax(x, axis)
        levels = numerics.largest_integer(bits)
        if axis is None:
            return _best(x, largest, levels, statistics)
        channels = x.detach().movedim(axis, 0).unbind(0)
        pairs = zip(channels, largest.unbind(0), strict=True)
        return torch.stack([_best(c, top, levels, statistics) for c, top in pairs])


def _best(x: Tensor, largest: Tensor, levels: int, statistics: Statistics) -> Tensor:
    """The clip value among ``GRID`` candidates, float32 ``()``; the largest magnitude itself if 0 or not finite."""
    top = float(largest)
    if not 0.0 < top < float("inf"):
        return largest
    if x.numel() <= EXACT_VALUES:
        values = x.detach().abs().double().flatten()
        counts = torch.ones_like(values)
    else:
        counts = statistics.histogram(x, largest)
        occupied = counts.nonzero()[:, 0]
        counts, values = counts[occupied].double(), magnitudes.bin_magnitudes(x.device)[occupied]
        top = 2.0 * math.frexp(top)[0]  # in the unit of those values
    if len(values) <= EXACT_VALUES:
        index = torch.arange(1, GRID + 1, device=x.device)
    else:
        small, large = torch.arange(1, 8 * COARSE_STEP), torch.arange(8 * COARSE_STEP, GRID + 1, COARSE_STEP)
        coarse = torch.cat((small, large)).to(x.device)
        best = int(coarse[_distances(values, counts, coarse * (top / GRID), levels).argmin()])
        index = torch.arange(max(1, best - COARSE_STEP), min(GRID, best + COARSE_STEP) + 1, device=x.device)
    distances = _distances(values, counts, index * (top / GRID), levels)
    return largest * (index[distances.argmin()] / GRID).to(largest)


def _distances(values: Tensor, counts: Tensor, clips: Tensor, levels: int) -> Tensor:
    """Cosine distance at each of ``clips``, float64, of magnitudes ``values`` that occur ``counts`` times."""
    gg = (counts * values * values).sum()
    out = []
    for block in clips.split(max(1, BLOCK_VALUES // len(values))):
        clip = block[:, None]
        step = clip / levels
        error = (torch.minimum(values, clip) / step).round_().mul_(step).sub_(values)
        weighted = counts * error
        out.append(cosine_distance_from_sums(gg, (weighted * values).sum(1), (weighted * error).sum(1)))
    return torch.cat(out)
