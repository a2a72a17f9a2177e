"""Routes that compute windowed sums of one form, of which a strided grad_input is assembled."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_int8.backends.cpu.correlation import (
    Correlation,
    assemble_grad_input,
    output_correlation,
    residue_correlation,
    transposed_weight,
)
from lightning_int8.backends.cpu.gemm import scaled_sums
from lightning_int8.backends.cpu.route import Route, Scales
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import Plane, along


class CorrelationRoute(Route):
    """A route of which only ``correlate`` and ``grad_weight`` differ."""

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
        """See ``Route.run``."""
        if contraction == "output":
            return self.correlate(a, b, output_correlation(geometry), scales)
        if contraction == "grad_weight":
            sums = self.grad_weight(a, b, geometry)
            return sums if scales is None else scaled_sums(sums, along(scales.left, 0, sums.dim()), scales.right)
        groups = geometry.groups
        return assemble_grad_input(
            geometry,
            a.data.shape[0],
            b.data.shape[-1] * groups,
            torch.int32 if scales is None else torch.float32,
            lambda r: self.correlate(a, transposed_weight(b, r, groups), residue_correlation(r, groups), scales),
        )
