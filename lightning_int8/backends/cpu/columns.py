"""The windows of a tensor as rows of a matrix, a few samples at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_int8.backends import im2col
from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.correlation import Correlation, grid_offsets
from lightning_int8.backends.cpu.passes import compiled_pass
from lightning_int8.numerics import Plane

COLUMN_BYTES = 1 << 20
"""Rows that one product reads, in bytes per thread: they stay in cache, where those of a whole batch do not."""


GATHER = compiled_pass("gather")
"""The compiled copies, or None where numba cannot be imported."""


BORDER = compiled_pass("border")
"""The compiled padding, or None likewise."""


def padded(data: Plane, padding: Sequence[tuple[int, int]], slack: int = 0) -> Tensor:
    """Data extended with their zero point, see ``im2col.pad``; a copy wherever there is slack."""
    zero = data.zero_point
    if BORDER is None or (zero is not None and zero.dim() > 0) or (slack == 0 and not any(map(any, padding))):
        return im2col.pad(data.data, padding, zero, slack)
    return BORDER.pad(data.data, padding, 0 if zero is None else int(zero), False, slack)


class Columns:
    """Windows of ``(N, *spatial, C)``: rows ``(sample and position)``, columns ``(tap, channel)``.

    Args:
        data: int8, contiguous; padded with its zero point, ``()`` or ``(C,)``.
        correlation: The windows.
    """

    def __init__(self, data: Plane, correlation: Correlation) -> None:
        self._correlation = correlation
        self._samples, self._channels = data.data.shape[0], data.data.shape[-1]
        self._plain = data.data if correlation.is_pointwise else None
        if self._plain is None:
            self._padded = padded(data, correlation.padding, 0 if GATHER is None else GATHER.WIDEST_COPY)
            self._buffer = torch.empty(0, dtype=torch.int8)

    def chunks(self, channels: int, total_bytes: int = 0) -> Iterator[slice]:
        """Slices of the batch whose rows with so many channels fit ``COLUMN_BYTES``; all of it without spatial axes.

        Args:
            channels: Channels of a row.
            total_bytes: What each slice is added to: rows may take as much, or adding would take longest.
        """
        per_sample = self._correlation.positions * prod(self._correlation.taps) * channels
        allowed = max(COLUMN_BYTES * torch.get_num_threads(), total_bytes)
        step = max(1, allowed // max(1, per_sample)) if self._correlation.size else max(1, self._samples)
        for start in range(0, self._samples, step):
            yield slice(start, min(start + step, self._samples))

    def rows(self, samples: slice, channels: slice) -> Tensor:
        """Rows ``(samples · positions, taps · channels)`` of some samples and channels; valid until the next call."""
        if self._plain is not None:
            return self._plain[samples].flatten(0, -2)[:, channels]
        correlation, padded = self._correlation, self._padded
        count = (samples.stop - samples.start) * correlation.positions
        width = prod(correlation.taps) * (channels.stop - channels.start)
        if GATHER is None:
            view = im2col.windows(padded, correlation.size, correlation.step, correlation.taps, correlation.tap_step)
            # With one channel the windows of neighbours overlap and `reshape` alone may leave them so.
            return view[samples][..., channels].reshape(count, width).contiguous()
        if self._buffer.numel() < count * width:
            self._buffer = empty(count * width, dtype=torch.int8)
        origins, offsets, run = window_tables(correlation, tuple(padded.shape[1:]), channels.start, channels.stop)
        flat = padded.as_strided((padded.numel() + GATHER.WIDEST_COPY,), (1,)).numpy()
        rows = self._buffer[: count * width]
        GATHER.gather_rows(flat, padded.stride(0), origins, offsets, run, samples, rows.numpy())
        return rows.view(count, width)


@lru_cache(maxsize=1024)
def window_tables(correlation: Correlation, shape: tuple[int, ...], first: int, stop: int) -> tuple[Any, Any, int]:
    """Where windows begin within a sample ``(*spatial, C)``, where their runs begin within them, and a run's length."""
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape) - 1)]
    channels = shape[-1]
    taps = list(correlation.taps)
    run = stop - first
    if taps and run == channels and correlation.tap_step[-1] == 1:
        # Taps along the last axis lie side by side: one run.
        run *= taps[-1]
        taps[-1] = 1
    origins = grid_offsets(correlation.size, [s * n for s, n in zip(strides, correlation.step, strict=True)])
    offsets = grid_offsets(taps, [s * n for s, n in zip(strides, correlation.tap_step, strict=True)]) + first
    return origins.numpy(), offsets.numpy(), run
