"""Fixed-point batch norm: statistics, normalised values and parameters rounded to fixed grids (WAGEUBN).

Source: Yang et al., "Training high-performance and large-scale deep neural networks with full 8-bit integers", Neural
Networks 2020, and the authors' code. With Q(x, k) rounding to multiples of 2^(1 - k) and SQ as in
``lightning_int8.grids``::

    x̂ = Q((x - Q(mean, 16)) / (Q(std, 16) + 2^-15), k)
    y = Q(gamma, 8)·x̂ + Q(beta, 8)

Backward takes SQ(grad, 8), the paper's E1, for the gradient of y, and every Q for the identity (straight-through).
Gradients of gamma and beta are rounded by the optimizer.

Q does not clip: k bits are one sign and k - 1 fraction bits, and integer bits come on top. A normalised value of "8
bits" reaches ±4 in steps of 1/128, some 11 bits. So this is a norm in fixed point carried by floats, with no INT8
contraction in it; saturating what the next layer reads is the business of that layer's operand.

Departures: E1 clips to ±127/128·R where the authors' code clips to ±R, an integer 128; it is taken of the gradient at
the norm's own output, so that the mask of a ReLU in between comes before it, not after. Running statistics are torch's:
they follow unrounded moments, the variance unbiased. Evaluation rounds by them in the same way. ``eps`` is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_int8.grids import direct_quantize, grid_step, shift_quantize
from lightning_int8.norm.batch_statistics_norm import BatchStatisticsNorm, SyncedStatistics
from lightning_int8.norm.passes import (
    channel_sum,
    gradient_sums,
    shift_and_scale,
    statistics_dtype,
    sum_over_ranks,
    values_per_channel,
)

STATISTICS_BITS = 16
PARAMETER_BITS = 8

STD_FLOOR = grid_step(STATISTICS_BITS)
"""The paper's epsilon, 2^-15: added to the rounded standard deviation, which may be 0."""


@dataclass(frozen=True)
class _Moments:
    """Mean and standard deviation by which a batch is normalised.

    Attributes:
        mean: ``(C,)``.
        std: ``(C,)``.
        count: Values per channel on all ranks, ``()``; None if the moments are running ones, no function of the batch.
        group: The ranks.
    """

    mean: Tensor
    std: Tensor
    count: Tensor | None = None
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, x: Tensor, group: dist.ProcessGroup | None) -> _Moments:
        total = channel_sum(x)
        sums = sum_over_ranks(torch.cat((total, total.new_full((1,), values_per_channel(x)))), group)
        count = sums[-1].clamp(min=1)
        mean = sums[:-1] / count
        squares = channel_sum((x - _per_channel(mean, x)).square_())
        return cls(mean, (sum_over_ranks(squares, group) / count).sqrt(), count, group)


class _FixedPointNormalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, moments: _Moments, bits: tuple[int, int | None]
    ) -> Tensor:
        ctx.save_for_backward(x, gamma)
        ctx.moments, ctx.bits = moments, bits
        normalized = _normalized(x, moments, bits[0])
        gamma, beta = (direct_quantize(p, PARAMETER_BITS) for p in (gamma, beta))
        return shift_and_scale(normalized, torch.zeros_like(gamma), gamma, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma = ctx.saved_tensors
        moments: _Moments = ctx.moments
        normalized_bits, error_bits = ctx.bits
        if error_bits is not None:
            grad = shift_quantize(grad, error_bits)
        shift, factor = _shift_and_factor(moments)
        normalized = _normalized(x, moments, normalized_bits)
        grad_beta, grad_gamma = gradient_sums(grad, normalized, torch.zeros_like(shift), torch.ones_like(shift))
        grad_x = None
        if ctx.needs_input_grad[0]:
            slope = direct_quantize(gamma, PARAMETER_BITS) * factor
            if moments.count is None:
                grad_x = shift_and_scale(grad, torch.zeros_like(shift), slope)
            else:
                sums = sum_over_ranks(torch.cat(gradient_sums(grad, x, shift, factor)), moments.group)
                through_mean, through_std = sums.chunk(2)
                grad_x = shift_and_scale(grad, through_mean / moments.count, slope)
                # d(std)/dx = (x - mean) / (count · std), and no derivative where all values of a channel are equal.
                per_value = slope * through_std / (moments.count * moments.std)
                grad_x -= shift_and_scale(x, moments.mean, torch.where(moments.std > 0, per_value, 0.0))
        return grad_x, grad_gamma, grad_beta, None, None


class _FixedPointNorm(BatchStatisticsNorm):
    """Fixed-point batch norm: modes, running statistics, parameters and buffers are torch's.

    Attributes:
        normalized_bits: Width k of the normalised value: 8 as in the authors' code, 16 in the paper.
        error_bits: Width of SQ on the gradient of the output, the paper's E1; None leaves it as it comes.
    """

    normalized_bits: int = 8
    error_bits: int | None = 8

    def _normalize_batch(self, x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            moments = _Moments.of(x.to(statistics_dtype(x)), group)
        assert moments.count is not None
        unbiased = moments.std.square() * (moments.count / (moments.count - 1).clamp(min=1))
        return self._normalize_by(x, moments), moments.mean, unbiased

    def _normalize_frozen(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        dtype = statistics_dtype(x)
        return self._normalize_by(x, _Moments(self.running_mean.to(dtype), self.running_var.to(dtype).sqrt()))

    def _normalize_by(self, x: Tensor, moments: _Moments) -> Tensor:
        # Narrow floats do not hold the grids.
        values = x.to(statistics_dtype(x))
        bits = self.normalized_bits, self.error_bits
        return _FixedPointNormalize.apply(values, *self._affine(x), moments, bits).to(x.dtype)


class FixedPointBatchNorm1d(_FixedPointNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` in fixed point."""


class FixedPointBatchNorm2d(_FixedPointNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` in fixed point."""


class FixedPointBatchNorm3d(_FixedPointNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` in fixed point."""


class FixedPointSyncBatchNorm(_FixedPointNorm, SyncedStatistics, nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm`` in fixed point, by the moments of all ranks."""


SWAPS: dict[type[nn.Module], type[Any]] = {
    nn.BatchNorm1d: FixedPointBatchNorm1d,
    nn.BatchNorm2d: FixedPointBatchNorm2d,
    nn.BatchNorm3d: FixedPointBatchNorm3d,
    nn.SyncBatchNorm: FixedPointSyncBatchNorm,
}
"""Exact float types, and what they become."""


def _shift_and_factor(moments: _Moments) -> tuple[Tensor, Tensor]:
    """Rounded mean, and the reciprocal of the rounded standard deviation with its floor."""
    std = direct_quantize(moments.std, STATISTICS_BITS)
    return direct_quantize(moments.mean, STATISTICS_BITS), (std + STD_FLOOR).reciprocal()


def _normalized(x: Tensor, moments: _Moments, bits: int) -> Tensor:
    return direct_quantize(shift_and_scale(x, *_shift_and_factor(moments)), bits)


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(-1, *(1,) * (x.dim() - 2))
