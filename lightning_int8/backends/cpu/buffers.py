"""Large tensors in memory that was in use before.

Fresh memory costs a page fault every 4 KiB, and the C library gives large blocks back to the system whenever they are
freed. A network allocates the same sizes step after step; here they are kept in between.
"""

from __future__ import annotations

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

# NumPy has no bfloat16, and torch makes tensors of one type faster than of another type's bytes.
_IN_MEMORY: dict[torch.dtype, np.dtype] = {
    torch.float32: np.dtype(np.float32),
    torch.bfloat16: np.dtype(np.uint16),
    torch.float64: np.dtype(np.float64),
    torch.int8: np.dtype(np.int8),
    torch.uint8: np.dtype(np.uint8),
    torch.int16: np.dtype(np.int16),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
}


class _Idle(NamedTuple):
    block: np.ndarray
    since: int


class _Pool:
    """Blocks of memory that nobody uses.

    A block that was not wanted while ``_PATIENCE`` times the memory of the whole pool was handed out is freed: a
    training step asks for less than that, so what each step uses stays.

    Attributes:
        held: Bytes of all blocks, used or not.
    """

    def __init__(self) -> None:
        self.held = 0
        self._idle: dict[int, list[_Idle]] = {}  # by size, the last one returned at the end
        self._returned: deque[np.ndarray] = deque()
        self._served = 0
        self._lock = Lock()

    def take(self, size: int) -> np.ndarray:
        """A block of ``size`` to ``MOST_WASTE`` times as many bytes; whoever takes it must ``give`` it back."""
        with self._lock:
            self._sort_in()
            self._served += size
            idle = self._idle.get(size) or self._idle.get(self._next_size(size))
            if idle:
                return idle.pop().block
            self._forget(self._served - _PATIENCE * self.held)
            self.held += size
        raw = np.empty(size + _ALIGNMENT, np.uint8)
        begin = -raw.ctypes.data % _ALIGNMENT
        return raw[begin : begin + size]

    def give(self, block: np.ndarray) -> None:
        """Take a block back; without the lock, since a tensor may die anywhere, even while this thread holds it."""
        self._returned.append(block)

    def clear(self) -> None:
        """Free what nobody uses."""
        with self._lock:
            self._sort_in()
            self._forget(self._served + 1)

    def _next_size(self, size: int) -> int:
        """The smallest size of an idle block that will do as well, or ``size``."""
        return min((s for s, idle in self._idle.items() if idle and size < s <= MOST_WASTE * size), default=size)

    def _sort_in(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._idle.setdefault(block.size, []).append(_Idle(block, self._served))

    def _forget(self, before: float) -> None:
        for size, idle in list(self._idle.items()):
            kept = [i for i in idle if i.since >= before]
            self.held -= size * (len(idle) - len(kept))
            if kept:
                self._idle[size] = kept
            else:
                del self._idle[size]


class _Lease(np.ndarray):
    """Part of a block, which lives as long as the storage of the tensor made of it.

    Attributes:
        block: The block, given back then.
    """

    block: np.ndarray

    def __del__(self) -> None:
        _pool.give(self.block)


_pool = _Pool()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``torch.empty`` on the CPU; its memory is kept for the next one when the last tensor that uses it is gone."""
    in_memory = _IN_MEMORY[dtype]
    size = prod(shape) * in_memory.itemsize
    if size < SMALLEST:
        return torch.empty(shape, dtype=dtype)
    block = _pool.take(size)
    lease = _Lease(shape, in_memory, block)
    lease.block = block
    tensor = torch.from_numpy(lease)
    # `.data`, since autograd refuses to change views in place that a custom function returns.
    return tensor.view(dtype).data if tensor.dtype != dtype else tensor


def clear() -> None:
    """Give the memory that no tensor uses back to the system."""
    _pool.clear()
