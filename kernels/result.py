"""What becomes of the sums of a product, in the fields of ``epilogue.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_int8.kernels.device import pointer
from lightning_int8.numerics import Plane

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 3}
"""Type of the result and its number in ``epilogue.cuh``; int64 asks for the sums before any scale."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What becomes of the sums.

    Attributes:
        dtype: float32, bfloat16 or float16; int64 for the sums with zero points taken off and no scale applied.
        addend: float32, shaped as the result, contiguous: the plane pairs before this one.
        bias: float32, one for each column.
    """

    dtype: torch.dtype = torch.float32
    addend: Tensor | None = None
    bias: Tensor | None = None


def epilogue_fields(
    a: Plane,
    b: Plane,
    left_sums: Tensor | None,
    right_sums: Tensor | None,
    products: int,
    out: Tensor,
    result: Result,
) -> dict[str, Any]:
    """Fields of ``parameters.EPILOGUE``.

    Args:
        a: Left operand.
        b: Right operand.
        left_sums: int64, sum of each row of the left operand; needed where ``b`` has a zero point.
        right_sums: int64, sum of each row (or column) of the right operand over k; needed where ``a`` has one.
        products: Number of products of one sum.
        out: The result, contiguous.
        result: What becomes of the sums.
    """
    return {
        "left_scale": pointer(a.scale),
        "right_scale": pointer(b.scale),
        "left_zero": pointer(a.zero_point),
        "right_zero": pointer(b.zero_point),
        "left_sums": pointer(left_sums),
        "right_sums": pointer(right_sums),
        "addend": pointer(result.addend),
        "bias": pointer(result.bias),
        "out": pointer(out),
        "left_step": int(a.scale.dim() > 0),
        "right_step": int(b.scale.dim() > 0),
        "products": products,
        "format": FORMATS[result.dtype],
    }
