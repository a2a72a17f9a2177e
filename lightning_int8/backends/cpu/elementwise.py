"""Elementwise passes: one walk through memory, in blocks whose intermediate results stay in cache."""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from lightning_int8.backends.cpu.compiler import compiled
from lightning_int8.backends.cpu.team import in_team
from lightning_int8.backends.cpu.unpool import unpool
from lightning_int8.backends.cpu.vector_rounding import nearest, shifted, steps, store_bytes, up_or_down
from lightning_int8.backends.cpu.vectors import (
    LANES,
    fetch,
    keep,
    keep_inside,
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
def whole(count):
    """The number of elements that whole vectors take."""
    return (count + LANES - 1) // LANES * LANES


def tiled(values, block):
    """An array repeated over a block, as often as it fits, up to whole vectors; a number as it is."""
    raise NotImplementedError("only compiled passes call this")


@overload(tiled)
def _tiled(values, block):
    if not isinstance(values, types.Array):
        return lambda values, block: values

    def repeated(values, block):
        out = np.zeros(whole(block) if values.size > 0 else 0, np.float32)
        for start in range(0, out.size - values.size + 1, max(1, values.size)):
            out[start : start + values.size] = values
        return out

    return repeated


@compiled
def new_buffers(source, block):
    """What ``walk`` needs for each place of a block: room for two results; both factors, and the offset."""
    out, unpooled = np.empty(whole(block), np.float32), np.empty(whole(block), np.float32)
    return out, unpooled, tiled(source[5], block), tiled(source[6], block), tiled(source[7], block)


@compiled
def block_values(source, start, count, buffers):
    """Elements ``start`` to ``start + count`` of a source, in the first of the buffers.

    Args:
        source: A tuple of

            - floats, see ``floats``, flat: the values of the first term;
            - uint8, flat: where there are any, those values are the gradient of a maximum over windows, see ``unpool``;
            - int64: the geometry of the windows;
            - uint16: the mask of the first term;
            - floats, flat: the values of the second term;
            - three of float32, one for each channel: the factor of the first term, of the second, and the offset;
              wherever there is one, there are the first and the last;
            - bool: whether negative sums become 0;
            - float32: what larger sums become then, or NaN;
            - uint16, to be filled with the mask of the rectified sum;
            - floats, flat, to be filled with the values.
        start: A multiple of the length of a block.
        count: At most the length of a block, whole words of masks.
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
        rounding: (low, high, inverse, zero, stochastic, keys, plane): see ``rounding.round_block``; the first
            four are numbers, or arrays with one for each channel, and zero may be None; the plane is int8, flat, of all
            elements. None not to round.
        sums: (first sums, second sums, other values, centre): what to add the elements to, and what their products with
            other values, centred, if there are any: float32, whole vectors of places of a block, but for the other
            values, which are floats, flat. None not to sum. Without rounding and sums the last block is put in the
            first buffer.

    Returns:
        The largest magnitude that was rounded, as its bits.
    """
    places = _places(rounding, block)
    top = _walk(source, first, last, block, buffers, rounding, places, sums, None)
    if (last - first) % LANES > 0:
        start = first + (last - first - 1) // block * block
        top = max(top, _walk(source, start, last, block, buffers, rounding, places, sums, True))
    return top


def _places(rounding, block):
    """The first four of a rounding for each place of a block."""
    raise NotImplementedError("only compiled passes call this")


@overload(_places)
def _places_of(rounding, block):
    if isinstance(rounding, types.NoneType):
        return lambda rounding, block: None

    def places(rounding, block):
        low, high, inverse, zero = rounding[:4]
        return tiled(low, block), tiled(high, block), tiled(inverse, block), tiled(zero, block)

    return places


def _with_zero(q, zero, i):
    """Integers plus lanes of the zero points, see ``lanes_of``; unchanged where they are None."""
    raise NotImplementedError("only compiled passes call this")


@overload(_with_zero, inline="always")
def _with_zero_points(q, zero, i):
    if isinstance(zero, types.NoneType):
        return lambda q, zero, i: q
    return lambda q, zero, i: shifted(q, lanes_of(zero, i))


@compiled
def _walk(source, first, last, block, buffers, rounding, places, sums, only_rest):
    """Whole vectors, with None as ``only_rest``, or what is left of the last block, less than a vector."""
    values, taps, windows, words, others, _, _, _, is_rectified, upper, kept_words, kept = source
    out, unpooled, factor, other_factor, offset = buffers
    if rounding is not None:
        _, _, _, _, stochastic, keys, plane = rounding
        low, high, inverse, zero = places
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
            if taps.size > 0:
                v = load(unpooled, j, room)
            else:
                fetch(values, i)
                v = load(values, i, room)
            if words.size > 0:
                v = keep(v, words, i, room)
            if others.size > 0:
                fetch(others, i)
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
                    keep_inside(kept_words, i, room, v, bound)
                v = rectified(v, bound)
            if kept.size > 0:
                store(kept, i, room, v)
            if rounding is not None:
                top = largest_bits(top, v)
                y = steps(v, lanes_of(low, j), lanes_of(high, j), lanes_of(inverse, j))
                q = up_or_down(y, np.uint32(i >> 1), keys[0], keys[1]) if stochastic else nearest(y)
                store_bytes(plane, i, room, _with_zero(q, zero, j))
            if sums is not None:
                store(first_sums, j, room, plus(load(first_sums, j, LANES), v))
                if partner.size > 0:
                    fetch(partner, i)
                    product = times(v, minus(load(partner, i, room), load(centre, j, LANES)))
                    store(second_sums, j, room, plus(load(second_sums, j, LANES), product))
            if rounding is None and sums is None:
                store(out, j, LANES, v)
    return largest_lane(top)


@compiled
def _rounded(source, block, rounding, first, last, piece):
    return walk(source, first, last, block, new_buffers(source, block), rounding, None)


_round_in_team = in_team(_rounded)


@compiled
def round_all(arguments, ends, results, runtime):
    """``walk`` to round, for ``team.run`` with its source, block and rounding."""
    _round_in_team(arguments, ends, results, runtime)


@compiled
def _computed(source, block, first, last, piece):
    return walk(source, first, last, block, new_buffers(source, block), None, None)


_compute_in_team = in_team(_computed)


@compiled
def compute_all(arguments, ends, results, runtime):
    """``walk`` for the sake of what the source keeps, for ``team.run`` with its source and block."""
    _compute_in_team(arguments, ends, results, runtime)


@compiled
def _summed(source, block, other, centre, rounding, out, first, last, piece):
    """Sums of a source and of its product with centred values for each place of a block.

    Args:
        source: See ``walk``.
        block: Likewise.
        other: The values; of size 0 where nobody wants the product.
        centre: float32, one for each channel.
        rounding: See ``walk``: sums and rounding share one walk.
        out: float64 ``(pieces, 2, block)``: the sums.
        first: See ``walk``.
        last: Likewise.
        piece: Number of the piece.

    Returns:
        The largest magnitude as its bits, 0 without rounding.
    """
    sums, partial = out[piece], np.zeros((2, whole(block)), np.float32)
    sums[:] = 0
    buffers, span, centres = new_buffers(source, block), _FLUSHED * block, tiled(centre, block)
    top = np.int32(0)
    for start in range(first, last, span):
        added = (partial[0], partial[1], other, centres)
        top = max(top, walk(source, start, min(start + span, last), block, buffers, rounding, added))
        sums += partial[:, :block]
        partial[:] = 0
    return top


_sum_in_team = in_team(_summed)


@compiled
def product_sums(arguments, ends, results, runtime):
    """``_summed``, for ``team.run``."""
    _sum_in_team(arguments, ends, results, runtime)
