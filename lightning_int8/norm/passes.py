"""The passes over an activation that a batch norm is made of, each one kernel of torch; and their sums over ranks.

Activations are ``(N, C, *spatial)`` in any memory format; what belongs to a channel is ``(C,)`` in float32, or float64
for float64 activations (``statistics_dtype``).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Dtype of statistics: float32 for it and for narrower activations, as in torch's batch norm."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def values_per_channel(x: Tensor) -> int:
    """N · positions."""
    return x.numel() // x.shape[1]


def channel_sum(x: Tensor) -> Tensor:
    """Sum over samples and positions, ``(C,)``."""
    return x.sum([d for d in range(x.dim()) if d != 1], dtype=statistics_dtype(x))


def shift_and_scale(x: Tensor, shift: Tensor, factor: Tensor, bias: Tensor | None = None) -> Tensor:
    """``(x - shift) · factor + bias`` per channel, in the dtype and memory format of ``x``."""
    # Batch norm at a variance of 1 and no eps is this one vectorised pass, mixed dtypes included.
    return nn.functional.batch_norm(x, shift, torch.ones_like(shift), factor, bias, False, 0.0, 0.0)


def gradient_sums(grad: Tensor, x: Tensor, shift: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ grad`` and ``Σ grad · (x - shift) · factor`` per channel, in one pass; zeros for an empty batch."""
    if x.numel() == 0:
        return torch.zeros_like(shift), torch.zeros_like(shift)
    ones = torch.ones_like(shift)
    _, weighted, plain = torch.ops.aten.native_batch_norm_backward(
        grad, x, ones, shift, ones, None, None, False, 0.0, (False, True, True)
    )
    return plain, weighted * factor


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of ``value`` over the ranks of ``group``; ``value`` itself where there is none."""
    if group is not None:
        dist.all_reduce(value, group=group)
    return value
