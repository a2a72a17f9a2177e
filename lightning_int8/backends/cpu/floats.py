"""Elements of arrays of floats in compiled loops: float32, or bfloat16 as its bits; see ``arrays.as_array``."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic, overload

from lightning_int8.backends.cpu.llvm import narrowed, widened


@intrinsic
def _widen(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return widened(builder, *arguments)

    return types.float32(types.uint16), generate


@intrinsic
def _narrow(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return narrowed(builder, *arguments)

    return types.uint16(types.float32), generate


def get(x, i):
    """``x[i]`` as float32."""
    raise NotImplementedError("only compiled passes call this")


@overload(get, inline="always")
def _get(x, i):
    if x.dtype == types.uint16:
        return lambda x, i: _widen(x[i])
    return lambda x, i: x[i]


def put(out, i, value):
    """``out[i] = value``, rounded if need be."""
    raise NotImplementedError("only compiled passes call this")


@overload(put, inline="always")
def _put(out, i, value):
    if out.dtype == types.uint16:

        def put_narrowed(out, i, value):
            out[i] = _narrow(value)

        return put_narrowed

    def put_whole(out, i, value):
        out[i] = value

    return put_whole
