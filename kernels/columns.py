"""Grids for kernels in which a thread keeps four neighbouring columns and walks down the rows."""

from __future__ import annotations

from torch import Tensor

from lightning_int8.kernels.planes import pitch

BLOCK_THREADS = 256
MOST_ACROSS = 32
"""Threads side by side: a warp then reads 512 neighbouring bytes of float32."""

BLOCKS_PER_MULTIPROCESSOR = 8
MOST_BLOCKS_DOWN = 65535


def matrix_shape(x: Tensor) -> tuple[int, int]:
    """Rows and columns of a contiguous tensor seen as a matrix whose columns are its last axis."""
    columns = x.shape[-1]
    return x.shape[:-1].numel(), columns


def column_grid(rows: int, columns: int, multiprocessors: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and block for ``rows`` of ``columns`` elements, the padding of a row included.

    Blocks are as many as keep the device busy and no more: each thread sets up its map and its key once.
    """
    fours = max(1, pitch(columns) // 4)
    across = min(MOST_ACROSS, 1 << (fours - 1).bit_length())
    down = BLOCK_THREADS // across
    blocks_across = -(-fours // across)
    wanted = max(1, BLOCKS_PER_MULTIPROCESSOR * multiprocessors // blocks_across)
    return (blocks_across, max(1, min(wanted, -(-rows // down), MOST_BLOCKS_DOWN))), (across, down)
