"""The contractions of a convolution by ``implicit_gemm``: packing, tables, and the work of each thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu import border, centre, implicit_gemm, panels
from lightning_int8.backends.cpu.arrays import as_array
from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.columns import window_tables
from lightning_int8.backends.cpu.correlation import Correlation, grid_offsets
from lightning_int8.backends.cpu.implicit_gemm import UNSIGNED
from lightning_int8.backends.cpu.microkernel import LANES, QUAD, ROWS, WIDTH, is_available
from lightning_int8.backends.cpu.route import Scales
from lightning_int8.backends.cpu.threads import split
from lightning_int8.backends.group_blocks import Block, blocks
from lightning_int8.numerics import Plane

__all__ = ["correlate", "grad_weight", "is_available"]

_compiled_correlate: Any = implicit_gemm.correlate  # numba's own type does not take unpacked arguments

_BLOCK_BYTES = 1 << 19  # what is multiplied, or added to, again and again: it stays in the second-level cache
_FEWEST_ROWS, _MOST_ROWS = 8, 256  # tiles of positions that are multiplied with one panel before the next one
_MOST_CHANNELS = 384  # rows of a grad_weight that share a panel
_LONGEST_PIECE = 96  # positions, where pieces may be of any length
_SUM_BYTES = 1 << 20  # sums of a matrix product that blocks of rows are added to
_FEWEST_QUADS = 48  # of rows that are added to them at a time
_SMALLEST_PIECE = 1 << 24  # products that are worth a thread
_ORIGIN = np.zeros(1, np.int64)


# --- Output and grad_input -------------------------------------------------------------------------------------------


def correlate(
    data: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    correlation: Correlation,
    scales: Scales | None,
    targets: np.ndarray,
    result: Tensor,
) -> None:
    """Write the windowed sums of one correlation, scaled if there are scales.

    Args:
        data: int8 ``(N, *spatial, C)``, contiguous.
        zero: Its zero point ``()``, or None.
        weight: int8 ``(Co, *taps, C / groups)``, any strides.
        correlation: The windows.
        scales: See ``Scales``; its form is taken but for the dtype.
        targets: int64: where each position of a sample belongs in one of ``result``.
        result: float32 or bfloat16 with ``scales``, else int32; contiguous, its last axis is Co.
    """
    assert data.is_contiguous()
    batch, channels = data.shape[0], data.shape[-1]
    fill = 0 if zero is None else int(zero)
    moments = None if scales is None else scales.form.moments
    # Windows of one tap and whole quads are copied and made unsigned a few at a time; others are read where they lie.
    is_single = all(n == 1 for n in correlation.taps) and channels // correlation.groups % QUAD == 0
    is_signed = is_single and all(p == (0, 0) for p in correlation.padding)
    source = data
    if not is_signed:
        with_axis, padding = (data, correlation.padding) if correlation.size else (data[:, None], ((0, 0),))
        source = border.pad(with_axis, padding, fill, True, QUAD)
    flat = source.as_strided((source.numel() + (0 if is_signed else QUAD),), (1,)).view(torch.uint8).numpy()
    samples, out = (source.stride(0), result.stride(0)), as_array(result)
    shape = tuple(source.shape[1:]) if correlation.size else (channels,)
    for block in blocks(correlation.groups, channels, len(weight)):
        own = weight if correlation.groups == 1 else block.weight(Plane(weight, torch.ones(())))
        windows = _windows(correlation, shape, block.inputs.start, block.inputs.stop, is_signed)
        packed = panels.of_weight(own, windows.runs, windows.run)
        starts = _column_sums(packed, windows.runs, windows.quads, len(own)) * -(int(UNSIGNED) + fill)
        factors = _factors(scales, block, len(starts))
        places = targets + block.outputs.start if block.outputs.start else targets
        # A weight that fits the cache is read as often as one likes, a larger one for as many positions as fit it.
        tiles = _FEWEST_ROWS
        if packed.nbytes > _BLOCK_BYTES // 2:
            tiles = _BLOCK_BYTES * batch * len(places) // (source.numel() * ROWS)
            tiles = max(_FEWEST_ROWS, min(tiles, _MOST_ROWS))
        operands = (flat, is_signed, samples, windows.origins, places, windows.pieces, windows.quads, packed)
        rest = (starts, factors, len(own), tiles * ROWS, out, None if moments is None else True)
        work = partial(_counted, partial(_compiled_correlate, *operands, *rest))
        parts = split(work, batch * len(places), -(-_SMALLEST_PIECE // own.numel()))
        if moments is not None:
            counts, sums = zip(*parts, strict=True)
            found = implicit_gemm.joined(np.array(counts), np.stack(sums).reshape(len(sums), 3, -1))
            moments[:, block.outputs] = torch.from_numpy(found)[:, : block.out_count]


def _counted(work: Callable[[int, int], np.ndarray], first: int, last: int) -> tuple[int, np.ndarray]:
    return last - first, work(first, last)


class _Windows(NamedTuple):
    """How windows are read, and a packed weight with them.

    Attributes:
        origins: int64: where the window of each position begins, within a sample.
        pieces: int64, pairs: where each piece of a window begins, from its origin, and of a panel.
        runs: Pieces of a window.
        run: Bytes of one.
        quads: Quads of one.
    """

    origins: np.ndarray
    pieces: np.ndarray
    runs: int
    run: int
    quads: int


@lru_cache(maxsize=1024)
def _windows(correlation: Correlation, shape: tuple[int, ...], first: int, stop: int, is_signed: bool) -> _Windows:
    """The windows of some channels of samples ``shape``; those of signed bytes have one piece, which begins at once."""
    origins, runs, run = window_tables(correlation, shape, first, stop)
    if is_signed:
        origins, runs = origins + runs, runs - runs
    quads = -(-run // QUAD)
    return _Windows(origins, _pieces(runs, np.arange(len(runs)) * quads * QUAD * WIDTH), len(runs), run, quads)


def _pieces(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.stack((left, right), axis=-1).reshape(-1)


def _column_sums(packed: np.ndarray, count: int, quads: int, columns: int) -> np.ndarray:
    """Sums of the columns of a packed weight, int32, whole vectors: a product with a row of ones."""
    whole = -(-columns // LANES) * LANES
    sums, unused = np.empty(whole, np.int32), np.zeros(whole, np.float32)
    ones, pieces = _row_of_ones(count, quads * QUAD)
    operands = ones, False, (0, 0), _ORIGIN, _ORIGIN, pieces, quads, packed, unused.view(np.int32)
    _compiled_correlate(*operands, (np.float32(1), unused, None), whole, ROWS, sums, None, 0, 1)
    return sums


@lru_cache(maxsize=1024)
def _row_of_ones(count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ones that each of ``count`` pieces of a panel is multiplied with, and the pieces."""
    return np.ones(length, np.uint8), _pieces(np.zeros(count, np.int64), np.arange(count) * length * WIDTH)


def _factors(scales: Scales | None, block: Block, columns: int) -> tuple[np.float32, np.ndarray, np.ndarray | None]:
    """Scales and the bias as ``correlate`` reads them."""
    right = np.zeros(columns, np.float32)
    if scales is None:
        return np.float32(1), right, None
    right[: block.out_count] = block.out(scales.right).numpy()
    bias = None
    if scales.form.bias is not None:
        bias = np.zeros(columns, np.float32)
        bias[: block.out_count] = block.out(scales.form.bias).numpy()
    return np.float32(scales.left.item()), right, bias


# --- grad_weight -----------------------------------------------------------------------------------------------------


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
        taken_off, factors = _ends(g.flatten(0, -2)[:, block.outputs], zero, scales, block)
        _sum_over_positions(g, padded, block, positions, table, factors, taken_off, as_array(result))
        results.append(block.diagonal(result))
    return results[0] if len(results) == 1 else torch.cat(results)


def _ends(
    g: Tensor, zero: Tensor | None, scales: Scales | None, block: Block
) -> tuple[np.ndarray, tuple[np.float32 | np.ndarray, np.float32]]:
    """What to take off the sums of each channel of g ``(rows, channels)`` for the sake of a zero point, and scales."""
    taken_off = np.zeros(g.shape[1], np.int32)
    if zero is not None:
        taken_off = (centre.row_sums(g.t()) * zero).to(torch.int32).numpy()
    if scales is None:
        return taken_off, (np.float32(1), np.float32(1))
    left = block.out(scales.left)
    own = np.float32(left.item()) if left.dim() == 0 else left.contiguous().numpy()
    return taken_off, (own, np.float32(scales.right.item()))


def _grad_product(g: Tensor, x: Tensor, zero: Tensor | None, scales: Scales | None, dtype: torch.dtype) -> Tensor:
    """``grad_weight`` of a matrix product, g ``(rows, Co)`` and x ``(rows, C)``."""
    (rows, out_channels), channels = g.shape, x.shape[1]
    (block,) = blocks(1, channels, out_channels)
    taken_off, factors = _ends(g, zero, scales, block)
    result = empty(out_channels, channels, dtype=dtype)
    table, threads = _columns(channels), torch.get_num_threads()
    # Sums of a part stay in cache, beside what is packed of some rows.
    wanted = max(threads, -(-out_channels * len(table) * WIDTH * 4 // _SUM_BYTES))
    own = -(-out_channels // min(wanted, out_channels))
    height = -(-(own + 1) // ROWS) * ROWS
    at_once = max(_FEWEST_QUADS, _BLOCK_BYTES // ((height + channels) * QUAD))
    operands = (g.reshape(-1).view(torch.uint8).numpy(), x.reshape(-1).view(torch.uint8).numpy(), rows)
    how = ((out_channels, channels), min(at_once, -(-rows // QUAD)), table)
    out = as_array(result)

    def work(first: int, last: int) -> None:
        sums = np.empty(len(table) * height * WIDTH, np.int32)
        for channel in range(first * own, min(last * own, out_channels), own):
            part = (min(own, out_channels - channel), channel, height)
            implicit_gemm.grad_product(*operands, *how, part, factors, taken_off, sums, out)

    split(work, -(-out_channels // own), -(-_SMALLEST_PIECE // max(1, rows * channels * own)))
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
    pieces = _pieces(positions.first * left_step, positions.windows)
    at_once = max(1, _BLOCK_BYTES // (positions.length * (height * QUAD + positions.step)))
    group = max(1, min(-(-len(table) * parts // threads), _BLOCK_BYTES // (height * WIDTH * out.itemsize)))
    groups = -(-len(table) // group)

    def work(first: int, last: int) -> None:
        sums = np.empty(group * height * WIDTH, np.int32)
        for unit in range(first, last):
            part, own_panels = unit // groups, table[unit % groups * group :][:group]
            channel = part * channels
            own_channels = (min(channels, block.out_count - channel), channel, height)
            operands = (left, part * height * QUAD, left_step), (padded, positions.step)
            rest = (own_panels, own_channels, factors, taken_off, sums, out)
            implicit_gemm.grad_weight(*operands, pieces, positions.length, at_once, *rest)

    split(work, groups * parts, -(-_SMALLEST_PIECE // max(1, g.numel() * WIDTH * group)))


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
