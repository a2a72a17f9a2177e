"""im2col as copies of whole vectors: several times as fast as a strided copy of short runs."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_int8.backends.cpu.compiler import compiled
from lightning_int8.backends.cpu.threads import split

WIDEST_COPY = 64
"""Bytes of the widest copy; the source must have as many readable bytes behind its end."""

_SMALLEST_PIECE = 1 << 18  # bytes of rows that are worth a thread


def gather_rows(
    source: np.ndarray, sample: int, origins: np.ndarray, offsets: np.ndarray, run: int, samples: slice, out: np.ndarray
) -> None:
    """Write the windows of some samples as dense rows.

    Args:
        source: int8, flat, ``WIDEST_COPY`` bytes longer than what the windows reach.
        sample: Distance of samples in ``source``.
        origins: int64, where the window of each position begins, within a sample.
        offsets: int64, where each run of a window begins, from its origin.
        run: Length of a run.
        samples: Which samples.
        out: int8, flat ``(samples · positions · runs · run)``.
    """
    positions = len(origins)
    first, rows = samples.start * positions, (samples.stop - samples.start) * positions
    length = len(offsets) * run
    # A copy runs over by less than a run, so never beyond the next one.
    width = next((w for w in (1, 2, 4, 8, 16, 32) if run <= w), WIDEST_COPY)

    def work(start: int, stop: int) -> None:
        _gather(source, sample, origins, offsets, run, width, first + start, first + stop, out[start * length :])

    split(work, rows, max(1, _SMALLEST_PIECE // length))


def _vector_copy(width: int) -> Any:
    """An intrinsic that copies ``width`` bytes from ``source[s:]`` to ``out[o:]``, aligned or not."""

    @intrinsic
    def copy(typing_context: Any, out: Any, o: Any, source: Any, s: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vector = ir.VectorType(ir.IntType(8), width).as_pointer()

            def address(array: int, index: int) -> Any:
                struct = cgutils.create_struct_proxy(signature.args[array])(context, builder, arguments[array])
                return builder.bitcast(builder.gep(struct.data, [arguments[index]]), vector)

            value = builder.load(address(2, 3), align=1)
            builder.store(value, address(0, 1), align=1)
            return context.get_dummy_value()

        flat = types.Array(types.int8, 1, "C")
        return types.void(flat, types.int64, flat, types.int64), generate

    return copy


_copy_1, _copy_2, _copy_4, _copy_8, _copy_16, _copy_32, _copy_64 = (_vector_copy(w) for w in (1, 2, 4, 8, 16, 32, 64))


@compiled
def _copy(out, o, source, s, width):
    if width == 64:
        _copy_64(out, o, source, s)
    elif width == 32:
        _copy_32(out, o, source, s)
    elif width == 16:
        _copy_16(out, o, source, s)
    elif width == 8:
        _copy_8(out, o, source, s)
    elif width == 4:
        _copy_4(out, o, source, s)
    elif width == 2:
        _copy_2(out, o, source, s)
    else:
        _copy_1(out, o, source, s)


@compiled
def _gather(source, sample, origins, offsets, run, width, first, last, out):
    """Rows ``first`` to ``last``; each copy may run over into the next run, which overwrites it."""
    positions = origins.size
    tail = max(run - width, 0)  # where the last copy of a run begins: it overlaps the one before it
    o = 0
    for row in range(first, last - 1):
        origin = row // positions * sample + origins[row % positions]
        for j in range(offsets.size):
            s = origin + offsets[j]
            for k in range(0, tail, width):
                _copy(out, o + k, source, s + k, width)
            _copy(out, o + tail, source, s + tail, width)
            o += run
    # The last row goes byte by byte: what follows it belongs to another thread.
    origin = (last - 1) // positions * sample + origins[(last - 1) % positions]
    for j in range(offsets.size):
        for k in range(run):
            out[o] = source[origin + offsets[j] + k]
            o += 1
