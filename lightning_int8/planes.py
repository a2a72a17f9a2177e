"""The planes of one pass of a layer: made once for each operand, saved for the backward pass in place of floats."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_int8.backends import Backend
from lightning_int8.backends.base import Request
from lightning_int8.backends.cpu.expression import Expression
from lightning_int8.magnitudes import STATISTICS, BothAxes, Statistics
from lightning_int8.numerics import Quantized
from lightning_int8.operand import Operand


class Planes:
    """Planes of the operands of one pass, each computed once.

    Args:
        backend: Computes them.
        update: Whether the pass is part of training, hence may refresh clip values.
    """

    def __init__(self, backend: Backend, update: bool) -> None:
        self._backend = backend
        self._update = update
        self._made: dict[Operand, Quantized] = {}

    def of(self, operand: Operand, tensor: Tensor | Expression, keys: dict[Operand, Tensor]) -> Quantized:
        """Planes of ``tensor``, canonical, with what ``Operand.draw`` gave for the operand."""
        if operand not in self._made:
            request = self._request(operand, tensor, keys, self._backend.statistics)
            self._made[operand] = self._backend.quantize(tensor, *request)
        return self._made[operand]

    def of_both(
        self, first: Operand, second: Operand, tensor: Tensor | Expression, keys: dict[Operand, Tensor]
    ) -> tuple[Quantized, Quantized]:
        """Those of two operands of one tensor, measured and rounded together where the backend can."""
        if first is second or first in self._made or second in self._made:
            return self.of(first, tensor, keys), self.of(second, tensor, keys)
        statistics = self._backend.statistics
        shared = BothAxes(tensor) if statistics is STATISTICS and isinstance(tensor, Tensor) else statistics
        requests = [self._request(operand, tensor, keys, shared) for operand in (first, second)]
        self._made[first], self._made[second] = self._backend.quantize_both(tensor, *requests)
        return self._made[first], self._made[second]

    def _request(
        self, operand: Operand, tensor: Tensor | Expression, keys: dict[Operand, Tensor], statistics: Statistics
    ) -> Request:
        return operand.request(tensor, keys[operand], self._backend, self._update, statistics)


Layout = list[tuple[int, int | None] | None]
"""Of each operand the number of its tensors and its axis; None where there is no operand."""


def packed(*quantized: Quantized | None) -> tuple[Layout, list[Tensor | None]]:
    """Operands as the tensors that autograd saves, one after the other, and what it takes to tell them apart."""
    parts = [[] if q is None else q.tensors() for q in quantized]
    layout: Layout = [None if q is None else (len(p), q.axis) for q, p in zip(quantized, parts, strict=True)]
    return layout, [t for p in parts for t in p]


def unpacked(layout: Layout, tensors: Sequence[Tensor | None]) -> list[Quantized | None]:
    """Inverse of ``packed``."""
    out: list[Quantized | None] = []
    for entry in layout:
        count, axis = entry or (0, None)
        out.append(Quantized.from_tensors(tensors[:count], axis) if entry else None)
        tensors = tensors[count:]
    return out
