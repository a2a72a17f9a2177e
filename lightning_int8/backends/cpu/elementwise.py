"""Elementwise passes: one walk through memory, in blocks whose intermediate results stay in cache."""

from __future__ import annotations

import numpy as np

from lightning_int8.backends.cpu.compiler import compiled, wide_vectors
from lightning_int8.backends.cpu.unpool import unpool
from lightning_int8.backends.cpu.vector_rounding import nearest, steps, store_bytes, up_or_down
from lightning_int8.backends.cpu.vectors import (
    LANES,
    inside,
    keep,
    lanes_of,
    largest_bits,
    largest_lane,
    load,
    minus,
    no_bits,
    plus,
    rectified,
    splat,
    store,
    times,
)

_FLUSHED = 512  # blocks that are summed in float32 before their sum goes to float64

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


@compiled
def new_buffers(block):
    """What ``block_values`` works in; ``block`` is a multiple of ``LANES``."""
    return np.empty(block, np.float32), np.empty(block, np.float32)


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
    walk(source, start, start + count, count, buffers, None, None)
    return buffers[0][:count]


@compiled
def walk(source, first, last, block, buffers, rounding, sums):
    """Compute elements of a source, see ``block_values``, and round them into a plane, or sum them.

    Args:
        source: See ``block_values``.
        first: A multiple of ``block``.
        last: Behind the last element.
        block: Length of a block.
        buffers: See ``block_values``.
        rounding: (low, high, inverse, zero, largest, stochastic, keys, plane): see ``rounding.round_block``; the plane
            is int8, flat, of all elements. None not to round.
        sums: (first sums, second sums, other values, centre): what to add the elements to, and what their products with
            other values, centred, if there are any: float32, one for each place of a block, but for the other values,
            which are flat. None not to sum. With neither the last block is put in the first of the buffers.

    Returns:
        The largest magnitude that was rounded, as its bits.
    """
    top = _walk(source, first, last, block, buffers, rounding, sums, None)
    if (last - first) % LANES > 0:
        start = first + (last - first - 1) // block * block
        top = max(top, _walk(source, start, last, block, buffers, rounding, sums, True))
    return top


@compiled
def _walk(source, first, last, block, buffers, rounding, sums, only_rest):
    """Whole vectors, with None as ``only_rest``, or what is left of the last block, less than a vector."""
    values, taps, windows, words, others, factor, other_factor, offset, is_rectified, upper, kept_words, kept = source
    out, unpooled = buffers
    if rounding is not None:
        low, high, inverse, zero, largest, stochastic, keys, plane = rounding
    if sums is not None:
        first_sums, second_sums, partner, centre = sums
    bound, top = splat(upper), no_bits()
    for start in range(first, last, block):
        count = min(block, last - start)
        begin, end = 0, count // LANES * LANES
        if only_rest is not None:
            begin, end = end, count
        if taps.size > 0:
            unpool(values, taps, windows, start, count, unpooled)
        for j in range(begin, end, LANES):
            i, room = start + j, LANES
            if only_rest is not None:
                room = count - j
            v = load(unpooled, j, room) if taps.size > 0 else load(values, i, room)
            if words.size > 0:
                v = keep(v, words[i // LANES])
            if others.size > 0:
                w = load(others, i, room)
                if offset.size > 0:
                    v = times(v, load(factor, j, LANES))
                    v = plus(plus(v, times(w, load(other_factor, j, LANES))), load(offset, j, LANES))
                else:
                    v = plus(v, w)
            elif offset.size > 0:
                v = plus(times(v, load(factor, j, LANES)), load(offset, j, LANES))
            if is_rectified:
                if kept_words.size > 0:
                    kept_words[i // LANES] = inside(v, bound)
                v = rectified(v, bound)
            if kept.size > 0:
                store(kept, i, room, v)
            if rounding is not None:
                top = largest_bits(top, v)
                y = steps(v, lanes_of(low, j), lanes_of(high, j), lanes_of(inverse, j))
                q = up_or_down(y, np.uint32(i >> 1), keys[0], keys[1]) if stochastic else nearest(y)
                store_bytes(plane, i, room, plus(q, lanes_of(zero, j)), splat(largest))
            elif sums is not None:
                store(first_sums, j, room, plus(load(first_sums, j, LANES), v))
                if partner.size > 0:
                    product = times(v, minus(load(partner, i, room), load(centre, j, LANES)))
                    store(second_sums, j, room, plus(load(second_sums, j, LANES), product))
            else:
                store(out, j, LANES, v)
    return largest_lane(top)


@compiled
def compute_all(source, first, last, block):
    """Compute elements ``first`` to ``last`` for the sake of what the source keeps of them."""
    walk(source, first, last, block, new_buffers(block), None, None)


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
    buffers, span = new_buffers(block), _FLUSHED * block
    for start in range(first, last, span):
        walk(source, start, min(start + span, last), block, buffers, None, (partial[0], partial[1], other, centre))
        sums += partial
        partial[:] = 0
    return sums


@compiled
def _flush(done, left, block, partial, sums):
    """Empty the float32 sums into float64 ones, every so many blocks and after the last."""
    if left <= block or (done // block) % _FLUSHED == _FLUSHED - 1:
        sums += partial
        partial[:] = 0


@compiled
def _add_squares(x, pivot, first, second):
    wide_vectors()
    for i in range(x.size):
        d = np.float32(x[i] - pivot[i])
        first[i] += d
        second[i] += np.float32(d * d)
