"""The innermost product: a tile of int32 sums that stay in registers.

One step multiplies four bytes of each row, broadcast, with four bytes of each column and adds the four products
(VPDPBUSD of AVX512-VNNI: unsigned by signed, exact). Six rows by four vectors of columns take 24 of the 32 registers,
and the ten loads of a step hide behind its 24 products: the multipliers are the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lightning_int8.backends.cpu.compiler import FEATURES
from lightning_int8.backends.cpu.llvm import operation, place_in, splat_of

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
BYTES = types.Array(types.uint8, 1, "C")
OFFSETS = types.Array(types.int64, 1, "C")


def is_available() -> bool:
    """Whether the CPU has the instruction, and numba compiles for this CPU."""
    return FEATURES.get("avx512vnni", False) and FEATURES.get("avx512bw", False)


def number(value: int) -> Any:
    """An index."""
    return ir.Constant(_INT64, value)


def sums_of_products(
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
    at = builder.gep(pieces, [builder.shl(piece, number(1))])
    left_offset, right_offset = builder.load(at), builder.load(builder.gep(at, [number(1)]))
    windows = [builder.gep(row, [left_offset]) for row in rows]
    own_columns = builder.gep(columns, [right_offset])
    builder.branch(each_quad)

    builder.position_at_end(each_quad)
    quad, left_place, right_place = (builder.phi(_INT64) for _ in range(3))
    sums = [builder.phi(INTS) for _ in initial]

    def load(base: Any, place: Any, kind: Any) -> Any:
        return builder.load(builder.bitcast(builder.gep(base, [place]), kind.as_pointer()), align=1)

    values = [load(own_columns, builder.add(right_place, number(v * LANES * QUAD)), INTS) for v in range(vectors)]
    added = []
    for r, window in enumerate(windows):
        quad_of_row = splat_of(builder, load(window, left_place, _INT32), INTS)
        for v, value in enumerate(values):
            sum_so_far = sums[r * vectors + v]
            added.append(operation(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, sum_so_far, quad_of_row, value))
    after = [builder.add(*pair) for pair in ((quad, number(1)), (left_place, left_step), (right_place, right_step))]
    builder.cbranch(builder.icmp_signed("<", after[0], quads), each_quad, next_piece)

    builder.position_at_end(next_piece)
    piece_after = builder.add(piece, number(1))
    builder.cbranch(builder.icmp_signed("<", piece_after, last), each_piece, done)

    outer = [(piece, first, piece_after), *zip(piece_sums, initial, added, strict=True)]
    inner = [(phi, number(0), later) for phi, later in zip((quad, left_place, right_place), after, strict=True)]
    inner += zip(sums, piece_sums, added, strict=True)
    for phis, entry, again in ((outer, before, next_piece), (inner, each_piece, each_quad)):
        for phi, at_first, later in phis:
            phi.add_incoming(at_first, entry)
            phi.add_incoming(later, again)
    builder.position_at_end(done)
    return added


def for_width(builder: Any, vectors: Any, emit: Callable[[int], None]) -> None:
    """Emit code for 1 to ``WIDTH / LANES`` vectors, of which the one for ``vectors`` runs."""
    done = builder.append_basic_block("widths_done")
    widths = range(1, WIDTH // LANES + 1)
    blocks = [builder.append_basic_block(f"vectors_{width}") for width in widths]
    choice = builder.switch(vectors, done)
    for width, block in zip(widths, blocks, strict=True):
        choice.add_case(number(width), block)
        builder.position_at_end(block)
        emit(width)
        builder.branch(done)
    builder.position_at_end(done)


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
            rows = [pointer(1, builder.add(row, number(r * QUAD)), ir.IntType(8)) for r in range(ROWS)]
            places = [
                pointer(11, builder.add(s, number(r * WIDTH + v * LANES)), INTS)
                for r in range(ROWS)
                for v in range(vectors)
            ]
            added = sums_of_products(
                builder,
                vectors,
                (rows, left_step),
                (pointer(8, p, ir.IntType(8)), right_step),
                pointer(4, number(0), _INT64),
                first,
                last,
                quads,
                [builder.load(place, align=4) for place in places],
            )
            for value, place in zip(added, places, strict=True):
                builder.store(value, place, align=4)

        for_width(builder, vectors, emit)
        return context.get_dummy_value()

    n = types.int64
    left = (n, BYTES, n, n, OFFSETS, n, n, n)
    return types.void(*left, BYTES, n, n, types.Array(types.int32, 1, "C"), n), generate
