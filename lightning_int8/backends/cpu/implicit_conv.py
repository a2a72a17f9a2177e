"""Output and grad_input of a convolution by ``implicit_gemm``: packing, tables, and the work of each thread."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu import border, implicit_gemm, panels, team, threads
from lightning_int8.backends.cpu.arrays import as_array
from lightning_int8.backends.cpu.columns import window_tables
from lightning_int8.backends.cpu.correlation import Correlation
from lightning_int8.backends.cpu.implicit_gemm import UNSIGNED
from lightning_int8.backends.cpu.microkernel import LANES, QUAD, ROWS, WIDTH
from lightning_int8.backends.cpu.route import Scales
from lightning_int8.backends.group_blocks import Block, blocks
from lightning_int8.numerics import Plane

BLOCK_BYTES = 1 << 19
"""What is multiplied, or added to, again and again: it stays in the second-level cache."""

SMALLEST_PIECE = 1 << 24
"""Products that are worth a thread."""

_FEWEST_ROWS, _MOST_ROWS = 8, 256  # tiles of positions that are multiplied with one panel before the next one
_ORIGIN = np.zeros(1, np.int64)


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


class Plan(NamedTuple):
    """All that the shapes of a correlation decide.

    Attributes:
        padding: (before, after) per axis of the data, of which there is at least one; None where windows are one tap
            of whole quads: those are copied and made unsigned a few at a time, others read where they lie.
        targets: int64: where each position of a sample belongs in one of the result.
        turned: Axes of the weight whose taps come in the opposite order.
        parts: Groups of channels and their windows.
    """

    padding: tuple[tuple[int, int], ...] | None
    targets: np.ndarray
    turned: tuple[int, ...]
    parts: list[tuple[Block, _Windows]]


def plan(
    correlation: Correlation,
    size: tuple[int, ...],
    channels: int,
    out_channels: int,
    targets: np.ndarray,
    turned: tuple[int, ...],
) -> Plan:
    """The plan for data ``(N, *size, channels)``; see ``Plan`` for the last two."""
    is_single = all(n == 1 for n in correlation.taps) and channels // correlation.groups % QUAD == 0
    is_signed = is_single and all(p == (0, 0) for p in correlation.padding)
    padded = (n + lo + hi for n, (lo, hi) in zip(size, correlation.padding, strict=True))
    shape = (*padded, channels)
    parts = [
        (block, _windows(correlation, shape, block.inputs.start, block.inputs.stop, is_signed))
        for block in blocks(correlation.groups, channels, out_channels)
    ]
    return Plan(None if is_signed else correlation.padding or ((0, 0),), targets, turned, parts)


def correlate(
    data: Tensor, zero: Tensor | None, weight: Tensor, plan: Plan, scales: Scales | None, result: Tensor
) -> None:
    """Write the windowed sums of one correlation, scaled if there are scales.

    Args:
        data: int8 ``(N, *spatial, C)``, contiguous.
        zero: Its zero point ``()``, or None.
        weight: int8 ``(Co, *taps, C / groups)``, any strides.
        plan: The windows, and where their sums belong.
        scales: See ``Scales``; its form is taken but for the dtype.
        result: float32 or bfloat16 with ``scales``, else int32; contiguous, its last axis is Co.
    """
    batch, fill = data.shape[0], 0 if zero is None else int(zero)
    moments = None if scales is None else scales.form.moments
    if plan.padding is None:
        flat, distance = as_array(data).view(np.uint8), data.stride(0)
    else:
        with_axis = data if data.dim() > 2 else data[:, None]
        source = border.pad(with_axis, plan.padding, fill, True, QUAD)
        distance = source.stride(0)
        flat = source.as_strided((batch * distance + QUAD,), (1,)).numpy()
    is_signed, samples, out = plan.padding is None, (distance, result.stride(0)), as_array(result)
    positions = plan.targets.size
    for block, windows in plan.parts:
        is_all = block.groups == len(plan.parts) == 1
        own = weight if is_all else block.weight(Plane(weight, torch.ones(())))
        packed = panels.of_weight(own, windows.runs, windows.run, plan.turned)
        columns = block.out_count
        starts = _column_sums(packed, windows.runs, windows.quads, columns) * -(int(UNSIGNED) + fill)
        factors = _factors(scales, block, len(starts))
        # A weight that fits the cache is read as often as one likes, a larger one for as many positions as fit it.
        tiles = _FEWEST_ROWS
        if packed.nbytes > BLOCK_BYTES // 2:
            tiles = BLOCK_BYTES * batch * positions // (flat.size * ROWS)
            tiles = max(_FEWEST_ROWS, min(tiles, _MOST_ROWS))
        operands = (flat, is_signed, samples, windows.origins, plan.targets, windows.pieces, windows.quads, packed)
        ends = threads.ends(batch * positions, -(-SMALLEST_PIECE // own.numel()))
        found = None if moments is None else np.empty((len(ends) - 1, 3 * len(starts)))
        rest = starts, factors, columns, tiles * ROWS, out[block.outputs.start :], found
        team.run(implicit_gemm.correlate, (*operands, *rest), ends)
        if moments is not None and found is not None:
            joined = implicit_gemm.joined(np.diff(ends), found.reshape(len(found), 3, -1))
            moments[:, block.outputs] = torch.from_numpy(joined)[:, :columns]


def _windows(correlation: Correlation, shape: tuple[int, ...], first: int, stop: int, is_signed: bool) -> _Windows:
    """The windows of some channels of samples ``shape``; those of signed bytes have one piece, which begins at once."""
    origins, runs, run = window_tables(correlation, shape, first, stop)
    if is_signed:
        origins, runs = origins + runs, runs - runs
    quads = -(-run // QUAD)
    return _Windows(origins, pieces_of(runs, np.arange(len(runs)) * quads * QUAD * WIDTH), len(runs), run, quads)


def pieces_of(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Pairs, flat: where each piece begins on the left and on the right."""
    return np.stack((left, right), axis=-1).reshape(-1)


def _column_sums(packed: np.ndarray, count: int, quads: int, columns: int) -> np.ndarray:
    """Sums of the columns of a packed weight, int32, whole vectors: a product with a row of ones."""
    whole = -(-columns // LANES) * LANES
    sums, unused = np.empty(whole, np.int32), np.zeros(whole, np.float32)
    ones, pieces = _row_of_ones(count, quads * QUAD)
    operands = ones, False, (0, 0), _ORIGIN, _ORIGIN, pieces, quads, packed, unused.view(np.int32)
    team.run(implicit_gemm.correlate, (*operands, (np.float32(1), unused, None), whole, ROWS, sums, None), (0, 1))
    return sums


@lru_cache(maxsize=1024)
def _row_of_ones(count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ones that each of ``count`` pieces of a panel is multiplied with, and the pieces."""
    return np.ones(length, np.uint8), pieces_of(np.zeros(count, np.int64), np.arange(count) * length * WIDTH)


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
