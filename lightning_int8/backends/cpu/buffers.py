"""Large tensors in memory that was in use before.

Fresh memory costs a page fault every 4 KiB, and the C library gives large blocks back to the system whenever they are
freed. A network allocates the same sizes step after step; here they are kept in between.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from math import prod
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 20
"""Bytes from which memory is kept; the C library keeps smaller blocks itself."""

MOST_WASTE = 1.25
"""Size of a block for each byte that is needed, at most."""

_ALIGNMENT = 64
_PATIENCE = 2.0


class _Idle(NamedTuple):
    size: int
    since: int
    block: np.ndarray


class _Pool:
    """Blocks of memory that nobody uses.

    A block that was not wanted while ``_PATIENCE`` times the memory of the whole pool was handed out is freed: a
    training step asks for less than that, so what each step uses stays.

    Attributes:
        held: Bytes of all blocks, used or not.
    """

    def __init__(self) -> None:
        self.held = 0
        self._idle: list[_Idle] = []  # by size
        self._returned: deque[_Idle] = deque()
        self._served = 0
        self._lock = Lock()

    def take(self, size: int) -> np.ndarray:
        """A block of ``size`` to ``MOST_WASTE`` times as many bytes; whoever takes it must ``give`` it back."""
        with self._lock:
            self._sort_in()
            self._served += size
            at = bisect_left(self._idle, size, key=_size)
            if at < len(self._idle) and self._idle[at].size <= MOST_WASTE * size:
                return self._idle.pop(at).block
            self._forget(self._served - _PATIENCE * self.held)
            self.held += size
        raw = np.empty(size + _ALIGNMENT, np.uint8)
        begin = -raw.ctypes.data % _ALIGNMENT
        return raw[begin : begin + size]

    def give(self, block: np.ndarray) -> None:
        """Take a block back; without the lock, since a tensor may die anywhere, even while this thread holds it."""
        self._returned.append(_Idle(block.size, self._served, block))

    def clear(self) -> None:
        """Free what nobody uses."""
        with self._lock:
            self._sort_in()
            self._forget(self._served + 1)

    def _sort_in(self) -> None:
        while self._returned:
            idle = self._returned.popleft()
            self._idle.insert(bisect_left(self._idle, idle.size, key=_size), idle)

    def _forget(self, before: float) -> None:
        self.held -= sum(idle.size for idle in self._idle if idle.since < before)
        self._idle = [idle for idle in self._idle if idle.since >= before]


class _Lease(np.ndarray):
    """Part of a block, which lives as long as the storage of the tensor made of it.

    Attributes:
        block: The block, given back then.
    """

    block: np.ndarray

    def __del__(self) -> None:
        _pool.give(self.block)


def _size(idle: _Idle) -> int:
    return idle.size


_pool = _Pool()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``torch.empty`` on the CPU; its memory is kept for the next one when the last tensor that uses it is gone."""
    count = prod(shape)
    size = count * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(shape, dtype=dtype)
    block = _pool.take(size)
    lease = block[:size].view(_Lease)
    lease.block = block
    # `.data`, since autograd refuses to change views in place that a custom function returns.
    return torch.from_numpy(lease).view(dtype).view(shape).data


def clear() -> None:
    """Give the memory that no tensor uses back to the system."""
    _pool.clear()
