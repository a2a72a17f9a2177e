"""What a route is: one exact way to compute the three contractions of a convolution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import Plane


class Scales(NamedTuple):
    """What becomes of sums: fl(fl(fl(sum) · left) · right) in float32, in the form that is wanted.

    Attributes:
        left: float32 ``()``; of a grad_weight it may be ``(Co,)``.
        right: float32 ``()``; of an output or a grad_input it may be one per channel of the result.
        dtype: See ``Form``; a route may leave the rounding to whoever calls it, and return float32.
        moments: See ``Form``; filled by routes of which ``sums_moments`` says so.
    """

    left: Tensor
    right: Tensor
    dtype: torch.dtype = torch.float32
    moments: Tensor | None = None


class Route(ABC):
    """One way to compute.

    Contract: the sums are those of ``reference`` to the integer, scaled results its results to the bit; so a choice
    between routes never shows.

    Attributes:
        name: How reports and the timing file call it.
        multiplies_matrices: Whether it supports convolutions without spatial axes, which are matrix products.
        sums_moments: Whether it fills the moments of an output.
    """

    name: str
    multiplies_matrices: bool = False
    sums_moments: bool = False

    @abstractmethod
    def supports(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scaled: bool) -> bool:
        """Whether the route can compute this contraction exactly, as scaled floats or as integer sums."""

    @abstractmethod
    def run(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scales: Scales | None = None) -> Tensor:
        """One contraction of one pair of planes, see ``Backend.accumulate``; floats with ``scales``."""
