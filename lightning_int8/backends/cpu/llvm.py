"""Pieces of LLVM code that the intrinsics of several modules are made of."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

_INDEX = ir.IntType(32)
_CACHE_LINE = 64  # bytes
_QUIET_NAN = 0x7FC0  # as bfloat16


def constant(kind: Any, value: Any) -> Any:
    """A vector of a kind of LLVM's with one value in every lane."""
    return ir.Constant(kind, [value] * kind.count)


def splat_of(builder: Any, value: Any, kind: Any) -> Any:
    """Likewise, of a value that the pass computes."""
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, _INDEX(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_INDEX, kind.count), [0] * kind.count))


def place_in(context: Any, builder: Any, kind: Any, array: Any, index: Any, vector: Any) -> Any:
    """Pointer to a vector of the array from the index on."""
    data = cgutils.create_struct_proxy(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def fetch_bytes(builder: Any, place: Any, count: int) -> None:
    """Ask for cache lines from a place on, to be in the second-level cache soon; what no memory backs is left."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), _INDEX, _INDEX, _INDEX])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    first = builder.bitcast(place, ir.IntType(8).as_pointer())
    for line in range(0, count, _CACHE_LINE):
        to_read, second_level, data = _INDEX(0), _INDEX(2), _INDEX(1)
        builder.call(prefetch, [builder.gep(first, [_INDEX(line)]), to_read, second_level, data])


def operation(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """The result of an operation of LLVM by its name."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _first_lanes(builder: Any, room: Any, count: int) -> Any:
    """A bit for each of ``count`` lanes that is below ``room``, which is less than their number."""
    bits = builder.sub(builder.shl(room.type(1), room), room.type(1))
    word = ir.IntType(count)
    return builder.bitcast(
        bits if bits.type == word else builder.trunc(bits, word), ir.VectorType(ir.IntType(1), count)
    )


def _has_room(builder: Any, room: Any, count: int) -> Any:
    """Whether there is room for all lanes; but for the end of an array there always is."""
    return builder.icmp_signed(">=", room, room.type(count))


def load_lanes(builder: Any, place: Any, room: Any, kind: Any, name: str) -> Any:
    """A vector; of its lanes no more than there is room for are read, the others are 0. ``name`` is LLVM's for it."""
    with builder.if_else(_has_room(builder, room, kind.count), likely=True) as (whole, part):
        with whole:
            all_lanes, of_whole = builder.load(place, align=1), builder.block
        with part:
            arguments = place, _INDEX(1), _first_lanes(builder, room, kind.count), ir.Constant(kind, None)
            some_lanes = operation(builder, f"llvm.masked.load.{name}.p0", kind, *arguments)
            of_part = builder.block
    v = builder.phi(kind)
    v.add_incoming(all_lanes, of_whole)
    v.add_incoming(some_lanes, of_part)
    return v


def store_lanes(builder: Any, v: Any, place: Any, room: Any, name: str) -> None:
    """Write a vector; of its lanes no more than there is room for."""
    with builder.if_else(_has_room(builder, room, v.type.count), likely=True) as (whole, part):
        with whole:
            builder.store(v, place, align=1)
        with part:
            arguments = v, place, _INDEX(1), _first_lanes(builder, room, v.type.count)
            operation(builder, f"llvm.masked.store.{name}.p0", ir.VoidType(), *arguments)


def widened(builder: Any, bits: Any) -> Any:
    """float32 from the bits of bfloat16, of a number or of lanes."""
    words = _like(bits, ir.IntType(32))
    return builder.bitcast(builder.shl(builder.zext(bits, words), _every(words, 16)), _like(bits, ir.FloatType()))


def narrowed(builder: Any, value: Any) -> Any:
    """The bits of the nearest bfloat16, ties to even, likewise."""
    words = _like(value, ir.IntType(32))
    bits = builder.bitcast(value, words)
    odd = builder.and_(builder.lshr(bits, _every(words, 16)), _every(words, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _every(words, 0x7FFF))), _every(words, 16))
    is_number = builder.fcmp_ordered("ord", value, value)
    halves = builder.select(is_number, rounded, _every(words, _QUIET_NAN))
    return builder.trunc(halves, _like(value, ir.IntType(16)))


def _like(value: Any, kind: Any) -> Any:
    """``kind``, as many of them as ``value`` has lanes."""
    return ir.VectorType(kind, value.type.count) if isinstance(value.type, ir.VectorType) else kind


def _every(kind: Any, value: int) -> Any:
    return constant(kind, value) if isinstance(kind, ir.VectorType) else ir.Constant(kind, value)


def load_floats(context: Any, builder: Any, kind: Any, x: Any, i: Any, room: Any, count: int) -> Any:
    """``x[i : i + count]`` as float32 lanes, of an array of those or of bfloat16; see ``load_lanes``."""
    own, name = (ir.IntType(16), "i16") if kind.dtype == types.uint16 else (ir.FloatType(), "f32")
    lanes = ir.VectorType(own, count)
    v = load_lanes(builder, place_in(context, builder, kind, x, i, lanes), room, lanes, f"v{count}{name}")
    return widened(builder, v) if kind.dtype == types.uint16 else v


def store_floats(
    context: Any, builder: Any, kind: Any, v: Any, out: Any, i: Any, room: Any, past_caches: bool = False
) -> None:
    """Write float32 lanes to ``out[i:]``, of those or, rounded, of bfloat16; see ``store_lanes``.

    What fills a line of the cache may go past it, for whoever reads it much later: that needs a fence behind the last.
    """
    lanes, name = (narrowed(builder, v), "i16") if kind.dtype == types.uint16 else (v, "f32")
    place, name = place_in(context, builder, kind, out, i, lanes.type), f"v{v.type.count}{name}"
    if not past_caches or v.type.count * kind.dtype.bitwidth != 8 * _CACHE_LINE:
        store_lanes(builder, lanes, place, room, name)
        return
    address = ir.IntType(64)
    begins_line = builder.icmp_signed(
        "==", builder.and_(builder.ptrtoint(place, address), address(_CACHE_LINE - 1)), address(0)
    )
    with builder.if_else(builder.and_(begins_line, _has_room(builder, room, v.type.count)), likely=True) as (
        line,
        part,
    ):
        with line:
            store = builder.store(lanes, place, align=_CACHE_LINE)
            store.set_metadata("nontemporal", builder.module.add_metadata([_INDEX(1)]))
        with part:
            store_lanes(builder, lanes, place, room, name)
