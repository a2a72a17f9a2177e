"""Depthwise convolutions by a compiled INT8 pass of our own: im2col would multiply blocks that are mostly zero.

The two passes are operators of their own, so that whoever watches operations sees INT8 products here as well.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu.arrays import as_array
from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.columns import padded
from lightning_int8.backends.cpu.correlation import Correlation, grid_offsets, output_correlation
from lightning_int8.backends.cpu.correlation_route import CorrelationRoute
from lightning_int8.backends.cpu.gemm import RAW_LIMIT
from lightning_int8.backends.cpu.passes import compiled_pass
from lightning_int8.backends.cpu.route import Scales
from lightning_int8.backends.cpu.torch_operator import operator
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import Plane

DEPTHWISE = compiled_pass("depthwise")
"""The compiled passes, or None where numba cannot be imported."""


class Depthwise(CorrelationRoute):
    """Every channel has its own group, on both sides."""

    name = "depthwise"

    def supports(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scaled: bool) -> bool:
        """See ``Route.supports``."""
        out_channels = a.data.shape[-1] if contraction == "grad_weight" else b.data.shape[0]
        channels = b.data.shape[-1] * (1 if contraction == "grad_weight" else geometry.groups)
        plain = a.zero_point is None and b.zero_point is None and len(geometry.kernel_size) > 0
        return DEPTHWISE is not None and plain and channels == out_channels == geometry.groups

    def correlate(self, data: Plane, weight: Plane, correlation: Correlation, scales: Scales | None) -> Tensor:
        """See ``Route.correlate``."""
        factors = [] if scales is None else [scales.left, scales.right]
        return torch.ops.lightning_int8.depthwise_conv(data.data, weight.data, *_arguments(correlation), factors)

    def grad_weight(self, g: Plane, x: Plane, geometry: ConvGeometry) -> Tensor:
        """See ``Route.grad_weight``."""
        correlation = output_correlation(geometry)
        return torch.ops.lightning_int8.depthwise_conv_grad_weight(g.data, x.data, *_arguments(correlation))


def _arguments(correlation: Correlation) -> tuple[list[int], ...]:
    c = correlation
    return list(c.size), list(c.step), list(c.taps), list(c.tap_step), [n for pair in c.padding for n in pair]


@operator()
def depthwise_conv(
    data: Tensor,
    weight: Tensor,
    size: list[int],
    step: list[int],
    taps: list[int],
    tap_step: list[int],
    padding: list[int],
    scales: list[Tensor],
) -> Tensor:
    """Σ over taps of int8 data ``(N, *spatial, C)`` times int8 weight ``(C, *taps, 1)``, see ``Correlation``.

    Returns:
        ``(N, *size, C)``: int32 or, with scales (``()``; ``()`` or ``(C,)``), float32.
    """
    assert DEPTHWISE is not None
    batch, channels = data.shape[0], data.shape[-1]
    flat, starts, offsets = _rows(data, _correlation(size, step, taps, tap_step, padding))
    repeats = max(1, min(size[-1], DEPTHWISE.BLOCK // channels))
    by_tap = weight.reshape(channels, -1).t().to(torch.int16).repeat(1, repeats)
    factors = None
    if scales:
        left, right = scales
        second = np.float32(right.item()) if right.dim() == 0 else right.repeat(repeats).numpy()
        factors = (np.float32(left.item()), second)
    out = empty(batch, *size, channels, dtype=torch.float32 if scales else torch.int32)
    DEPTHWISE.correlate(flat, starts, offsets, by_tap.numpy(), factors, as_array(out).reshape(len(starts), -1))
    return out


@torch.library.register_fake("lightning_int8::depthwise_conv")
def _(data: Tensor, weight: Tensor, size: list[int], *rest: Any) -> Tensor:
    dtype = torch.float32 if rest[-1] else torch.int32
    return data.new_empty(data.shape[0], *size, data.shape[-1], dtype=dtype)


@operator()
def depthwise_conv_grad_weight(
    g: Tensor,
    x: Tensor,
    size: list[int],
    step: list[int],
    taps: list[int],
    tap_step: list[int],
    padding: list[int],
) -> Tensor:
    """Σ over samples and positions of int8 g ``(N, *size, C)`` times int8 x ``(N, *spatial, C)``, see ``Correlation``.

    Returns:
        int64 sums ``(C, *taps, 1)``.
    """
    assert DEPTHWISE is not None
    channels = x.shape[-1]
    flat, starts, offsets = _rows(x, _correlation(size, step, taps, tap_step, padding))
    repeats = max(1, min(size[-1], DEPTHWISE.BLOCK // channels))
    rows = g.view(len(starts), size[-1] * channels).numpy()
    sums = DEPTHWISE.grad_weight(flat, starts, offsets, rows, repeats * channels, RAW_LIMIT)
    by_tap = torch.from_numpy(sums).view(-1, repeats, channels).sum(1)
    return by_tap.t().reshape(channels, *taps, 1).contiguous()


@torch.library.register_fake("lightning_int8::depthwise_conv_grad_weight")
def _(g: Tensor, x: Tensor, size: list[int], step: list[int], taps: list[int], *rest: Any) -> Tensor:
    return g.new_empty(g.shape[-1], *taps, 1, dtype=torch.int64)


def _correlation(
    size: list[int], step: list[int], taps: list[int], tap_step: list[int], padding: list[int]
) -> Correlation:
    pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
    return Correlation(tuple(size), tuple(step), tuple(taps), tuple(tap_step), pairs, 1)


def _rows(data: Tensor, correlation: Correlation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Padded data, flat; where the row of each sample and outer position begins; where each tap begins from there.

    Positions along the last axis are sorted by their remainder mod the step, so that those of a tap lie side by side.
    """
    *outer, (before, after) = correlation.padding
    step = correlation.step[-1]
    width = data.shape[-2] + before + after
    rows = padded(Plane(data, torch.ones(())), (*outer, (before, after + -width % step)))
    if step > 1:
        rows = rows.unflatten(-2, (-1, step)).transpose(-2, -3).contiguous().flatten(-3, -2)
    starts, offsets = _tables(correlation, tuple(rows.shape[1:]))
    samples = torch.arange(len(rows)) * rows.stride(0)
    return rows.view(-1).numpy(), (samples[:, None] + starts).flatten().numpy(), offsets.numpy()


@lru_cache(maxsize=256)
def _tables(correlation: Correlation, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Where rows begin within a padded sample ``(*spatial, C)``, and taps within them."""
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape) - 1)]
    steps = [s * n for s, n in zip(strides, correlation.step, strict=True)]
    tap_steps = [s * n for s, n in zip(strides, correlation.tap_step, strict=True)]
    starts = grid_offsets(correlation.size[:-1], steps[:-1])
    outer_taps = grid_offsets(correlation.taps[:-1], tap_steps[:-1])
    # Tap j stands for position j · tap_step: its remainder chooses a part of the row, its quotient a place in it.
    positions = torch.arange(correlation.taps[-1]) * correlation.tap_step[-1]
    step, width = correlation.step[-1], shape[-2]
    last_taps = (positions % step * (width // step) + positions // step) * shape[-1]
    return starts, (outer_taps[:, None] + last_taps).flatten()
