"""Words of rows side by side, as the panels of a weight have them."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lightning_int8.backends.cpu.compiler import compiled
from lightning_int8.backends.cpu.llvm import place_in
from lightning_int8.backends.cpu.microkernel import INTS, LANES, WIDTH
from lightning_int8.backends.cpu.team import in_team


@compiled
def _transposed(rows, out, first, last, piece):
    """Words of rows side by side: word w of row r to ``out[r // WIDTH, w * WIDTH + r % WIDTH]``.

    Args:
        rows: uint32 ``(rows, words)``.
        out: uint32 ``(panels, words · WIDTH)``; what no row reaches is left.
        first: First panel.
        last: Behind the last one.
        piece: Number of the piece.
    """
    count, words = rows.shape
    flat, panels = rows.reshape(-1), out.reshape(-1)
    for p in range(first, last):
        for row in range(p * WIDTH, min((p + 1) * WIDTH, count), LANES):
            column = p * words * WIDTH + row % WIDTH
            whole = words // LANES * LANES if row + LANES <= count else 0
            for w in range(0, whole, LANES):
                _transpose(flat, row * words + w, words, panels, column + w * WIDTH)
            for r in range(row, min(row + LANES, count)):
                for w in range(whole, words):
                    panels[column + w * WIDTH + r - row] = flat[r * words + w]
    return np.int32(0)


_transpose_in_team = in_team(_transposed)


@compiled
def transpose_words(arguments, ends, results, runtime):
    """``_transposed``, for ``team.run``."""
    _transpose_in_team(arguments, ends, results, runtime)


@intrinsic
def _transpose(typing_context: Any, data: Any, i: Any, stride: Any, out: Any, o: Any) -> Any:
    """``out[o + w * WIDTH + r] = data[i + r * stride + w]`` for w and r below ``LANES``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, i, stride, out, o = arguments

        def place(which: int, array: Any, begin: Any, distance: Any, k: int) -> Any:
            index = builder.add(begin, builder.mul(distance, ir.IntType(64)(k)))
            return place_in(context, builder, signature.args[which], array, index, INTS)

        vectors = [builder.load(place(0, data, i, stride, r), align=4) for r in range(LANES)]
        distance = 1
        while distance < LANES:
            # Squares of so many lanes beside the diagonal change places.
            upper = [lane + (LANES - distance if lane & distance else 0) for lane in range(LANES)]
            lower = [lane + (LANES if lane & distance else distance) for lane in range(LANES)]
            for k in (k for k in range(LANES) if not k & distance):
                pair = vectors[k], vectors[k + distance]
                vectors[k], vectors[k + distance] = (_picked(builder, *pair, order) for order in (upper, lower))
            distance *= 2
        for w, vector in enumerate(vectors):
            builder.store(vector, place(3, out, o, ir.IntType(64)(WIDTH), w), align=4)
        return context.get_dummy_value()

    n = types.int64
    return types.void(data, n, n, out, n), generate


def _picked(builder: Any, first: Any, second: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), LANES), order))
