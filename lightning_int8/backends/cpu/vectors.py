"""Some elements at a time, in registers: what a pass over an expression does to them in one go.

The compiler vectorizes loops of a few operations; of a pass that masks, scales, adds, rectifies and rounds it makes one
loop after the other, each through memory. With vectors as values the whole pass is one loop. A vector takes several
registers, so that what the loop asks about the expression is asked less often.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

from lightning_int8.backends.cpu.compiler import HAS_AVX512
from lightning_int8.backends.cpu.expression import MASK_BITS
from lightning_int8.backends.cpu.llvm import (
    constant,
    fetch_bytes,
    load_floats,
    load_lanes,
    place_in,
    splat_of,
    store_floats,
    store_lanes,
)

LANES = 64 if HAS_AVX512 else 16
"""Elements of a vector."""

FLOATS, INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
_BITS, _INDEX = ir.VectorType(ir.IntType(1), LANES), ir.IntType(32)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_WORDS = ir.VectorType(ir.IntType(MASK_BITS), LANES // MASK_BITS)
_PAGE = 4096  # bytes


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


@intrinsic
def load(typing_context: Any, x: Any, i: Any, room: Any) -> Any:
    """``x[i : i + LANES]`` of floats, see ``floats``; no more than ``room`` are read, the other lanes are 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return load_floats(context, builder, signature.args[0], *arguments, LANES)

    return floats(x, types.int64, types.int64), generate


@intrinsic
def fetch(typing_context: Any, x: Any, i: Any) -> Any:
    """Ask for the vector of floats a page behind ``x[i]``: the CPU itself looks ahead to the end of a page at most."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        item = signature.args[0].dtype.bitwidth // 8
        index = builder.add(arguments[1], ir.IntType(64)(_PAGE // item))
        fetch_bytes(builder, place_in(context, builder, signature.args[0], arguments[0], index, FLOATS), LANES * item)
        return context.get_dummy_value()

    return types.void(x, types.int64), generate


@intrinsic
def store(typing_context: Any, out: Any, i: Any, room: Any, v: Any) -> Any:
    """``out[i : i + LANES] = v`` of floats, rounded if need be; no more than ``room`` elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, i, room, v = arguments
        store_floats(context, builder, signature.args[0], v, out, i, room)
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
def keep(typing_context: Any, v: Any, words: Any, i: Any, room: Any) -> Any:
    """The lanes whose bit is set, 0 for the others; the bits of a mask, see ``Mask``, from element ``i`` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v, words, i, room = arguments
        place, own_room = _words_at(context, builder, signature.args[1], words, i, room)
        bits = builder.bitcast(load_lanes(builder, place, own_room, _WORDS, f"v{_WORDS.count}i{MASK_BITS}"), _BITS)
        return builder.select(bits, v, constant(FLOATS, 0.0))

    return floats(v, words, types.int64, types.int64), generate


@intrinsic
def keep_inside(typing_context: Any, words: Any, i: Any, room: Any, v: Any, upper: Any) -> Any:
    """Set the bits of lanes above 0 and below the bound, or no number; a bound that is none bounds nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, i, room, v, upper = arguments
        above = builder.fcmp_unordered(">", v, constant(FLOATS, 0.0))
        bits = builder.bitcast(builder.and_(above, builder.fcmp_unordered("<", v, upper)), _WORDS)
        place, own_room = _words_at(context, builder, signature.args[0], words, i, room)
        store_lanes(builder, bits, place, own_room, f"v{_WORDS.count}i{MASK_BITS}")
        return context.get_dummy_value()

    return types.void(words, types.int64, types.int64, v, upper), generate


def _words_at(context: Any, builder: Any, kind: Any, words: Any, i: Any, room: Any) -> tuple[Any, Any]:
    """Pointer to the words of elements from ``i`` on, a multiple of their bits, and how many there is room for."""
    bits = i.type(MASK_BITS)
    place = place_in(context, builder, kind, words, builder.sdiv(i, bits), _WORDS)
    return place, builder.sdiv(builder.add(room, i.type(MASK_BITS - 1)), bits)


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
def larger(typing_context: Any, v: Any, w: Any) -> Any:
    """The lanes of v that are above those of w, or no number; else those of w."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v, w = arguments
        return _where_larger(builder, v, w, v, w)

    return floats(v, w), generate


@intrinsic
def where_larger(typing_context: Any, v: Any, w: Any, a: Any, b: Any) -> Any:
    """The lanes of a where ``larger`` takes those of v, else those of b."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _where_larger(builder, *arguments)

    return floats(v, w, a, b), generate


def _where_larger(builder: Any, v: Any, w: Any, a: Any, b: Any) -> Any:
    # One after the other: LLVM joins the masks of several registers to combine them, and takes them apart again.
    above = builder.select(builder.fcmp_ordered(">", v, w), a, b)
    return builder.select(builder.fcmp_unordered("uno", v, v), a, above)


@intrinsic
def store_small(typing_context: Any, out: Any, i: Any, room: Any, v: Any) -> Any:
    """``out[i : i + LANES] = v``, uint8, of lanes that are such integers; no more than ``room`` elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, i, room, v = arguments
        place = place_in(context, builder, signature.args[0], out, i, _BYTES)
        store_lanes(builder, builder.trunc(builder.fptosi(v, INTS), _BYTES), place, room, f"v{LANES}i8")
        return context.get_dummy_value()

    return types.void(out, types.int64, types.int64, v), generate


@intrinsic
def keep_equal(typing_context: Any, v: Any, values: Any, i: Any, room: Any, value: Any) -> Any:
    """The lanes where ``values[i : i + LANES]`` of uint8 are this one, 0 for the others; see ``load``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v, values, i, room, value = arguments
        place = place_in(context, builder, signature.args[1], values, i, _BYTES)
        lanes = load_lanes(builder, place, room, _BYTES, f"v{LANES}i8")
        is_equal = builder.icmp_signed("==", lanes, splat_of(builder, value, _BYTES))
        return builder.select(is_equal, v, constant(FLOATS, 0.0))

    return floats(v, values, types.int64, types.int64, types.uint8), generate


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
