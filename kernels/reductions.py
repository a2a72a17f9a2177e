"""Launches of ``absmax.cu``, ``histogram.cu`` and ``error_sums.cu``: statistics for range rules and decisions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_int8.kernels.columns import ENTRIES, column_grid, matrix_of
from lightning_int8.kernels.device import Device, Program, pointer
from lightning_int8.kernels.parameters import ABSMAX, ERROR_SUMS, HISTOGRAM, by_value
from lightning_int8.numerics import Quantized

OCTAVES, BINS_PER_OCTAVE = 23, 2048
"""Of ``histogram.cu``."""

SUMS = ("xx", "xe", "ee", "abs_x", "abs_quantized")
"""Of ``error_sums.cu``."""


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
    """Counts of magnitudes in bins of equal relative width; see ``histogram.cu`` for their edges.

    Args:
        device: Runs the kernel.
        x: float32, bfloat16 or float16, contiguous.
        largest: float32 ``()``, what ``absmax`` gives for the tensor.

    Returns:
        int32 ``(OCTAVES · BINS_PER_OCTAVE,)``, the smallest magnitudes first.
    """
    counts = torch.zeros(OCTAVES * BINS_PER_OCTAVE, dtype=torch.int32, device=x.device)
    fields = {"matrix": matrix_of(x, None), "x": pointer(x), "largest": pointer(largest), "counts": pointer(counts)}
    kernel = device.kernel(Program("histogram.cu"), f"histogram_{ENTRIES[x.dtype]}")
    kernel(*column_grid(x, device.multiprocessors), (by_value(HISTOGRAM, fields),))
    return counts


@dataclass(frozen=True)
class ErrorSums:
    """Sums over a tensor x and the error e of its planes, float64 ``()`` each.

    Attributes:
        xx: Σ x².
        xe: Σ x·e.
        ee: Σ e².
        abs_x: Σ |x|.
        abs_quantized: Σ |x + e|.
    """

    xx: Tensor
    xe: Tensor
    ee: Tensor
    abs_x: Tensor
    abs_quantized: Tensor


def error_sums(device: Device, x: Tensor, quantized: Quantized) -> ErrorSums:
    """How far planes are from the tensor they were made of.

    Args:
        device: Runs the kernel.
        x: float32, bfloat16 or float16, canonical order, contiguous.
        quantized: What ``quantize`` made of it: its planes have neighbouring storage.
    """
    planes = [p.data for p in quantized.planes]
    rows_apart = planes[0].stride(-2) if planes[0].dim() > 1 else 0
    scales = torch.stack([p.scale.reshape(-1) for p in quantized.planes])
    zeros = None
    if quantized.planes[0].zero_point is not None:
        zeros = torch.stack([p.zero_point.reshape(-1) for p in quantized.planes if p.zero_point is not None])
    grid, block = column_grid(x, device.multiprocessors)
    sums = torch.empty(math.prod(grid), len(SUMS), dtype=torch.float64, device=x.device)
    fields = {
        "matrix": matrix_of(x, quantized.axis),
        "plane_count": len(planes),
        "pitch": rows_apart,
        "plane_bytes": planes[1].data_ptr() - planes[0].data_ptr() if len(planes) > 1 else 0,
        "x": pointer(x),
        "planes": pointer(planes[0]),
        "scales": pointer(scales),
        "zeros": pointer(zeros),
        "sums": pointer(sums),
    }
    kernel = device.kernel(Program("error_sums.cu"), f"error_sums_{ENTRIES[x.dtype]}")
    warps = math.prod(block) // 32
    kernel(grid, block, (by_value(ERROR_SUMS, fields),), shared_mem=warps * len(SUMS) * sums.element_size())
    return ErrorSums(*sums.sum(0).unbind())
