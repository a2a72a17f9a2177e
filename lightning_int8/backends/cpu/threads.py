"""Passes on as many threads as torch uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Result = TypeVar("Result")

SMALLEST_PIECE = 1 << 15
"""Elements that are worth a thread."""


def split(work: Callable[[int, int], Result], count: int, smallest: int) -> list[Result]:
    """Run ``work(start, stop)`` over ``range(count)`` in pieces, one per thread of torch.

    Args:
        work: Releases the interpreter lock; must not depend on where the pieces end.
        count: Length of the range.
        smallest: Length below which a piece is not worth a thread.

    Returns:
        What the pieces returned, in order.
    """
    pieces = max(1, min(torch.get_num_threads(), count // max(1, smallest)))
    if pieces == 1:
        return [work(0, count)]
    ends = [count * k // pieces for k in range(pieces + 1)]
    others = [_pool(os.getpid(), pieces - 1).submit(work, ends[k], ends[k + 1]) for k in range(1, pieces)]
    first = work(0, ends[1])
    return [first, *(o.result() for o in others)]


def split_blocks(work: Callable[[int, int], Result], count: int, block: int) -> list[Result]:
    """Run ``work(first, last)`` over ``count`` elements in pieces of whole blocks, the last short; see ``split``."""

    def pieces(start: int, stop: int) -> Result:
        return work(start * block, min(stop * block, count))

    return split(pieces, -(-count // block), -(-SMALLEST_PIECE // block))


@lru_cache(maxsize=1)
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork, so every process has its own."""
    return ThreadPoolExecutor(workers, thread_name_prefix="lightning_int8")
