"""What a route is: one exact way to compute the three contractions of a convolution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from lightning_int8.backends.form import FLOAT32, Form
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import Plane


class Scales(NamedTuple):
    """What becomes of sums: fl(fl(fl(sum) · left) · right) in float32, in the form that is wanted.

    Attributes:
        left: float32 ``()``; of a grad_weight it may be ``(Co,)``.
        right: float32 ``()``; of an output or a grad_input it may be one per channel of the result.
        form: See ``Route.finishes``.
    """

    left: Tensor
    right: Tensor
    form: Form = FLOAT32


class Route(ABC):
    """One way to compute.

    Contract: the sums are those of ``reference`` to the integer, scaled results its results to the bit; so a choice
    between routes never shows.

    Attributes:
        name: How reports and the timing file call it.
        multiplies_matrices: Whether it supports convolutions without spatial axes, which are matrix products.
        finishes: Whether its results have the form that ``Scales`` ask for, moments included; those of other routes are
            scaled, and float32.
    """

    name: str
    multiplies_matrices: bool = False
    finishes: bool = False

    @abstractmethod
    def supports(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scaled: bool) -> bool:
        """Whether the route can compute this contraction exactly, as scaled floats or as integer sums."""

    @abstractmethod
    def run(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scales: Scales | None = None) -> Tensor:
        """One contraction of one pair of planes, see ``Backend.accumulate``; floats with ``scales``."""
