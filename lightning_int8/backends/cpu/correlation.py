"""Output and grad_input of a convolution as windowed sums of one form, so that a route computes only this form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.geometry import ConvGeometry, Residue
from lightning_int8.numerics import Plane


@dataclass(frozen=True)
class Correlation:
    """Σ over taps j and channels c of ``data[n, t · step + j · tap_step - before, c] · weight[o, j, c]`` at (n, t, o).

    ``data`` is ``(N, *spatial, C)``, ``weight`` ``(Co, *taps, C / groups)``; each tuple has one entry per spatial axis.

    Attributes:
        size: Positions t.
        step: Distance of the windows of neighbouring positions.
        taps: Taps j.
        tap_step: Distance of neighbouring taps.
        padding: (before, after) by which the data is extended with its zero point; negative where it is cropped.
        groups: Number of channel groups.
    """

    size: tuple[int, ...]
    step: tuple[int, ...]
    taps: tuple[int, ...]
    tap_step: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int

    @property
    def positions(self) -> int:
        """Number of positions of one sample."""
        return prod(self.size)

    @property
    def is_pointwise(self) -> bool:
        """Whether the windows are the positions of the data themselves, one tap each."""
        ones = all(n == 1 for n in (*self.taps, *self.step))
        return ones and all(p == (0, 0) for p in self.padding)


@lru_cache(maxsize=1024)
def output_correlation(geometry: ConvGeometry) -> Correlation:
    """The output of a convolution: data x, weight w."""
    return Correlation(
        geometry.output_size,
        geometry.stride,
        geometry.kernel_size,
        geometry.dilation,
        geometry.padding,
        geometry.groups,
    )


def residue_correlation(residue: Residue, groups: int) -> Correlation:
    """grad_input at the positions of one residue class: data g, weight ``transposed_weight``."""
    dims = residue.dims
    return Correlation(
        tuple(d.size for d in dims),
        (1,) * len(dims),
        tuple(len(d.taps) for d in dims),
        tuple(d.tap_step for d in dims),
        tuple(d.padding for d in dims),
        groups,
    )


def correlations(contraction: str, geometry: ConvGeometry) -> list[Correlation]:
    """The correlations that an "output" or a "grad_input" consists of."""
    if contraction == "output":
        return [output_correlation(geometry)]
    reached = (r for r in geometry.residues() if all(d.taps for d in r.dims))
    return [residue_correlation(r, geometry.groups) for r in reached]


def turned_axes(residue: Residue) -> list[int]:
    """Axes of a weight whose taps a residue class takes in the opposite order."""
    return [axis for axis, d in enumerate(residue.dims, start=1) if len(d.taps) > 1]


def taps_of(w: Tensor, residue: Residue) -> Tensor:
    """The part of a weight ``(Co, *kernel, C / groups)`` whose taps a residue class takes; no axis is turned."""
    for axis, (d, count) in enumerate(zip(residue.dims, w.shape[1:-1], strict=True), start=1):
        # A residue class takes every so manieth tap, the last one first.
        distance = d.taps[0] - d.taps[1] if len(d.taps) > 1 else count
        if len(d.taps) < count:
            w = w.narrow(axis, d.taps[-1], count - d.taps[-1])
            w = w[(slice(None),) * axis + (slice(None, len(d.taps) * distance, distance),)]
    return w


def transposed_weight(w: Plane, residue: Residue, groups: int) -> Plane:
    """The weight that carries a gradient back: ``(C, *taps, Co / groups)`` of ``(Co, *kernel, C / groups)``.

    A view where no tap is left out or turned round; the zero point becomes one per channel of C, or stays a scalar.
    """
    picked, turned = taps_of(w.data, residue), turned_axes(residue)
    picked = picked.flip(turned) if turned else picked
    zero = w.zero_point
    if zero is not None and zero.dim() == 1:
        zero = zero.repeat(groups)
    if groups == 1:
        return Plane(picked.transpose(0, -1), w.scale, zero)
    split = picked.unflatten(0, (groups, -1))  # (groups, Co / groups, *taps, C / groups)
    return Plane(split.transpose(1, -1).flatten(0, 1), w.scale, zero)


def assemble_grad_input(
    geometry: ConvGeometry, batch: int, channels: int, dtype: torch.dtype, part: Callable[[Residue], Tensor]
) -> Tensor:
    """grad_input ``(N, *in, C)`` from its residue classes.

    Args:
        geometry: The convolution.
        batch: N.
        channels: C.
        dtype: Of the parts; they may also be int64 where this is int32.
        part: Sums ``(N, *size, C)`` of one class.
    """
    residues = geometry.residues()
    parts = [(r, part(r)) for r in residues if all(d.taps for d in r.dims)]
    if len(residues) == len(parts) == 1:
        return parts[0][1]
    if any(sums.dtype == torch.int64 for _, sums in parts):
        dtype = torch.int64
    # Input positions that no tap reaches have a gradient of 0.
    result = empty(batch, *geometry.input_size, channels, dtype=dtype)
    if len(parts) < len(residues):
        result.zero_()
    for residue, sums in parts:
        positions = (slice(None), *(slice(d.first, None, d.stride) for d in residue.dims))
        result[positions] = sums
    return result


def grid_offsets(sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Σ index · stride at each point of a grid, in row-major order, int64; one 0 for a grid without axes."""
    total = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(sizes, strides, strict=True):
        total = total.unsqueeze(-1) + torch.arange(size) * stride
    return total.flatten()
