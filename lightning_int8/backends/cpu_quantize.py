"""Quantization in one pass over memory on the CPU (numba): the bits of ``numerics.quantize``, several times as fast."""

from __future__ import annotations

import numba as nb
import numpy as np
import torch
from torch import Tensor

from lightning_int8.generator import HASH_MULTIPLIERS, RANDOM_BITS, mix_key
from lightning_int8.numerics import AffineMap, largest_integer
from lightning_int8.spec import OperandSpec

_jit = nb.njit(nogil=True, error_model="numpy", cache=True)  # no fastmath: products and sums must not be fused

_M0, _M1 = (np.uint32(m) for m in HASH_MULTIPLIERS)
_U16, _U15, _U1 = np.uint32(16), np.uint32(15), np.uint32(1)
_LOW = np.uint32(0xFFFF)
_RANGE = np.float32(1 << RANDOM_BITS)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


def quantize(x: Tensor, m: AffineMap, spec: OperandSpec, axis: int | None, key: Tensor) -> tuple[Tensor, bool]:
    """Quantize ``x`` to integers.

    Args:
        x: float32, bfloat16 or float16, canonical order.
        m: The map, on the CPU.
        spec: Bits and rounding.
        axis: Axis along which the map varies, None for one map per tensor.
        key: int64 ``(seed, rank, call)``.

    Returns:
        int8 integers (int32 above 8 bits) in the shape of ``x``, contiguous, and whether ``x`` was finite.
    """
    values = x.detach().float().contiguous()
    integers = torch.empty(values.shape, dtype=torch.int8 if spec.bits == 8 else torch.int32)
    rows, cols = _matrix(values.shape, axis)
    by_column = axis == -1
    count = cols if by_column else rows
    zero = torch.zeros_like(m.scale) if m.zero is None else m.zero
    maps = [v.to(torch.float32).expand(count).numpy() for v in (m.low, m.high, m.inverse, zero)]
    keys = np.array(mix_key(*key.tolist()), dtype=np.uint32)
    fused_pass = _quantize_columns if by_column else _quantize_rows
    finite = fused_pass(
        values.view(rows, cols).numpy(),
        *(np.ascontiguousarray(v) for v in maps),
        np.float32(largest_integer(spec.bits)),
        spec.rounding == "stochastic",
        keys,
        integers.view(rows, cols).numpy(),
    )
    return integers, bool(finite)


def _matrix(shape: torch.Size, axis: int | None) -> tuple[int, int]:
    """Rows and columns such that ``axis`` is one of them."""
    count = shape.numel()
    if axis == 0:
        return shape[0], count // shape[0]
    return count // shape[-1], shape[-1]


@_jit
def _hash_bits(index, k0, k1):
    """16 random bits of element ``index``, see ``generator.random_bits``."""
    h = np.uint32(np.uint32(index >> 1) ^ k0)
    h ^= h >> _U16
    h = np.uint32(h * _M0)
    h ^= h >> _U15
    h = np.uint32(h + k1)
    h = np.uint32(h * _M1)
    h ^= h >> _U16
    return np.float32(np.uint32(h >> np.uint32((np.uint32(index) & _U1) * _U16)) & _LOW)


@_jit
def _scale(v, low, high, inverse):
    """clamp(v) · inverse; 0 where that is not a number."""
    c = low if v < low else v
    c = high if c > high else c
    y = np.float32(c * inverse)
    return y if y == y else _ZERO


@_jit
def _round(y, index, stochastic, keys):
    """Nearest with ties to even, or up with probability equal to the fraction."""
    if not stochastic:
        return np.rint(y)
    floor = np.floor(y)
    return floor + (_ONE if _hash_bits(index, keys[0], keys[1]) < np.float32(y - floor) * _RANGE else _ZERO)


@_jit
def _clamp(q, largest):
    q = -largest if q < -largest else q
    return largest if q > largest else q


@_jit
def _quantize_rows(x, low, high, inverse, zero, largest, stochastic, keys, out):
    """Quantize ``x`` (rows, columns) by the map of each row; return whether it was finite."""
    finite = True
    columns = x.shape[1]
    for r in range(x.shape[0]):
        for c in range(columns):
            v = x[r, c]
            finite &= (v - v) == _ZERO
            q = _round(_scale(v, low[r], high[r], inverse[r]), r * columns + c, stochastic, keys)
            out[r, c] = np.int32(_clamp(np.float32(q + zero[r]), largest))
    return finite


@_jit
def _quantize_columns(x, low, high, inverse, zero, largest, stochastic, keys, out):
    """Quantize ``x`` (rows, columns) by the map of each column; return whether it was finite."""
    finite = True
    columns = x.shape[1]
    for r in range(x.shape[0]):
        for c in range(columns):
            v = x[r, c]
            finite &= (v - v) == _ZERO
            q = _round(_scale(v, low[c], high[c], inverse[c]), r * columns + c, stochastic, keys)
            out[r, c] = np.int32(_clamp(np.float32(q + zero[c]), largest))
    return finite
