"""What a route is: one exact way to compute the three contractions of a convolution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_int8.backends.cpu.correlation import (
    Correlation,
    assemble_grad_input,
    output_correlation,
    residue_correlation,
    transposed_weight,
)
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import Plane


class Scales(NamedTuple):
    """The factors of an output or a grad_input: result = fl(fl(fl(sum) · left) · right) in float32.

    Attributes:
        left: float32 ``()``.
        right: float32 ``()``, or one per channel of the result.
    """

    left: Tensor
    right: Tensor


class Route(ABC):
    """One way to compute.

    Contract: the sums are those of ``reference`` to the integer, scaled results its results to the bit; so a choice
    between routes never shows.

    Attributes:
        name: How reports and the timing file call it.
    """

    name: str

    @abstractmethod
    def supports(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scaled: bool) -> bool:
        """Whether the route can compute this contraction exactly, as scaled float32 or as integer sums."""

    @abstractmethod
    def correlate(self, data: Plane, weight: Plane, correlation: Correlation, scales: Scales | None) -> Tensor:
        """The windowed sums ``(N, *size, Co)``.

        Args:
            data: int8 ``(N, *spatial, C)``, contiguous; its zero point is a scalar.
            weight: int8 ``(Co, *taps, C / groups)``, any strides; its zero point is a scalar or ``(Co,)``.
            correlation: The windows.
            scales: What to multiply by, None for integer sums.

        Returns:
            float32 with ``scales``, else int32 or int64; no view of another tensor.
        """

    @abstractmethod
    def grad_weight(self, g: Plane, x: Plane, geometry: ConvGeometry) -> Tensor:
        """The sums ``(Co, *kernel, C / groups)`` of g ``(N, *out, Co)`` and x ``(N, *in, C)``."""

    def run(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scales: Scales | None = None) -> Tensor:
        """One contraction of one pair of planes, see ``Backend.accumulate``; scaled to float32 with ``scales``."""
        if contraction == "output":
            return self.correlate(a, b, output_correlation(geometry), scales)
        if contraction == "grad_weight":
            assert scales is None, "grad_weight is small: it is scaled by whoever asks"
            return self.grad_weight(a, b, geometry)
        groups = geometry.groups
        return assemble_grad_input(
            geometry,
            a.data.shape[0],
            b.data.shape[-1] * groups,
            torch.int32 if scales is None else torch.float32,
            lambda r: self.correlate(a, transposed_weight(b, r, groups), residue_correlation(r, groups), scales),
        )
