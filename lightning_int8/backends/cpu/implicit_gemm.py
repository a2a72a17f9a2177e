"""Convolutions as matrix products whose windows are read where they lie.

Rows are positions, read from the data through tables; columns are output channels, whose weights lie in panels as
``microkernel`` reads them.

The instruction multiplies unsigned by signed bytes: 128 is added to the left operand, and 128 times the sum of the
right one taken off again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from lightning_int8.backends.cpu.compiler import compiled
from lightning_int8.backends.cpu.floats import get
from lightning_int8.backends.cpu.llvm import constant, load_lanes, place_in, store_lanes
from lightning_int8.backends.cpu.microkernel import QUAD, ROWS, WIDTH
from lightning_int8.backends.cpu.team import in_team
from lightning_int8.backends.cpu.tile_end import write_tile

UNSIGNED = np.uint8(128)
"""Added to signed bytes it makes unsigned ones; as bits it is the sign, so exclusive or does."""

_BYTES_AT_ONCE = 64
_BYTES = ir.VectorType(ir.IntType(8), _BYTES_AT_ONCE)


@compiled
def _correlated(
    data,
    is_signed,
    samples,
    origins,
    targets,
    pieces,
    quads,
    panels,
    starts,
    scales,
    columns,
    at_once,
    out,
    moments_of,
    first,
    last,
    piece,
):
    """Sums over windows for some positions, written as they are (int32) or scaled (floats).

    Args:
        data: uint8, flat: data + 128, or the bytes of signed ones.
        is_signed: Whether they are; then a window is a single piece.
        samples: (distance of samples in ``data``, in ``out``).
        origins: int64: where the window of each position begins, within a sample.
        targets: int64: where the result of each position belongs, within a sample.
        pieces: int64, pairs: where each piece of a window begins, from its origin, and of a panel.
        quads: Quads of a piece.
        panels: uint8, flat: the signed bytes of ``(panel, piece, quad, WIDTH, QUAD)``.
        starts: int32: what the sums of each column begin with, whole vectors.
        scales: (left, right, bias): float32, a number and one for each column, whole vectors; the bias may be None.
        columns: Columns.
        at_once: Positions that are multiplied with one panel before the next one; whole tiles.
        out: flat.
        moments_of: float64 ``(pieces of the work, 3 · whole vectors)``, or None: of each column the first result; the
            sum of all, that taken off; and the sum of their squares.
        first: First (sample and) position.
        last: Behind the last one.
        piece: Number of this piece of the work.
    """
    rows, places = np.empty(at_once, np.int64), np.empty(at_once, np.int64)
    step = quads * QUAD
    taken = np.empty(at_once * step if is_signed else 0, np.uint8)
    source = taken if is_signed else data
    panel = pieces.size // 2 * step
    pivots, partial, moments = _moments_of_piece(moments_of, starts.size, piece)
    n, t = first // origins.size, first % origins.size
    for m in range(first, last, at_once):
        count = min(at_once, last - m)
        for i in range(count):
            rows[i] = n * samples[0] + origins[t]
            places[i] = n * samples[1] + targets[t]
            t += 1
            if t == origins.size:
                n, t = n + 1, 0
        # The last row fills up the last tile.
        rows[count:] = rows[count - 1]
        places[count:] = places[count - 1]
        if is_signed:
            _take(data, rows, count, step, taken)
        # For the sake of the pivots the first tiles are computed once more, before anything is summed.
        rounds = 2 if moments_of is not None and m == first else 1
        for k in range(rounds):
            is_last = k == rounds - 1
            own, summed = (count, count) if is_last else (ROWS, 0)
            for c in range(0, columns, WIDTH):
                right = (pieces, quads, panels, c * panel, starts, c, *scales)
                for i in range(0, own, ROWS):
                    write_tile(min(WIDTH, columns - c), source, rows, i, *right, out, places, summed, pivots, partial)
            if moments_of is not None:
                if not is_last:
                    for c in range(columns):
                        pivots[c] = moments[c] = get(out, places[0] + c)
                # Sums of many keep their digits in float64.
                for c in range(partial.size):
                    moments[pivots.size + c] += partial[c]
                    partial[c] = 0
    return np.int32(0)


def _moments_of_piece(moments_of, columns, piece):
    """Pivots, sums in float32, and where the moments of a piece belong; zeros. Nothing where nobody wants them."""
    raise NotImplementedError("only compiled passes call this")


@overload(_moments_of_piece)
def _own_moments(moments_of, columns, piece):
    if isinstance(moments_of, types.NoneType):
        return lambda moments_of, columns, piece: (None, None, None)

    def zeros(moments_of, columns, piece):
        moments_of[piece] = 0
        return np.zeros(columns, np.float32), np.zeros(2 * columns, np.float32), moments_of[piece]

    return zeros


_correlate_in_team = in_team(_correlated)


@compiled
def correlate(arguments, ends, results, runtime):
    """``_correlated``, for ``team.run``."""
    _correlate_in_team(arguments, ends, results, runtime)


@compiled
def joined(counts, parts):
    """Mean and biased variance of each column, float64 ``(2, whole vectors)``, of what ``correlate`` summed in parts.

    Args:
        counts: int64: positions of each part.
        parts: float64 ``(parts, 3, whole vectors)``.
    """
    out = np.zeros((2, parts.shape[2]))
    total = counts.sum()
    for c in range(parts.shape[2]):
        for k in range(counts.size):
            out[0, c] += (parts[k, 0, c] * counts[k] + parts[k, 1, c]) / total
        for k in range(counts.size):
            pivot, first, second = parts[k, :, c]
            away = pivot + first / counts[k] - out[0, c]
            out[1, c] += (max(second - first * first / counts[k], 0.0) + counts[k] * away * away) / total
    return out


@intrinsic
def _copy_flipped(typing_context: Any, data: Any, i: Any, room: Any, out: Any, o: Any) -> Any:
    """``out[o + k] = data[i + k] ^ UNSIGNED`` for a vector of bytes, no more than ``room``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, i, room, out, o = arguments
        name = f"v{_BYTES.count}i8"
        v = load_lanes(builder, place_in(context, builder, signature.args[0], data, i, _BYTES), room, _BYTES, name)
        flipped = builder.xor(v, constant(_BYTES, int(UNSIGNED)))
        store_lanes(builder, flipped, place_in(context, builder, signature.args[3], out, o, _BYTES), room, name)
        return context.get_dummy_value()

    n = types.int64
    return types.void(data, n, n, out, n), generate


@compiled
def _take(data, rows, count, length, out):
    """Copy rows + 128 side by side, and point to the copies."""
    for i in range(count):
        for j in range(0, length, _BYTES_AT_ONCE):
            _copy_flipped(data, rows[i] + j, length - j, out, i * length + j)
    for i in range(rows.size):
        rows[i] = min(i, count - 1) * length
