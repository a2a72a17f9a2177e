"""grad_input of a strided convolution as one direct convolution whose channels are then spread over positions.

The residue classes of the input positions are correlations of the same gradient. Put side by side as channels, each
with its taps in a window that all share and zeros elsewhere, they are one convolution with stride² times as many
channels; its result, channels sorted into positions (the pixel shuffle of Shi et al., CVPR 2016), is the gradient. A
3x3 kernel at stride 2 takes 16/9 of the products so, in one call instead of four.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.correlation import Correlation, transposed_weight
from lightning_int8.backends.cpu.correlation_route import CorrelationRoute
from lightning_int8.backends.cpu.direct_route import Direct
from lightning_int8.backends.cpu.route import Scales
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import Plane

MOST_WASTE = 2.0
"""Products taken for each one that is needed, beyond which the classes are better computed one by one."""


class Subpixel(CorrelationRoute):
    """grad_input at a stride, through ``Direct``."""

    name = "subpixel"

    def __init__(self, direct: Direct) -> None:
        self._direct = direct

    def supports(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scaled: bool) -> bool:
        """See ``Route.supports``."""
        if contraction != "grad_input" or geometry.groups > 1 or set(geometry.dilation) != {1}:
            return False
        if all(s == 1 for s in geometry.stride):
            return False
        if not any(all(d.taps for d in residue.dims) for residue in geometry.residues()):
            return False  # no tap reaches an input position: there is no window to share
        merged = _merged(geometry)
        taken = prod(merged.taps) * len(geometry.residues())
        return taken <= MOST_WASTE * geometry.taps and self._direct.supports_one(a, b, merged, b.data.shape[0], scaled)

    def correlate(self, data: Plane, weight: Plane, correlation: Correlation, scales: Scales | None) -> Tensor:
        """See ``Route.correlate``."""
        return self._direct.correlate(data, weight, correlation, scales)

    def grad_weight(self, g: Plane, x: Plane, geometry: ConvGeometry) -> Tensor:
        """There is none, see ``supports``."""
        return self._direct.grad_weight(g, x, geometry)

    def run(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scales: Scales | None = None) -> Tensor:
        """See ``Route.run``."""
        channels, residues = b.data.shape[-1], geometry.residues()
        merged = _merged(geometry)
        weight = b.data.new_zeros(len(residues), channels, *merged.taps, b.data.shape[0])
        starts = [-before for before, _ in merged.padding]
        for own, residue in zip(weight, residues, strict=True):
            if all(d.taps for d in residue.dims):
                for axis, (dim, start) in enumerate(zip(residue.dims, starts, strict=True), start=1):
                    own = own.narrow(axis, dim.offset - start, len(dim.taps))
                own.copy_(transposed_weight(b, residue, groups=1).data)
        if scales is not None and scales.right.dim():
            scales = scales._replace(right=scales.right.repeat(len(residues)))
        stacked = self._direct.correlate(a, Plane(weight.flatten(0, 1), b.scale), merged, scales)
        return _spread(stacked, geometry, channels)


def _merged(geometry: ConvGeometry) -> Correlation:
    """The correlation whose window covers those of all residue classes."""
    per_axis = [[dim for dim in dims if dim.taps] for dims in zip(*(r.dims for r in geometry.residues()), strict=True)]
    starts = [min(d.offset for d in dims) for dims in per_axis]
    taps = [max(d.offset + len(d.taps) for d in dims) - s for dims, s in zip(per_axis, starts, strict=True)]
    sizes = [-(-n // s) for n, s in zip(geometry.input_size, geometry.stride, strict=True)]
    axes = zip(starts, sizes, taps, geometry.output_size, strict=True)
    padding = tuple((-start, start + size + count - 1 - n_out) for start, size, count, n_out in axes)
    ones = (1,) * len(sizes)
    return Correlation(tuple(sizes), ones, tuple(taps), ones, padding, 1)


def _spread(stacked: Tensor, geometry: ConvGeometry, channels: int) -> Tensor:
    """``(N, *size, residues · C)`` to ``(N, *in, C)``: position t of class r becomes t · stride + r."""
    dims = len(geometry.stride)
    classes = [min(s, n) for s, n in zip(geometry.stride, geometry.input_size, strict=True)]
    sizes = stacked.shape[1:-1]
    spread = (n * c for n, c in zip(sizes, classes, strict=True))
    result = empty(len(stacked), *spread, channels, dtype=stacked.dtype)
    by_class = stacked.unflatten(-1, (*classes, channels))
    for axis in range(dims):  # (N, *size, *class, C) to (N, size, class, size, class, ..., C)
        by_class = by_class.movedim(1 + dims + axis, 2 + 2 * axis)
    positions = result.view(len(stacked), *(n for pair in zip(sizes, classes, strict=True) for n in pair), channels)
    positions.copy_(by_class)
    if result.shape[1:-1] == geometry.input_size:
        return result
    inside = (slice(None), *map(slice, geometry.input_size))
    return result[inside].clone(memory_format=torch.contiguous_format)
