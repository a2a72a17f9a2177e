"""Elementwise passes: blocks computed in the first two levels of cache, loops that the compiler vectorizes."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_int8.backends.cpu.compiler import compiled, wide_vectors
from lightning_int8.backends.cpu.expression import MASK_BITS
from lightning_int8.backends.cpu.unpool import unpool

_FLUSHED = 512  # blocks that are summed in float32 before their sum goes to float64
_ZERO = np.float32(0.0)

Source = tuple[
    np.ndarray,
    np.ndarray,
    np.ndarray,
    np.ndarray,
    np.ndarray,
    np.ndarray,
    np.ndarray,
    np.ndarray,
    bool,
    np.float32,
    np.ndarray,
    np.ndarray,
]
"""An expression as the compiled passes read it, in the order of ``block_values``; arrays of size 0 are absent.

A plain tuple: numba keeps the names of classes on disk, where later versions could not read them.
"""

_ARRAY = types.Array(types.float32, 1, "C")


def _vector(context: Any, builder: Any, signature: Any, arguments: Any, array: int) -> Any:
    """Pointer to a vector of ``MASK_BITS`` elements of argument ``array``, from the index on that follows it."""
    struct = cgutils.create_struct_proxy(signature.args[array])(context, builder, arguments[array])
    pointer = builder.gep(struct.data, [arguments[array + 1]])
    return builder.bitcast(pointer, ir.VectorType(ir.FloatType(), MASK_BITS).as_pointer())


@intrinsic
def _inside(typing_context: Any, x: Any, i: Any, upper: Any) -> Any:
    """The bits of a word: which of ``x[i : i + MASK_BITS]`` are between 0 and the bound, or no numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = builder.load(_vector(context, builder, signature, arguments, 0), align=4)
        zero, bound = ir.Constant(value.type, [0.0] * MASK_BITS), ir.Constant(value.type, ir.Undefined)
        for lane in range(MASK_BITS):
            bound = builder.insert_element(bound, arguments[2], ir.Constant(ir.IntType(32), lane))
        # Unordered comparisons are true of what is no number, and of a bound that is none.
        positive, below = builder.fcmp_unordered(">", value, zero), builder.fcmp_unordered("<", value, bound)
        return builder.bitcast(builder.and_(positive, below), ir.IntType(MASK_BITS))

    return types.uint16(_ARRAY, types.int64, types.float32), generate


@intrinsic
def _keep(typing_context: Any, out: Any, i: Any, x: Any, j: Any, word: Any) -> Any:
    """Copy those of ``x[j : j + MASK_BITS]`` to ``out[i:]`` whose bit is set, and 0 for the others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = builder.load(_vector(context, builder, signature, arguments, 2), align=4)
        zero = ir.Constant(value.type, [0.0] * MASK_BITS)
        bits = builder.bitcast(arguments[4], ir.VectorType(ir.IntType(1), MASK_BITS))
        kept = builder.select(bits, value, zero)
        builder.store(kept, _vector(context, builder, signature, arguments, 0), align=4)
        return context.get_dummy_value()

    return types.void(_ARRAY, types.int64, _ARRAY, types.int64, types.uint16), generate


@compiled
def new_buffers(block):
    """What ``block_values`` works in."""
    return np.empty(block, np.float32), np.empty(block, np.float32), np.empty(block, np.float32)


@compiled
def block_values(source, start, count, buffers):
    """Elements ``start`` to ``start + count`` of a source, in the first of the buffers.

    Args:
        source: A tuple of

            - float32, flat: the values of the first term;
            - uint8, flat: where there are any, those values are the gradient of a maximum over windows, see ``unpool``;
            - int64: the geometry of the windows;
            - uint16: the mask of the first term;
            - float32, flat: the values of the second term;
            - three of float32, as long as a block: the factor of the first term, of the second, and the offset;
            - bool: whether negative sums become 0;
            - float32: what larger sums become then, or NaN;
            - uint16, to be filled with the mask of the rectified sum;
            - float32, flat, to be filled with the values.
        start: A multiple of the length of a block.
        count: At most the length of a block.
        buffers: From ``new_buffers``.
    """
    values, taps, windows, words, others, factor, other_factor, offset, rectified, upper, kept_words, kept = source
    out, unpooled, masked = buffers
    if taps.size > 0:
        unpool(values, taps, windows, start, count, unpooled)
        first = unpooled[:count]
    else:
        first = values[start : start + count]
    if words.size > 0:
        _keep_all(first, words, start // MASK_BITS, masked)
        first = masked[:count]
    if others.size > 0:
        second = others[start : start + count]
        if offset.size > 0:
            _combine(first, second, factor, other_factor, offset, out)
        else:
            _plus(first, second, out)
    elif offset.size > 0:
        _apply(first, factor, offset, out)
    else:
        _copy(first, out[:count])
    if rectified:
        if kept_words.size > 0:
            _note_inside(out, count, upper, start // MASK_BITS, kept_words)
        _rectify(count, upper, out)
    if kept.size > 0:
        _copy(out, kept[start : start + count])
    return out[:count]


# Loops of their own, which the compiler vectorizes: an array that is read is written at the same place or not at all,
# and no index might be negative.


@compiled
def _combine(x, y, x_factor, y_factor, offset, out):
    wide_vectors()
    for i in range(x.size):
        both = np.float32(np.float32(x[i] * x_factor[i]) + np.float32(y[i] * y_factor[i]))
        out[i] = np.float32(both + offset[i])


@compiled
def _plus(x, y, out):
    wide_vectors()
    for i in range(x.size):
        out[i] = np.float32(x[i] + y[i])


@compiled
def _apply(x, factor, offset, out):
    wide_vectors()
    for i in range(x.size):
        out[i] = np.float32(np.float32(x[i] * factor[i]) + offset[i])


@compiled
def _copy(x, out):
    wide_vectors()
    for i in range(out.size):
        out[i] = x[i]


@compiled
def _rectify(count, upper, x):
    wide_vectors()
    for i in range(count):
        v = upper if x[i] > upper else x[i]
        x[i] = _ZERO if v <= _ZERO else v


@compiled
def _note_inside(x, count, upper, word, words):
    """The mask of the first ``count`` elements; ``x`` is whole words long."""
    wide_vectors()
    for k in range((count + MASK_BITS - 1) // MASK_BITS):
        words[word + k] = _inside(x, k * MASK_BITS, upper)


@compiled
def _keep_all(x, words, word, out):
    wide_vectors()
    whole = x.size // MASK_BITS
    for k in range(whole):
        _keep(out, k * MASK_BITS, x, k * MASK_BITS, words[word + k])
    for i in range(whole * MASK_BITS, x.size):
        bit = (words[word + whole] >> (i % MASK_BITS)) & 1
        out[i] = x[i] if bit else _ZERO


@compiled
def compute_all(source, first, last, block):
    """Compute elements ``first`` to ``last`` for the sake of what the source keeps of them."""
    buffers = new_buffers(block)
    for start in range(first, last, block):
        block_values(source, start, min(block, last - start), buffers)


@compiled
def square_sums(values, first, last, block, pivot):
    """Sums of values and of their squares for each place of a block, pivots taken off."""
    sums, partial = np.zeros((2, block)), np.zeros((2, block), np.float32)
    sum_x, sum_xx = partial[0], partial[1]
    for start in range(first, last, block):
        _add_squares(values[start : start + min(block, last - start)], pivot, sum_x, sum_xx)
        _flush(start - first, last - start, block, partial, sums)
    return sums


@compiled
def product_sums(source, first, last, block, other, centre):
    """Sums of a source and of its product with centred values for each place of a block."""
    sums, partial = np.zeros((2, block)), np.zeros((2, block), np.float32)
    sum_x, sum_xy = partial[0], partial[1]
    buffers = new_buffers(block)
    for start in range(first, last, block):
        count = min(block, last - start)
        x = block_values(source, start, count, buffers)
        if other.size > 0:
            _add_products(x, other[start : start + count], centre, sum_x, sum_xy)
        else:
            _add(x, sum_x)
        _flush(start - first, last - start, block, partial, sums)
    return sums


@compiled
def _flush(done, left, block, partial, sums):
    """Empty the float32 sums into float64 ones, every so many blocks and after the last."""
    if left <= block or (done // block) % _FLUSHED == _FLUSHED - 1:
        sums += partial
        partial[:] = 0


@compiled
def _add(x, out):
    wide_vectors()
    for i in range(x.size):
        out[i] += x[i]


@compiled
def _add_squares(x, pivot, first, second):
    wide_vectors()
    for i in range(x.size):
        d = np.float32(x[i] - pivot[i])
        first[i] += d
        second[i] += np.float32(d * d)


@compiled
def _add_products(x, y, centre, first, second):
    wide_vectors()
    for i in range(x.size):
        first[i] += x[i]
        second[i] += np.float32(x[i] * np.float32(y[i] - centre[i]))
