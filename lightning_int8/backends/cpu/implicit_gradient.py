"""grad_weight of a convolution by ``implicit_gradient_gemm``: packing, tables, and the work of each thread."""

from __future__ import annotations

from functools import lru_cache, partial
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu import centre, implicit_gradient_gemm, panels, team, threads
from lightning_int8.backends.cpu.arrays import as_array
from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.correlation import Correlation, grid_offsets
from lightning_int8.backends.cpu.implicit_conv import BLOCK_BYTES, SMALLEST_PIECE, pieces_of
from lightning_int8.backends.cpu.microkernel import LANES, QUAD, ROWS, WIDTH
from lightning_int8.backends.cpu.route import Scales
from lightning_int8.backends.group_blocks import Block, blocks

_MOST_CHANNELS = 384  # rows that share a panel
_PANEL_BYTES = 20 << 10  # of a panel that all rows are multiplied with: they stay in the first-level cache, beside rows
_SUM_BYTES = 1 << 20  # sums that block after block is added to: they stay in the second-level cache
_NO_RUNS = np.zeros(0, np.int64)
_FEWEST_QUADS = 48  # of a matrix product that are added to them at a time


def grad_weight(
    g: Tensor,
    x: Tensor,
    zero: Tensor | None,
    correlation: Correlation,
    scales: Scales | None,
    dtype: torch.dtype,
    longest: int,
) -> Tensor:
    """The sums ``(Co, taps · C / groups)``, scaled if there are scales.

    Args:
        g: int8 ``(N, *size, Co)``, contiguous.
        x: int8 ``(N, *spatial, C)``, contiguous.
        zero: Zero point of x ``()``, or None.
        correlation: The windows of x that g is about.
        scales: See ``Scales``.
        dtype: float32 or bfloat16 with ``scales``, else int32; sums of more than ``longest`` products are int64.
        longest: Products over which int32 holds the sums.
    """
    assert g.is_contiguous()
    assert x.is_contiguous()
    is_product = all(n == 1 for n in correlation.taps) and not any(map(any, correlation.padding))
    if is_product:
        # Only the positions of x that have a window.
        spans = zip(correlation.size, correlation.step, strict=True)
        with_window = (slice(None), *(slice(0, (count - 1) * step + 1, step) for count, step in spans))
        g, x = (t.flatten(0, -2) for t in (g, x[with_window].contiguous()))
    is_long = prod(g.shape[:-1]) > longest
    own_blocks = blocks(correlation.groups, x.shape[-1], g.shape[-1])
    if is_long:
        # What is packed of a large batch should not take as much memory as the batch.
        samples = max(QUAD, longest // prod(g.shape[1:-1]) // QUAD * QUAD)
        ends = [_ends(g[..., b.outputs], None, None, b) for b in own_blocks]
        results = [torch.zeros(b.out_count, prod(correlation.taps) * b.in_count, dtype=torch.int64) for b in own_blocks]
    else:
        samples = len(g)
        ends = [_ends(g[..., b.outputs], zero, scales, b) for b in own_blocks]
        results = [empty(b.out_count, prod(correlation.taps) * b.in_count, dtype=dtype) for b in own_blocks]
    for own_g, own_x in zip(g.split(samples), x.split(samples), strict=True):
        if is_product:
            compute = partial(_of_product, own_g, own_x)
        else:
            width, stride = _width_and_stride(correlation, x.shape[-1])
            quads = panels.of_samples(own_x, correlation.padding, 0 if zero is None else int(zero), width, stride)
            compute = partial(_of_windows, own_g, tuple(own_x.shape), quads, correlation, longest)
        for part in zip(own_blocks, ends, results, strict=True):
            compute(*part)
    parts = [b.diagonal(result) for b, result in zip(own_blocks, results, strict=True)]
    result = parts[0] if len(parts) == 1 else torch.cat(parts)
    return _finished(result, g, zero, scales, dtype) if is_long else result


def _finished(sums: Tensor, g: Tensor, zero: Tensor | None, scales: Scales | None, dtype: torch.dtype) -> Tensor:
    """int64 sums with all that ``_Ends`` would have done."""
    if zero is not None:
        sums -= centre.row_sums(g.flatten(0, -2).t()).long()[:, None] * zero
    if scales is None:
        return sums
    return sums.to(torch.float32).mul_(scales.left.reshape(-1, 1)).mul_(scales.right).to(dtype)


class _Ends(NamedTuple):
    """What becomes of the sums of each channel of g.

    Attributes:
        factors: Scales: left, a number or one for each channel, and right.
        taken_off: int32, what to take off for the sake of a zero point.
    """

    factors: tuple[np.float32 | np.ndarray, np.float32]
    taken_off: np.ndarray


def _ends(g: Tensor, zero: Tensor | None, scales: Scales | None, block: Block) -> _Ends:
    taken_off = np.zeros(g.shape[-1], np.int32)
    if zero is not None:
        taken_off = (centre.row_sums(g.flatten(0, -2).t()) * zero).to(torch.int32).numpy()
    if scales is None:
        return _Ends((np.float32(1), np.float32(1)), taken_off)
    left = block.out(scales.left)
    own = np.float32(left.item()) if left.dim() == 0 else left.contiguous().numpy()
    return _Ends((own, np.float32(scales.right.item())), taken_off)


def _of_product(g: Tensor, x: Tensor, block: Block, ends: _Ends, result: Tensor) -> None:
    """``grad_weight`` of a matrix product, g ``(..., Co)`` and x ``(..., C)``."""
    out_channels, channels = block.out_count, block.in_count
    rows, width = prod(g.shape[:-1]), panels.slab_width(channels)
    # Sums of a part stay in cache, beside what is packed of some rows.
    wanted = max(torch.get_num_threads(), -(-out_channels * -(-channels // width) * WIDTH * 4 // _SUM_BYTES))
    own = -(-out_channels // min(wanted, out_channels))
    height = -(-(own + 1) // ROWS) * ROWS
    at_once = min(BLOCK_BYTES // ((height + channels) * QUAD), _PANEL_BYTES // (width * QUAD))
    at_once = min(max(_FEWEST_QUADS, at_once), -(-rows // QUAD))
    left = g.reshape(-1)[block.outputs.start :].view(torch.uint8).numpy()
    right = x.reshape(-1)[block.inputs.start :].view(torch.uint8).numpy()
    table = _panel_table(np.zeros(1, np.int64), _slabs(0, channels, width, at_once * width * QUAD), channels)
    pieces = threads.ends(-(-out_channels // own), -(-SMALLEST_PIECE // max(1, rows * channels * own)))
    sums = empty(len(pieces) - 1, len(table) * height * WIDTH, dtype=torch.int32).numpy()
    how = rows, (g.shape[-1], x.shape[-1], channels, width), at_once, table, (own, height)
    team.run(implicit_gradient_gemm.grad_product, (left, right, *how, *ends, sums, as_array(result)), pieces)


def _slabs(first: int, stop: int, width: int, distance: int) -> np.ndarray:
    """Channels side by side in slabs: (where each panel of some channels begins, in bytes, and its columns).

    Args:
        first: First channel.
        stop: Behind the last one.
        width: Channels of a slab; a wide one has several panels.
        distance: Of slabs, in bytes.
    """
    channels = np.arange(first, stop, min(width, panels.slab_width(stop - first)))
    return np.stack((channels // width * distance + channels % width * QUAD, np.diff(channels, append=stop)))


def _panel_table(offsets: np.ndarray, own: np.ndarray, run: int) -> np.ndarray:
    """Where each panel begins, its columns, and where they belong in a row; those of the same channels side by side.

    Args:
        offsets: int64, where each run of columns begins, in bytes.
        own: Panels of a run, see ``_slabs``.
        run: Its columns.
    """
    begins, widths = own[:, :, None]
    places = np.cumsum(widths, axis=0) - widths + np.arange(len(offsets)) * run
    columns = begins + offsets, np.broadcast_to(widths, places.shape), places
    return np.stack([column.reshape(-1) for column in columns], axis=1)


def _shares_panels(correlation: Correlation, channels: int) -> bool:
    """Whether taps that lie side by side share panels."""
    return channels < WIDTH and correlation.groups == 1 and correlation.tap_step[-1] == 1


def _width_and_stride(correlation: Correlation, channels: int) -> tuple[int, int]:
    """How ``panels.of_samples`` packs x: slabs as wide as panels, or of all channels where groups do not fill those."""
    if _shares_panels(correlation, channels):
        return channels, 1
    is_split = channels > WIDTH and (correlation.groups == 1 or channels // correlation.groups % WIDTH == 0)
    return panels.slab_width(channels) if is_split else channels, correlation.step[-1]


class _WindowsOfFours(NamedTuple):
    """The windows of four samples at a time, as pieces of equally distant ones.

    Attributes:
        begins: int64, where the first window of each piece begins, in bytes.
        length: Windows of a piece.
        step: Their distance in bytes.
        table: See ``_panel_table``; of copied windows where there are any.
        runs: int64, bytes from a window: the runs of columns that are copied side by side, where that fills panels
            better; none where windows are read where they lie.
    """

    begins: np.ndarray
    length: int
    step: int
    table: np.ndarray
    runs: np.ndarray


@lru_cache(maxsize=1024)
def _windows(correlation: Correlation, shape: tuple[int, ...], first: int, stop: int) -> _WindowsOfFours:
    """Windows of some channels of x ``shape``."""
    samples, *spatial, channels = shape
    padded = [n + lo + hi for n, (lo, hi) in zip(spatial, correlation.padding, strict=True)]
    *taps, across = correlation.taps
    *outer, length = correlation.size
    pitch, stride = _width_and_stride(correlation, channels)
    distances = [pitch * QUAD]
    for size in (panels.sorted_length(padded[-1], stride), *reversed(padded[:-1])):
        distances.insert(0, distances[0] * size)
    sample, *rows, position = distances
    fours = -(-samples // QUAD)
    own = _slabs(first, stop, pitch, fours * sample)
    of_rows = grid_offsets(taps, [s * n for s, n in zip(rows, correlation.tap_step, strict=False)]).numpy()
    runs = _NO_RUNS
    if _shares_panels(correlation, channels):
        run, across = across * channels, 1
        if -(-len(of_rows) * run // LANES) < len(of_rows) * -(-run // LANES):
            runs, of_rows, run = of_rows, np.zeros(1, np.int64), len(of_rows) * run
        own = _slabs(0, run, run, 0)
    in_row = panels.sorted_places(np.arange(across) * correlation.tap_step[-1], padded[-1], stride) * position
    table = _panel_table((of_rows[:, None] + in_row).reshape(-1), own, int(own[1].sum()))
    begins = grid_offsets(outer, [s * n for s, n in zip(rows, correlation.step, strict=False)]).numpy()
    begins = (np.arange(fours)[:, None] * sample + begins).reshape(-1)
    return _WindowsOfFours(begins, length, correlation.step[-1] // stride * position, table, runs)


def _of_windows(
    g: Tensor,
    shape: tuple[int, ...],
    quads: np.ndarray,
    correlation: Correlation,
    longest: int,
    block: Block,
    ends: _Ends,
    result: Tensor,
) -> None:
    """``grad_weight`` of windows of x ``shape``, which is packed."""
    windows, wanted = _windows(correlation, shape, block.inputs.start, block.inputs.stop), torch.get_num_threads()
    table, out_channels = windows.table, block.out_count
    is_copied, columns = len(windows.runs) > 0, int(table[:, 1].sum())
    window = -(-columns // LANES) * LANES
    step = window * QUAD if is_copied else windows.step
    # As many parts of the channels as it takes to give every thread panels of its own, and to stay in cache. Who copies
    # windows multiplies with all of them.
    parts = max(-(-wanted // (1 if is_copied else len(table))), -(-out_channels // _MOST_CHANNELS))
    channels = -(-out_channels // min(parts, out_channels))
    parts, height = -(-out_channels // channels), -(-(channels + 1) // ROWS) * ROWS
    left_step, count, length = height * QUAD, len(windows.begins), windows.length
    panel_step = min(step, int(table[:, 1].max()) * QUAD)
    rounds = max(panel_step / _PANEL_BYTES, left_step / BLOCK_BYTES) * count * length
    at_once = -(-count // max(1, round(rounds)))
    most = count
    if result.dtype == torch.int64:
        at_once = min(at_once, longest // (length * QUAD))
        most = longest // (length * QUAD) // at_once * at_once
    places = np.arange(count) % at_once * length
    pieces = pieces_of(places * left_step, places * step if is_copied else windows.begins)
    flat = g.reshape(-1)[block.outputs.start :].view(torch.uint8).numpy()
    begins = np.arange(correlation.positions) * g.shape[-1]
    groups = max(-(-wanted // parts), -(-len(table) * height * WIDTH * 4 // _SUM_BYTES))
    group = -(-len(table) // min(groups, len(table)))
    groups = -(-len(table) // group)
    smallest = -(-SMALLEST_PIECE // max(1, count * length * out_channels * WIDTH * group))
    ends_of_parts = threads.ends(groups * parts, smallest)

    def room(quads: int) -> np.ndarray:
        return empty(len(ends_of_parts) - 1, quads, dtype=torch.int32).numpy()

    copies = None
    if is_copied:
        copied = room(at_once * length * window + LANES).view(np.uint32)
        copies = windows.begins, windows.runs, columns // len(windows.runs), copied, window
    left = flat, len(g), g[0].numel(), begins, room(at_once * length * height).view(np.uint32)
    how = (pieces, length, most, at_once), table, (group, groups, channels, height)
    sums = room(group * height * WIDTH)
    arguments = left, (quads, windows.step, copies), *how, *ends, sums, as_array(result)
    team.run(implicit_gradient_gemm.grad_weight, arguments, ends_of_parts)
