"""What every backend shares: the sum over planes, the epilogue that applies scales, and the counters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_int8 import measures, numerics
from lightning_int8.backends.cpu.expression import Expression, values_of
from lightning_int8.backends.form import FLOAT32, Form
from lightning_int8.geometry import ConvGeometry
from lightning_int8.magnitudes import STATISTICS, Statistics
from lightning_int8.measures import QuantizationError
from lightning_int8.numerics import Plane, Quantized, along
from lightning_int8.spec import CONTRACTIONS, OperandSpec


class Counts(Counter):
    """Plane-by-plane contractions executed for one layer, by (backend name, contraction).

    Attributes:
        routes: By contraction, how the first one since the dictionary was empty was computed, where a backend chooses.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.routes: dict[str, str] = {}

    def of(self, contraction: str, backend: str | None = None) -> int:
        """Number of executions of ``contraction``, by every backend or by one."""
        return sum(n for (b, c), n in self.items() if c == contraction and backend in (None, b))


class Request(NamedTuple):
    """What ``Backend.quantize`` takes besides the tensor."""

    clip_value: Tensor
    spec: OperandSpec
    axis: int | None
    key: Tensor


class Backend(ABC):
    """The three contractions on planes, on one kind of device.

    Contract: planes are bit-equal across backends for one clip value and key. With one plane on each side the result is
    ``fl(fl(fl(sum) · scale_lhs) · scale_rhs)`` in float32, bit-equal too. Wider operands add the plane pairs in
    float32, most significant first.

    Attributes:
        name: What counters and reports call it.
        integer: Whether the products are 8-bit integer products, so that they count as INT8.
        exact: Whether the self-check found its sums exact.
        fuses: Whether it quantizes expressions too, without computing their values first.
        statistics: What range rules measure tensors with.
    """

    name: str
    integer: bool
    exact: bool = True
    fuses: bool = False
    statistics: Statistics = STATISTICS

    @abstractmethod
    def route(self, convolution: bool) -> str:
        """How a layer is computed, in a few words for the conversion report."""

    def quantize(
        self, x: Tensor | Expression, clip_value: Tensor, spec: OperandSpec, axis: int | None, key: Tensor
    ) -> Quantized:
        """Turn a tensor into planes.

        Args:
            x: float32, bfloat16 or float16, canonical order (any strides); or what is to be computed.
            clip_value: float32, see ``numerics.affine_map``.
            spec: Bits, rounding and zero point.
            axis: Axis of ``clip_value`` where it is a vector.
            key: int64 ``(seed, rank, call)``.
        """
        return numerics.quantize(
            values_of(x).contiguous(),
            clip_value,
            bits=spec.bits,
            affine=spec.affine,
            axis=axis,
            stochastic=spec.rounding == "stochastic",
            key=key,
        )

    def quantize_both(self, x: Tensor | Expression, first: Request, second: Request) -> tuple[Quantized, Quantized]:
        """``quantize`` for two operands, in one walk where that pays."""
        return self.quantize(x, *first), self.quantize(x, *second)

    def quantization_error(
        self, x: Tensor, clip_values: Sequence[Tensor], bits: Sequence[int], affine: bool, axis: int | None
    ) -> QuantizationError:
        """See ``measures.quantization_error``: one pass where the device has a kernel for it."""
        return measures.quantization_error(x, clip_values, bits, affine, axis)

    @abstractmethod
    def accumulate(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry | None) -> Tensor:
        """The exact integer sums of one pair of planes, zero points taken off, before any scale.

        Args:
            contraction: "output", "grad_input" or "grad_weight".
            a: Left operand: x ``(N, *in, C)`` for output, else g ``(N, *out, Co)``.
            b: Right operand: w ``(Co, *kernel, C / groups)``, or x for grad_weight.
            geometry: None for a matrix product: x ``(rows, C)``, w ``(Co, C)``, g ``(rows, Co)``.

        Returns:
            int32 or int64 sums ``(N, *out, Co)``, ``(N, *in, C)`` or ``(Co, *kernel, C / groups)``.
        """

    def scaled(
        self,
        contraction: str,
        a: Quantized,
        b: Quantized,
        i: int,
        j: int,
        geometry: ConvGeometry | None,
        form: Form,
    ) -> Tensor:
        """fl(fl(fl(sums) · scale_lhs) · scale_rhs) of planes ``a[i]`` and ``b[j]``; see ``accumulate``.

        In the form that is wanted.
        """
        sums = self.accumulate(contraction, a.planes[i], b.planes[j], geometry)
        left, right = output_scales(contraction, a, b, i, j, geometry, sums.dim())
        return form.finish(sums.to(torch.float32).mul_(left).mul_(right))

    def output(
        self,
        x: Quantized,
        w: Quantized,
        geometry: ConvGeometry | None,
        counts: Counts,
        form: Form = FLOAT32,
    ) -> Tensor:
        """x · w in the form that is wanted, canonical order."""
        return self._contract("output", x, w, geometry, counts, form)

    def grad_input(
        self,
        g: Quantized,
        w: Quantized,
        geometry: ConvGeometry | None,
        counts: Counts,
        form: Form = FLOAT32,
    ) -> Tensor:
        """g · w in the form that is wanted, canonical order."""
        return self._contract("grad_input", g, w, geometry, counts, form)

    def grad_weight(
        self,
        g: Quantized,
        x: Quantized,
        geometry: ConvGeometry | None,
        counts: Counts,
        form: Form = FLOAT32,
    ) -> Tensor:
        """g · x in the form that is wanted, canonical order."""
        return self._contract("grad_weight", g, x, geometry, counts, form)

    def _contract(
        self,
        contraction: str,
        a: Quantized,
        b: Quantized,
        geometry: ConvGeometry | None,
        counts: Counts,
        form: Form,
    ) -> Tensor:
        assert contraction in CONTRACTIONS
        if len(a.planes) == len(b.planes) == 1:
            counts[self.name, contraction] += 1
            return self.scaled(contraction, a, b, 0, 0, geometry, form)
        total: Tensor | None = None
        for i, j in plane_pairs(a, b):
            scaled = self.scaled(contraction, a, b, i, j, geometry, FLOAT32)
            counts[self.name, contraction] += 1
            total = scaled if total is None else total.add_(scaled)
        assert total is not None
        return form.finish(total)


def plane_pairs(a: Quantized, b: Quantized) -> list[tuple[int, int]]:
    """Pairs of plane indices, the most significant product first."""
    pairs = [(i, j) for i in range(len(a.planes)) for j in range(len(b.planes))]
    return sorted(pairs, key=lambda ij: (ij[0] + ij[1], ij))


def output_scales(
    contraction: str, a: Quantized, b: Quantized, i: int, j: int, geometry: ConvGeometry | None, dim: int
) -> tuple[Tensor, Tensor]:
    """Scales of planes ``a[i]`` and ``b[j]`` viewed so that they broadcast over the result of ``contraction``."""
    groups = 1 if geometry is None else geometry.groups
    left = along(a.planes[i].scale, None if a.axis is None else 0, dim)
    right = b.planes[j].scale
    if b.axis is None:
        return left, right
    if contraction == "grad_weight" and groups > 1:
        # Weight (co, ..., ci) meets input channel group(co) · C/groups + ci: its scale depends on both.
        out_channels = a.shape[-1]
        per_group = right.reshape(groups, -1).repeat_interleave(out_channels // groups, dim=0)
        return left, per_group.reshape(out_channels, *[1] * (dim - 2), -1)
    if contraction == "grad_input":
        right = right.repeat(groups)
    return left, along(right, -1, dim)
