"""An INT8 matrix product on the CPU that is exact, or says that it is not.

oneDNN's int8 product multiplies unsigned by signed bytes. Without VNNI it adds pairs of products in 16 bits, which
saturate: 256 · 127 · 127 came out as 32,640 where 4,129,024 is right. Products of the full range are exact with VNNI;
without it they are exact as long as the right operand stays within ±64, since 2 · 255 · 64 < 2^15. So there the right
operand is split into two halves and two products are added.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.numerics import INT8_MAX, LOWER_PLANE_MAX

_CHECKED_LENGTHS = (2, 100, 4608)
_CHECKED_SIZES = ((1, 1), (1, 17), (17, 1), (33, 32))
_SIGNS = ((1, 1), (-1, -1), (1, -1), (-1, 1))

MatMul = Callable[[Tensor, Tensor], Tensor]


def full_range(a: Tensor, b: Tensor) -> Tensor:
    """a · b in one product, int8 ``(M, K)`` and ``(K, N)`` to int32 ``(M, N)``."""
    if 0 in b.stride():  # of an expanded tensor, which torch reads wrongly
        b = b.contiguous()
    out = empty(a.shape[0], b.shape[1], dtype=torch.int32)
    return torch._int_mm(_plain_row(a), _plain_row(b), out=out)


def halves(a: Tensor, b: Tensor) -> Tensor:
    """a · b as a · ⌊b/2⌋ + a · (b - ⌊b/2⌋): both halves lie within ±64."""
    if b.shape[1] == 1:
        # For a single column oneDNN exchanges the operands, and then the wrong one would have the small range.
        return halves(a, b.expand(-1, 2).contiguous())[:, :1]
    lower = b >> 1
    return full_range(a, lower).add_(full_range(a, b - lower))


@cache
def exact_matmul() -> MatMul | None:
    """The fastest product that passes the self-check in this process, or None."""
    for candidate in (full_range, halves):
        if is_exact(candidate):
            return candidate
    return None


def is_exact(matmul: MatMul) -> bool:
    """Compare with exact float64 arithmetic where saturating instructions betray themselves: at ±127 and -128."""
    for length, (left, right), (rows, cols) in product(_CHECKED_LENGTHS, _SIGNS, _CHECKED_SIZES):
        a = torch.full((rows, length), left * INT8_MAX, dtype=torch.int8)
        b = torch.full((length, cols), right * INT8_MAX, dtype=torch.int8)
        a[rows // 2, ::2] = -LOWER_PLANE_MAX
        b[::2, cols // 2] = -LOWER_PLANE_MAX
        for x, y in ((a, b), (a, b.t().contiguous().t()), (a.t().contiguous().t(), b)):
            if not torch.equal(matmul(x, y).double(), x.double() @ y.double()):
                return False
    return True


def _plain_row(t: Tensor) -> Tensor:
    """``t``, where it has one row with the usual row stride: torch 2.13 reads a row stride of 1 as a column's."""
    if t.shape[0] != 1 or t.stride(0) != 1:
        return t
    return t.as_strided(t.shape, (t.shape[1] * t.stride(1), t.stride(1)), t.storage_offset())
