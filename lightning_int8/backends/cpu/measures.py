"""Quantization errors at several widths in one pass over memory on the CPU (numba)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu.compiler import compiled
from lightning_int8.measures import QuantizationError
from lightning_int8.numerics import affine_map, largest_integer


def quantization_error(
    x: Tensor, clip_values: Sequence[Tensor], bits: Sequence[int], affine: bool, axis: int | None
) -> QuantizationError:
    """See ``measures.quantization_error``; every width but the flag format."""
    values = x.detach().float().contiguous()
    columns = values.shape[-1] if axis == -1 else values.numel() // (values.shape[0] if axis == 0 else 1)
    matrix = values.view(-1, columns)
    count = columns if axis == -1 else matrix.shape[0]
    maps = np.empty((len(bits), 5, count), np.float32)
    for i, (clip_value, width) in enumerate(zip(clip_values, bits, strict=True)):
        m = affine_map(clip_value.cpu(), width, affine)
        zero = torch.zeros_like(m.scale) if m.zero is None else m.zero
        for j, field in enumerate((m.low, m.high, m.inverse, m.scale, zero)):
            maps[i, j] = field.expand(count).numpy()
    largest = np.array([largest_integer(width) for width in bits], np.float32)
    sums = _sums(matrix.numpy(), maps, largest, axis == -1)
    return QuantizationError.from_sums(torch.from_numpy(sums), values.numel())


@compiled
def _sums(x, maps, largest, by_column):
    sums = np.zeros((maps.shape[0], 6))
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            v = x[r, c]
            g = np.float64(v)
            channel = c if by_column else r
            for i in range(maps.shape[0]):
                low, high, inverse, scale, zero = maps[i, :, channel]
                kept = low if v < low else (high if v > high else v)
                q = np.rint(np.float32(kept * inverse)) + zero
                q = min(max(q, -largest[i]), largest[i])
                quantized = np.float64(q - zero) * np.float64(scale)
                error = quantized - g
                row = sums[i]
                row[0] += g * g
                row[1] += g * error
                row[2] += error * error
                row[3] += abs(g)
                row[4] += abs(quantized)
                row[5] += kept != v
    return sums
