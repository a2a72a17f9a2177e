"""Launches of ``quantize.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_int8.kernels.columns import ENTRIES, column_grid, matrix_of
from lightning_int8.kernels.device import Device, Program, pointer
from lightning_int8.kernels.parameters import QUANTIZE, by_value
from lightning_int8.kernels.planes import empty_planes
from lightning_int8.numerics import Plane, Quantized, plane_count


def quantize(
    device: Device, x: Tensor, clip_value: Tensor, bits: int, affine: bool, axis: int | None, key: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn a tensor into planes in one read: ``numerics.quantize``, bit for bit; see ``quantized``.

    Args:
        device: Runs the kernel.
        x: float32, bfloat16 or float16, canonical order, contiguous.
        clip_value: float32 on the device of ``x``, see ``numerics.affine_map``.
        bits: One of ``numerics.BITS``.
        affine: Whether the range has a zero point.
        axis: 0 or -1 for one clip value per index of that axis, None for one per tensor.
        key: int64 ``(seed, rank, call)`` on the device of ``x``; None rounds to nearest.

    Returns:
        Planes, int8 ``(planes, *shape[:-1], pitch)``: rows a multiple of 16 bytes long, zeros behind the last column.
        Scales, float32 ``(planes, maps)``. Zero points, int32, likewise, or ``(0, maps)`` where not affine.
    """
    matrix = matrix_of(x, axis)
    count, maps = plane_count(bits), matrix["maps"]
    clip_value = clip_value.contiguous()
    planes = empty_planes(count, x.shape, x.device)
    scales = torch.zeros(count, maps, device=x.device)
    zeros = torch.empty(count if affine else 0, maps, dtype=torch.int32, device=x.device)
    fields = {
        "matrix": matrix,
        "pitch": planes.shape[-1],
        "bits": bits,
        "x": pointer(x),
        "clip_values": pointer(clip_value),
        "key": pointer(key),
        "planes": pointer(planes),
        "scales": pointer(scales),
        "zeros": pointer(zeros) if affine else 0,
        "plane_bytes": planes.stride(0),
    }
    kernel = device.kernel(Program("quantize.cu"), f"quantize_{ENTRIES[x.dtype]}")
    kernel(*column_grid(x, device.multiprocessors), (by_value(QUANTIZE, fields),))
    return planes, scales, zeros


def quantized(planes: Tensor, scales: Tensor, zeros: Tensor, columns: int, axis: int | None) -> Quantized:
    """What ``quantize`` returns as views, without the padding behind ``columns``."""
    shape = () if axis is None else scales.shape[1:]
    made = [
        Plane(plane[..., :columns], scale.reshape(shape), zeros[p].reshape(shape) if len(zeros) else None)
        for p, (plane, scale) in enumerate(zip(planes.unbind(0), scales.unbind(0), strict=True))
    ]
    return Quantized(tuple(made), axis)
