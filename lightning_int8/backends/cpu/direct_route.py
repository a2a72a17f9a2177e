"""oneDNN's own INT8 convolution, where it is exact: no windows are gathered, the scales are applied in its epilogue.

It multiplies unsigned data by signed weights, so the data go in as ``q + 128`` with a zero point of 128, which oneDNN
takes off exactly (it pads with the zero point). With VNNI all products are exact; without, pairs of them saturate, the
self-check finds out and the route is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from math import prod

import torch
from torch import Tensor

from lightning_int8.backends import im2col
from lightning_int8.backends.cpu.correlation import Correlation, correlations, output_correlation
from lightning_int8.backends.cpu.correlation_route import CorrelationRoute
from lightning_int8.backends.cpu.passes import compiled_pass
from lightning_int8.backends.cpu.route import Scales
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import INT8_MAX, LOWER_PLANE_MAX, Plane

UNSIGNED_ZERO = 128
"""What stands for the integer 0 in unsigned data."""

FLOAT32_EXACT = 1 << 24
"""Integers up to here are exact in float32; the convolution returns its sums in no other form."""

_CHECKED_LENGTHS = (1, 3, 16, 130)
_CHECKED_CHANNELS = (1, 16, 33)
_CHECKED_ZEROS = (None, -INT8_MAX, 0, INT8_MAX)


BORDER = compiled_pass("border")
"""The compiled pass that makes data unsigned, or None where numba cannot be imported."""


class Direct(CorrelationRoute):
    """Output and grad_input; there is no INT8 gradient of the weight in oneDNN."""

    name = "direct"

    def supports(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scaled: bool) -> bool:
        """See ``Route.supports``."""
        if contraction == "grad_weight":
            return False
        depthwise = geometry.groups == b.data.shape[0] and b.data.shape[-1] == 1
        if geometry.groups > 1 and not depthwise:
            return False
        per_group = b.data.shape[-1] if contraction == "output" else b.data.shape[0] // geometry.groups
        parts = correlations(contraction, geometry)
        return all(self.supports_one(a, b, part, per_group, scaled) for part in parts)

    @staticmethod
    def supports_one(data: Plane, weight: Plane, correlation: Correlation, per_group: int, scaled: bool) -> bool:
        """Whether one correlation, of ``per_group`` channels for each result, is computed exactly."""
        largest = INT8_MAX + LOWER_PLANE_MAX if data.zero_point is not None else LOWER_PLANE_MAX
        fits = scaled or prod(correlation.taps) * per_group * largest * LOWER_PLANE_MAX <= FLOAT32_EXACT
        return fits and weight.zero_point is None and _is_sound(correlation) and is_exact()

    def correlate(self, data: Plane, weight: Plane, correlation: Correlation, scales: Scales | None) -> Tensor:
        """See ``Route.correlate``."""
        if scales is None:
            one = torch.ones(())
            return _convolution(data, weight, correlation, Scales(one, one)).to(torch.int32)
        return _convolution(data, weight, correlation, scales)

    def grad_weight(self, g: Plane, x: Plane, geometry: ConvGeometry) -> Tensor:
        """There is none, see ``supports``."""
        raise NotImplementedError("oneDNN has no INT8 gradient of the weight")


def _is_sound(correlation: Correlation) -> bool:
    """Whether oneDNN 3.12 computes windows of this form rightly.

    In random tests three dimensions gave other roundings or wrong sums, groups of several channels and results of width
    1 wrong sums, and dilation wrong sums where the data are narrower than the kernel.
    """
    return len(correlation.size) == 2 and set(correlation.tap_step) == {1} and correlation.size[-1] > 1


@cache
def is_exact() -> bool:
    """Whether the operator exists and agrees with exact float64 arithmetic where saturation betrays itself."""
    if not all(hasattr(torch.ops.onednn, name) for name in ("qconv_prepack", "qconv_pointwise")):
        return False
    cases = product(_CHECKED_LENGTHS, _CHECKED_CHANNELS, _CHECKED_ZEROS, (INT8_MAX, -LOWER_PLANE_MAX))
    return all(_agrees(*case) for case in cases)


def _agrees(channels: int, out_channels: int, zero: int | None, extreme: int) -> bool:
    geometry = ConvGeometry(
        input_size=(5, 6), kernel_size=(3, 3), stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), groups=1
    )
    data = torch.full((2, 5, 6, channels), extreme, dtype=torch.int8)
    data[:, ::2, ::3] = -LOWER_PLANE_MAX
    weight = torch.full((out_channels, 3, 3, channels), INT8_MAX, dtype=torch.int8)
    weight[1::2] = -LOWER_PLANE_MAX
    offset = None if zero is None else torch.tensor(zero, dtype=torch.int32)
    scales = Scales(torch.tensor(0.37), torch.linspace(0.1, 0.9, out_channels))
    try:
        y = _convolution(
            Plane(data, scales.left, offset), Plane(weight, scales.right), output_correlation(geometry), scales
        )
    except RuntimeError:  # the operator refuses on this CPU, or in this version of torch
        return False
    centred = (data.double() - (zero or 0)).movedim(-1, 1)
    sums = torch.nn.functional.conv2d(centred, weight.movedim(-1, 1).double(), padding=1).movedim(1, -1)
    return torch.equal(y, sums.float() * scales.left * scales.right)


def _convolution(data: Plane, weight: Plane, correlation: Correlation, scales: Scales) -> Tensor:
    """Scaled float32 ``(N, *size, Co)``."""
    axes = zip(data.data.shape[1:-1], correlation.taps, correlation.padding, strict=True)
    if all(n >= k > lo == hi >= 0 for n, k, (lo, hi) in axes):
        own, ours = [lo for lo, _ in correlation.padding], [(0, 0)] * len(correlation.padding)
    else:
        # oneDNN pads alike on both sides; and windows that lie in its padding alone make it read out of bounds.
        own, ours = [0] * len(correlation.padding), list(correlation.padding)
    unsigned = _unsigned(data, ours).movedim(-1, 1)
    zero = UNSIGNED_ZERO + (0 if data.zero_point is None else int(data.zero_point))
    left, right = scales.left.item(), scales.right.expand(weight.data.shape[0]).contiguous()
    windows = (list(correlation.step), own, list(correlation.tap_step), correlation.groups)
    packed = torch.ops.onednn.qconv_prepack(
        weight.data.movedim(-1, 1).clone(memory_format=torch.contiguous_format),
        right,
        left,
        zero,
        *windows,
        list(unsigned.shape),
    )
    no_offset = torch.zeros(len(right), dtype=torch.int32)
    arguments = (unsigned, left, zero, packed, right, no_offset, None, *windows)
    result = torch.ops.onednn.qconv_pointwise(*arguments, 1.0, 0, torch.float32, "none", [], "none")
    # Results are channels-last, so this copies nothing; `.data`, since autograd must not take the output for a view.
    return result.movedim(1, -1).contiguous().data


def _unsigned(data: Plane, padding: Sequence[tuple[int, int]]) -> Tensor:
    """``data + 128``, uint8, padded with its zero point."""
    fill = 0 if data.zero_point is None else int(data.zero_point)
    if BORDER is not None:
        return BORDER.pad(data.data, padding, fill, unsigned=True)
    return im2col.pad(data.data, padding, data.zero_point).view(torch.uint8) ^ UNSIGNED_ZERO
