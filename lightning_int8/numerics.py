"""INT8 planes, scales and rounding: pure functions, and the law that every backend must reproduce bit for bit.

Vocabulary
    clip value   largest magnitude kept; everything beyond it saturates
    scale        real value of one integer step: ``clip_value / largest_integer(bits)``
    plane        one int8 digit of a wider integer (base 256, most significant first)
    zero point   integer that stands for 0.0; absent when the range is symmetric
    canonical    channels-last order, ``(N, *spatial, C)`` or ``(rows, C)``, contiguous
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lightning_int8.generator import RANDOM_BITS, random_bits

INT8_MAX = 127
"""Largest magnitude of the top plane; -128 is left out so that a negated plane is a plane."""

PLANE_BASE = 256
"""Weight of one plane relative to the next lower one."""

LOWER_PLANE_MAX = 128
"""Largest magnitude of a lower plane: its balanced digits span [-128, 127]."""

FLAG_BITS = 9
"""WAGEUBN's flag format: a coarse and a fine INT8 plane, of which one is zero at each element (Yang et al. 2019)."""

FLAG_STEPS = 128
"""Fine steps per coarse step of the flag format."""

BITS = (8, FLAG_BITS, 16, 24)
"""Widths that an operand can have: one plane, two (coarse and fine), two or three."""

MIN_CLIP_VALUE = 2.0**-96
"""Smallest clip value: the scale and its reciprocal stay normal floats at every width in ``BITS``."""


@cache
def plane_count(bits: int) -> int:
    """Number of int8 planes of an operand of ``bits`` bits."""
    return 2 if bits == FLAG_BITS else bits // 8


@cache
def largest_integer(bits: int) -> int:
    """Largest integer whose top plane stays within ``INT8_MAX``: 127, 32,639 or 8,355,711.

    In the flag format this is the largest coarse integer, 127.
    """
    return INT8_MAX if bits == FLAG_BITS else INT8_MAX * sum(PLANE_BASE**k for k in range(plane_count(bits)))


@dataclass(frozen=True)
class TruthRow:
    """What one element becomes at 8 bits, symmetric range, nearest rounding.

    Attributes:
        case: What the row is about.
        x: The element.
        clip_value: The clip value given.
        integer: The plane's value.
        scale: The scale; NaN where the contraction must show a non-finite input.
    """

    case: str
    x: float
    clip_value: float
    integer: int
    scale: float


_NAN, _INF = float("nan"), float("inf")

TRUTH_TABLE = (
    TruthRow("zero is kept", 0.0, 127.0, 0, 1.0),
    TruthRow("the clip value is the largest integer", 127.0, 127.0, 127, 1.0),
    TruthRow("its negative is the smallest", -127.0, 127.0, -127, 1.0),
    TruthRow("a tie goes to even, down", 0.5, 127.0, 0, 1.0),
    TruthRow("a tie goes to even, up", 1.5, 127.0, 2, 1.0),
    TruthRow("a negative tie goes to even", -2.5, 127.0, -2, 1.0),
    TruthRow("a tie below the clip value", 126.5, 127.0, 126, 1.0),
    TruthRow("beyond the clip value saturates", 128.0, 127.0, 127, 1.0),
    TruthRow("never -128", -1e30, 127.0, -127, 1.0),
    TruthRow("+inf saturates and shows", _INF, 127.0, 127, _NAN),
    TruthRow("-inf saturates and shows", -_INF, 127.0, -127, _NAN),
    TruthRow("nan is zero and shows", _NAN, 127.0, 0, _NAN),
    TruthRow("all-zero tensor", 0.0, 0.0, 0, MIN_CLIP_VALUE / INT8_MAX),
    TruthRow("denormal tensor", 1e-40, 1e-40, 0, MIN_CLIP_VALUE / INT8_MAX),
    TruthRow("nan clip value", 1.0, _NAN, 0, _NAN),
    TruthRow("infinite clip value", 1.0, _INF, 0, _NAN),
)


@dataclass(frozen=True)
class Plane:
    """One int8 digit of a quantized tensor.

    Attributes:
        data: int8, canonical order.
        scale: float32, ``()`` or ``(C,)`` along the axis of its ``Quantized``; NaN if the tensor was not finite.
        zero_point: int32, shaped as ``scale``, or None for a symmetric range.
    """

    data: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


@dataclass(frozen=True)
class Quantized:
    """A tensor as a sum of INT8 planes.

    Law: ``x[i] ≈ Σ_p (planes[p].data[i] - planes[p].zero_point) · planes[p].scale``, most significant plane first; all
    planes have one shape; scales and zero points are scalars, or vectors along ``axis``.

    Attributes:
        planes: One to three planes.
        axis: 0 or -1 where each index of that axis has its own scale, None for one scale per tensor.
    """

    planes: tuple[Plane, ...]
    axis: int | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that the planes stand for."""
        return self.planes[0].data.shape

    def tensors(self) -> list[Tensor | None]:
        """Data, scale and zero point of each plane in turn: what autograd saves."""
        return [t for p in self.planes for t in (p.data, p.scale, p.zero_point)]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor | None], axis: int | None) -> Quantized:
        """Inverse of ``tensors``."""
        planes = [Plane(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]  # type: ignore[arg-type]
        return cls(tuple(planes), axis)


def along(value: Tensor, axis: int | None, dim: int) -> Tensor:
    """View a scalar or per-channel ``value`` so that it broadcasts along ``axis`` of a tensor of ``dim`` axes."""
    if axis is None:
        return value
    shape = [1] * dim
    shape[axis] = -1
    return value.reshape(shape)


def absmax(x: Tensor, axis: int | None) -> Tensor:
    """Largest magnitude, float32: ``()`` or, with ``axis``, ``(C,)``. NaN where ``x`` has a NaN."""
    if axis is None:
        low, high = torch.aminmax(x)
    else:
        others = [d for d in range(x.dim()) if d != axis % x.dim()]
        low, high = x.amin(others), x.amax(others)
    return torch.maximum(-low, high).float()


@dataclass(frozen=True)
class AffineMap:
    """The float → integer map that a clip value defines: ``integer = round(clamp(x, low, high) · inverse) + zero``.

    Attributes:
        low: Smallest value kept, float32, ``()`` or ``(C,)``.
        high: Largest value kept.
        inverse: Integer steps per unit, rounded once.
        scale: Units per integer step; NaN where the clip value is not finite.
        zero: Zero point, float32 holding an integer; None for a symmetric range.
    """

    low: Tensor
    high: Tensor
    inverse: Tensor
    scale: Tensor
    zero: Tensor | None


def affine_map(clip_value: Tensor, bits: int, affine: bool) -> AffineMap:
    """Derive the map of one operand.

    Args:
        clip_value: float32. Symmetric: ``()`` or ``(C,)``, the largest magnitude. Affine: a leading axis of two, the
            magnitudes of the smallest and the largest value, so that the range always includes 0.
        bits: One of ``BITS``.
        affine: Whether the range has a zero point.
    """
    largest = largest_integer(bits)
    if affine:
        low, high = -clip_value[0], clip_value[1]
        span, steps = (high - low).clamp(min=MIN_CLIP_VALUE), 2.0 * largest
    else:
        high = clip_value.clamp(min=MIN_CLIP_VALUE)
        low, span, steps = -high, high, float(largest)
    # A tensor by a tensor: torch divides a number by a tensor as reciprocal times number, which rounds twice.
    inverse = torch.full_like(span, steps) / span
    scale = torch.where(torch.isfinite(span), span / steps, torch.nan)
    zero = None
    if affine:
        zero = (torch.round(-low * inverse) - largest).nan_to_num(0.0).clamp(-largest, largest)
    return AffineMap(low, high, inverse, scale, zero)


def quantize(
    x: Tensor,
    clip_value: Tensor,
    *,
    bits: int = 8,
    affine: bool = False,
    axis: int | None = None,
    stochastic: bool = False,
    key: Tensor | None = None,
) -> Quantized:
    """Quantize in plain tensor operations: the definition that fused passes are tested against.

    Args:
        x: float32, bfloat16 or float16, canonical order.
        clip_value: See ``affine_map``.
        bits: One of ``BITS``.
        affine: Whether the range has a zero point; not with the flag format.
        axis: 0 or -1 for one clip value per index of that axis, None for one per tensor.
        stochastic: Round up with probability equal to the fraction instead of to the nearest integer.
        key: int64 ``(seed, rank, call)``; needed where ``stochastic``.

    Returns:
        The planes. A non-finite element or clip value makes the scales NaN, hence every output of the contraction.
    """
    m = affine_map(clip_value, bits, affine)
    low, high, inverse = (along(v, axis, x.dim()) for v in (m.low, m.high, m.inverse))
    values = x.float()
    y = (torch.clamp(values, low, high) * inverse).nan_to_num(0.0)
    scale = torch.where(torch.isfinite(values).all(), m.scale, torch.nan)
    if bits == FLAG_BITS:
        # Magnitudes below one coarse step are counted in fine steps instead.
        is_fine = y.abs() < 1.0
        q = _round(torch.where(is_fine, y * FLAG_STEPS, y), stochastic, key).clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
        coarse, fine = q.masked_fill(is_fine, 0), q.masked_fill(~is_fine, 0)
        return Quantized((Plane(coarse, scale), Plane(fine, scale / FLAG_STEPS)), axis)
    q = _round(y, stochastic, key)
    if m.zero is not None:
        q = q + along(m.zero, axis, x.dim())
    largest = largest_integer(bits)
    return from_integers(q.clamp(-largest, largest).to(torch.int32), scale, m.zero, bits, axis)


def _round(y: Tensor, stochastic: bool, key: Tensor | None) -> Tensor:
    if not stochastic:
        return torch.round(y)
    assert key is not None, "stochastic rounding needs a key"
    floor = torch.floor(y)
    bits16 = random_bits(key, y.numel(), y.device).reshape(y.shape)
    return floor + (bits16 < (y - floor) * float(1 << RANDOM_BITS))


def from_integers(integers: Tensor, scale: Tensor, zero: Tensor | None, bits: int, axis: int | None) -> Quantized:
    """Split integers and their zero point into planes.

    Args:
        integers: int8 or int32, canonical order, magnitudes up to ``largest_integer(bits)``.
        scale: float32 ``()`` or ``(C,)``, real value of one integer step.
        zero: Zero point shaped as ``scale``, or None.
        bits: 8, 16 or 24.
        axis: Axis of ``scale``, None for a scalar.
    """
    count = plane_count(bits)
    data = digits(integers, count)
    zeros: Sequence[Tensor | None] = [None] * count if zero is None else digits(zero.to(torch.int32), count)
    weights = [float(PLANE_BASE ** (count - 1 - p)) for p in range(count)]
    planes = tuple(Plane(d.to(torch.int8), scale * w, z) for d, w, z in zip(data, weights, zeros, strict=True))
    return Quantized(planes, axis)


def digits(integers: Tensor, count: int) -> list[Tensor]:
    """Base-256 digits, most significant first; the lower ones balanced in [-128, 127]."""
    out: list[Tensor] = []
    for _ in range(count - 1):
        lowest = ((integers + LOWER_PLANE_MAX) & (PLANE_BASE - 1)) - LOWER_PLANE_MAX
        out.append(lowest)
        integers = (integers - lowest) >> 8
    return [integers, *reversed(out)]


def dequantize(q: Quantized) -> Tensor:
    """The float32 tensor that the planes stand for (summed in float64)."""
    dim = q.planes[0].data.dim()
    total = torch.zeros(q.shape, dtype=torch.float64, device=q.planes[0].data.device)
    for plane in q.planes:
        centred = plane.data.double()
        if plane.zero_point is not None:
            centred = centred - along(plane.zero_point, q.axis, dim)
        total += centred * along(plane.scale, q.axis, dim).double()
    return total.float()
