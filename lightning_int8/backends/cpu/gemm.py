"""Exact matrix products of planes: zero points, sums beyond int32, and the epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.passes import compiled_pass
from lightning_int8.backends.cpu.route import Scales
from lightning_int8.backends.int_matmul import MatMul
from lightning_int8.numerics import INT8_MAX, LOWER_PLANE_MAX
from lightning_int8.spec import INT32_MAX

RAW_LIMIT = INT32_MAX // (LOWER_PLANE_MAX * LOWER_PLANE_MAX)
"""Longest sum of plane products that int32 holds for certain."""


CENTRED_LIMIT = INT32_MAX // (INT8_MAX + LOWER_PLANE_MAX) ** 2
"""Longest sum of products of centred planes, (plane - zero)(plane - zero), that int32 holds for certain."""

CENTRE = compiled_pass("centre")
"""The compiled pass that takes zero points off, or None where numba cannot be imported."""

SCALE = compiled_pass("scale")
"""The compiled epilogue, or None where numba cannot be imported."""


class Gemm:
    """Σ (a - zero_a)(b - zero_b) for int8 ``a`` ``(M, K)`` and ``b`` ``(K, N)`` of any strides.

    Zero points are None, int32 ``()``, or ``(M,)`` for a and ``(N,)`` for b.

    Attributes:
        matmul: The product: int8 to exact int32 sums.
    """

    def __init__(self, matmul: MatMul) -> None:
        self.matmul = matmul

    @staticmethod
    def dtype(length: int, zero_a: Tensor | None, zero_b: Tensor | None) -> torch.dtype:
        """dtype of the sums: int64 where int32 may not do."""
        limit = RAW_LIMIT if zero_a is None and zero_b is None else CENTRED_LIMIT
        return torch.int32 if length <= limit else torch.int64

    def sums(self, a: Tensor, b: Tensor, zero_a: Tensor | None, zero_b: Tensor | None) -> Tensor:
        """The exact sums ``(M, N)``, int32 or int64."""
        length = a.shape[1]
        if length <= RAW_LIMIT:
            sums = self.matmul(a, b)
        else:
            pieces = range(0, length, RAW_LIMIT)
            parts = [self.matmul(a[:, k : k + RAW_LIMIT], b[k : k + RAW_LIMIT]).long() for k in pieces]
            sums = torch.stack(parts).sum(0)
        if zero_a is None and zero_b is None:
            return sums
        if length <= CENTRED_LIMIT:
            return _centred(sums, a, b, zero_a, zero_b)
        sums = sums.long()
        left = 0 if zero_a is None else zero_a.long().reshape(-1, 1)
        right = 0 if zero_b is None else zero_b.long().reshape(1, -1)
        if zero_b is not None:
            sums = sums - right * a.sum(1, dtype=torch.int64)[:, None]
        if zero_a is not None:
            sums = sums - left * b.sum(0, dtype=torch.int64)[None, :]
        return sums + length * left * right

    def into(
        self, out: Tensor, a: Tensor, b: Tensor, zero_a: Tensor | None, zero_b: Tensor | None, scales: Scales | None
    ) -> None:
        """Write the sums, scaled to float32 if there are scales, to ``out`` ``(M, N)``."""
        sums = self.sums(a, b, zero_a, zero_b)
        if scales is None:
            out.copy_(sums)
        elif SCALE is not None and _is_plain_int32(sums) and out.is_contiguous():
            SCALE.scale_into(out, sums, scales.left, scales.right)
        else:
            torch.mul(sums.to(torch.float32).mul_(scales.left), scales.right, out=out)


def scaled_sums(sums: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """fl(fl(fl(sums) · left) · right), float32; the factors broadcast over ``sums``."""
    if SCALE is None or left.numel() > 1 or right.numel() > 1 or not _is_plain_int32(sums):
        return sums.to(torch.float32).mul_(left).mul_(right)
    out = empty(*sums.shape)
    SCALE.scale_into(out.flatten(1), sums.flatten(1), left.reshape(()), right.reshape(()))
    return out


def _is_plain_int32(sums: Tensor) -> bool:
    return sums.dtype == torch.int32 and sums.is_contiguous()


def _centred(sums: Tensor, a: Tensor, b: Tensor, zero_a: Tensor | None, zero_b: Tensor | None) -> Tensor:
    """``sums`` without zero points, int32: intermediate results may wrap around, the last one does not.

    Σ(a - zero_a)(b - zero_b) = Σab - (Σa)·zero_b - zero_a·(Σb - K·zero_b).
    """
    (rows, length), columns = a.shape, b.shape[1]
    nothing = torch.zeros((), dtype=torch.int32)
    left = (nothing if zero_a is None else zero_a).expand(rows)
    right = (nothing if zero_b is None else zero_b).expand(columns)
    sum_a = nothing.expand(rows) if zero_b is None else _row_sums(a)
    sum_b = nothing.expand(columns) if zero_a is None else _row_sums(b.t())
    rest = sum_b - length * right
    if CENTRE is not None and sums.is_contiguous():
        CENTRE.subtract_outer_products(sums, (sum_a, left), (right, rest))
        return sums
    return sums - (sum_a[:, None] * right + left[:, None] * rest)


def _row_sums(a: Tensor) -> Tensor:
    return CENTRE.row_sums(a) if CENTRE is not None else a.sum(1, dtype=torch.int32)
