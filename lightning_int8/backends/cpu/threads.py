"""Passes on as many threads as torch uses, on Linux on the very threads of its OpenMP runtime.

Between two of its operations those wait spinning. Threads of our own would compete with them for the cores.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

SMALLEST_PIECE = 1 << 15
"""Elements that are worth a thread."""

_PROCESS = os.getpid()
_TEAM_WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def split(work: Callable[[int, int], Result], count: int, smallest: int) -> list[Result]:
    """Run ``work(start, stop)`` over ``range(count)`` in pieces, one per thread of torch.

    Args:
        work: Releases the interpreter lock; must not depend on where the pieces end.
        count: Length of the range.
        smallest: Length below which a piece is not worth a thread.

    Returns:
        What the pieces returned, in order.
    """
    return by_ends(work, ends(count, smallest))


def by_ends(work: Callable[[int, int], Result], ends: list[int]) -> list[Result]:
    """``split`` where the ends of the pieces are known."""
    tasks = list(pairwise(ends))
    if len(tasks) == 1:
        return [work(*tasks[0])]
    library = runtime()
    return by_pool(work, tasks) if library is None else _by_team(library, work, tasks)


def ends(count: int, smallest: int) -> list[int]:
    """Where the pieces of ``range(count)`` begin, one per thread of torch, and the end of the last one.

    Args:
        count: Length of the range.
        smallest: Length below which a piece is not worth a thread.
    """
    pieces = max(1, min(torch.get_num_threads(), count // max(1, smallest)))
    return [count * k // pieces for k in range(pieces + 1)]


def block_ends(count: int, block: int) -> list[int]:
    """``ends`` of ``count`` elements in pieces of whole blocks, the last short."""
    return [min(k * block, count) for k in ends(-(-count // block), -(-SMALLEST_PIECE // block))]


def runtime() -> Any:
    """torch's library with its OpenMP runtime, or None: in a forked process it has no threads, and does not notice."""
    return _openmp() if os.getpid() == _PROCESS else None


@cache
def _openmp() -> Any:
    """The library of torch through which its OpenMP runtime is found, or None where there is no such runtime.

    ``GOMP_parallel`` is what GCC compiles parallel regions to; the runtimes of LLVM and Intel have it as well.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.GOMP_parallel.argtypes = [_TEAM_WORK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        library.omp_get_thread_num.restype = ctypes.c_int
    except (OSError, AttributeError):
        return None
    return library


def _by_team(runtime: Any, work: Callable[[int, int], Result], tasks: list[tuple[int, int]]) -> list[Result]:
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def own_tasks(_: Any) -> None:
        try:
            # The team may be smaller than asked for, inside another parallel region or by OMP_THREAD_LIMIT.
            for k in range(runtime.omp_get_thread_num(), len(tasks), runtime.omp_get_num_threads()):
                results[k] = work(*tasks[k])
        except BaseException as error:  # it cannot pass through the runtime, and is raised behind it
            errors.append(error)

    # Always as many threads as torch's own operations take: the runtime would stop and start what differs.
    runtime.GOMP_parallel(_TEAM_WORK(own_tasks), None, torch.get_num_threads(), 0)
    if errors:
        raise errors[0]
    if len(results) < len(tasks):
        # A signal handler has raised before a thread's first line, where nobody can catch it.
        raise KeyboardInterrupt
    return [results[k] for k in range(len(tasks))]


def by_pool(work: Callable[[int, int], Result], tasks: list[tuple[int, int]]) -> list[Result]:
    """Run ``work(start, stop)`` for each task, on threads of our own but for the first."""
    others = [_pool(os.getpid(), len(tasks) - 1).submit(work, *task) for task in tasks[1:]]
    try:
        first = work(*tasks[0])
    finally:
        wait(others)  # whoever hears of an error may free what they write to
    return [first, *(o.result() for o in others)]


@lru_cache(maxsize=1)
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork, so every process has its own."""
    return ThreadPoolExecutor(workers, thread_name_prefix="lightning_int8")
