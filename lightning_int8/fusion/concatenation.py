"""Concatenation of channels, so that what follows it is fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.expression import Expression, Term
from lightning_int8.fusion.deferred import Deferred, canonical, fuses, is_alike, plain


@fuses(torch.cat, torch.concat, torch.concatenate)
def cat(tensors: Sequence[Tensor], dim: int = 0, **unusual: Any) -> Any:
    """``torch.cat``."""
    first = next((t for t in tensors if isinstance(t, Deferred)), None)
    if first is None or unusual or dim not in (1, 1 - first.dim()):
        return NotImplemented
    if not all(is_alike(t, first) and _without_channels(t) == _without_channels(first) for t in tensors):
        return NotImplemented
    return _Cat.apply(first.channels_last, *tensors)


def _without_channels(tensor: Tensor) -> tuple[int, ...]:
    samples, _, *spatial = tensor.shape if tensor.dim() > 1 else (0, 0)
    return samples, *spatial


class _Cat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, channels_last: bool, *tensors: Tensor) -> Deferred:
        ctx.set_materialize_grads(False)
        ctx.channels = [t.shape[1] for t in tensors]
        parts = [canonical(t) for t in tensors]
        whole = empty(*parts[0].shape[:-1], sum(ctx.channels), dtype=parts[0].dtype)
        for place, part in zip(whole.split(ctx.channels, -1), parts, strict=True):
            place.copy_(part.values())
        return Deferred(Expression((Term(whole),)), channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (1 + len(ctx.channels))
        return None, *plain(grad).split(ctx.channels, 1)
