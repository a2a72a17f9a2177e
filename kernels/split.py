"""Cutting long sums into slices: so that every multiprocessor has work, and that int32 holds each sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_int8.kernels.device import Device, Launch, pointer
from lightning_int8.numerics import LOWER_PLANE_MAX
from lightning_int8.spec import INT32_MAX

RAW_LIMIT = INT32_MAX // (LOWER_PLANE_MAX * LOWER_PLANE_MAX)
"""Longest sum of products of plane elements that int32 holds for certain."""

BLOCKS_PER_MULTIPROCESSOR = 2
SHORTEST_SLICE = 512
"""Shorter slices spend more on adding their sums up than on products."""

FINISH_THREADS = 256


@dataclass(frozen=True)
class Split:
    """Slices of the summed index; see ``split_sums.cuh``.

    Attributes:
        depth: Summed index of a slice.
        slices: Number of slices.
        slices_per_slab: Neighbouring slices that share an int32 slab.
        slabs: int32 ``(slabs, rows, columns rounded up to 4)``, zeros; None where nothing is split.
    """

    depth: int
    slices: int
    slices_per_slab: int
    slabs: Tensor | None

    def fields(self) -> dict[str, Any]:
        """Fields of ``parameters.SPLIT``."""
        count, rows, columns = (0, 0, 0) if self.slabs is None else self.slabs.shape
        return {
            "slabs": pointer(self.slabs),
            "depth": self.depth,
            "slices_per_slab": self.slices_per_slab,
            "count": count,
            "columns": columns,
            "slab_elements": rows * columns,
        }


WHOLE = Split(0, 1, 1, None)
"""No slices, for kernels that do not look at their depth."""


def plan_split(
    device: Device,
    place: torch.device,
    tiles: int,
    shape: Sequence[int],
    length: int,
    tile_depth: int,
    *,
    limit: int | None = None,
    whole_sums: bool = True,
) -> Split:
    """Decide on slices.

    Args:
        device: Runs the kernel.
        place: Where the slabs are allocated.
        tiles: Blocks that the result has without slices.
        shape: Rows (over all groups) and columns of the product.
        length: Summed index.
        tile_depth: Summed index of a tile; slices are multiples of it.
        limit: Longest sum that int32 holds; ``RAW_LIMIT`` for None.
        whole_sums: Whether a block that has whole sums finishes them; else there is a slab even for one slice.
    """
    limit = RAW_LIMIT if limit is None else limit
    wanted = BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors // tiles
    slices = max(1, min(wanted, length // SHORTEST_SLICE), -(-length // limit))
    tiles_deep = -(-length // (slices * tile_depth))
    depth = min(max(1, tiles_deep), limit // tile_depth) * tile_depth
    slices = max(1, -(-length // depth))
    if slices == 1 and whole_sums:
        return Split(depth, 1, 1, None)
    per_slab = limit // depth
    rows, columns = shape
    slabs = torch.zeros(-(-slices // per_slab), rows, -(-columns // 4) * 4, dtype=torch.int32, device=place)
    return Split(depth, slices, per_slab, slabs)


def finish(kernel: Launch, split: Split, parameters: np.ndarray) -> None:
    """Add the slabs and write the result: the second pass of a split product.

    Args:
        kernel: ``*_finish``.
        split: What the first pass was launched with.
        parameters: Likewise.
    """
    assert split.slabs is not None
    fours = math.prod(split.slabs.shape[1:]) // 4
    kernel((-(-fours // FINISH_THREADS),), (FINISH_THREADS,), (parameters,))
