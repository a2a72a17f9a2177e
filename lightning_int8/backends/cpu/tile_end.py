"""The end of a contraction: sums in registers become results, scaled, biased and rounded, and add to moments."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_int8.backends.cpu.llvm import narrowed, operation, place_in, splat_of, store_floats, store_lanes, widened
from lightning_int8.backends.cpu.microkernel import (
    BYTES,
    FLOATS,
    INTS,
    LANES,
    OFFSETS,
    QUAD,
    ROWS,
    WIDTH,
    for_width,
    number,
    sums_of_products,
)

_INT64 = ir.IntType(64)


def write_scaled(
    context: Any,
    builder: Any,
    kind: Any,
    sums: Any,
    factors: list[Any],
    offset: Any,
    out: Any,
    o: Any,
    room: Any,
    past_caches: bool = False,
) -> Any:
    """Emit the end of a contraction: a vector of sums to ``out[o:]``, no more than there is room for.

    An array of floats takes fl(fl(fl(sums) · left) · right), plus the offset unless it is None; one of int32 the sums.
    What was written comes back; floats, rounded or not, as float32. For the caches see ``store_floats``.
    """
    if kind.dtype == types.int32:
        store_lanes(builder, sums, place_in(context, builder, kind, out, o, INTS), room, f"v{LANES}i32")
        return sums
    scaled = builder.sitofp(sums, FLOATS)
    for factor in factors:
        scaled = builder.fmul(scaled, factor)
    scaled = scaled if offset is None else builder.fadd(scaled, offset)
    store_floats(context, builder, kind, scaled, out, o, room, past_caches)
    return widened(builder, narrowed(builder, scaled)) if kind.dtype == types.uint16 else scaled


@intrinsic
def write_tile(
    typing_context: Any,
    columns: Any,
    data: Any,
    rows: Any,
    i: Any,
    pieces: Any,
    quads: Any,
    panels: Any,
    p: Any,
    starts: Any,
    c: Any,
    left: Any,
    right: Any,
    bias: Any,
    out: Any,
    places: Any,
    count: Any,
    pivots: Any,
    moments: Any,
) -> Any:
    """Products of ``ROWS`` rows and a panel, scaled to floats or as they are, depending on the type of ``out``.

    Args:
        typing_context: Of numba.
        columns: Columns that are written, 1 to ``WIDTH``.
        data: Unsigned bytes.
        rows: int64: where the rows begin in ``data``, from ``rows[i]`` on.
        i: See above.
        pieces: int64, pairs: where the pieces of a row begin from there, and those of the panel from ``p``.
        quads: Quads of a piece.
        panels: Signed bytes, as uint8: ``(piece, quad, WIDTH, QUAD)`` from ``p`` on.
        p: See above.
        starts: int32, whole vectors: what the sums begin with, from ``starts[c]`` on.
        c: First column.
        left: float32: result = fl(fl(fl(sum) · left) · right).
        right: float32, whole vectors, from ``right[c]`` on.
        bias: Likewise: what is added then; or None.
        out: Floats, see ``floats``, or int32, flat.
        places: int64: where column 0 of each row belongs, from ``places[i]`` on.
        count: Rows from the first one of the array on; those of the tile behind them repeat the last one.
        pivots: float32, whole vectors, from ``pivots[c]`` on; or None.
        moments: float32 ``(2, whole vectors)``, flat, or None: the results of the rows, pivots taken off, are added
            from ``moments[c]`` on, and their squares behind.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        columns, data, rows, i, pieces, quads, panels, p, starts, c = arguments[:10]
        left, right, bias, out, places, count, pivots, moments = arguments[10:]
        kinds = signature.args

        def pointer(which: int, array: Any, index: Any, kind: Any) -> Any:
            return place_in(context, builder, kinds[which], array, index, kind)

        def emit(vectors: int) -> None:
            def each(row: int) -> Any:
                return builder.add(i, number(row))

            begins = [builder.load(pointer(2, rows, each(r), _INT64)) for r in range(ROWS)]
            row_pointers = [pointer(1, data, begin, ir.IntType(8)) for begin in begins]
            initial = [
                builder.load(pointer(8, starts, builder.add(c, number(v * LANES)), INTS), align=4)
                for v in range(vectors)
            ]
            sums = sums_of_products(
                builder,
                vectors,
                (row_pointers, number(QUAD)),
                (pointer(6, panels, p, ir.IntType(8)), number(WIDTH * QUAD)),
                pointer(4, pieces, number(0), _INT64),
                number(0),
                builder.lshr(cgutils.create_struct_proxy(kinds[4])(context, builder, pieces).nitems, number(1)),
                quads,
                initial * ROWS,
            )
            room = builder.sub(columns, number((vectors - 1) * LANES))
            by_left = splat_of(builder, left, FLOATS)
            by_right, offsets = of_columns(11, right, vectors), of_columns(12, bias, vectors)
            results = []
            for r in range(ROWS):
                own = builder.add(builder.load(pointer(14, places, each(r), _INT64)), c)
                for v in range(vectors):
                    total, o = sums[r * vectors + v], builder.add(own, number(v * LANES))
                    own_room = number(LANES) if v < vectors - 1 else room
                    how = [by_left, by_right[v]], offsets[v]
                    results.append(write_scaled(context, builder, kinds[13], total, *how, out, o, own_room))
            if not isinstance(kinds[17], types.NoneType):
                add_moments(vectors, results)

        def of_columns(which: int, array: Any, vectors: int) -> list[Any]:
            if isinstance(kinds[which], types.NoneType):
                return [None] * vectors
            places = [pointer(which, array, builder.add(c, number(v * LANES)), FLOATS) for v in range(vectors)]
            return [builder.load(place, align=4) for place in places]

        def add_moments(vectors: int, results: list[Any]) -> None:
            nothing = ir.Constant(FLOATS, [0.0] * LANES)
            size = cgutils.create_struct_proxy(kinds[17])(context, builder, moments).nitems
            squares_at = builder.add(c, builder.lshr(size, number(1)))
            for v in range(vectors):
                at = number(v * LANES)
                pivot = builder.load(pointer(16, pivots, builder.add(c, at), FLOATS), align=4)
                places_of = [pointer(17, moments, builder.add(first, at), FLOATS) for first in (c, squares_at)]
                total, squares = (builder.load(place, align=4) for place in places_of)
                for r in range(ROWS):
                    is_own = builder.icmp_signed("<", builder.add(i, number(r)), count)
                    d = builder.select(is_own, builder.fsub(results[r * vectors + v], pivot), nothing)
                    total = builder.fadd(total, d)
                    squares = operation(builder, f"llvm.fma.v{LANES}f32", FLOATS, d, d, squares)
                for place, value in zip(places_of, (total, squares), strict=True):
                    builder.store(value, place, align=4)

        for_width(builder, builder.sdiv(builder.add(columns, number(LANES - 1)), number(LANES)), emit)
        return context.get_dummy_value()

    n = types.int64
    operands = (n, BYTES, OFFSETS, n, OFFSETS, n, BYTES, n, types.Array(types.int32, 1, "C"), n)
    ends = (types.float32, types.Array(types.float32, 1, "C"), bias, out, OFFSETS, n, pivots, moments)
    return types.void(*operands, *ends), generate
