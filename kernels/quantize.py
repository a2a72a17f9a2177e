"""Launches of ``quantize.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_int8.kernels.columns import ENTRIES, column_grid, matrix_of
from lightning_int8.kernels.device import Device, Program, pointer
from lightning_int8.kernels.parameters import QUANTIZE, by_value
from lightning_int8.kernels.planes import empty_planes
from lightning_int8.numerics import Plane, Quantized, plane_count
from lightning_int8.spec import OperandSpec


def quantize(
    device: Device, x: Tensor, clip_value: Tensor, spec: OperandSpec, axis: int | None, key: Tensor
) -> Quantized:
    """Turn a tensor into planes in one read: ``numerics.quantize``, bit for bit.

    Args:
        device: Runs the kernel.
        x: float32, bfloat16 or float16, canonical order, contiguous.
        clip_value: float32 on the device of ``x``, see ``numerics.affine_map``.
        spec: Bits, rounding and zero point.
        axis: 0 or -1 for one clip value per index of that axis, None for one per tensor.
        key: int64 ``(seed, rank, call)`` on the device of ``x``.

    Returns:
        The planes; each has rows a multiple of 16 bytes apart.
    """
    matrix = matrix_of(x, axis)
    count, maps = plane_count(spec.bits), matrix["maps"]
    clip_value = clip_value.contiguous()
    planes = empty_planes(count, x.shape, x.device)
    scales = torch.zeros(count, maps, device=x.device)
    zeros = torch.empty(count, maps, dtype=torch.int32, device=x.device) if spec.affine else None
    fields = {
        "matrix": matrix,
        "pitch": planes.shape[-1],
        "bits": spec.bits,
        "x": pointer(x),
        "clip_values": pointer(clip_value),
        "key": pointer(key) if spec.rounding == "stochastic" else 0,
        "planes": pointer(planes),
        "scales": pointer(scales),
        "zeros": pointer(zeros),
        "plane_bytes": planes.stride(0),
    }
    kernel = device.kernel(Program("quantize.cu"), f"quantize_{ENTRIES[x.dtype]}")
    kernel(*column_grid(x, device.multiprocessors), (by_value(QUANTIZE, fields),))
    shape = () if axis is None else (maps,)
    made = [
        Plane(
            planes[p, ..., : x.shape[-1]], scales[p].reshape(shape), None if zeros is None else zeros[p].reshape(shape)
        )
        for p in range(count)
    ]
    return Quantized(tuple(made), axis)
