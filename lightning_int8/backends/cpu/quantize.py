"""Quantization in one pass over memory: the bits of ``numerics.quantize``, planes included.

Memory is walked in blocks that stay in cache: 16-bit floats are widened, expressions computed, and elements rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from lightning_int8.backends.cpu import team
from lightning_int8.backends.cpu.arrays import as_array
from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.compiler import compiled, wide_vectors
from lightning_int8.backends.cpu.elementwise import block_values, new_buffers, round_all
from lightning_int8.backends.cpu.evaluation import block_of, nothing_to_multiply, source_of, sums_and_tops
from lightning_int8.backends.cpu.expression import Expression, Term
from lightning_int8.backends.cpu.floats import get
from lightning_int8.backends.cpu.rounding import round_block
from lightning_int8.backends.cpu.threads import SMALLEST_PIECE, block_ends, by_ends, split
from lightning_int8.generator import mix_key
from lightning_int8.numerics import (
    FLAG_BITS,
    FLAG_STEPS,
    MIN_CLIP_VALUE,
    PLANE_BASE,
    Plane,
    Quantized,
    digits,
    largest_integer,
    plane_count,
)
from lightning_int8.spec import OperandSpec

_BLOCK = 1024  # elements
_SHORT_ROW = 64  # elements
_NO_KEYS = np.zeros(2, np.uint32)
_INFINITY = 0x7F800000  # bits of the smallest magnitude that is not finite


class Map(NamedTuple):
    """``numerics.affine_map`` as compiled passes take it, and what it says of the planes.

    Attributes:
        own: low, high, inverse and zero (0 if symmetric): float32 numbers, or arrays with one for each channel.
        scales: Of each plane, float32.
        zeros: Zero point of each plane, int32; None if symmetric.
    """

    own: tuple[Any, Any, Any, Any]
    scales: tuple[Tensor, ...]
    zeros: tuple[Tensor | None, ...]


def quantize(x: Tensor | Expression, clip_value: Tensor, spec: OperandSpec, axis: int | None, key: Tensor) -> Quantized:
    """Quantize ``x``, see ``Backend.quantize``."""
    map_axis = axis if clip_value.dim() > spec.affine else None
    if map_axis is None:
        clip_values = tuple(clip_value.tolist()) if spec.affine else (clip_value.item(),)
        m = _map_of_tensor(clip_values, spec.bits, spec.affine)
    else:
        m = map_of(as_array(clip_value.to(torch.float32).contiguous()), spec.bits, spec.affine)
    count = plane_count(spec.bits)
    planes: Sequence[Tensor]
    if count == 1:
        planes = [empty(*x.shape, dtype=torch.int8)]
        out = as_array(planes[0]).reshape(1, -1)
    else:
        together = empty(count, *x.shape, dtype=torch.int8)
        planes, out = together.unbind(), as_array(together).reshape(count, -1)
    keys = np.array(mix_key(*key.tolist()), dtype=np.uint32) if spec.rounding == "stochastic" else _NO_KEYS
    if isinstance(x, Expression) and (map_axis == 0 or (x.is_plain and count > 1)):
        x = x.values()
    if isinstance(x, Tensor):
        source = x.detach().contiguous()
        source = source.float() if source.dtype == torch.float16 else source
        is_walked = count == 1 and map_axis != 0 and source.dim() > 1
        x = Expression((Term(source),)) if is_walked else source
    if isinstance(x, Expression):
        top = _quantize_expression(x, m.own, spec, keys, out)
    else:
        top = _quantize(x, m.own, spec, map_axis, keys, out)
    return quantized(planes, m, top, axis)


def quantized(planes: Sequence[Tensor], m: Map, top: int, axis: int | None) -> Quantized:
    """Planes with scales; ``top`` are the bits of the largest magnitude, which shows if it is no number."""
    scales = m.scales
    if top >= _INFINITY:
        scales = tuple(torch.full_like(s, torch.nan) for s in scales)
    return Quantized(tuple(Plane(*parts) for parts in zip(planes, scales, m.zeros, strict=True)), axis)


def map_of(clip_values: np.ndarray, bits: int, affine: bool) -> Map:
    """The map for each channel; the integers themselves become planes as in ``numerics.from_integers``."""
    *own, scale = _map(clip_values, np.float32(largest_integer(bits)), affine)
    count, units = plane_count(bits), torch.from_numpy(scale)
    if bits == FLAG_BITS:
        return Map(tuple(own), (units, units / FLAG_STEPS), (None, None))
    zeros: Sequence[Tensor | None] = [None] * count
    if affine:
        zeros = digits(torch.from_numpy(own[3]).to(torch.int32), count)
    scales = [units * float(PLANE_BASE ** (count - 1 - p)) for p in range(count - 1)] + [units]
    return Map(tuple(own), tuple(scales), tuple(zeros))


@lru_cache(maxsize=1024)
def _map_of_tensor(clip_values: tuple[float, ...], bits: int, affine: bool) -> Map:
    """The map of all elements; clip values stay the same from one refresh to the next."""
    with torch.inference_mode(False):  # a validation may come first, and autograd cannot save its tensors
        m = map_of(np.array(clip_values, np.float32), bits, affine)
        scales = tuple(s.reshape(()) for s in m.scales)
        zeros = tuple(None if z is None else z.reshape(()) for z in m.zeros)
    return Map(tuple(v[0] for v in m.own), scales, zeros)


@compiled
def _map(clip_value, largest, affine):
    """``numerics.affine_map`` for each channel: low, high, inverse, zero (0 if symmetric) and scale, float32."""
    count = clip_value.size // 2 if affine else clip_value.size
    maps = np.empty((5, count), np.float32)
    smallest, steps = np.float32(MIN_CLIP_VALUE), np.float32(2 * largest if affine else largest)
    for c in range(count):
        high = clip_value[count + c] if affine else clip_value[c]
        low = -clip_value[c]
        span = np.float32(high - low) if affine else high
        span = smallest if span < smallest else span
        if not affine:
            low, high = -span, span
        inverse = np.float32(steps / span)
        zero = np.float32(0.0)
        if affine:
            zero = np.float32(np.rint(np.float32(-low * inverse)) - largest)
            zero = np.float32(0.0) if zero != zero else min(max(zero, -largest), largest)
        maps[0, c], maps[1, c], maps[2, c], maps[3, c] = low, high, inverse, zero
        maps[4, c] = np.float32(span / steps) if np.abs(span) < np.inf else np.float32(np.nan)
    return maps


def _quantize(source: Tensor, own: Any, spec: OperandSpec, axis: int | None, keys: np.ndarray, out: np.ndarray) -> int:
    """Fill the planes ``out``; return the bits of the largest magnitude, above ``_INFINITY`` where there is a NaN.

    ``own`` is low, high, inverse and zero: numbers, or one for each channel.
    """
    values = as_array(source)
    largest = np.float32(largest_integer(spec.bits))
    rest = (largest, spec.rounding == "stochastic", spec.bits == FLAG_BITS, keys)
    by_rows = axis == 0 and values.size >= _SHORT_ROW * len(source)
    if axis is None:
        unit, block = 1, _BLOCK
    elif by_rows:
        unit, block = values.size // len(source), _BLOCK
    elif axis == 0:
        # A call per row would cost more than the row: one call, with the maps written out for every element.
        unit = block = values.size
        own = tuple(np.repeat(v, unit // len(source)) for v in own)
    else:
        unit = source.shape[-1]
        repeats = -(-_BLOCK // unit)
        block = repeats * unit
        own = tuple(np.tile(v, repeats) for v in own)

    def work(start: int, stop: int) -> int:
        if by_rows:
            return _rows(values, start, stop, unit, *own, *rest, block, out)
        return _segment(values, start * unit, stop * unit, *own, *rest, block, out)

    return max(split(work, values.size // unit, -(-SMALLEST_PIECE // unit)))


def _quantize_expression(expression: Expression, own: Any, spec: OperandSpec, keys: np.ndarray, out: np.ndarray) -> int:
    """``_quantize`` of elements that are computed on the way, one scale for all or one per channel."""
    values = empty(*expression.shape, dtype=expression.dtype) if expression.kept else None
    source = source_of(expression, values)
    channels, count = expression.shape[-1], out.shape[1]
    block = block_of(channels)
    largest, stochastic = np.float32(largest_integer(spec.bits)), spec.rounding == "stochastic"
    if len(out) > 1 and isinstance(own[0], np.ndarray):
        own = tuple(np.tile(v, block // channels) for v in own)

    ends = block_ends(count, block)
    tops: Sequence[int] | np.ndarray
    if len(out) > 1:
        rest = (largest, stochastic, spec.bits == FLAG_BITS, keys, block, out)
        tops = by_ends(lambda first, last: _segment(source, first, last, *own, *rest), ends)
    else:
        rounding = (*own[:3], own[3] if spec.affine else None, stochastic, keys, out[0])
        if expression.summed and expression.sums is None:
            sums, tops = sums_and_tops(source, ends, block, channels, nothing_to_multiply(expression), rounding)
            expression.sums = sums[0]
        else:
            tops = team.run(round_all, (source, block, rounding), ends)
    if values is not None:
        expression.computed(values)
    return max(tops)


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
    integers = np.empty(block, np.int32)
    buffers = _buffers_of(values, block)
    top = np.int32(0)
    for start in range(first, last, block):
        x = _as_float32(values, start, min(block, last - start), buffers)
        how = (stochastic, flagged, keys)
        found = round_block(x, start, low, high, inverse, zero, largest, how, words, integers, planes[:, start:])
        top = max(top, found)
    return top


def _buffers_of(values, block):
    """Buffers of a source, or one to widen floats in."""
    raise NotImplementedError("only compiled passes call this")


@overload(_buffers_of)
def _buffers_for(values, block):
    if isinstance(values, types.BaseTuple):
        return lambda values, block: new_buffers(values, block)
    return lambda values, block: np.empty(block, np.float32)


def _as_float32(values, start, count, buffers):
    """A block of float32 itself; of bfloat16, given as its bits, or of a source, computed in ``buffers``."""
    raise NotImplementedError("only compiled passes call this")


@overload(_as_float32)
def _as_float32_of(values, start, count, buffers):
    if isinstance(values, types.BaseTuple):
        return lambda values, start, count, buffers: block_values(values, start, count, buffers)
    if values.dtype == types.float32:
        return lambda values, start, count, buffers: values[start : start + count]

    def widened(values, start, count, buffers):
        _widen(values[start : start + count], buffers)
        return buffers[:count]

    return widened


@compiled
def _widen(values, out):
    wide_vectors()
    for i in range(values.size):
        out[i] = get(values, i)
