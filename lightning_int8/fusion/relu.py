"""ReLU and its bounded kin as properties of an expression; backward keeps one bit an element."""

from __future__ import annotations

from dataclasses import replace
from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_int8.backends.cpu.expression import Expression, Mask, Term
from lightning_int8.fusion.deferred import Deferred, fuses, plain_term


@fuses(functional.relu, torch.relu, Tensor.relu)
def relu(input: Tensor, inplace: bool = False) -> Any:
    """``torch.nn.functional.relu``."""
    return _bounded(input, nan, inplace)


@fuses(torch.relu_, Tensor.relu_)
def relu_(input: Tensor) -> Any:
    """``torch.relu_``."""
    return relu(input, inplace=True)


@fuses(functional.relu6)
def relu6(input: Tensor, inplace: bool = False) -> Any:
    """``torch.nn.functional.relu6``."""
    return _bounded(input, 6.0, inplace)


@fuses(functional.hardtanh)
def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    """``torch.nn.functional.hardtanh``, which is also what ``torch.nn.ReLU6`` calls."""
    if min_val != 0.0 or max_val <= 0.0:
        return NotImplemented
    return _bounded(input, float(max_val), inplace)


def _bounded(input: Tensor, upper: float, inplace: bool) -> Any:
    if not isinstance(input, Deferred) or (inplace and input.is_computed):
        return NotImplemented
    return _Relu.apply(input, upper, inplace)


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Deferred, upper: float, inplace: bool) -> Deferred:
        ctx.mask = Mask() if ctx.needs_input_grad[0] else None
        ctx.channels_last = x.channels_last
        ctx.set_materialize_grads(False)
        rectified = x.source().rectify(ctx.mask, upper)
        if not inplace:
            return Deferred(rectified, x.channels_last)
        ctx.mark_dirty(x)
        x.defer(rectified)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Deferred | None, None, None]:
        if grad is None:
            return None, None, None
        g = plain_term(grad)
        if g.mask is not None:
            g = Term(Expression((g,)).values())
        return Deferred(Expression((replace(g, mask=ctx.mask),)), ctx.channels_last), None, None
