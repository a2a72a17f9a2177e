"""Addition of two tensors of one shape, as at the end of a residual block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_int8.fusion.deferred import Deferred, canonical, fuses, is_fusable, plain


@fuses(torch.add, Tensor.add)
def add(input: Tensor, other: Any, **unusual: Any) -> Any:
    """``torch.add``."""
    if unusual or not is_fusable(input, other) or not is_fusable(other, input):
        return NotImplemented
    return _Add.apply(input, other, False)


@fuses(Tensor.add_)
def add_(input: Tensor, other: Any, **unusual: Any) -> Any:
    """``torch.Tensor.add_``."""
    if unusual or not isinstance(input, Deferred) or input.is_computed or not is_fusable(other, input):
        return NotImplemented
    return _Add.apply(input, other, True)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, inplace: bool) -> Deferred:
        ctx.set_materialize_grads(False)
        ctx.deferred = [isinstance(t, Deferred) for t in (a, b)]
        total = canonical(a).plus(canonical(b))
        # A block's sum is read twice: by the next block's convolution and by its addition.
        total.kept = True
        if not inplace:
            one = a if isinstance(a, Deferred) else b
            assert isinstance(one, Deferred)
            return Deferred(total, one.channels_last)
        assert isinstance(a, Deferred)
        ctx.mark_dirty(a)
        a.defer(total)
        return a

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        # What is not deferred has another producer, maybe a parameter, whose gradient others store and send.
        grad_a, grad_b = (grad if deferred else plain(grad) for deferred in ctx.deferred)
        return grad_a, grad_b, None
