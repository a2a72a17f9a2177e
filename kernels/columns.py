"""Grids of the kernels in which a thread keeps four neighbouring columns and walks down the rows: ``columns.cuh``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_int8.kernels.planes import pitch

BLOCK_THREADS = 256
MOST_ACROSS = 32
"""Threads side by side: a warp then reads 512 neighbouring bytes of float32."""

BLOCKS_PER_MULTIPROCESSOR = 8
MOST_BLOCKS_DOWN = 65535

ENTRIES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""Type of an element and the end of an entry point's name."""

MAP_AXES: dict[int | None, int] = {None: 0, 0: 1, -1: 2}
"""Axis with scales or statistics of its own and its number in ``columns.cuh``."""


def matrix_of(x: Tensor, axis: int | None) -> dict[str, Any]:
    """Fields of ``parameters.COLUMNS``.

    Args:
        x: Contiguous, seen as a matrix whose columns are its last axis.
        axis: 0 or -1 where each index of that axis has a map of its own, None for one map.
    """
    rows, maps = x.shape[:-1].numel(), 1 if axis is None else x.shape[axis]
    return {
        "rows": rows,
        "columns": x.shape[-1],
        "map_axis": MAP_AXES[axis],
        "maps": maps,
        "rows_per_map": max(1, rows // maps) if axis == 0 else 1,
    }


def column_grid(x: Tensor, multiprocessors: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and block for a contiguous tensor, the padding of its planes' rows included.

    Blocks are as many as keep the device busy and no more: each thread sets up its map and its key once.
    """
    rows, fours = x.shape[:-1].numel(), max(1, pitch(x.shape[-1]) // 4)
    across = min(MOST_ACROSS, 1 << (fours - 1).bit_length())
    down = BLOCK_THREADS // across
    blocks_across = -(-fours // across)
    wanted = max(1, BLOCKS_PER_MULTIPROCESSOR * multiprocessors // blocks_across)
    return (blocks_across, max(1, min(wanted, -(-rows // down), MOST_BLOCKS_DOWN))), (across, down)
