"""Sixteen elements at a time, in a register: what a pass over an expression does to them in one go.

The compiler vectorizes loops of a few operations; of a pass that masks, scales, adds, rectifies and rounds it makes one
loop after the other, each through memory. With vectors as values the whole pass is one loop.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from lightning_int8.backends.cpu.expression import MASK_BITS

LANES = MASK_BITS
"""Elements of a vector: as many as a word of a mask has bits."""

FLOATS, INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
_BITS, _INDEX = ir.VectorType(ir.IntType(1), LANES), ir.IntType(32)


class _Floats(types.Type):
    """float32 vectors."""

    def __init__(self) -> None:
        super().__init__(name="LightningInt8Floats")


class _Ints(types.Type):
    """int32 vectors."""

    def __init__(self) -> None:
        super().__init__(name="LightningInt8Ints")


floats, ints = _Floats(), _Ints()


@register_model(_Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, FLOATS)


@register_model(_Ints)
class _IntsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, INTS)


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


@intrinsic
def load(typing_context: Any, x: Any, i: Any, room: Any) -> Any:
    """``x[i : i + LANES]`` of float32; no more than ``room`` elements are read, the other lanes are 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, i, room = arguments
        place = place_in(context, builder, signature.args[0], x, i, FLOATS)
        return load_lanes(builder, place, room, FLOATS, f"v{LANES}f32")

    return floats(x, types.int64, types.int64), generate


@intrinsic
def store(typing_context: Any, out: Any, i: Any, room: Any, v: Any) -> Any:
    """``out[i : i + LANES] = v``, no more than ``room`` elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, i, room, v = arguments
        place = place_in(context, builder, signature.args[0], out, i, FLOATS)
        store_lanes(builder, v, place, room, f"v{LANES}f32")
        return context.get_dummy_value()

    return types.void(out, types.int64, types.int64, v), generate


@intrinsic
def splat(typing_context: Any, value: Any) -> Any:
    """A float32 number in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return splat_of(builder, arguments[0], FLOATS)

    return floats(types.float32), generate


@intrinsic
def plus(typing_context: Any, v: Any, w: Any) -> Any:
    """fl(v + w)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return floats(v, w), generate


@intrinsic
def minus(typing_context: Any, v: Any, w: Any) -> Any:
    """fl(v - w)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fsub(*arguments)

    return floats(v, w), generate


@intrinsic
def times(typing_context: Any, v: Any, w: Any) -> Any:
    """fl(v · w)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fmul(*arguments)

    return floats(v, w), generate


@intrinsic
def keep(typing_context: Any, v: Any, word: Any) -> Any:
    """The lanes whose bit is set, 0 for the others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v, word = arguments
        return builder.select(builder.bitcast(word, _BITS), v, constant(FLOATS, 0.0))

    return floats(v, types.uint16), generate


@intrinsic
def inside(typing_context: Any, v: Any, upper: Any) -> Any:
    """A bit for each lane that is above 0 and below the bound, or no number; a bound that is none bounds nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v, upper = arguments
        above = builder.fcmp_unordered(">", v, constant(FLOATS, 0.0))
        return builder.bitcast(builder.and_(above, builder.fcmp_unordered("<", v, upper)), ir.IntType(LANES))

    return types.uint16(v, upper), generate


@intrinsic
def rectified(typing_context: Any, v: Any, upper: Any) -> Any:
    """min(max(v, 0), upper); what is no number stays so, a bound that is none bounds nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v, upper = arguments
        zero = constant(FLOATS, 0.0)
        bounded = builder.select(builder.fcmp_ordered(">", v, upper), upper, v)
        return builder.select(builder.fcmp_ordered("<=", bounded, zero), zero, bounded)

    return floats(v, upper), generate


@intrinsic
def no_bits(typing_context: Any) -> Any:
    """Zeros, to begin ``largest_bits`` with."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return constant(INTS, 0)

    return ints(), generate


@intrinsic
def largest_bits(typing_context: Any, top: Any, v: Any) -> Any:
    """The larger of ``top`` and the magnitudes of ``v``, as their bits, lane by lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        top, v = arguments
        magnitude = builder.and_(builder.bitcast(v, INTS), constant(INTS, 0x7FFFFFFF))
        return builder.select(builder.icmp_signed(">", magnitude, top), magnitude, top)

    return ints(top, v), generate


@intrinsic
def largest_lane(typing_context: Any, top: Any) -> Any:
    """The largest of all lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = [builder.extract_element(arguments[0], _INDEX(k)) for k in range(LANES)]
        while len(lanes) > 1:
            pairs = zip(lanes[::2], lanes[1::2], strict=True)
            lanes = [builder.select(builder.icmp_signed(">", a, b), a, b) for a, b in pairs]
        return lanes[0]

    return types.int32(top), generate


def lanes_of(value, i):
    """Lanes from ``i`` on of an array, or a number in every lane; decided when the pass is compiled."""
    raise NotImplementedError("only compiled passes call this")


@overload(lanes_of, inline="always")
def _lanes_of(value, i):
    if isinstance(value, types.Array):
        return lambda value, i: load(value, i, LANES)
    return lambda value, i: splat(value)
