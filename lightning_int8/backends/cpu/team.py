"""Compiled passes on the threads of torch's OpenMP runtime, without the interpreter.

Each thread of ``threads.split`` takes the interpreter's lock before and after its work, and waits for it longer than a
short pass takes. Here the runtime calls compiled code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_int8.backends.cpu import threads

_INT64, _INT32, _POINTER = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
_NUMBER = ir.FunctionType(_INT32, []).as_pointer()
_WORK = ir.FunctionType(ir.VoidType(), [_POINTER])
_PARALLEL = ir.FunctionType(ir.VoidType(), [_WORK.as_pointer(), _POINTER, _INT32, _INT32]).as_pointer()
_FAILED = -1


def run(entry: Any, arguments: tuple[Any, ...], ends: Sequence[int]) -> np.ndarray:
    """Run a compiled pass in pieces, one per thread of torch.

    Args:
        entry: What ``in_team`` has made of its kernel.
        arguments: Of the kernel.
        ends: Where pieces begin, and the end of the last one, see ``threads.ends``.

    Returns:
        What the kernel returned for each piece, int32.

    Raises:
        MemoryError: A piece had an exception; the only one that kernels have is that memory is short.
    """
    every, results = np.array(ends, np.int64), np.empty(len(ends) - 1, np.int32)
    runtime = threads.runtime() if len(results) > 1 else None
    if len(results) == 1:
        entry(arguments, every, results, _alone(0))
    elif runtime is not None:
        entry(arguments, every, results, (*_addresses(runtime), torch.get_num_threads(), 0))
    else:

        def work(k: int, _: int) -> None:
            entry(arguments, every[k : k + 2], results[k : k + 1], _alone(k))

        threads.by_pool(work, [(k, k + 1) for k in range(len(results))])
    if (results == _FAILED).any():
        raise MemoryError("a compiled pass found no memory to work in")
    return results


def _alone(piece: int) -> tuple[int, int, int, int, int]:
    return 0, 0, 0, 1, piece


@cache
def _addresses(runtime: Any) -> tuple[int, int, int]:
    names = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
    first, second, third = (ctypes.cast(getattr(runtime, n), ctypes.c_void_p).value or 0 for n in names)
    return first, second, third


def in_team(kernel: Any) -> Any:
    """What a compiled function calls, with the arguments that it gets itself, to be an entry for ``run``.

    numba remembers compiled functions by where their source stands, so that each kernel has such a function of its own.

    Args:
        kernel: Compiled; takes arguments, first and last element of a piece, and its number; returns an int32 that is
            not negative.
    """

    @intrinsic
    def entry(typing_context: Any, arguments: Any, ends: Any, results: Any, runtime: Any) -> Any:
        kinds = (*arguments.types, types.int64, types.int64, types.int64)
        kernel.compile(kinds)
        found = kernel.overloads[kinds]
        assert found.signature.return_type == types.int32, found.signature

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            context.active_code_library.add_linking_library(found.library)
            callee = context.declare_function(builder.module, found.fndesc)
            own, *arrays, how = values
            of_ends, of_results = (
                cgutils.create_struct_proxy(kind)(context, builder, array)
                for kind, array in zip(signature.args[1:3], arrays, strict=True)
            )
            parallel, thread, team_size, threads_wanted, first = cgutils.unpack_tuple(builder, how)
            fields = own, of_ends.data, of_results.data, of_results.nitems, first, thread, team_size
            place = cgutils.alloca_once(builder, ir.LiteralStructType([f.type for f in fields]))
            for k, field in enumerate(fields):
                builder.store(field, _field(builder, place, k))

            def call(inner: Any, piece: Any, given: Any, begin: Any, end: Any) -> Any:
                parts = [*cgutils.unpack_tuple(inner, given), begin, end, piece]
                status, number = context.call_conv.call_function(inner, callee, types.int32, kinds, parts)
                return inner.select(status.is_error, _INT32(_FAILED), number)

            pieces = _pieces(builder.module, place.type, call)
            where = builder.bitcast(place, _POINTER)
            with builder.if_else(builder.icmp_signed(">", threads_wanted, _INT64(1))) as (several, one):
                with several:
                    start = builder.inttoptr(parallel, _PARALLEL)
                    team = _of_team(builder.module, place.type, pieces)
                    builder.call(start, [team, where, builder.trunc(threads_wanted, _INT32), _INT32(0)])
                with one:
                    builder.call(pieces, [where, _INT64(0), _INT64(1)])
            return context.get_dummy_value()

        return types.void(arguments, ends, results, runtime), generate

    return entry


def _field(builder: Any, place: Any, k: int) -> Any:
    return builder.gep(place, [_INT32(0), _INT32(k)])


def _new_function(module: Any, kind: Any, name: str) -> tuple[Any, Any]:
    """A function of the module alone, and a builder for its body."""
    function = ir.Function(module, kind, module.get_unique_name(name))
    function.linkage = "internal"
    return function, ir.IRBuilder(function.append_basic_block("entry"))


def _pieces(module: Any, kind: Any, call: Any) -> Any:
    """A function (place of the fields, first piece, step) that calls the kernel piece by piece."""
    function, builder = _new_function(module, ir.FunctionType(ir.VoidType(), [_POINTER, _INT64, _INT64]), "pieces")
    where, first, step = function.args
    place = builder.bitcast(where, kind)
    own, ends, results, count, before = (builder.load(_field(builder, place, k)) for k in range(5))
    with cgutils.for_range_slice(builder, first, count, step, intp=_INT64, inc=True) as (piece, _):
        begin, end = (builder.load(builder.gep(ends, [builder.add(piece, _INT64(k))])) for k in range(2))
        number = call(builder, builder.add(piece, before), own, begin, end)
        builder.store(number, builder.gep(results, [piece]))
    builder.ret_void()
    return function


def _of_team(module: Any, kind: Any, pieces: Any) -> Any:
    """What the runtime calls on each thread: its share of the pieces, also in a team smaller than was asked for."""
    function, builder = _new_function(module, _WORK, "team")
    place = builder.bitcast(function.args[0], kind)
    asked = (builder.inttoptr(builder.load(_field(builder, place, k)), _NUMBER) for k in (5, 6))
    builder.call(pieces, [function.args[0], *(builder.sext(builder.call(f, []), _INT64) for f in asked)])
    builder.ret_void()
    return function
