"""Rounding of a block of elements, in loops of their own, each of which the compiler vectorizes."""

from __future__ import annotations

import numpy as np

from lightning_int8.backends.cpu.compiler import at, compiled, wide_vectors
from lightning_int8.generator import HASH_MULTIPLIERS, RANDOM_BITS
from lightning_int8.numerics import FLAG_STEPS, INT8_MAX, LOWER_PLANE_MAX, PLANE_BASE

_U15, _U16 = np.uint32(15), np.uint32(16)
_M0, _M1 = (np.uint32(m) for m in HASH_MULTIPLIERS)
_RANGE = np.float32(1 << RANDOM_BITS)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_FINE, _LARGEST = np.float32(FLAG_STEPS), np.float32(INT8_MAX)
_MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits of a float32 but its sign


@compiled
def round_block(x, start, low, high, inverse, zero, largest, how, words, integers, planes):
    """Fill the planes of a block, see ``numerics.quantize``.

    Args:
        x: float32, the elements.
        start: Index of the first.
        low: Smallest value kept; a scalar or as long as ``x``, as are the next three.
        high: Largest value kept.
        inverse: Integer steps per unit.
        zero: Zero point.
        largest: Largest integer.
        how: Whether rounding is stochastic, whether planes are those of the flag format, the key of the generator.
        words: uint32, room for half as many as ``x`` has elements and one more.
        integers: int32, room for as many.
        planes: int8 ``(planes, at least as long as x)``.

    Returns:
        The largest magnitude, as its bits.
    """
    stochastic, flagged, keys = how
    bits, maps = x.view(np.int32), (low, high, inverse, zero)
    if stochastic:
        # An odd element takes the upper half of the word that it shares with the one before it.
        _draw(np.uint32(start >> 1), keys[0], keys[1], words)
        noise = words.view(np.uint16)[start & 1 :]
        if flagged:
            return _flag_up_or_down(x, bits, *maps[:3], noise, planes)
    elif flagged:
        return _flag_to_nearest(x, bits, *maps[:3], planes)
    if planes.shape[0] == 1:
        if stochastic:
            return _round_up_or_down(x, bits, *maps, largest, noise, planes[0])
        return _round_to_nearest(x, bits, *maps, largest, planes[0])
    if stochastic:
        top = _round_up_or_down(x, bits, *maps, largest, noise, integers)
    else:
        top = _round_to_nearest(x, bits, *maps, largest, integers)
    _split_digits(integers, x.size, planes)
    return top


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
