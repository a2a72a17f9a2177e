"""Averages over windows around each position: they are their own derivative, which torch computes slowly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_int8.backends.cpu.expression import Expression, Term
from lightning_int8.fusion.deferred import Deferred, fuses, plain
from lightning_int8.fusion.max_pool import Sizes, pair


@fuses(functional.avg_pool2d)
def avg_pool2d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """``torch.nn.functional.avg_pool2d``."""
    if not isinstance(input, Deferred) or input.dim() != 4 or not count_include_pad or divisor_override is not None:
        return NotImplemented
    kernel, pad = pair(kernel_size), pair(padding)
    if pair(stride or kernel_size) != (1, 1) or ceil_mode:
        return NotImplemented
    if any(k != 2 * p + 1 for k, p in zip(kernel, pad, strict=True)):
        return NotImplemented
    return _AveragePool.apply(input, kernel, pad)


class _AveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Deferred, kernel: tuple[int, int], pad: tuple[int, int]) -> Deferred:
        ctx.set_materialize_grads(False)
        ctx.windows, ctx.channels_last = (kernel, pad), x.channels_last
        return _averaged(x, kernel, pad, x.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Deferred | None, None, None]:
        # Position i counts in the average at j as j counts in that at i.
        kernel, pad = ctx.windows
        return None if grad is None else _averaged(grad, kernel, pad, ctx.channels_last), None, None


def _averaged(x: Tensor, kernel: tuple[int, int], pad: tuple[int, int], channels_last: bool) -> Deferred:
    values = functional.avg_pool2d(plain(x).contiguous(memory_format=torch.channels_last), kernel, 1, pad)
    return Deferred(Expression((Term(values.movedim(1, -1).contiguous()),)), channels_last)
