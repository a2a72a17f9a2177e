"""grad_weight as a matrix product: rows are output channels, columns are taps and input channels.

Sums run over positions of four samples, or over rows of a matrix product, at a time, so that neither a tap nor a stride
changes what is summed together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from lightning_int8.backends.cpu.compiler import at, compiled
from lightning_int8.backends.cpu.implicit_gemm import UNSIGNED
from lightning_int8.backends.cpu.llvm import constant, operation, place_in, splat_of
from lightning_int8.backends.cpu.microkernel import FLOATS, INTS, LANES, QUAD, ROWS, WIDTH, add_tile
from lightning_int8.backends.cpu.panels import AT_ONCE, FLIP, NO_FLIP, interleave
from lightning_int8.backends.cpu.team import in_team
from lightning_int8.backends.cpu.tile_end import write_scaled


@compiled
def _of_windows(left, right, rows, panels, parts, scales, taken_off, sums_of, out, first_part, last_part, piece):
    """Sums over positions for some channels of g and some panels of columns, part by part.

    Args:
        left: (uint8, flat: the signed bytes of g ``(N, positions, Co)`` from the first channel on; samples; their
            distance; where the positions of one begin; uint32, for each piece room for the quads of a block).
        right: (uint8, flat: quads of the signed bytes of x; distance of positions; copies). Where windows are copied
            side by side before they are multiplied, copies are (int64: where the positions of each piece begin in x;
            int64: where each run of columns begins, from a position; columns of a run; uint32, for each piece of the
            work room for a block of such windows, whole vectors, and one more; length of a window there). Else None.
        rows: (int64, pairs: where the positions of each piece begin, from its block and from a panel; positions of a
            piece; pieces over which int32 holds the sums: if there are more, ``out`` is to be int64; pieces of a block,
            which are packed and multiplied before the next ones, so that they stay in cache).
        panels: int64 ``(panels, 3)``: where each begins in x, or in a copied window, its columns, and where they belong
            in a row of ``out``.
        parts: (panels of a part; parts of the panels; channels of a part; rows of its tiles). Parts of the panels come
            first, then those of the channels.
        scales: (left, right): float32, left is a number or one for each channel.
        taken_off: int32: what else to take off the sums of a channel.
        sums_of: int32, for each piece of the work room for ``(panels · rows · WIDTH)``.
        out: flat, ``(channels, columns)``: int32 for the sums as they are, floats for scaled ones; int64 to be added
            to, without scales, nothing taken off.
        first_part: First part.
        last_part: Behind the last one.
        piece: Number of this piece of the work.
    """
    g, samples, stride, begins, packed_of = left
    x, right_step, copies = right
    pieces, quads, most, block = rows
    group, groups, own_channels, height = parts
    count, sums, packed = pieces.size // 2, sums_of[piece], packed_of[piece]
    places, packed_bytes = np.arange(begins.size) * height, packed.view(np.uint8)
    for part in range(first_part, last_part):
        own_panels, channel = panels[part % groups * group :][:group], part // groups * own_channels
        channels = min(own_channels, taken_off.size - channel)
        for first in range(0, count, most):
            last = min(first + most, count)
            sums[: own_panels.shape[0] * height * WIDTH] = 0
            for k in range(first, last, block):
                stop = min(k + block, last)
                there = places, begins.size * height, k * quads * height, height - channels, AT_ONCE, AT_ONCE
                span = k * quads, stop * quads
                interleave(g[channel:], begins, stride, samples, FLIP, channels, packed, *there, *span)
                source, step = _side_by_side(x, right_step, copies, piece, k, stop, quads)
                lhs = packed_bytes, pieces, k, stop, quads
                _add_tiles(lhs, source, step, own_panels, height, sums)
            _write_all(sums, own_panels, (channels, channel, height), scales, taken_off, out)
    return np.int32(0)


@compiled
def _add_tiles(left, right, right_step, panels, height, sums):
    """Products of all rows of a block with all panels."""
    packed, pieces, first, last, quads = left
    for j in range(panels.shape[0]):
        vectors = (panels[j, 1] + LANES - 1) // LANES
        for r in range(0, height, ROWS):
            lhs = (packed, r * QUAD, height * QUAD, pieces, first, last, quads)
            add_tile(vectors, *lhs, right, panels[j, 0], right_step, sums, (j * height + r) * WIDTH)


_windows_in_team = in_team(_of_windows)


@compiled
def grad_weight(arguments, ends, results, runtime):
    """``_of_windows``, for ``team.run``."""
    _windows_in_team(arguments, ends, results, runtime)


@compiled
def _of_product(
    g, x, rows, widths, block, panels, parts, scales, taken_off, sums_of, out, first_part, last_part, piece
):
    """``_of_windows`` of a matrix product: four rows at a time are summed together, some rows are packed at a time.

    Args:
        g: uint8, flat: the signed bytes of ``(rows, Co)`` from the first channel on.
        x: uint8, flat: the signed bytes of ``(rows, C)``, likewise.
        rows: Rows.
        widths: (Co, C, channels of x, columns of a panel).
        block: Quads of rows that are packed before they are multiplied: they stay in cache.
        panels: See ``_of_windows``.
        parts: (channels of a part; rows of its tiles).
        scales: See ``_of_windows``.
        taken_off: Likewise.
        sums_of: Likewise.
        out: Likewise.
        first_part: Likewise.
        last_part: Likewise.
        piece: Likewise.
    """
    out_row, in_row, columns, width = widths
    own_channels, height = parts
    left, right = np.empty(block * height, np.uint32), np.empty(block * (columns + width), np.uint32)
    left_bytes, right_bytes = left.view(np.uint8), right.view(np.uint8)
    begins, pieces, sums = np.zeros(1, np.int64), np.zeros(2, np.int64), sums_of[piece]
    for part in range(first_part, last_part):
        channel = part * own_channels
        channels = min(own_channels, taken_off.size - channel)
        sums[: panels.shape[0] * height * WIDTH] = 0
        for first in range(0, rows, block * QUAD):
            count = (min(block * QUAD, rows - first) + QUAD - 1) // QUAD
            own, others = g[first * out_row + channel :], x[first * in_row :]
            there = begins, height, 0, height - channels, AT_ONCE, AT_ONCE, 0, count
            interleave(own, begins, out_row, rows - first, FLIP, channels, left, *there)
            there = begins, width, 0, 0, width, block * width, 0, count
            interleave(others, begins, in_row, rows - first, NO_FLIP, columns, right, *there)
            _add_tiles((left_bytes, pieces, 0, 1, count), right_bytes, width * QUAD, panels, height, sums)
        _write_all(sums, panels, (channels, channel, height), scales, taken_off, out)
    return np.int32(0)


_product_in_team = in_team(_of_product)


@compiled
def grad_product(arguments, ends, results, runtime):
    """``_of_product``, for ``team.run``."""
    _product_in_team(arguments, ends, results, runtime)


def _side_by_side(x, step, copies, piece, first, last, quads):
    """The windows of some pieces and their distance in bytes: copies, or where they lie if those are None."""
    raise NotImplementedError("only compiled passes call this")


@overload(_side_by_side)
def _side_by_side_of(x, step, copies, piece, first, last, quads):
    if isinstance(copies, types.NoneType):
        return lambda x, step, copies, piece, first, last, quads: (x, step)

    def copied(x, step, copies, piece, first, last, quads):
        begins, runs, run, room, length = copies
        out = room[piece]
        for k in range(first, last):
            for q in range(quads):
                window, o = begins[k] + q * step, ((k - first) * quads + q) * length
                for r in range(runs.size):
                    # What a run has written too much, the next one writes over.
                    for c in range(0, run, LANES):
                        _copy_quads(x, window + runs[r] + c * QUAD, out, o + r * run + c)
        return out.view(np.uint8), length * QUAD

    return copied


@intrinsic
def _copy_quads(typing_context: Any, data: Any, i: Any, out: Any, o: Any) -> Any:
    """``out[o + k]``, a vector of quads, is what lies from byte ``i`` of ``data`` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, i, out, o = arguments
        quads = builder.load(place_in(context, builder, signature.args[0], data, i, INTS), align=1)
        builder.store(quads, place_in(context, builder, signature.args[2], out, o, INTS), align=4)
        return context.get_dummy_value()

    return types.void(data, types.int64, out, types.int64), generate


@compiled
def _write_all(sums, panels, part, scales, taken_off, out):
    """What is in ``sums`` of one part (channels, the first one, rows of tiles) to ``out``."""
    channels, channel, height = part
    columns = out.size // taken_off.size
    for r in range(channels):
        # Row by row: what is written lies in one page.
        row, off, factor = (channel + r) * columns, taken_off[channel + r], at(scales[0], channel + r)
        for j in range(panels.shape[0]):
            width, o = panels[j, 1], row + panels[j, 2]
            s, ones = (j * height + r) * WIDTH, (j * height + channels) * WIDTH
            for c in range(0, width, LANES):
                _write_or_add(sums, s + c, ones + c, off, factor, scales[1], width - c, out, o + c)
    _fence()


@intrinsic
def _fence(typing_context: Any) -> Any:
    """What was written past the caches is seen before anything that is written from here on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        operation(builder, "llvm.x86.sse.sfence", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate


def _write_or_add(sums, s, ones, off, left, right, room, out, o):
    """``_write_sums``, or add the sums to int64 as they are."""
    raise NotImplementedError("only compiled passes call this")


@overload(_write_or_add)
def _write_or_add_to(sums, s, ones, off, left, right, room, out, o):
    if out.dtype != types.int64:
        return lambda sums, s, ones, off, left, right, room, out, o: _write_sums(
            sums, s, ones, off, left, right, room, out, o
        )

    def added(sums, s, ones, off, left, right, room, out, o):
        for k in range(min(room, LANES)):
            out[o + k] += np.int32(sums[s + k] - np.int32(sums[ones + k] * np.int32(UNSIGNED)))

    return added


@intrinsic
def _write_sums(
    typing_context: Any, sums: Any, s: Any, ones: Any, off: Any, left: Any, right: Any, room: Any, out: Any, o: Any
) -> Any:
    """A vector of ``sums`` without what the added ``UNSIGNED`` has brought, and without ``off``; see ``write_tile``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, s, ones, off, left, right, room, out, o = arguments

        def load(index: Any) -> Any:
            return builder.load(place_in(context, builder, signature.args[0], sums, index, INTS), align=4)

        brought = builder.mul(load(ones), constant(INTS, int(UNSIGNED)))
        total = builder.sub(builder.sub(load(s), brought), splat_of(builder, off, INTS))
        write_scaled(
            context,
            builder,
            signature.args[7],
            total,
            [splat_of(builder, f, FLOATS) for f in (left, right)],
            None,
            out,
            o,
            room,
            past_caches=True,  # an optimizer reads the gradient when it would long have left them
        )
        return context.get_dummy_value()

    n = types.int64
    return types.void(sums, n, n, types.int32, types.float32, types.float32, n, out, n), generate
