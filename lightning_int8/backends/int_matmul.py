"""An INT8 matrix product on the CPU that is exact, or says that it is not.

oneDNN's int8 product multiplies unsigned by signed bytes. Without VNNI it adds pairs of products in 16 bits, which
saturate: 256 · 127 · 127 came out as 32,640 where 4,129,024 is right. Products of the full range are exact with VNNI;
without it they are exact as long as the right operand stays within ±64, since 2 · 255 · 64 < 2^15. So there the right
operand is split into two halves and two products are added.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lightning_int8.numerics import INT8_MAX, LOWER_PLANE_MAX

_CHECKED_LENGTHS = (64, 100, 576, 4608)
_SIGNS = ((1, 1), (-1, -1), (1, -1), (-1, 1))

MatMul = Callable[[Tensor, Tensor], Tensor]


def full_range(a: Tensor, b: Tensor) -> Tensor:
    """a · b in one product, int8 ``(M, K)`` and ``(K, N)`` to int32 ``(M, N)``."""
    return torch._int_mm(a, b)


def halves(a: Tensor, b: Tensor) -> Tensor:
    """a · b as a · ⌊b/2⌋ + a · (b - ⌊b/2⌋): both halves lie within ±64."""
    lower = b >> 1
    return torch._int_mm(a, lower).add_(torch._int_mm(a, b - lower))


@cache
def exact_matmul() -> MatMul | None:
    """The fastest product that passes the self-check in this process, or None."""
    for candidate in (full_range, halves):
        if is_exact(candidate):
            return candidate
    return None


def is_exact(matmul: MatMul) -> bool:
    """Compare with int64 arithmetic where saturating instructions betray themselves: ±127 and -128 everywhere."""
    for length in _CHECKED_LENGTHS:
        for left, right in _SIGNS:
            a = torch.full((32, length), left * INT8_MAX, dtype=torch.int8)
            b = torch.full((length, 32), right * INT8_MAX, dtype=torch.int8)
            a[0], b[:, 0] = -LOWER_PLANE_MAX, -LOWER_PLANE_MAX
            for x, y in ((a, b), (a, b.t().contiguous().t()), (a.t().contiguous().t(), b)):
                if not torch.equal(matmul(x, y).long(), x.long() @ y.long()):
                    return False
    return True
