"""grad_weight of a convolution by ``implicit_gradient_gemm``: packing, tables, and the work of each thread."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu import border, centre, implicit_gradient_gemm, panels
from lightning_int8.backends.cpu.arrays import as_array
from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.correlation import Correlation, grid_offsets
from lightning_int8.backends.cpu.implicit_conv import BLOCK_BYTES, SMALLEST_PIECE, pieces_of
from lightning_int8.backends.cpu.microkernel import QUAD, ROWS, WIDTH
from lightning_int8.backends.cpu.route import Scales
from lightning_int8.backends.cpu.threads import split
from lightning_int8.backends.group_blocks import blocks

_MOST_CHANNELS = 384  # rows that share a panel
_FEWEST_CHANNELS = 32  # of x that get panels of their own; taps that lie side by side share those of fewer
_PANEL_BYTES = 1 << 15  # of a panel that all rows are multiplied with: they stay in the first-level cache
_SUM_BYTES = 1 << 20  # sums that block after block is added to: they stay in the second-level cache
_FEWEST_QUADS = 48  # of a matrix product that are added to them at a time


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
    is_product = all(n == 1 for n in correlation.taps) and not any(map(any, correlation.padding))
    if is_product:
        # Only the positions of x that have a window.
        ends = [(n - 1) * step + 1 for n, step in zip(correlation.size, correlation.step, strict=True)]
        x = x[(slice(None), *(slice(0, end, step) for end, step in zip(ends, correlation.step, strict=True)))]
    results = []
    for block in blocks(correlation.groups, x.shape[-1], g.shape[-1]):
        own_g, own_x = g[..., block.outputs].contiguous(), x[..., block.inputs].contiguous()
        ends_of_sums = _ends(own_g, zero, scales and scales._replace(left=block.out(scales.left)))
        if is_product:
            result = _of_product(own_g, own_x, ends_of_sums, dtype)
        else:
            result = _of_windows(own_g, own_x, 0 if zero is None else int(zero), correlation, ends_of_sums, dtype)
        results.append(block.diagonal(result))
    return results[0] if len(results) == 1 else torch.cat(results)


class _Ends(NamedTuple):
    """What becomes of the sums of each channel of g.

    Attributes:
        factors: Scales: left, a number or one for each channel, and right.
        taken_off: int32, what to take off for the sake of a zero point.
    """

    factors: tuple[np.float32 | np.ndarray, np.float32]
    taken_off: np.ndarray


def _ends(g: Tensor, zero: Tensor | None, scales: Scales | None) -> _Ends:
    taken_off = np.zeros(g.shape[-1], np.int32)
    if zero is not None:
        taken_off = (centre.row_sums(g.flatten(0, -2).t()) * zero).to(torch.int32).numpy()
    if scales is None:
        return _Ends((np.float32(1), np.float32(1)), taken_off)
    left = scales.left
    own = np.float32(left.item()) if left.dim() == 0 else left.contiguous().numpy()
    return _Ends((own, np.float32(scales.right.item())), taken_off)


def _of_product(g: Tensor, x: Tensor, ends: _Ends, dtype: torch.dtype) -> Tensor:
    """``grad_weight`` of a matrix product, g ``(..., Co)`` and x ``(..., C)``."""
    out_channels, channels = g.shape[-1], x.shape[-1]
    rows, width, threads = g.numel() // out_channels, panels.slab_width(channels), torch.get_num_threads()
    result = empty(out_channels, channels, dtype=dtype)
    # Sums of a part stay in cache, beside what is packed of some rows.
    wanted = max(threads, -(-out_channels * -(-channels // width) * WIDTH * 4 // _SUM_BYTES))
    own = -(-out_channels // min(wanted, out_channels))
    height = -(-(own + 1) // ROWS) * ROWS
    at_once = min(BLOCK_BYTES // ((height + channels) * QUAD), _PANEL_BYTES // (width * QUAD))
    at_once = min(max(_FEWEST_QUADS, at_once), -(-rows // QUAD))
    operands = (g.reshape(-1).view(torch.uint8).numpy(), x.reshape(-1).view(torch.uint8).numpy(), rows)
    table = _panel_table(np.zeros(1, np.int64), channels, width, at_once * width * QUAD)
    how = ((out_channels, channels, width), at_once, table)
    out = as_array(result)

    def work(first: int, last: int) -> None:
        sums = empty(len(table) * height * WIDTH, dtype=torch.int32).numpy()
        for channel in range(first * own, min(last * own, out_channels), own):
            part = (min(own, out_channels - channel), channel, height)
            implicit_gradient_gemm.grad_product(*operands, *how, part, *ends, sums, out)

    split(work, -(-out_channels // own), -(-SMALLEST_PIECE // max(1, rows * channels * own)))
    return result


def _panel_table(offsets: np.ndarray, run: int, width: int, distance: int) -> np.ndarray:
    """Where each panel begins, its columns, and where they belong in a row; those of the same channels side by side.

    Args:
        offsets: int64, where each run of columns begins, in bytes.
        run: Its columns.
        width: Those of a panel.
        distance: Of the panels of a run, in bytes.
    """
    columns = np.arange(0, run, width)[:, None]
    begins = columns // width * distance + offsets
    places = columns + np.arange(len(offsets)) * run
    widths = np.broadcast_to(np.minimum(run - columns, width), places.shape)
    return np.stack([column.reshape(-1) for column in (begins, widths, places)], axis=1)


def _of_windows(g: Tensor, x: Tensor, fill: int, correlation: Correlation, ends: _Ends, dtype: torch.dtype) -> Tensor:
    """``grad_weight`` of windows, outside of which x is ``fill``."""
    fours, channels = -(-len(g) // QUAD), x.shape[-1]
    shape = (*(n + lo + hi for n, (lo, hi) in zip(x.shape[1:-1], correlation.padding, strict=True)), channels)
    windows = _windows(correlation, shape, fours)
    if channels < _FEWEST_CHANNELS:
        x = border.pad(x, correlation.padding, fill, False).flatten(-2)
        quads = panels.of_samples(x, ((0, 0),) * (x.dim() - 2), fill, x.shape[-1], 1)
    else:
        quads = panels.of_samples(x, correlation.padding, fill, panels.slab_width(channels), correlation.step[-1])
    result = empty(g.shape[-1], int(windows.table[:, 1].sum()), dtype=dtype)
    _sum_over_positions(g, quads, windows, ends, as_array(result))
    return result


class _Windows(NamedTuple):
    """The windows of four samples at a time, as pieces of equally distant ones.

    Attributes:
        begins: int64, where the first window of each piece begins, in bytes.
        length: Windows of a piece.
        step: Their distance in bytes.
        table: See ``_panel_table``.
    """

    begins: np.ndarray
    length: int
    step: int
    table: np.ndarray


@lru_cache(maxsize=1024)
def _windows(correlation: Correlation, shape: tuple[int, ...], fours: int) -> _Windows:
    """Windows of ``fours`` times four samples that are padded to ``shape``, as ``_of_windows`` packs them."""
    *spatial, channels = shape
    *taps, across = correlation.taps
    *outer, length = correlation.size
    stride, pitch, run = correlation.step[-1], panels.slab_width(channels), channels
    if channels < _FEWEST_CHANNELS:
        stride, pitch = 1, channels
        if correlation.tap_step[-1] == 1:
            across, run = 1, across * channels
    strides = [pitch * QUAD]
    for size in (panels.sorted_length(spatial[-1], stride), *reversed(spatial[:-1])):
        strides.insert(0, strides[0] * size)
    sample, *steps, position = strides
    of_rows = grid_offsets(taps, [s * n for s, n in zip(steps, correlation.tap_step, strict=False)]).numpy()
    in_row = panels.sorted_places(np.arange(across) * correlation.tap_step[-1], spatial[-1], stride) * position
    offsets = (of_rows[:, None] + in_row).reshape(-1)
    if channels < _FEWEST_CHANNELS:
        width = panels.slab_width(run)
        table = _panel_table(offsets, run, width, width * QUAD)
    else:
        table = _panel_table(offsets, run, pitch, fours * sample)
    rows = grid_offsets(outer, [s * n for s, n in zip(steps, correlation.step, strict=False)]).numpy()
    begins = (np.arange(fours)[:, None] * sample + rows).reshape(-1)
    return _Windows(begins, length, correlation.step[-1] // stride * position, table)


def _sum_over_positions(g: Tensor, quads: np.ndarray, windows: _Windows, ends: _Ends, out: np.ndarray) -> None:
    """Write ``(channels of g, columns of the panels)``, flat."""
    threads, table, out_channels = torch.get_num_threads(), windows.table, g.shape[-1]
    # As many parts of the channels as it takes to give every thread panels of its own, and to stay in cache.
    wanted = max(-(-threads // len(table)), -(-out_channels // _MOST_CHANNELS))
    channels = -(-out_channels // min(wanted, out_channels))
    parts = -(-out_channels // channels)
    left, height = panels.of_gradient(g, channels)
    left_step, count, length = height * QUAD, len(windows.begins), windows.length
    pieces = pieces_of(np.arange(count) * length * left_step, windows.begins)
    rounds = max(windows.step / _PANEL_BYTES, left_step / BLOCK_BYTES) * count * length
    at_once = -(-count // max(1, round(rounds)))
    groups = max(-(-threads // parts), -(-len(table) * height * WIDTH * 4 // _SUM_BYTES))
    group = -(-len(table) // min(groups, len(table)))
    groups = -(-len(table) // group)

    def work(first: int, last: int) -> None:
        sums = empty(group * height * WIDTH, dtype=torch.int32).numpy()
        for unit in range(first, last):
            part, own_panels = unit // groups, table[unit % groups * group :][:group]
            channel = part * channels
            own_channels = (min(channels, out_channels - channel), channel, height)
            operands = (left, part * count * length * left_step, left_step), (quads, windows.step)
            implicit_gradient_gemm.grad_weight(
                *operands, pieces, length, at_once, own_panels, own_channels, *ends, sums, out
            )

    split(work, groups * parts, -(-SMALLEST_PIECE // max(1, g.numel() * WIDTH * group)))
