"""The CPU: every contraction by one of several exact routes, INT8 products of oneDNN or of our own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_int8.backends import int_matmul
from lightning_int8.backends.base import Backend, Counts, Request, output_scales
from lightning_int8.backends.cpu.choice import Choice
from lightning_int8.backends.cpu.choice_file import ChoiceFile
from lightning_int8.backends.cpu.depthwise_route import Depthwise
from lightning_int8.backends.cpu.direct_route import Direct
from lightning_int8.backends.cpu.expression import Expression
from lightning_int8.backends.cpu.gemm import Gemm, scaled_sums
from lightning_int8.backends.cpu.im2col_route import Im2col
from lightning_int8.backends.cpu.implicit_route import Implicit
from lightning_int8.backends.cpu.passes import compiled_pass
from lightning_int8.backends.cpu.route import Route, Scales
from lightning_int8.backends.cpu.subpixel_route import Subpixel
from lightning_int8.backends.form import Form
from lightning_int8.backends.int_matmul import MatMul
from lightning_int8.geometry import ConvGeometry
from lightning_int8.measures import QuantizationError
from lightning_int8.numerics import FLAG_BITS, Plane, Quantized
from lightning_int8.spec import OperandSpec

QUANTIZE = compiled_pass("quantize")
"""The compiled quantization, or None where numba cannot be imported."""

BOTH_AXES = compiled_pass("both_axes")
"""The compiled quantization of weights along two axes, or None."""

MEASURES = compiled_pass("measures")
"""The compiled measurement of quantization errors, or None."""


_PRODUCT = ConvGeometry(input_size=(), kernel_size=(), stride=(), padding=(), dilation=(), groups=1)
"""A matrix product is a convolution without spatial axes."""


class OneDNN(Backend):
    """INT8 products by oneDNN and by passes of our own, which are compiled where numba can be imported.

    Args:
        matmul: The matrix product; None where the self-check found none that is exact.
        only: Name of the one route to take wherever it can, instead of the fastest; for tests and measurements.
    """

    name = "onednn"
    integer = True
    fuses = QUANTIZE is not None

    def __init__(self, matmul: MatMul | None, only: str | None = None) -> None:
        self.exact = matmul is not None
        self._gemm = Gemm(matmul or int_matmul.full_range)
        im2col, direct = Im2col(self._gemm), Direct()
        routes: list[Route] = [Depthwise(), im2col, direct, Subpixel(direct), Implicit()]
        if only is None:
            self._choice = Choice(routes, im2col, ChoiceFile())
        else:
            self._choice = Choice([*(r for r in routes if r.name == only), im2col], im2col, None)

    @property
    def routes(self) -> list[Route]:
        """The routes that contractions choose from."""
        return self._choice.routes

    def route(self, convolution: bool) -> str:
        """See ``Backend.route``."""
        halves = self._gemm.matmul is int_matmul.halves
        product = "INT8 product in two halves (no VNNI)" if halves else "INT8 product"
        names = [r.name for r in self.routes if convolution or r.multiplies_matrices]
        return f"onednn: {product}, fastest of {', '.join(names)}"

    def quantize(
        self, x: Tensor | Expression, clip_value: Tensor, spec: OperandSpec, axis: int | None, key: Tensor
    ) -> Quantized:
        """See ``Backend.quantize``."""
        if QUANTIZE is None:
            return super().quantize(x, clip_value, spec, axis, key)
        return QUANTIZE.quantize(x, clip_value, spec, axis, key)

    def quantize_both(self, x: Tensor | Expression, first: Request, second: Request) -> tuple[Quantized, Quantized]:
        """See ``Backend.quantize_both``."""
        plain = isinstance(x, Tensor) and x.dtype == torch.float32 and x.is_contiguous() and x.numel() > 0
        if BOTH_AXES is None or not plain or (first.axis, second.axis) != (0, -1):
            return super().quantize_both(x, first, second)
        by_channel = all(r.clip_value.shape == (x.shape[r.axis or 0],) for r in (first, second))
        if not by_channel or any(
            r.spec.bits != 8 or r.spec.affine or r.spec.rounding != "nearest" for r in (first, second)
        ):
            return super().quantize_both(x, first, second)
        return BOTH_AXES.quantize_both(x, first.clip_value, second.clip_value)

    def quantization_error(
        self, x: Tensor, clip_values: Sequence[Tensor], bits: Sequence[int], affine: bool, axis: int | None
    ) -> QuantizationError:
        """See ``Backend.quantization_error``."""
        if MEASURES is None or FLAG_BITS in bits:
            return super().quantization_error(x, clip_values, bits, affine, axis)
        return MEASURES.quantization_error(x, clip_values, bits, affine, axis)

    def accumulate(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry | None) -> Tensor:
        """See ``Backend.accumulate``."""
        assert self.exact, "the self-check found no exact INT8 product"
        return self._choice.run(contraction, a, b, geometry or _PRODUCT)

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
        """See ``Backend.scaled``; scales are applied while sums are in cache, where the route can."""
        assert self.exact, "the self-check found no exact INT8 product"
        left, right = a.planes[i], b.planes[j]
        geometry = geometry or _PRODUCT
        scales = _scales(contraction, left, b, j, geometry, form)
        if scales is None:
            sums = self.accumulate(contraction, left, right, geometry)
            return form.finish(scaled_sums(sums, *output_scales(contraction, a, b, i, j, geometry, sums.dim())))
        return self._choice.run(contraction, left, right, geometry, scales)

    def _contract(
        self,
        contraction: str,
        a: Quantized,
        b: Quantized,
        geometry: ConvGeometry | None,
        counts: Counts,
        form: Form,
    ) -> Tensor:
        total = super()._contract(contraction, a, b, geometry, counts, form)
        if contraction not in counts.routes:
            left, right = a.planes[0], b.planes[0]
            geometry = geometry or _PRODUCT
            scales = _scales(contraction, left, b, 0, geometry, form)
            counts.routes[contraction] = self._choice.pick(contraction, left, right, geometry, scales).name
        return total


def make() -> OneDNN:
    """Build the backend; runs the self-check."""
    return OneDNN(int_matmul.exact_matmul())


def _scales(contraction: str, left: Plane, b: Quantized, j: int, geometry: ConvGeometry, form: Form) -> Scales | None:
    """The factors that a route applies; None where those of a grad_weight differ by column."""
    right = b.planes[j].scale
    if contraction == "grad_weight" and b.axis is not None:
        return None
    by_group = contraction == "grad_input" and b.axis is not None and geometry.groups > 1
    return Scales(left.scale, right.repeat(geometry.groups) if by_group else right, form)
