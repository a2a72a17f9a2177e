"""Padding in one pass: rows copied, borders filled, signed data made unsigned on the way where that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu import team
from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.compiler import compiled, wide_vectors
from lightning_int8.backends.cpu.threads import ends

_SMALLEST_PIECE = 1 << 18  # bytes that are worth a thread


def pad(data: Tensor, padding: Sequence[tuple[int, int]], fill: int, unsigned: bool, slack: int = 0) -> Tensor:
    """Extend (or, where negative, crop) the spatial axes.

    Args:
        data: int8 ``(N, *spatial, C)``, contiguous.
        padding: (before, after) per spatial axis.
        fill: int8 value of the border.
        unsigned: Whether to add 128 to everything and return uint8.
        slack: Bytes that must be readable behind the result.
    """
    samples, *spatial, channels = data.shape
    sizes = [n + lo + hi for n, (lo, hi) in zip(spatial, padding, strict=True)]
    count = samples * prod(sizes) * channels
    dtype = torch.uint8 if unsigned else torch.int8
    out = empty(count + slack, dtype=dtype)[:count].view(samples, *sizes, channels)
    sources = source_rows(tuple(spatial[:-1]), tuple(padding[:-1]))
    source = data.view(torch.uint8).view(samples, prod(spatial[:-1]), spatial[-1] * channels).numpy()
    target = out.view(torch.uint8).view(samples, len(sources), sizes[-1] * channels).numpy()
    flip = np.uint8(128 if unsigned else 0)
    shift = padding[-1][0] * channels

    arguments = source, sources, shift, np.uint8(fill & 0xFF) ^ flip, flip, target
    team.run(_pad, arguments, ends(samples, -(-_SMALLEST_PIECE * samples // max(1, count))))
    return out


@lru_cache(maxsize=1024)
def source_rows(sizes: tuple[int, ...], padding: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The row of the data that each row of the result copies, int64; -1 for a row of the border."""
    rows = np.zeros((), np.int64)
    for size, (before, after) in zip(sizes, padding, strict=True):
        index = np.arange(size + before + after) - before
        own = np.where((index >= 0) & (index < size), index, -1)
        rows = np.where((rows[..., None] < 0) | (own < 0), -1, rows[..., None] * size + own)
    return rows.reshape(-1)


@compiled
def _padded(source, rows, shift, border, flip, out, first, last, piece):
    """Row r of each sample: row ``rows[r]`` of the source moved by ``shift`` bytes, between bytes of the border."""
    width, length = out.shape[2], source.shape[2]
    begin, end = min(max(shift, 0), width), max(0, min(length + shift, width))
    for n in range(first, last):
        for r in range(rows.size):
            target = out[n, r]
            if rows[r] < 0 or end <= begin:
                _fill(target, border)
            else:
                _fill(target[:begin], border)
                _flipped(source[n, rows[r], begin - shift : end - shift], flip, target[begin:end])
                _fill(target[end:], border)
    return np.int32(0)


_pad_in_team = team.in_team(_padded)


@compiled
def _pad(arguments, ends, results, runtime):
    """``_padded``, for ``team.run``."""
    _pad_in_team(arguments, ends, results, runtime)


@compiled
def _fill(target, value):
    for i in range(target.size):
        target[i] = value


@compiled
def _flipped(source, flip, target):
    wide_vectors()
    for i in range(target.size):
        target[i] = source[i] ^ flip
