"""Sums of the operands of a convolution, which take a zero point off the products; needed for affine ranges alone."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lightning_int8.backends import im2col
from lightning_int8.geometry import ConvGeometry, Residue
from lightning_int8.kernels.planes import pitch
from lightning_int8.numerics import Plane


def window_sums(x: Plane, geometry: ConvGeometry) -> Tensor:
    """Of x under the window at each position: int64 ``(groups, positions)``."""
    return _by_group(_columns(x, geometry), len(geometry.kernel_size), geometry.groups)


def residue_sums(g: Plane, geometry: ConvGeometry, residue: Residue) -> Tensor:
    """Of the gradient that reaches each position of a residue: int64 ``(groups, positions)``."""
    dims = residue.dims
    if not all(d.taps for d in dims):
        positions = g.data.shape[0] * prod(d.size for d in dims)
        return torch.zeros(geometry.groups, positions, dtype=torch.int64, device=g.data.device)
    padded = im2col.pad(g.data, [d.padding for d in dims], g.zero_point)
    taps, steps = [len(d.taps) for d in dims], [d.tap_step for d in dims]
    cols = im2col.windows(padded, [d.size for d in dims], [1] * len(dims), taps, steps)
    return _by_group(cols, len(dims), geometry.groups)


def weight_sums(w: Plane) -> Tensor:
    """Of the weight of each output channel: int64 ``(Co,)``."""
    return w.data.flatten(1).sum(1, dtype=torch.int64)


def residue_weight_sums(w: Plane, geometry: ConvGeometry, residue: Residue) -> Tensor:
    """Of the weight at the taps that reach a residue: int64 ``(groups, C / groups)``."""
    selected = w.data
    for axis, dim in enumerate(residue.dims, start=1):
        selected = selected.index_select(axis, torch.tensor(dim.taps, dtype=torch.int64, device=w.data.device))
    return selected.reshape(geometry.groups, -1, w.data.shape[-1]).sum(1, dtype=torch.int64)


def position_sums(x: Plane, geometry: ConvGeometry) -> Tensor:
    """Of x under each tap, over all positions: int64 ``(groups, taps · padded channels of a group)``."""
    spatial = len(geometry.kernel_size)
    by_tap = _columns(x, geometry).sum(tuple(range(spatial + 1)), dtype=torch.int64).reshape(geometry.taps, -1)
    grouped = by_tap.reshape(geometry.taps, geometry.groups, -1).transpose(0, 1)
    channels = grouped.shape[-1]
    return torch.nn.functional.pad(grouped, (0, pitch(channels) - channels)).flatten(1).contiguous()


def gradient_sums(g: Plane) -> Tensor:
    """Of the gradient of each output channel: int64 ``(Co,)``."""
    return g.data.flatten(0, -2).sum(0, dtype=torch.int64)


def _columns(x: Plane, geometry: ConvGeometry) -> Tensor:
    padded = im2col.pad(x.data, geometry.padding, x.zero_point)
    return im2col.windows(padded, geometry.output_size, geometry.stride, geometry.kernel_size, geometry.dilation)


def _by_group(cols: Tensor, spatial: int, groups: int) -> Tensor:
    """``(N, *size, *taps, C)`` to ``(groups, N · size)``."""
    sums = cols.sum(tuple(range(spatial + 1, 2 * spatial + 1)), dtype=torch.int64)
    return sums.reshape(-1, groups, sums.shape[-1] // groups).sum(2).t().contiguous()
