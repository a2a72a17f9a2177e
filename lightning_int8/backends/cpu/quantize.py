"""Quantization in one pass over memory: the bits of ``numerics.quantize``, planes included.

Memory is walked in blocks of about a thousand elements that stay in the first-level cache: 16-bit floats are widened,
random words drawn, and elements rounded in loops of their own, each of which the compiler vectorizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from lightning_int8.backends.cpu.compiler import at, compiled, wide_vectors
from lightning_int8.backends.cpu.threads import split
from lightning_int8.generator import HASH_MULTIPLIERS, RANDOM_BITS, mix_key
from lightning_int8.numerics import (
    FLAG_BITS,
    FLAG_STEPS,
    INT8_MAX,
    LOWER_PLANE_MAX,
    PLANE_BASE,
    Plane,
    Quantized,
    affine_map,
    digits,
    largest_integer,
    plane_count,
)
from lightning_int8.spec import OperandSpec

_BLOCK = 1024  # elements
_SHORT_ROW = 64  # elements
_SMALLEST_PIECE = 1 << 15  # elements that are worth a thread

_U1, _U15, _U16 = np.uint32(1), np.uint32(15), np.uint32(16)
_M0, _M1 = (np.uint32(m) for m in HASH_MULTIPLIERS)
_RANGE = np.float32(1 << RANDOM_BITS)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_FINE, _LARGEST = np.float32(FLAG_STEPS), np.float32(INT8_MAX)
_MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits of a float32 but its sign
_INFINITY = 0x7F800000  # bits of the smallest magnitude that is not finite


def quantize(x: Tensor, clip_value: Tensor, spec: OperandSpec, axis: int | None, key: Tensor) -> Quantized:
    """Quantize ``x``, see ``Backend.quantize``."""
    m = affine_map(clip_value, spec.bits, spec.affine)
    source = x.detach().contiguous()
    if source.dtype == torch.float16:
        source = source.float()
    planes = torch.empty(plane_count(spec.bits), *x.shape, dtype=torch.int8)
    zero = torch.zeros_like(m.scale) if m.zero is None else m.zero
    maps = [v.to(torch.float32) for v in (m.low, m.high, m.inverse, zero)]
    top = _quantize(source, maps, spec, axis, np.array(mix_key(*key.tolist()), dtype=np.uint32), planes)

    # As in `numerics.from_integers`; the integers themselves have become planes already.
    scale = m.scale if top < _INFINITY else torch.full_like(m.scale, torch.nan)
    if spec.bits == FLAG_BITS:
        return Quantized((Plane(planes[0], scale), Plane(planes[1], scale / FLAG_STEPS)), axis)
    count = len(planes)
    zeros = [None] * count if m.zero is None else digits(m.zero.to(torch.int32), count)
    weights = [float(PLANE_BASE ** (count - 1 - p)) for p in range(count)]
    made = (Plane(d, scale * w, z) for d, w, z in zip(planes.unbind(), weights, zeros, strict=True))
    return Quantized(tuple(made), axis)


def _quantize(
    source: Tensor, maps: list[Tensor], spec: OperandSpec, axis: int | None, keys: np.ndarray, planes: Tensor
) -> int:
    """Fill ``planes``; return the bits of the largest magnitude, above ``_INFINITY`` where there is a NaN."""
    flat = source.view(-1)
    values = (flat.view(torch.int16) if source.dtype == torch.bfloat16 else flat).numpy()
    out = planes.view(len(planes), -1).numpy()
    largest = np.float32(largest_integer(spec.bits))
    rest = (largest, spec.rounding == "stochastic", spec.bits == FLAG_BITS, keys)
    own: tuple[Any, ...]  # numbers, or arrays
    by_rows = axis == 0 and flat.numel() >= _SHORT_ROW * len(source)
    if axis is None:
        unit, block = 1, _BLOCK
        own = tuple(np.float32(v.item()) for v in maps)
    elif by_rows:
        unit, block = flat.numel() // len(source), _BLOCK
        own = tuple(v.expand(len(source)).contiguous().numpy() for v in maps)
    elif axis == 0:
        # A call per row would cost more than the row: one call, with the maps written out for every element.
        unit = block = flat.numel()
        own = tuple(v.expand(len(source)).repeat_interleave(unit // len(source)).numpy() for v in maps)
    else:
        unit = source.shape[-1]
        repeats = -(-_BLOCK // unit)
        own, block = tuple(v.expand(unit).repeat(repeats).numpy() for v in maps), repeats * unit

    def work(start: int, stop: int) -> int:
        if by_rows:
            return _rows(values, start, stop, unit, *own, *rest, block, out)
        return _segment(values, start * unit, stop * unit, *own, *rest, block, out)

    return max(split(work, flat.numel() // unit, -(-_SMALLEST_PIECE // unit)))


@compiled
def _rows(values, first, last, length, low, high, inverse, zero, largest, stochastic, flagged, keys, block, planes):
    """Rows of ``length`` elements, each with its own map."""
    top = np.int32(0)
    for r in range(first, last):
        own = (low[r], high[r], inverse[r], zero[r])
        rest = (largest, stochastic, flagged, keys, block, planes)
        top = max(top, _segment(values, r * length, (r + 1) * length, *own, *rest))
    return top


@compiled
def _segment(values, first, last, low, high, inverse, zero, largest, stochastic, flagged, keys, block, planes):
    """Elements ``first`` to ``last``; maps are scalars, or arrays as long as a block."""
    words = np.empty(block // 2 + 1, np.uint32)
    halves = words.view(np.uint16)
    wide = np.empty(block, np.float32)
    integers = np.empty(block, np.int32)
    top = np.int32(0)
    for start in range(first, last, block):
        count = min(block, last - start)
        x = _as_float32(values[start : start + count], wide)
        maps = (low, high, inverse, zero)
        if stochastic:
            # An odd element takes the upper half of the word that it shares with the one before it.
            _draw(np.uint32(start >> 1), keys[0], keys[1], words)
            noise = halves[start & 1 :]
            if flagged:
                found = _flag_up_or_down(x, x.view(np.int32), *maps[:3], noise, planes[:, start:])
            elif planes.shape[0] == 1:
                found = _round_up_or_down(x, x.view(np.int32), *maps, largest, noise, planes[0, start:])
            else:
                found = _round_up_or_down(x, x.view(np.int32), *maps, largest, noise, integers)
        elif flagged:
            found = _flag_to_nearest(x, x.view(np.int32), *maps[:3], planes[:, start:])
        elif planes.shape[0] == 1:
            found = _round_to_nearest(x, x.view(np.int32), *maps, largest, planes[0, start:])
        else:
            found = _round_to_nearest(x, x.view(np.int32), *maps, largest, integers)
        top = max(top, found)
        if planes.shape[0] > 1 and not flagged:
            _split_digits(integers, count, planes[:, start:])
    return top


def _as_float32(block, buffer):
    """A block of float32 itself; of bfloat16, given as its bits, a copy in ``buffer``."""
    raise NotImplementedError("only compiled passes call this")


@overload(_as_float32)
def _as_float32_of(block, buffer):
    if block.dtype == types.float32:
        return lambda block, buffer: block

    def widened(block, buffer):
        _widen(block, buffer.view(np.int32))
        return buffer[: block.size]

    return widened


@compiled
def _widen(bits, out):
    """bfloat16 to float32, both as their bits."""
    wide_vectors()
    for i in range(bits.size):
        out[i] = np.int32(bits[i]) << 16


@compiled
def _draw(first, k0, k1, words):
    """The random words of elements from ``2 · first`` on, see ``generator.random_bits``."""
    wide_vectors()
    for i in range(words.size):
        h = np.uint32((first + np.uint32(i)) ^ k0)
        h = np.uint32(h ^ (h >> _U16))
        h = np.uint32(h * _M0)
        h = np.uint32(h ^ (h >> _U15))
        h = np.uint32(h + k1)
        h = np.uint32(h * _M1)
        words[i] = np.uint32(h ^ (h >> _U16))


@compiled
def _scaled(v, low, high, inverse):
    """clamp(v) · inverse; 0 where that is not a number."""
    c = low if v < low else v
    c = high if c > high else c
    y = np.float32(c * inverse)
    return y if y == y else _ZERO


@compiled
def _clamped(q, largest):
    q = -largest if q < -largest else q
    return largest if q > largest else q


@compiled
def _round_to_nearest(x, x_bits, low, high, inverse, zero, largest, out):
    """Round, ties to even; return the largest magnitude, as its bits."""
    wide_vectors()
    top = np.int32(0)
    for i in range(x.size):
        magnitude = np.int32(x_bits[i] & _MAGNITUDE)
        top = magnitude if magnitude > top else top
        y = _scaled(x[i], at(low, i), at(high, i), at(inverse, i))
        out[i] = np.int32(_clamped(np.float32(np.rint(y) + at(zero, i)), largest))
    return top


@compiled
def _round_up_or_down(x, x_bits, low, high, inverse, zero, largest, noise, out):
    """Round up with probability equal to the fraction; return the largest magnitude, as its bits."""
    wide_vectors()
    top = np.int32(0)
    for i in range(x.size):
        magnitude = np.int32(x_bits[i] & _MAGNITUDE)
        top = magnitude if magnitude > top else top
        y = _scaled(x[i], at(low, i), at(high, i), at(inverse, i))
        floor = np.floor(y)
        up = np.float32(np.int32(noise[i])) < np.float32(np.float32(y - floor) * _RANGE)
        q = floor + (_ONE if up else _ZERO)
        out[i] = np.int32(_clamped(np.float32(q + at(zero, i)), largest))
    return top


@compiled
def _flag_to_nearest(x, x_bits, low, high, inverse, planes):
    """As ``_round_to_nearest``, to a coarse or, below one coarse step, a fine code."""
    wide_vectors()
    top, coarse, fine = np.int32(0), planes[0], planes[1]
    for i in range(x.size):
        magnitude = np.int32(x_bits[i] & _MAGNITUDE)
        top = magnitude if magnitude > top else top
        y = _scaled(x[i], at(low, i), at(high, i), at(inverse, i))
        is_fine = np.abs(y) < _ONE
        code = np.int32(_clamped(np.rint(y * _FINE if is_fine else y), _LARGEST))
        coarse[i] = 0 if is_fine else code
        fine[i] = code if is_fine else 0
    return top


@compiled
def _flag_up_or_down(x, x_bits, low, high, inverse, noise, planes):
    """As ``_round_up_or_down``, to a coarse or, below one coarse step, a fine code."""
    wide_vectors()
    top, coarse, fine = np.int32(0), planes[0], planes[1]
    for i in range(x.size):
        magnitude = np.int32(x_bits[i] & _MAGNITUDE)
        top = magnitude if magnitude > top else top
        y = _scaled(x[i], at(low, i), at(high, i), at(inverse, i))
        is_fine = np.abs(y) < _ONE
        y = np.float32(y * _FINE) if is_fine else y
        floor = np.floor(y)
        up = np.float32(np.int32(noise[i])) < np.float32(np.float32(y - floor) * _RANGE)
        code = np.int32(_clamped(floor + (_ONE if up else _ZERO), _LARGEST))
        coarse[i] = 0 if is_fine else code
        fine[i] = code if is_fine else 0
    return top


@compiled
def _split_digits(integers, count, planes):
    """``numerics.digits`` of ``count`` integers, which are used up."""
    for p in range(planes.shape[0] - 1, 0, -1):
        _split_lowest_digit(integers, count, planes[p])
    top = planes[0]
    for i in range(count):
        top[i] = integers[i]


@compiled
def _split_lowest_digit(integers, count, plane):
    wide_vectors()
    for i in range(count):
        lowest = np.int32(np.int32((integers[i] + LOWER_PLANE_MAX) & (PLANE_BASE - 1)) - LOWER_PLANE_MAX)
        plane[i] = lowest
        integers[i] = np.int32(np.int32(integers[i] - lowest) >> 8)
