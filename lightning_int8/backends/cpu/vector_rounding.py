"""Vectors rounded to integers: the numbers of ``rounding``, some at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lightning_int8.backends.cpu.compiler import HAS_AVX512
from lightning_int8.backends.cpu.llvm import constant, operation, place_in, splat_of, store_lanes
from lightning_int8.backends.cpu.vectors import FLOATS, INTS, LANES, floats, ints
from lightning_int8.generator import HASH_MULTIPLIERS, RANDOM_BITS
from lightning_int8.numerics import INT8_MAX

_HALVES = ir.VectorType(ir.IntType(32), LANES // 2)
_REGISTER = 16  # lanes
_TO_NEAREST, _UPWARDS = 8, 10  # modes of AVX-512, without exceptions


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
    """The nearest integers, ties to even, int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _converted(builder, arguments[0], "rint", _TO_NEAREST)

    return ints(y), generate


def _converted(builder: Any, y: Any, name: str, mode: int) -> Any:
    """float32 lanes to int32 by a rounding of LLVM's; AVX-512 has one instruction with a mode for both."""
    if not HAS_AVX512:
        return builder.fptosi(operation(builder, f"llvm.{name}.v{LANES}f32", FLOATS, y), INTS)
    ints_of = ir.VectorType(ir.IntType(32), _REGISTER)
    rest = ir.Constant(ints_of, None), ir.IntType(_REGISTER)(-1), ir.IntType(32)(mode)
    converted = None
    for k in range(0, LANES, _REGISTER):
        part = builder.shuffle_vector(y, y, _indices(range(k, k + _REGISTER)))
        own = operation(builder, "llvm.x86.avx512.mask.cvtps2dq.512", ints_of, part, *rest)
        wide = builder.shuffle_vector(own, own, _indices([min(n, _REGISTER - 1) for n in range(LANES)]))
        # Lanes from k on come from this register, those below from the ones before it.
        order = [n if n < k else LANES + n - k if n < k + _REGISTER else 0 for n in range(LANES)]
        converted = wide if converted is None else builder.shuffle_vector(converted, wide, _indices(order))
    return converted


def _indices(lanes: Iterable[int]) -> Any:
    lanes = list(lanes)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


@intrinsic
def up_or_down(typing_context: Any, y: Any, first: Any, k0: Any, k1: Any) -> Any:
    """Integers above ``y`` with probability equal to its fraction, else below, int32; see ``generator.random_bits``.

    ``first`` is half the index of the first element, which is even; ``k0`` and ``k1`` are the key, all uint32. The
    magnitude of ``y`` is at most 2^14.
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
        # Up where noise < share, the fraction in units of 2^-16. Noise is an integer, so it is below the share where it
        # is below the next integer above: with c = ceil(y · 2^16), which is floor(y) · 2^16 + ceil(share), adding
        # 2^16 - 1 - noise carries into the upper bits just then.
        c = _converted(builder, builder.fmul(y, constant(FLOATS, float(1 << RANDOM_BITS))), "ceil", _UPWARDS)
        carried = builder.add(c, builder.sub(constant(INTS, (1 << RANDOM_BITS) - 1), bits))
        return builder.ashr(carried, constant(INTS, RANDOM_BITS))

    return ints(y, types.uint32, types.uint32, types.uint32), generate


@intrinsic
def shifted(typing_context: Any, q: Any, zero: Any) -> Any:
    """Integers plus zero points, float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        q, zero = arguments
        return builder.add(q, builder.fptosi(zero, INTS))

    return ints(q, zero), generate


@intrinsic
def store_bytes(typing_context: Any, out: Any, i: Any, room: Any, q: Any) -> Any:
    """``out[i : i + LANES] = clamp(q)``, int8 up to ``INT8_MAX``, no more than ``room`` elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, i, room, q = arguments
        low, high = constant(INTS, -INT8_MAX), constant(INTS, INT8_MAX)
        q = builder.select(builder.icmp_signed("<", q, low), low, q)
        q = builder.select(builder.icmp_signed(">", q, high), high, q)
        kind = ir.VectorType(ir.IntType(8), LANES)
        place = place_in(context, builder, signature.args[0], out, i, kind)
        store_lanes(builder, builder.trunc(q, kind), place, room, f"v{LANES}i8")
        return context.get_dummy_value()

    return types.void(out, types.int64, types.int64, q), generate
