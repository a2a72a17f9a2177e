"""Vectors rounded to integers: the numbers of ``rounding``, some at a time."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lightning_int8.backends.cpu.llvm import constant, operation, place_in, splat_of, store_lanes
from lightning_int8.backends.cpu.vectors import FLOATS, INTS, LANES, floats
from lightning_int8.generator import HASH_MULTIPLIERS, RANDOM_BITS

_HALVES = ir.VectorType(ir.IntType(32), LANES // 2)


@intrinsic
def steps(typing_context: Any, v: Any, low: Any, high: Any, inverse: Any) -> Any:
    """clamp(v) · inverse; 0 where that is no number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v, low, high, inverse = arguments
        v = builder.select(builder.fcmp_ordered("<", v, low), low, v)
        v = builder.select(builder.fcmp_ordered(">", v, high), high, v)
        y = builder.fmul(v, inverse)
        return builder.select(builder.fcmp_ordered("ord", y, y), y, constant(FLOATS, 0.0))

    return floats(v, low, high, inverse), generate


@intrinsic
def nearest(typing_context: Any, y: Any) -> Any:
    """The nearest integers, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return operation(builder, f"llvm.rint.v{LANES}f32", FLOATS, *arguments)

    return floats(y), generate


@intrinsic
def up_or_down(typing_context: Any, y: Any, first: Any, k0: Any, k1: Any) -> Any:
    """Integers above ``y`` with probability equal to its fraction, else below; see ``generator.random_bits``.

    ``first`` is half the index of the first element, which is even; ``k0`` and ``k1`` are the key, all uint32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        y, first, k0, k1 = arguments
        h = builder.add(splat_of(builder, first, _HALVES), ir.Constant(_HALVES, list(range(LANES // 2))))

        def shifted(bits: int) -> Any:
            return builder.xor(h, builder.lshr(h, constant(_HALVES, bits)))

        h = builder.xor(h, splat_of(builder, k0, _HALVES))
        h = shifted(16)
        h = builder.mul(h, constant(_HALVES, HASH_MULTIPLIERS[0]))
        h = shifted(15)
        h = builder.add(h, splat_of(builder, k1, _HALVES))
        h = builder.mul(h, constant(_HALVES, HASH_MULTIPLIERS[1]))
        h = shifted(16)
        # An odd element takes the upper half of the word that it shares with the one before it.
        bits = builder.zext(builder.bitcast(h, ir.VectorType(ir.IntType(16), LANES)), INTS)
        noise = builder.sitofp(bits, FLOATS)
        floor = operation(builder, f"llvm.floor.v{LANES}f32", FLOATS, y)
        share = builder.fmul(builder.fsub(y, floor), constant(FLOATS, float(1 << RANDOM_BITS)))
        up = builder.fcmp_ordered("<", noise, share)
        return builder.select(up, builder.fadd(floor, constant(FLOATS, 1.0)), floor)

    return floats(y, types.uint32, types.uint32, types.uint32), generate


@intrinsic
def store_bytes(typing_context: Any, out: Any, i: Any, room: Any, q: Any, largest: Any) -> Any:
    """``out[i : i + LANES] = clamp(q, ±largest)``, int8, no more than ``room`` elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, i, room, q, largest = arguments
        smallest = builder.fneg(largest)
        q = builder.select(builder.fcmp_ordered("<", q, smallest), smallest, q)
        q = builder.select(builder.fcmp_ordered(">", q, largest), largest, q)
        kind = ir.VectorType(ir.IntType(8), LANES)
        some_bytes = builder.trunc(builder.fptosi(q, INTS), kind)
        place = place_in(context, builder, signature.args[0], out, i, kind)
        store_lanes(builder, some_bytes, place, room, f"v{LANES}i8")
        return context.get_dummy_value()

    return types.void(out, types.int64, types.int64, q, largest), generate
