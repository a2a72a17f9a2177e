"""Windows of a canonical ``(N, *spatial, C)`` tensor as rows of a matrix: a strided view, made dense by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def pad(x: Tensor, padding: Sequence[tuple[int, int]], fill: Tensor | None, slack: int = 0) -> Tensor:
    """Extend (or, where negative, crop) the spatial axes.

    Args:
        x: int8 ``(N, *spatial, C)``, contiguous.
        padding: (before, after) per spatial axis.
        fill: The zero point, ``()`` or ``(C,)``; None fills with 0.
        slack: Bytes that must be readable behind the result.
    """
    if slack == 0 and all(p == (0, 0) for p in padding):
        return x
    sizes = [n + lo + hi for n, (lo, hi) in zip(x.shape[1:-1], padding, strict=True)]
    count = x.shape[0] * prod(sizes) * x.shape[-1]
    out = x.new_empty(count + slack)[:count].view(x.shape[0], *sizes, x.shape[-1])
    border = 0 if fill is None else fill.to(torch.int8)
    inside, source = [slice(None)], [slice(None)]
    for axis, (n, (lo, hi)) in enumerate(zip(x.shape[1:-1], padding, strict=True), start=1):
        size = out.shape[axis]
        if lo > 0:
            out.narrow(axis, 0, min(lo, size))[:] = border
        if hi > 0:
            out.narrow(axis, max(size - hi, 0), min(hi, size))[:] = border
        kept = max(0, n + min(lo, 0) + min(hi, 0))
        inside.append(slice(max(lo, 0), max(lo, 0) + kept))
        source.append(slice(max(-lo, 0), max(-lo, 0) + kept))
    out[tuple(inside)] = x[tuple(source)]
    return out


def windows(
    x: Tensor, size: Sequence[int], step: Sequence[int], taps: Sequence[int], tap_step: Sequence[int]
) -> Tensor:
    """View ``(N, *size, *taps, C)`` of a padded tensor: element [n, t, j, c] is x[n, t · step + j · tap_step, c].

    Args:
        x: ``(N, *spatial, C)``; any strides.
        size: Number of windows per spatial axis.
        step: Distance of neighbouring windows.
        taps: Number of taps per spatial axis.
        tap_step: Distance of neighbouring taps.
    """
    strides = x.stride()
    spatial = strides[1:-1]
    return x.as_strided(
        (x.shape[0], *size, *taps, x.shape[-1]),
        (
            strides[0],
            *(s * n for s, n in zip(spatial, step, strict=True)),
            *(s * n for s, n in zip(spatial, tap_step, strict=True)),
            strides[-1],
        ),
        x.storage_offset(),
    )
