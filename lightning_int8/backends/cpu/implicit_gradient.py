"""grad_weight of a convolution by ``implicit_gradient_gemm``: packing, tables, and the work of each thread."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu import centre, implicit_gradient_gemm, panels
from lightning_int8.backends.cpu.arrays import as_array
from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.columns import window_tables
from lightning_int8.backends.cpu.correlation import Correlation, grid_offsets
from lightning_int8.backends.cpu.implicit_conv import BLOCK_BYTES, SMALLEST_PIECE, pieces_of
from lightning_int8.backends.cpu.microkernel import QUAD, ROWS, WIDTH
from lightning_int8.backends.cpu.route import Scales
from lightning_int8.backends.cpu.threads import split
from lightning_int8.backends.group_blocks import Block, blocks

_MOST_CHANNELS = 384  # rows that share a panel
_LONGEST_PIECE = 96  # positions, where pieces may be of any length
_SUM_BYTES = 1 << 20  # sums of a matrix product that blocks of rows are added to
_FEWEST_QUADS = 48  # of rows that are added to them at a time


def grad_weight(
    g: Tensor, x: Tensor, zero: Tensor | None, correlation: Correlation, scales: Scales | None, dtype: torch.dtype
) -> Tensor:
    """The sums ``(Co, taps · C / groups)``, scaled if there are scales.

    Args:
        g: int8 ``(N, *size, Co)``, contiguous.
        x: int8 ``(N, *spatial, C)``, contiguous.
        zero: Zero point of x ``()``, or None.
        correlation: The windows of x that g is about.
        scales: See ``Scales``.
        dtype: float32 or bfloat16 with ``scales``, else int32.
    """
    assert g.is_contiguous()
    assert x.is_contiguous()
    channels, out_channels = x.shape[-1], g.shape[-1]
    if correlation.is_pointwise and correlation.groups == 1:
        return _grad_product(g.flatten(0, -2), x.flatten(0, -2), zero, scales, dtype)
    shape = (*(n + lo + hi for n, (lo, hi) in zip(x.shape[1:-1], correlation.padding, strict=True)), channels)
    positions = _positions(correlation, shape, -(-len(g) // QUAD))
    padded = panels.of_samples(x, correlation.padding, 0 if zero is None else int(zero), positions.more)
    results = []
    for block in blocks(correlation.groups, channels, out_channels):
        table = _panel_table(correlation, shape, block.inputs.start, block.inputs.stop)
        result = empty(block.out_count, int(table[:, 1].sum()), dtype=dtype)
        own_scales = scales and scales._replace(left=block.out(scales.left))
        taken_off, factors = _ends(g.flatten(0, -2)[:, block.outputs], zero, own_scales)
        _sum_over_positions(g, padded, block, positions, table, factors, taken_off, as_array(result))
        results.append(block.diagonal(result))
    return results[0] if len(results) == 1 else torch.cat(results)


def _ends(
    g: Tensor, zero: Tensor | None, scales: Scales | None
) -> tuple[np.ndarray, tuple[np.float32 | np.ndarray, np.float32]]:
    """What to take off the sums of each channel of g ``(rows, channels)`` for the sake of a zero point, and scales."""
    taken_off = np.zeros(g.shape[1], np.int32)
    if zero is not None:
        taken_off = (centre.row_sums(g.t()) * zero).to(torch.int32).numpy()
    if scales is None:
        return taken_off, (np.float32(1), np.float32(1))
    left = scales.left
    own = np.float32(left.item()) if left.dim() == 0 else left.contiguous().numpy()
    return taken_off, (own, np.float32(scales.right.item()))


def _grad_product(g: Tensor, x: Tensor, zero: Tensor | None, scales: Scales | None, dtype: torch.dtype) -> Tensor:
    """``grad_weight`` of a matrix product, g ``(rows, Co)`` and x ``(rows, C)``."""
    (rows, out_channels), channels = g.shape, x.shape[1]
    taken_off, factors = _ends(g, zero, scales)
    result = empty(out_channels, channels, dtype=dtype)
    table, threads = _columns(channels), torch.get_num_threads()
    # Sums of a part stay in cache, beside what is packed of some rows.
    wanted = max(threads, -(-out_channels * len(table) * WIDTH * 4 // _SUM_BYTES))
    own = -(-out_channels // min(wanted, out_channels))
    height = -(-(own + 1) // ROWS) * ROWS
    at_once = max(_FEWEST_QUADS, BLOCK_BYTES // ((height + channels) * QUAD))
    operands = (g.reshape(-1).view(torch.uint8).numpy(), x.reshape(-1).view(torch.uint8).numpy(), rows)
    how = ((out_channels, channels), min(at_once, -(-rows // QUAD)), table)
    out = as_array(result)

    def work(first: int, last: int) -> None:
        sums = np.empty(len(table) * height * WIDTH, np.int32)
        for channel in range(first * own, min(last * own, out_channels), own):
            part = (min(own, out_channels - channel), channel, height)
            implicit_gradient_gemm.grad_product(*operands, *how, part, factors, taken_off, sums, out)

    split(work, -(-out_channels // own), -(-SMALLEST_PIECE // max(1, rows * channels * own)))
    return result


@lru_cache(maxsize=1024)
def _columns(count: int) -> np.ndarray:
    """The panels of rows of so many bytes, see ``_panel_table``."""
    begins = np.arange(0, count, WIDTH)
    return np.stack((begins * QUAD, np.minimum(count - begins, WIDTH), begins), axis=1)


def _sum_over_positions(
    g: Tensor,
    padded: np.ndarray,
    block: Block,
    positions: _Positions,
    table: np.ndarray,
    factors: Any,
    taken_off: np.ndarray,
    out: np.ndarray,
) -> None:
    """Write ``(channels of g, columns of the panels)``, flat."""
    threads = torch.get_num_threads()
    # As many parts of the channels as it takes to give every thread panels of its own, and to stay in cache.
    wanted = max(-(-threads // len(table)), -(-block.out_count // _MOST_CHANNELS))
    channels = -(-block.out_count // min(wanted, block.out_count))
    parts = -(-block.out_count // channels)
    left, height = panels.of_gradient(g, block.outputs.start, block.out_count, channels, positions.more)
    left_step = parts * height * QUAD
    pieces = pieces_of(positions.first * left_step, positions.windows)
    at_once = max(1, BLOCK_BYTES // (positions.length * (height * QUAD + positions.step)))
    group = max(1, min(-(-len(table) * parts // threads), BLOCK_BYTES // (height * WIDTH * out.itemsize)))
    groups = -(-len(table) // group)

    def work(first: int, last: int) -> None:
        sums = np.empty(group * height * WIDTH, np.int32)
        for unit in range(first, last):
            part, own_panels = unit // groups, table[unit % groups * group :][:group]
            channel = part * channels
            own_channels = (min(channels, block.out_count - channel), channel, height)
            operands = (left, part * height * QUAD, left_step), (padded, positions.step)
            rest = (own_panels, own_channels, factors, taken_off, sums, out)
            implicit_gradient_gemm.grad_weight(*operands, pieces, positions.length, at_once, *rest)

    split(work, groups * parts, -(-SMALLEST_PIECE // max(1, g.numel() * WIDTH * group)))


@lru_cache(maxsize=1024)
def _panel_table(correlation: Correlation, shape: tuple[int, ...], first: int, stop: int) -> np.ndarray:
    """Where each panel begins in quads of samples ``shape``, its columns, and where they belong in a row."""
    _, runs, run = window_tables(correlation, shape, first, stop)
    columns = np.arange(0, run, WIDTH)
    begins = (runs[:, None] + columns).reshape(-1) * QUAD
    places = (np.arange(len(runs))[:, None] * run + columns).reshape(-1)
    return np.stack((begins, np.tile(np.minimum(run - columns, WIDTH), len(runs)), places), axis=1)


class _Positions(NamedTuple):
    """Positions of four samples at a time, as pieces of equally distant ones.

    Attributes:
        first: int64, the number of the first position of each piece.
        windows: int64, where its window begins, in bytes of the quads of the padded samples.
        length: Positions of a piece.
        step: Distance of their windows in bytes.
        more: Positions beyond the last ones that the pieces reach.
    """

    first: np.ndarray
    windows: np.ndarray
    length: int
    step: int
    more: int


@lru_cache(maxsize=1024)
def _positions(correlation: Correlation, shape: tuple[int, ...], fours: int) -> _Positions:
    """Positions of ``fours`` times four samples that are padded to ``shape``."""
    strides = [prod(shape[axis + 1 :]) * QUAD for axis in range(len(shape) - 1)]
    if correlation.is_pointwise:
        # All windows lie side by side: pieces of any length.
        total = fours * correlation.positions
        pieces = max(1, -(-total // _LONGEST_PIECE))
        length, step = max(1, -(-total // pieces)), shape[-1] * QUAD
        first = np.arange(pieces) * length
        return _Positions(first, first * step, length, step, pieces * length - total)
    *outer, length = correlation.size
    *outer_steps, step = [s * n for s, n in zip(strides, correlation.step, strict=True)]
    windows = grid_offsets(outer, outer_steps).numpy()
    samples = np.arange(fours)[:, None] * (prod(shape) * QUAD)
    return _Positions(np.arange(fours * len(windows)) * length, (samples + windows).reshape(-1), length, step, 0)
