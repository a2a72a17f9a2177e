"""Maximum over windows: what is pooled is never written, its gradient never spread out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_int8.backends.cpu.expression import Expression, Term, Unpooled, Windows, pooling
from lightning_int8.fusion.deferred import Deferred, fuses, plain_term

Sizes = int | tuple[int, ...]


@fuses(functional.max_pool2d, torch.max_pool2d)
def max_pool2d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """``torch.nn.functional.max_pool2d``."""
    if not isinstance(input, Deferred) or input.dim() != 4 or ceil_mode or return_indices or pair(dilation) != (1, 1):
        return NotImplemented
    kernel, pad = pair(kernel_size), pair(padding)
    step = pair(stride) if stride else kernel
    samples, channels, height, width = input.shape
    size = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip((height, width), kernel, step, pad, strict=True))
    if min(size) < 1 or any(2 * p > k for p, k in zip(pad, kernel, strict=True)):
        return NotImplemented  # torch says what is wrong
    windows = Windows((samples, height, width, channels), (size[0], size[1]), kernel, step, pad)
    if input.source().is_plain or not pooling().supports(input.source(), windows):
        return NotImplemented
    return _MaxPool.apply(input, windows)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Deferred, windows: Windows) -> Deferred:
        values, taps = pooling().max_pool(x.source(), windows)
        ctx.set_materialize_grads(False)
        ctx.windows, ctx.channels_last = windows, x.channels_last
        ctx.save_for_backward(taps)
        return Deferred(Expression((Term(values),)), x.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Deferred | None, None]:
        if grad is None:
            return None, None
        g = plain_term(grad)
        values = g.values if g.is_plain else Expression((g,)).values()
        (taps,) = ctx.saved_tensors
        return Deferred(Expression((Term(values, unpooled=Unpooled(taps, ctx.windows)),)), ctx.channels_last), None


def pair(sizes: Sizes) -> tuple[int, int]:
    """Sizes down and across."""
    return (sizes, sizes) if isinstance(sizes, int) else (sizes[0], sizes[-1])
