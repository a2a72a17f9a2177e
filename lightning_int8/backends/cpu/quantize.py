"""Quantization in one pass over memory: the bits of ``numerics.quantize``, planes included.

Memory is walked in blocks that stay in cache: 16-bit floats are widened, expressions computed, and elements rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.compiler import compiled
from lightning_int8.backends.cpu.elementwise import block_values, new_buffers, walk
from lightning_int8.backends.cpu.evaluation import block_of, source_of
from lightning_int8.backends.cpu.expression import Expression, Term
from lightning_int8.backends.cpu.rounding import round_block, widen
from lightning_int8.backends.cpu.threads import SMALLEST_PIECE, split, split_blocks
from lightning_int8.backends.cpu.tile import tile
from lightning_int8.generator import mix_key
from lightning_int8.numerics import (
    FLAG_BITS,
    FLAG_STEPS,
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
_INFINITY = 0x7F800000  # bits of the smallest magnitude that is not finite


def quantize(x: Tensor | Expression, clip_value: Tensor, spec: OperandSpec, axis: int | None, key: Tensor) -> Quantized:
    """Quantize ``x``, see ``Backend.quantize``."""
    m = affine_map(clip_value, spec.bits, spec.affine)
    planes = empty(plane_count(spec.bits), *x.shape, dtype=torch.int8)
    zero = torch.zeros_like(m.scale) if m.zero is None else m.zero
    maps = [v.to(torch.float32) for v in (m.low, m.high, m.inverse, zero)]
    keys = np.array(mix_key(*key.tolist()), dtype=np.uint32)
    if isinstance(x, Expression) and (x.is_plain or axis == 0):
        x = x.values()
    if isinstance(x, Expression):
        top = _quantize_expression(x, maps, spec, axis, keys, planes)
    else:
        source = x.detach().contiguous()
        source = source.float() if source.dtype == torch.float16 else source
        if source.dtype == torch.float32 and len(planes) == 1 and axis != 0 and source.dim() > 1:
            top = _quantize_expression(Expression((Term(source),)), maps, spec, axis, keys, planes)
        else:
            top = _quantize(source, maps, spec, axis, keys, planes)

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
        block = repeats * unit
        own = tuple(tile(v.expand(unit), block) for v in maps)

    def work(start: int, stop: int) -> int:
        if by_rows:
            return _rows(values, start, stop, unit, *own, *rest, block, out)
        return _segment(values, start * unit, stop * unit, *own, *rest, block, out)

    return max(split(work, flat.numel() // unit, -(-SMALLEST_PIECE // unit)))


def _quantize_expression(
    expression: Expression, maps: list[Tensor], spec: OperandSpec, axis: int | None, keys: np.ndarray, planes: Tensor
) -> int:
    """``_quantize`` of elements that are computed on the way, one scale for all or one per channel."""
    values = empty(*expression.shape) if expression.kept else None
    source = source_of(expression, None if values is None else values.view(-1))
    channels, count = expression.shape[-1], planes[0].numel()
    block = block_of(channels)
    own: tuple[Any, ...]
    if axis is None:
        own = tuple(np.float32(v.item()) for v in maps)
    else:
        own = tuple(tile(v.expand(channels), block) for v in maps)
    out = planes.view(len(planes), -1).numpy()
    largest, stochastic = np.float32(largest_integer(spec.bits)), spec.rounding == "stochastic"

    def work(first: int, last: int) -> int:
        if len(out) > 1:
            return _segment(source, first, last, *own, largest, stochastic, spec.bits == FLAG_BITS, keys, block, out)
        rounding = (*own, largest, stochastic, keys, out[0])
        return walk(source, first, last, block, new_buffers(block), rounding, None)

    top = max(split_blocks(work, count, block))
    if values is not None:
        expression.computed(values)
    return top


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
    buffers = new_buffers(block)
    top = np.int32(0)
    for start in range(first, last, block):
        x = _as_float32(values, start, min(block, last - start), buffers)
        how = (stochastic, flagged, keys)
        found = round_block(x, start, low, high, inverse, zero, largest, how, words, integers, planes[:, start:])
        top = max(top, found)
    return top


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
        widen(values[start : start + count], buffers[0].view(np.int32))
        return buffers[0][:count]

    return widened
