"""Launches of ``absmax.cu``, ``histogram.cu`` and ``error_sums.cu``: statistics for range rules and decisions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_int8.kernels.columns import ENTRIES, column_grid, matrix_of
from lightning_int8.kernels.device import Device, Program, pointer
from lightning_int8.kernels.parameters import ABSMAX, ERROR_SUMS, HISTOGRAM, by_value
from lightning_int8.magnitudes import BINS

SUMS = 6
"""Of ``error_sums.cu``, for each width: what ``QuantizationError.from_sums`` takes."""

MOST_WIDTHS = 3


def absmax(device: Device, x: Tensor, axis: int | None, sides: bool = False) -> Tensor:
    """Largest magnitudes, ``numerics.absmax`` bit for bit.

    Args:
        device: Runs the kernel.
        x: float32, bfloat16 or float16, canonical order, contiguous.
        axis: 0 or -1 for one value per index of that axis, None for one per tensor.
        sides: Whether negative and positive elements have a value each, as the clip value of an affine range.

    Returns:
        float32 ``()`` or ``(C,)``, with ``sides`` behind an axis of two: negative, positive. NaN where a NaN is.
    """
    matrix = matrix_of(x, axis)
    out = torch.zeros(2 if sides else 1, matrix["maps"], device=x.device)
    step = matrix["maps"] if sides else 0
    fields = {"matrix": matrix, "side_step": step, "x": pointer(x), "out": pointer(out)}
    kernel = device.kernel(Program("absmax.cu"), f"absmax_{ENTRIES[x.dtype]}")
    kernel(*column_grid(x, device.multiprocessors), (by_value(ABSMAX, fields),))
    out = out if axis is not None else out[:, 0]
    return out if sides else out[0]


def histogram(device: Device, x: Tensor, largest: Tensor) -> Tensor:
    """Counts of magnitudes, see ``magnitudes.Statistics.histogram``, exactly.

    Args:
        device: Runs the kernel.
        x: float32, bfloat16 or float16, contiguous.
        largest: float32 ``()``, what ``absmax`` gives for the tensor.

    Returns:
        int32 ``(BINS,)``, the smallest magnitudes first.
    """
    counts = torch.zeros(BINS, dtype=torch.int32, device=x.device)
    fields = {"matrix": matrix_of(x, None), "x": pointer(x), "largest": pointer(largest), "counts": pointer(counts)}
    kernel = device.kernel(Program("histogram.cu"), f"histogram_{ENTRIES[x.dtype]}")
    kernel(*column_grid(x, device.multiprocessors), (by_value(HISTOGRAM, fields),))
    return counts


def error_sums(
    device: Device, x: Tensor, clip_values: Tensor, bits: Sequence[int], affine: bool, axis: int | None
) -> Tensor:
    """How far a tensor would be from its original, at up to ``MOST_WIDTHS`` widths, rounded to nearest: one pass.

    Args:
        device: Runs the kernel.
        x: float32, bfloat16 or float16, canonical order, contiguous.
        clip_values: float32, the clip value at each width (``numerics.affine_map``) along a leading axis.
        bits: Widths.
        affine: Whether the ranges have a zero point.
        axis: 0 or -1 for one clip value per index of that axis, None for one per tensor.

    Returns:
        float64 ``(widths, SUMS)``, see ``measures.QuantizationError.from_sums``.
    """
    clip_values, count = clip_values.contiguous(), len(bits)
    grid, block = column_grid(x, device.multiprocessors)
    sums = torch.empty(math.prod(grid), count, SUMS, dtype=torch.float64, device=x.device)
    fields = {
        "matrix": matrix_of(x, axis),
        "affine": int(affine),
        "count": count,
        "bits": (*bits, *(bits[0],) * (MOST_WIDTHS - count)),
        "x": pointer(x),
        "clip_values": pointer(clip_values),
        "sums": pointer(sums),
    }
    kernel = device.kernel(Program("error_sums.cu"), f"error_sums_{ENTRIES[x.dtype]}")
    shared = math.prod(block) // 32 * MOST_WIDTHS * SUMS * sums.element_size()
    kernel(grid, block, (by_value(ERROR_SUMS, fields),), shared_mem=shared)
    return sums.sum(0)
