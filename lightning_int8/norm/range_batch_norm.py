"""Range BN: batch norm that divides by the range of its values instead of their standard deviation.

Source: Banner et al., "Scalable Methods for 8-bit Training of Neural Networks", NeurIPS 2018, and the authors' code.
With the n = N · positions values of a channel cut into chunks of m values::

    scale = C(m) · mean over chunks of (max - min),    C(m) = 0.5·0.35·(1 + sqrt(π·ln 4)) / sqrt(2·ln m)
    y     = (x - mean) / sqrt(scale² + eps) · gamma + beta

C(m) is the authors' code's, 0.540 / sqrt(2·ln m): it alone makes ``scale`` a measure of the standard deviation (0.92 to
0.98 of it for Gaussian values); the printed 1 / sqrt(2·ln m) is 1.8 times as large.

Departures from the authors' code: chunks need not be 16, so that every batch size works; nothing is quantized here;
eps is under the root and ``running_var`` holds scale², so that a float batch norm evaluates the checkpoint as this one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_int8.norm.batch_statistics_norm import BatchStatisticsNorm, SyncedStatistics
from lightning_int8.norm.passes import (
    channel_sum,
    gradient_sums,
    shift_and_scale,
    sum_over_ranks,
    values_per_channel,
)

MAX_CHUNKS = 16
"""Chunks of a channel in the authors' code."""

MIN_CHUNK_SIZE = 16
"""Smallest chunk that more than one chunk may have."""

MIN_PIECE_LENGTH = 128
"""Values that are reduced together where possible: fewer are not vectorised, more take longer to be searched again."""

RANGE_CONSTANT = 0.5 * 0.35 * (1 + math.sqrt(math.pi * math.log(4)))
"""The authors' correction of 1 / sqrt(2·ln m) towards the standard deviation of m Gaussian values."""


def chunk_count(values: int) -> int:
    """Number of equal chunks: the largest divisor of ``values`` up to 16 that leaves 16 values a chunk, else 1."""
    return max(d for d in range(1, MAX_CHUNKS + 1) if values % d == 0 and (d == 1 or values // d >= MIN_CHUNK_SIZE))


def range_to_std(chunk_size: int) -> float:
    """C(m): standard deviation of Gaussian values over the range of ``chunk_size`` of them, approximately."""
    return RANGE_CONSTANT / math.sqrt(2 * math.log(chunk_size))


@cache
def piece_length(chunk_size: int, positions: int) -> int:
    """Length of the pieces that chunks are made of: the least common divisor from ``MIN_PIECE_LENGTH`` on, if any."""
    common = math.gcd(chunk_size, positions)
    small = [d for d in range(1, math.isqrt(common) + 1) if common % d == 0]
    divisors = (*small, *(common // d for d in small))
    return min((d for d in divisors if d >= MIN_PIECE_LENGTH), default=common)


@dataclass(frozen=True)
class _Extrema:
    """Largest or smallest value of each chunk.

    A chunk runs through the positions of a sample, then on to the next sample. It is a run of pieces, none of which
    crosses a sample: so maxima are taken in place, without a copy in channel-major order, and without an index for
    every element, which no kernel of torch's CPU vectorises.

    Attributes:
        values: ``(chunks, C)``, dtype of x.
        piece: Piece of the channel that holds the first such value, int64 ``(chunks, C)``.
        length: Values per piece.
        largest: Whether these are maxima.
    """

    values: Tensor
    piece: Tensor
    length: int
    largest: bool

    @classmethod
    def of(cls, x: Tensor, chunks: int, largest: bool) -> _Extrema:
        length = piece_length(values_per_channel(x) // chunks, x.shape[2:].numel())
        pieces = _in_pieces(x, length)
        by_piece = pieces.squeeze(2) if length == 1 else pieces.amax(2) if largest else pieces.amin(2)
        runs = by_piece.reshape(chunks, -1, x.shape[1])
        values = runs.amax(1) if largest else runs.amin(1)
        run = runs.shape[1]
        first_of_chunk = torch.arange(0, chunks * run, run, device=x.device)[:, None]
        return cls(values, first_of_chunk + _first_equal(runs, values), length, largest)

    def add_at(self, grad: Tensor, x: Tensor, step: Tensor) -> None:
        """Add ``step``, ``(C,)``, to the elements of ``grad`` where ``x`` has these values; to the first of equals."""
        pieces = _in_pieces(x, self.length)
        sample, place = self.piece // pieces.shape[1], self.piece % pieces.shape[1]
        channel = torch.arange(x.shape[1], device=x.device)
        candidates = pieces.movedim(-1, 1)[sample, channel, place]
        element = _first_equal(candidates.transpose(1, 2), self.values)
        # One element per chunk, hence no index twice: an ordinary read, add and write, into a view.
        _in_pieces(grad.view(*x.shape[:2], -1), self.length)[sample, place, element, channel] += step.to(grad.dtype)


def _first_equal(runs: Tensor, values: Tensor) -> Tensor:
    """Index along axis 1 of the first element of ``runs`` that equals its value; the last index where none does."""
    count = runs.shape[1]
    countdown = torch.arange(count, 0, -1, dtype=torch.float32, device=runs.device)[:, None]
    # Written as floats, the comparison is vectorised; neither a comparison to bool nor max with an index is.
    equal = torch.eq(runs, values[:, None], out=torch.empty_like(runs, dtype=torch.float32))
    return (count - equal.mul_(countdown).amax(1)).long().clamp_(max=count - 1)


def _in_pieces(x: Tensor, length: int) -> Tensor:
    """``(N, C, *spatial)`` as ``(N, pieces, length, C)``, the order in which either memory format reduces fast."""
    return x.reshape(*x.shape[:2], -1).transpose(1, 2).unflatten(1, (-1, length))


@dataclass(frozen=True)
class _RangeStatistics:
    """Statistics of a batch.

    Attributes:
        mean: ``(C,)``.
        scale: ``(C,)``.
        share: What the range of one local chunk contributes to ``scale``: C(m) over the chunks of all ranks.
        count: Values per channel on all ranks, ``()``.
        extrema: Maxima and minima of the local chunks; empty if this rank has less than two values.
        group: The ranks.
    """

    mean: Tensor
    scale: Tensor
    share: Tensor
    count: Tensor
    extrema: tuple[_Extrema, ...]
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, x: Tensor, group: dist.ProcessGroup | None) -> _RangeStatistics:
        count = values_per_channel(x)
        total = channel_sum(x)
        chunks, to_std, spread = 0, 0.0, torch.zeros_like(total)
        extrema: tuple[_Extrema, ...] = ()
        if count > 1:
            chunks = chunk_count(count)
            to_std = range_to_std(count // chunks)
            high, low = (_Extrema.of(x, chunks, largest) for largest in (True, False))
            extrema = (high, low)
            spread = to_std * (high.values.to(total) - low.values.to(total)).sum(0)
        numbers = (total.new_full((1,), number) for number in (count, chunks))  # filled on the device, not copied to it
        sums = sum_over_ranks(torch.cat((total, spread, *numbers)), group)
        total, spread = sums[:-2].chunk(2)
        count_all, chunks_all = sums[-2:].clamp(min=1).unbind()
        return cls(total / count_all, spread / chunks_all, to_std / chunks_all, count_all, extrema, group)


class _RangeNormalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, s: _RangeStatistics, eps: float) -> Tensor:
        ctx.statistics = s
        ctx.inverse_std = (s.scale.square() + eps).rsqrt()
        ctx.save_for_backward(x, gamma)
        return shift_and_scale(x, s.mean, gamma * ctx.inverse_std, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        s: _RangeStatistics = ctx.statistics
        x, gamma = ctx.saved_tensors
        grad_beta, grad_gamma = gradient_sums(grad, x, s.mean, ctx.inverse_std)
        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = sum_over_ranks(torch.cat((grad_beta, grad_gamma)), s.group)
            through_mean, through_scale = sums.chunk(2)
            factor = gamma * ctx.inverse_std
            grad_x = shift_and_scale(grad, through_mean / s.count, factor)
            # d(loss)/d(scale), shared out to the extrema of the chunks.
            step = factor * through_scale * s.scale * ctx.inverse_std * s.share
            for extrema in s.extrema:
                extrema.add_at(grad_x, x, -step if extrema.largest else step)
        return grad_x, grad_gamma, grad_beta, None, None


class _RangeNorm(BatchStatisticsNorm):
    """Range BN: modes, running statistics, parameters and buffers are torch's; ``running_var`` holds scale²."""

    @torch.compiler.disable
    def _normalize_batch(self, x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            statistics = _RangeStatistics.of(x, group)
        y = _RangeNormalize.apply(x, *self._affine(x), statistics, self.eps)
        return y, statistics.mean, statistics.scale.square()

    def _normalize_frozen(self, x: Tensor) -> Tensor:
        return _BatchNorm.forward(self, x)


class RangeBatchNorm1d(_RangeNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` that normalises a batch by its range."""


class RangeBatchNorm2d(_RangeNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` that normalises a batch by its range."""


class RangeBatchNorm3d(_RangeNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` that normalises a batch by its range."""


class RangeSyncBatchNorm(_RangeNorm, SyncedStatistics, nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm`` that normalises the batches of all ranks by the mean range of all their chunks.

    A rank with less than two values per channel adds to the mean, not to the range.
    """


SWAPS: dict[type[nn.Module], type[Any]] = {
    nn.BatchNorm1d: RangeBatchNorm1d,
    nn.BatchNorm2d: RangeBatchNorm2d,
    nn.BatchNorm3d: RangeBatchNorm3d,
    nn.SyncBatchNorm: RangeSyncBatchNorm,
}
"""Exact float types, and what they become."""
