"""Planes in memory as the kernels want them: rows a multiple of 16 bytes apart, zeros behind the last column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_int8.kernels.device import pointer

ALIGNMENT = 16
"""Bytes that one thread copies at a time."""

MOST_BYTES = 2**31 - 2**24
"""Largest operand: offsets are 32-bit, and a source may step one tile beyond the end."""


def pitch(columns: int) -> int:
    """Distance of rows of ``columns`` bytes."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


def empty_planes(count: int, shape: torch.Size, device: torch.device) -> Tensor:
    """Room for ``count`` planes, int8 ``(count, *shape[:-1], pitch)``; a kernel must write the padding too."""
    return torch.empty(count, *shape[:-1], pitch(shape[-1]), dtype=torch.int8, device=device)


def fits(data: Tensor) -> bool:
    """Whether the kernels can take ``data``, int8 and channels last, as an operand."""
    return data.shape[:-1].numel() * pitch(data.shape[-1]) <= MOST_BYTES


def padded(data: Tensor) -> Tensor:
    """``data`` if it lies as the kernels want it, else a copy that does.

    Whether the bytes behind the last column are zeros cannot be seen from outside: planes that come from ``quantize``
    keep their storage, and only those have such a pitch.

    Args:
        data: int8, channels last.

    Returns:
        The same values, of the same shape, with the strides that the kernels want.

    Raises:
        ValueError: The operand is too large for 32-bit offsets.
    """
    if not fits(data):
        raise ValueError(f"an operand of shape {tuple(data.shape)} is larger than {MOST_BYTES} bytes")
    width = pitch(data.shape[-1])
    wanted = [width]
    for size in reversed(data.shape[1:-1]):
        wanted.insert(0, wanted[0] * size)
    if data.stride() == (*wanted, 1)[-data.dim() :] and data.data_ptr() % ALIGNMENT == 0:
        return data
    copy = torch.nn.functional.pad(data, (0, width - data.shape[-1])).contiguous()
    return copy[..., : data.shape[-1]]


def matrix_fields(data: Tensor) -> dict[str, Any]:
    """Fields of ``parameters.MATRIX`` for the result of ``padded``."""
    return {"data": pointer(data), "pitch": pitch(data.shape[-1])}
