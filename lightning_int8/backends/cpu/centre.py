"""Zero points taken off the sums of a product, in one pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu.compiler import compiled, wide_vectors
from lightning_int8.backends.cpu.threads import SMALLEST_PIECE, split


def subtract_outer_products(sums: Tensor, columns: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor]) -> None:
    """``sums -= columns[0] ⊗ rows[0] + columns[1] ⊗ rows[1]`` in place, modulo 2^32.

    Args:
        sums: int32 ``(M, N)``, contiguous.
        columns: Two int32 ``(M,)``.
        rows: Two int32 ``(N,)``.
    """
    matrix = sums.numpy()
    (a, b), (c, d) = ([t.contiguous().numpy() for t in pair] for pair in (columns, rows))

    def work(start: int, stop: int) -> None:
        _subtract(matrix[start:stop], a[start:stop], b[start:stop], c, d)

    split(work, sums.shape[0], -(-SMALLEST_PIECE // sums.shape[1]))


def row_sums(a: Tensor) -> Tensor:
    """int32 ``(M,)`` sums of the rows of int8 ``a`` ``(M, K)``, of any strides."""
    out = torch.empty(a.shape[0], dtype=torch.int32)
    if a.stride(-1) == 1 or a.shape[1] == 1:
        _sum_rows(a.numpy(), out.numpy())
    else:
        out.zero_()
        _sum_columns(a.t().numpy(), out.numpy())
    return out


@compiled
def _subtract(sums, a, b, c, d):
    for i in range(sums.shape[0]):
        _subtract_row(sums[i], a[i], b[i], c, d)


@compiled
def _subtract_row(sums, a, b, c, d):
    wide_vectors()
    for j in range(sums.size):
        sums[j] = np.int32(sums[j] - np.int32(np.int32(a * c[j]) + np.int32(b * d[j])))


@compiled
def _sum_rows(a, out):
    for i in range(a.shape[0]):
        out[i] = _sum(a[i])


@compiled
def _sum(row):
    wide_vectors()
    total = np.int32(0)
    for k in range(row.size):
        total += np.int32(row[k])
    return total


@compiled
def _sum_columns(a, out):
    for k in range(a.shape[0]):
        _add(a[k], out)


@compiled
def _add(row, out):
    wide_vectors()
    for i in range(row.size):
        out[i] += np.int32(row[i])
