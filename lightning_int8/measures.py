"""How far quantized values are from the values, with nearest rounding: a random draw would add its own noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_int8 import numerics


@dataclass(frozen=True)
class QuantizationError:
    """Error of one tensor at several widths.

    Attributes:
        cosine_distance: 1 - cos(x, quantized x), float64 ``(k,)``; 0 for a tensor of zeros.
        magnitude_shift: log2(|mean|x| - mean|quantized x|| / mean|x| + 1), the ``Diff`` of Zhang et al. 2020.
        saturation: Share of elements beyond the clip value.
    """

    cosine_distance: Tensor
    magnitude_shift: Tensor
    saturation: Tensor

    @classmethod
    def from_sums(cls, sums: Tensor, count: int) -> QuantizationError:
        """Build from float64 ``(k, 6)`` sums over the tensor: gg, ge, ee, |g|, |g + e|, beyond; e is the error."""
        gg, ge, ee, magnitude, quantized, beyond = sums.unbind(-1)
        shift = (magnitude - quantized).abs() / magnitude.clamp(min=torch.finfo(torch.float64).tiny)
        return cls(cosine_distance_from_sums(gg, ge, ee), torch.log2(shift + 1.0), beyond / max(count, 1))


def cosine_distance_from_sums(gg: Tensor, ge: Tensor, ee: Tensor) -> Tensor:
    """1 - cos(g, g + e) from Σg², Σge and Σe², float64, without the cancellation of ``1 - cos``.

    With s² = sin² of the angle: s² = (ee - ge²/gg) / (gg + 2·ge + ee), and the distance is s² / (1 + sqrt(1 - s²)).
    """
    tiny = torch.finfo(torch.float64).tiny
    across = (ee - ge * ge / gg.clamp(min=tiny)).clamp(min=0.0)
    quantized = gg + 2.0 * ge + ee
    sin2 = (across / quantized.clamp(min=tiny)).clamp(max=1.0)
    distance = sin2 / (1.0 + torch.sqrt(1.0 - sin2))
    # All clipped to zero has no direction: as far away as can be; unless there was none before.
    return torch.where(quantized > 0, distance, (gg > 0).double())


def quantization_error(
    x: Tensor, clip_values: Sequence[Tensor], bits: Sequence[int], affine: bool, axis: int | None
) -> QuantizationError:
    """Measure the error of ``x`` at each clip value and width, in plain tensor operations.

    Args:
        x: float32, bfloat16 or float16, canonical order.
        clip_values: One for each width, see ``numerics.affine_map``.
        bits: Widths.
        affine: Whether the ranges have a zero point.
        axis: Axis of vector clip values.
    """
    return QuantizationError.from_sums(error_sums(x, clip_values, bits, affine, axis), x.numel())


def error_sums(x: Tensor, clip_values: Sequence[Tensor], bits: Sequence[int], affine: bool, axis: int | None) -> Tensor:
    """The float64 ``(k, 6)`` sums that ``QuantizationError.from_sums`` takes; arguments of ``quantization_error``."""
    values = x.double()
    rows = []
    for clip_value, width in zip(clip_values, bits, strict=True):
        quantized = numerics.dequantize(numerics.quantize(x, clip_value, bits=width, affine=affine, axis=axis)).double()
        error = quantized - values
        m = numerics.affine_map(clip_value, width, affine)
        low, high = (numerics.along(v, axis, x.dim()) for v in (m.low, m.high))
        beyond = (x.float() < low) | (x.float() > high)
        terms = (values * values, values * error, error * error, values.abs(), quantized.abs(), beyond.double())
        rows.append(torch.stack([t.sum() for t in terms]))
    return torch.stack(rows)
