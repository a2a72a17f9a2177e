"""The epilogue in one pass: int32 sums to float32, times both scales."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lightning_int8.backends.cpu.compiler import at, compiled, wide_vectors
from lightning_int8.backends.cpu.threads import SMALLEST_PIECE, split

_BLOCK = 1024  # elements that one call of the inner loop takes, at least


def scale_into(out: Tensor, sums: Tensor, left: Tensor, right: Tensor) -> None:
    """``out = fl(fl(fl(sums) · left) · right)``.

    Args:
        out: float32 ``(rows, channels)``, contiguous.
        sums: int32, as ``out``.
        left: float32 ``()``.
        right: float32 ``()`` or ``(channels,)``.
    """
    rows, channels = out.shape
    sums_flat, out_flat = sums.view(-1).numpy(), out.view(-1).numpy()
    factor = np.float32(left.item())
    second: Any  # a number, or one for each element of a block
    if right.dim() == 0:
        second, block = np.float32(right.item()), _BLOCK
    else:
        repeats = min(rows, -(-_BLOCK // channels))
        # `Tensor.repeat` takes twice as long.
        second, block = np.tile(right.numpy(), repeats), repeats * channels

    def work(start: int, stop: int) -> None:
        part = slice(start * channels, stop * channels)
        _scale_blocks(sums_flat[part], factor, second, block, out_flat[part])

    split(work, rows, -(-SMALLEST_PIECE // channels))


@compiled
def _scale_blocks(sums, left, right, block, out):
    for start in range(0, sums.size, block):
        scale_block(sums[start : start + block], left, right, out[start : start + block])


@compiled
def scale_block(sums, left, right, out):
    """``out = fl(fl(fl(sums) · left) · right)``; ``right`` is a scalar or as long as ``sums``."""
    wide_vectors()
    for i in range(sums.size):
        out[i] = np.float32(np.float32(np.float32(sums[i]) * left) * at(right, i))
