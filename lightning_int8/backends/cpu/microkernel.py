"""The innermost product: a tile of int32 sums that stay in registers.

One step multiplies four bytes of each row, broadcast, with four bytes of each column and adds the four products
(VPDPBUSD of AVX512-VNNI: unsigned by signed, exact). Six rows by four vectors of columns take 24 of the 32 registers,
and the ten loads of a step hide behind its 24 products: the multipliers are the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from lightning_int8.backends.cpu.llvm import operation, place_in, splat_of, store_floats, store_lanes

LANES = 16
"""Columns of a vector, which fills a register."""

FLOATS, INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)

ROWS = 6
"""Rows of a tile."""

WIDTH = 4 * LANES
"""Columns of the widest tile; a narrower one takes the first of its vectors."""

QUAD = 4
"""Bytes that one step sums; quads of a panel lie ``WIDTH`` columns side by side."""

_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_BYTES = types.Array(types.uint8, 1, "C")
_OFFSETS = types.Array(types.int64, 1, "C")


def is_available() -> bool:
    """Whether the CPU has the instruction, and numba compiles for this CPU and not for one that the user names."""
    if getattr(config, "CPU_NAME", None) or getattr(config, "CPU_FEATURES", None):
        return False
    features = get_host_cpu_features()
    return features.get("avx512vnni", False) and features.get("avx512bw", False)


def _number(value: int) -> Any:
    return ir.Constant(_INT64, value)


def _product(
    builder: Any, vectors: int, left: Any, right: Any, pieces: Any, first: Any, last: Any, quads: Any, initial: Any
) -> list[Any]:
    """Emit a tile's sums of products.

    Args:
        builder: Where to.
        vectors: Vectors of columns.
        left: (pointers to the rows, distance of their quads).
        right: (pointer to the columns, distance of their quads).
        pieces: Pointer to pairs: where each piece of a sum begins, from the rows and from the columns.
        first: First piece.
        last: Behind the last one; there is at least one.
        quads: Quads of a piece, at least one.
        initial: What each sum begins with: ``vectors`` vectors for each row.

    Returns:
        The sums, as ``initial``.
    """
    (rows, left_step), (columns, right_step) = left, right
    before = builder.block
    each_piece, each_quad, next_piece, done = (builder.append_basic_block(n) for n in ("piece", "quad", "next", "done"))
    builder.branch(each_piece)

    builder.position_at_end(each_piece)
    piece = builder.phi(_INT64)
    piece_sums = [builder.phi(INTS) for _ in initial]
    at = builder.gep(pieces, [builder.shl(piece, _number(1))])
    left_offset, right_offset = builder.load(at), builder.load(builder.gep(at, [_number(1)]))
    windows = [builder.gep(row, [left_offset]) for row in rows]
    own_columns = builder.gep(columns, [right_offset])
    builder.branch(each_quad)

    builder.position_at_end(each_quad)
    quad, left_place, right_place = (builder.phi(_INT64) for _ in range(3))
    sums = [builder.phi(INTS) for _ in initial]

    def load(base: Any, place: Any, kind: Any) -> Any:
        return builder.load(builder.bitcast(builder.gep(base, [place]), kind.as_pointer()), align=1)

    values = [load(own_columns, builder.add(right_place, _number(v * LANES * QUAD)), INTS) for v in range(vectors)]
    added = []
    for r, window in enumerate(windows):
        quad_of_row = splat_of(builder, load(window, left_place, _INT32), INTS)
        for v, value in enumerate(values):
            sum_so_far = sums[r * vectors + v]
            added.append(operation(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, sum_so_far, quad_of_row, value))
    after = [builder.add(*pair) for pair in ((quad, _number(1)), (left_place, left_step), (right_place, right_step))]
    builder.cbranch(builder.icmp_signed("<", after[0], quads), each_quad, next_piece)

    builder.position_at_end(next_piece)
    piece_after = builder.add(piece, _number(1))
    builder.cbranch(builder.icmp_signed("<", piece_after, last), each_piece, done)

    outer = [(piece, first, piece_after), *zip(piece_sums, initial, added, strict=True)]
    inner = [(phi, _number(0), later) for phi, later in zip((quad, left_place, right_place), after, strict=True)]
    inner += zip(sums, piece_sums, added, strict=True)
    for phis, entry, again in ((outer, before, next_piece), (inner, each_piece, each_quad)):
        for phi, at_first, later in phis:
            phi.add_incoming(at_first, entry)
            phi.add_incoming(later, again)
    builder.position_at_end(done)
    return added


def _for_width(builder: Any, vectors: Any, emit: Callable[[int], None]) -> None:
    """Emit code for 1 to ``WIDTH / LANES`` vectors, of which the one for ``vectors`` runs."""
    done = builder.append_basic_block("widths_done")
    widths = range(1, WIDTH // LANES + 1)
    blocks = [builder.append_basic_block(f"vectors_{width}") for width in widths]
    choice = builder.switch(vectors, done)
    for width, block in zip(widths, blocks, strict=True):
        choice.add_case(_number(width), block)
        builder.position_at_end(block)
        emit(width)
        builder.branch(done)
    builder.position_at_end(done)


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
) -> Any:
    """Emit the end of a contraction: a vector of sums to ``out[o:]``, no more than there is room for.

    An array of floats takes fl(fl(fl(sums) · left) · right), plus the offset unless it is None; one of int32 the sums.
    What was written comes back, but as float32 in place of narrower floats.
    """
    if kind.dtype == types.int32:
        store_lanes(builder, sums, place_in(context, builder, kind, out, o, INTS), room, f"v{LANES}i32")
        return sums
    scaled = builder.sitofp(sums, FLOATS)
    for factor in factors:
        scaled = builder.fmul(scaled, factor)
    scaled = scaled if offset is None else builder.fadd(scaled, offset)
    store_floats(context, builder, kind, scaled, out, o, room)
    return scaled


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
                return builder.add(i, _number(row))

            begins = [builder.load(pointer(2, rows, each(r), _INT64)) for r in range(ROWS)]
            row_pointers = [pointer(1, data, begin, ir.IntType(8)) for begin in begins]
            initial = [
                builder.load(pointer(8, starts, builder.add(c, _number(v * LANES)), INTS), align=4)
                for v in range(vectors)
            ]
            sums = _product(
                builder,
                vectors,
                (row_pointers, _number(QUAD)),
                (pointer(6, panels, p, ir.IntType(8)), _number(WIDTH * QUAD)),
                pointer(4, pieces, _number(0), _INT64),
                _number(0),
                builder.lshr(cgutils.create_struct_proxy(kinds[4])(context, builder, pieces).nitems, _number(1)),
                quads,
                initial * ROWS,
            )
            room = builder.sub(columns, _number((vectors - 1) * LANES))
            by_left = splat_of(builder, left, FLOATS)
            by_right, offsets = of_columns(11, right, vectors), of_columns(12, bias, vectors)
            results = []
            for r in range(ROWS):
                own = builder.add(builder.load(pointer(14, places, each(r), _INT64)), c)
                for v in range(vectors):
                    total, o = sums[r * vectors + v], builder.add(own, _number(v * LANES))
                    own_room = _number(LANES) if v < vectors - 1 else room
                    how = [by_left, by_right[v]], offsets[v]
                    results.append(write_scaled(context, builder, kinds[13], total, *how, out, o, own_room))
            if not isinstance(kinds[17], types.NoneType):
                add_moments(vectors, results)

        def of_columns(which: int, array: Any, vectors: int) -> list[Any]:
            if isinstance(kinds[which], types.NoneType):
                return [None] * vectors
            places = [pointer(which, array, builder.add(c, _number(v * LANES)), FLOATS) for v in range(vectors)]
            return [builder.load(place, align=4) for place in places]

        def add_moments(vectors: int, results: list[Any]) -> None:
            nothing = ir.Constant(FLOATS, [0.0] * LANES)
            size = cgutils.create_struct_proxy(kinds[17])(context, builder, moments).nitems
            squares_at = builder.add(c, builder.lshr(size, _number(1)))
            for v in range(vectors):
                at = _number(v * LANES)
                pivot = builder.load(pointer(16, pivots, builder.add(c, at), FLOATS), align=4)
                places_of = [pointer(17, moments, builder.add(first, at), FLOATS) for first in (c, squares_at)]
                total, squares = (builder.load(place, align=4) for place in places_of)
                for r in range(ROWS):
                    is_own = builder.icmp_signed("<", builder.add(i, _number(r)), count)
                    d = builder.select(is_own, builder.fsub(results[r * vectors + v], pivot), nothing)
                    total, squares = builder.fadd(total, d), builder.fadd(squares, builder.fmul(d, d))
                for place, value in zip(places_of, (total, squares), strict=True):
                    builder.store(value, place, align=4)

        _for_width(builder, builder.sdiv(builder.add(columns, _number(LANES - 1)), _number(LANES)), emit)
        return context.get_dummy_value()

    n = types.int64
    operands = (n, _BYTES, _OFFSETS, n, _OFFSETS, n, _BYTES, n, types.Array(types.int32, 1, "C"), n)
    ends = (types.float32, types.Array(types.float32, 1, "C"), bias, out, _OFFSETS, n, pivots, moments)
    return types.void(*operands, *ends), generate


@intrinsic
def add_tile(
    typing_context: Any,
    vectors: Any,
    data: Any,
    row: Any,
    left_step: Any,
    pieces: Any,
    first: Any,
    last: Any,
    quads: Any,
    others: Any,
    p: Any,
    right_step: Any,
    sums: Any,
    s: Any,
) -> Any:
    """Add products of ``ROWS`` rows and some vectors of columns, all of which lie interleaved, to sums.

    Args:
        typing_context: Of numba.
        vectors: Vectors of columns.
        data: Unsigned bytes; the first quads of the rows lie side by side from ``row`` on, the next ones ``left_step``
            behind them.
        row: See above.
        left_step: See above.
        pieces: int64, pairs: where pieces begin from ``row`` and from ``p``.
        first: First piece.
        last: Behind the last one.
        quads: Quads of a piece.
        others: Signed bytes, as uint8: the first quads of the columns from ``p`` on, the next ones ``right_step``
            behind them.
        p: See above.
        right_step: See above.
        sums: int32 ``(ROWS, WIDTH)`` from ``s`` on.
        s: See above.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors, _, row, left_step, _, first, last, quads, _, p, right_step, _, s = arguments

        def pointer(which: int, index: Any, kind: Any) -> Any:
            return place_in(context, builder, signature.args[which], arguments[which], index, kind)

        def emit(vectors: int) -> None:
            rows = [pointer(1, builder.add(row, _number(r * QUAD)), ir.IntType(8)) for r in range(ROWS)]
            places = [
                pointer(11, builder.add(s, _number(r * WIDTH + v * LANES)), INTS)
                for r in range(ROWS)
                for v in range(vectors)
            ]
            added = _product(
                builder,
                vectors,
                (rows, left_step),
                (pointer(8, p, ir.IntType(8)), right_step),
                pointer(4, _number(0), _INT64),
                first,
                last,
                quads,
                [builder.load(place, align=4) for place in places],
            )
            for value, place in zip(added, places, strict=True):
                builder.store(value, place, align=4)

        _for_width(builder, vectors, emit)
        return context.get_dummy_value()

    n = types.int64
    left = (n, _BYTES, n, n, _OFFSETS, n, n, n)
    return types.void(*left, _BYTES, n, n, types.Array(types.int32, 1, "C"), n), generate
