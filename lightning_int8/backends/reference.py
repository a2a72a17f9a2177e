"""The truth: exact float64 arithmetic on any device, through torch's own convolutions. Slow, never counted as INT8."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_int8.backends.base import Backend, Counts, output_scales, plane_pairs
from lightning_int8.backends.form import Form
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import Plane, Quantized, along


class Reference(Backend):
    """Every product and sum is an integer below 2^53, so float64 holds it exactly whatever the order."""

    name = "reference"
    integer = False

    def route(self, convolution: bool) -> str:
        """See ``Backend.route``."""
        return "reference: float64 arithmetic, no INT8"

    def accumulate(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry | None) -> Tensor:
        """See ``Backend.accumulate``."""
        left, right = _centred(a, contraction, "lhs"), _centred(b, contraction, "rhs")
        if geometry is None:
            products = {
                "output": lambda: left @ right.t(),
                "grad_input": lambda: left @ right,
                "grad_weight": lambda: left.t() @ right,
            }
            return products[contraction]().to(torch.int64)
        return _convolution(contraction, left, right, geometry).to(torch.int64)

    def _contract(
        self,
        contraction: str,
        a: Quantized,
        b: Quantized,
        geometry: ConvGeometry | None,
        counts: Counts,
        form: Form,
    ) -> Tensor:
        if len(a.planes) == len(b.planes) == 1:
            return super()._contract(contraction, a, b, geometry, counts, form)
        total: Tensor | float = 0.0
        for i, j in plane_pairs(a, b):
            sums = self.accumulate(contraction, a.planes[i], b.planes[j], geometry)
            counts[self.name, contraction] += 1
            left, right = output_scales(contraction, a, b, i, j, geometry, sums.dim())
            total = total + sums.double() * (left.double() * right.double())
        assert isinstance(total, Tensor)
        return form.finish(total.float())


def make() -> Reference:
    """Build the backend."""
    return Reference()


def _centred(plane: Plane, contraction: str, side: str) -> Tensor:
    """plane - zero point, float64."""
    data = plane.data.double()
    if plane.zero_point is None:
        return data
    axis = None if plane.zero_point.dim() == 0 else 0 if (contraction, side) == ("output", "rhs") else -1
    return data - along(plane.zero_point, axis, data.dim())


def _convolution(contraction: str, left: Tensor, right: Tensor, geometry: ConvGeometry) -> Tensor:
    """Torch's convolution and its derivatives on canonical, centred float64 tensors."""
    out_channels = right.shape[0] if contraction != "grad_weight" else left.shape[-1]
    batch = left.shape[0]
    channels = right.shape[-1] * (geometry.groups if contraction != "grad_weight" else 1)
    # Padding differs before and after, so it is applied by hand and the convolution itself has none.
    padded = [n + lo + hi for n, (lo, hi) in zip(geometry.input_size, geometry.padding, strict=True)]
    zeros = [0] * len(padded)
    args = (geometry.stride, zeros, geometry.dilation, False, zeros, geometry.groups)

    def pad(x: Tensor) -> Tensor:
        flat = [p for pair in reversed(geometry.padding) for p in pair]
        return torch.nn.functional.pad(x.movedim(-1, 1), flat)

    if contraction == "output":
        return torch.ops.aten.convolution(pad(left), right.movedim(-1, 1), None, *args).movedim(1, -1)
    g = left.movedim(-1, 1)
    x = pad(right) if contraction == "grad_weight" else g.new_zeros(batch, channels, *padded)
    kernel = (out_channels, channels // geometry.groups, *geometry.kernel_size)
    w = right.movedim(-1, 1) if contraction == "grad_input" else g.new_zeros(kernel)
    mask = [contraction == "grad_input", contraction == "grad_weight", False]
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(g, x, w, None, *args, mask)
    if contraction == "grad_weight":
        return grad_weight.movedim(1, -1)
    inside = [slice(lo, lo + n) for n, (lo, _) in zip(geometry.input_size, geometry.padding, strict=True)]
    positions = (slice(None), *inside)
    return grad_input.movedim(1, -1)[positions]
