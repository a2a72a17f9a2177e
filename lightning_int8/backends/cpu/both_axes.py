"""A weight for output and for grad_input at once: one walk rounds it with a scale for each row and for each column."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_int8.backends.cpu import team
from lightning_int8.backends.cpu.arrays import as_array
from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.compiler import compiled
from lightning_int8.backends.cpu.elementwise import tiled
from lightning_int8.backends.cpu.evaluation import block_of
from lightning_int8.backends.cpu.quantize import map_of, quantized
from lightning_int8.backends.cpu.threads import SMALLEST_PIECE, ends
from lightning_int8.backends.cpu.vector_rounding import nearest, steps, store_bytes
from lightning_int8.backends.cpu.vectors import LANES, fetch, lanes_of, largest_bits, largest_lane, load, no_bits
from lightning_int8.numerics import Quantized


def quantize_both(x: Tensor, by_row: Tensor, by_column: Tensor) -> tuple[Quantized, Quantized]:
    """``numerics.quantize`` of 8 bits, symmetric and to nearest, along axis 0 and along axis -1.

    Args:
        x: float32 ``(rows, ..., C)``, contiguous, not empty.
        by_row: Clip values ``(rows,)``.
        by_column: Clip values ``(C,)``.
    """
    rows, channels = x.shape[0], x.shape[-1]
    maps = [map_of(as_array(c.to(torch.float32).contiguous()), 8, False) for c in (by_row, by_column)]
    planes = [empty(*x.shape, dtype=torch.int8) for _ in maps]
    length, block = x.numel() // rows, block_of(channels)
    operands = as_array(x), length, block, *(m.own[:3] for m in maps), *map(as_array, planes)
    top = int(team.run(_round_both, operands, ends(rows, -(-SMALLEST_PIECE // length))).max())
    first, second = (quantized([p], m, top, axis) for p, m, axis in zip(planes, maps, (0, -1), strict=True))
    return first, second


@compiled
def _rounded_both(x, length, block, of_rows, of_columns, by_row, by_column, first, last, piece):
    """Rows ``first`` to ``last``; the maps are (low, high, inverse), and one of columns is repeated over a block."""
    row_low, row_high, row_inverse = of_rows
    low, high, inverse = tiled(of_columns[0], block), tiled(of_columns[1], block), tiled(of_columns[2], block)
    top = no_bits()
    for r in range(first, last):
        for start in range(r * length, (r + 1) * length, block):
            count = min(block, (r + 1) * length - start)
            for j in range(0, count, LANES):
                i, room = start + j, min(LANES, count - j)
                fetch(x, i)
                v = load(x, i, room)
                top = largest_bits(top, v)
                y = steps(v, lanes_of(row_low[r], j), lanes_of(row_high[r], j), lanes_of(row_inverse[r], j))
                store_bytes(by_row, i, room, nearest(y))
                y = steps(v, lanes_of(low, j), lanes_of(high, j), lanes_of(inverse, j))
                store_bytes(by_column, i, room, nearest(y))
    return largest_lane(top)


_round_in_team = team.in_team(_rounded_both)


@compiled
def _round_both(arguments, ends, results, runtime):
    """``_rounded_both``, for ``team.run``."""
    _round_in_team(arguments, ends, results, runtime)
