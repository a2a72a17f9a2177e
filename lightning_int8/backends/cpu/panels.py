"""Operands in the order in which ``microkernel`` reads them: quads, the four bytes that one step sums, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from lightning_int8.backends.cpu import team, threads
from lightning_int8.backends.cpu.arrays import as_array
from lightning_int8.backends.cpu.border import source_rows
from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.compiler import compiled
from lightning_int8.backends.cpu.correlation import grid_offsets
from lightning_int8.backends.cpu.llvm import load_lanes, place_in, splat_of, store_lanes
from lightning_int8.backends.cpu.microkernel import LANES, QUAD, WIDTH
from lightning_int8.backends.cpu.transpose import transpose_words

AT_ONCE = 64
"""Bytes of each of four rows that are interleaved at a time."""

_BYTES, _QUADS = ir.VectorType(ir.IntType(8), AT_ONCE), ir.VectorType(ir.IntType(32), AT_ONCE)

_ONES = np.uint32(0x01010101)
FLIP = np.uint32(0x80808080)
NO_FLIP = np.uint32(0)
_PRESENT = np.array([0, 0xFF, 0xFFFF, 0xFFFFFF, 0xFFFFFFFF], np.uint32)

_SMALLEST_PIECE = 1 << 16  # quads that are worth a thread


def of_weight(weight: Tensor, runs: int, run: int, turned: tuple[int, ...] = ()) -> np.ndarray:
    """Panels ``(panel, run, quad, WIDTH, QUAD)``, as uint8, of columns and what they sum.

    Args:
        weight: int8 ``(columns, *taps, C)``, any strides.
        runs: Runs of a window.
        run: Bytes of a run: the taps and channels of a column are ``runs · run``.
        turned: Axes of the weight along which the last tap comes first.
    """
    columns, channels = weight.shape[0], weight.shape[-1]
    quads = -(-run // QUAD)
    words = runs * quads
    is_whole = columns % WIDTH == 0 and run % QUAD == 0
    count = -(-columns // WIDTH)
    out = empty(count * WIDTH * words * QUAD, dtype=torch.uint8).numpy()
    if not is_whole:
        out.fill(0)
    by_panel = out.view(np.uint32).reshape(count, -1)
    arguments: tuple[Any, ...]
    if weight.stride(0) == 1 and channels % QUAD == 0:
        begins, places, extent = _quads_of_rows(tuple(weight.shape), weight.stride(), turned)
        flat = weight.as_strided((extent,), (1,)).numpy().view(np.uint8)
        entry, arguments = _interleave_columns, (flat, begins, weight.stride(-1), columns, by_panel, places)
    else:
        rows = (weight.flip(turned) if turned else weight).reshape(columns, runs, run)
        if run % QUAD:
            rows = torch.nn.functional.pad(rows, (0, -run % QUAD))
        as_words = as_array(rows.contiguous()).view(np.uint32).reshape(columns, -1)
        entry, arguments = transpose_words, (as_words, by_panel)
    team.run(entry, arguments, threads.ends(count, -(-_SMALLEST_PIECE // (words * WIDTH))))
    return out


@lru_cache(maxsize=1024)
def _quads_of_rows(
    sizes: tuple[int, ...], strides: tuple[int, ...], turned: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Of ``(columns, *taps, C)``: where the first row of each quad begins, where it belongs, and the length of all."""
    extent = 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    steps = [-s if axis in turned else s for axis, s in enumerate(strides)]
    begins = grid_offsets((*sizes[1:-1], sizes[-1] // QUAD), (*steps[1:-1], steps[-1] * QUAD)).numpy()
    begins = begins + sum((sizes[axis] - 1) * strides[axis] for axis in turned)
    return begins, np.arange(len(begins)) * WIDTH, extent


def slab_width(channels: int) -> int:
    """Channels of a slab: whole vectors, no more than a panel's, and as many in each slab as may be."""
    vectors = -(-channels // LANES)
    return -(-vectors // -(-vectors * LANES // WIDTH)) * LANES


def of_samples(x: Tensor, padding: Sequence[tuple[int, int]], fill: int, width: int, stride: int) -> np.ndarray:
    """Four samples at a time: ``(slab, N / 4, *padded, width, QUAD)`` of int8 ``(N, *spatial, C)``, as uint8, flat.

    What a tile reads of one slab after the other position lies side by side: in slabs of all channels it would lie a
    power of two apart, all of it in few sets of the first-level cache.

    Args:
        x: See above; contiguous.
        padding: (before, after) per spatial axis; negative where the data are cropped.
        fill: int8 value of the border. Samples that fill up the last four are 0, borders too.
        width: Channels of a slab; the last one is filled up by anything.
        stride: See ``sorted_places``.

    Returns:
        The quads, behind which a whole vector can be read.
    """
    samples, channels = x.shape[0], x.shape[-1]
    spatial, pads = (tuple(x.shape[1:-1]), tuple(padding)) if x.dim() > 2 else ((1,), ((0, 0),))
    *outer, last = (n + lo + hi for n, (lo, hi) in zip(spatial, pads, strict=True))
    fours, slabs, step = -(-samples // QUAD), -(-channels // width), prod(outer) * sorted_length(last, stride) * width
    out = empty((slabs * fours * step + LANES) * QUAD, dtype=torch.uint8).numpy()
    quads = out.view(np.uint32)
    rows = _positions(spatial, pads, channels, stride) if slabs > 1 or stride > 1 else _rows(spatial, pads, channels)
    begins, places, kept, borders, lengths = rows
    flat = x.reshape(-1).view(torch.uint8).numpy()
    how = begins, prod(x.shape[1:]), samples, NO_FLIP, kept, quads, places * width // channels, step, 0, 0
    at_once, distance = (width, fours * step) if slabs > 1 else (AT_ONCE, AT_ONCE)
    ends = threads.ends(fours * len(begins), -(-_SMALLEST_PIECE // max(1, kept)))
    team.run(_interleave_all, (flat, *how, at_once, distance), ends)
    if len(borders):
        present = np.minimum(samples - np.arange(fours) * QUAD, QUAD)
        values = (np.uint32(fill & 0xFF) * _ONES) & _PRESENT[present]
        for slab in range(slabs):
            _fill(borders * width // channels, lengths * width // channels, values, step, quads[slab * fours * step :])
    return out


def sorted_length(length: int, stride: int) -> int:
    """Places that positions take, see ``sorted_places``."""
    return -(-length // stride) * stride


def sorted_places(positions: np.ndarray, length: int, stride: int) -> np.ndarray:
    """Places of some of ``length`` positions sorted by their remainder: those a stride apart are neighbours."""
    return positions % stride * -(-length // stride) + positions // stride


@lru_cache(maxsize=1024)
def _positions(
    spatial: tuple[int, ...], padding: tuple[tuple[int, int], ...], channels: int, stride: int
) -> tuple[np.ndarray, np.ndarray, int, np.ndarray, np.ndarray]:
    """``_rows`` of a position each, sorted."""
    sources, length = source_rows(spatial, padding), spatial[-1] + sum(padding[-1])
    rows, across = np.divmod(np.arange(len(sources)), length)
    places = (rows * sorted_length(length, stride) + sorted_places(across, length, stride)) * channels
    inside = sources >= 0
    borders = places[~inside]
    return sources[inside] * channels, places[inside], channels, borders, np.full(len(borders), channels)


@lru_cache(maxsize=1024)
def _rows(
    spatial: tuple[int, ...], padding: tuple[tuple[int, int], ...], channels: int
) -> tuple[np.ndarray, np.ndarray, int, np.ndarray, np.ndarray]:
    """How a sample is padded: rows of the data that are kept and their places, and the borders between them.

    Returns:
        Where each row begins in the data, where in the result, and the length of all; where borders begin and their
        lengths.
    """
    sources = source_rows(spatial[:-1], padding[:-1])
    before, after = padding[-1]
    width = (spatial[-1] + before + after) * channels
    first = min(max(before * channels, 0), width)
    last = max(first, min((spatial[-1] + before) * channels, width))
    rows = np.arange(len(sources)) * width
    inside = sources >= 0
    begins = sources[inside] * spatial[-1] * channels + max(-before, 0) * channels
    strips = [(rows[~inside], width), (rows[inside], first), (rows[inside] + last, width - last)]
    strips = [(at, length) for at, length in strips if length > 0 and len(at)]
    borders = np.concatenate([at for at, _ in strips]) if strips else np.zeros(0, np.int64)
    lengths = np.concatenate([np.full(len(at), n) for at, n in strips]) if strips else np.zeros(0, np.int64)
    return begins, rows[inside] + first, last - first, borders, lengths


@intrinsic
def _store_quads(
    typing_context: Any, data: Any, a: Any, b: Any, c: Any, d: Any, mask: Any, flip: Any, room: Any, out: Any, o: Any
) -> Any:
    """``out[o + i]``: bytes i of the rows at a, b, c and d, masked, then flipped; a vector, no more than ``room``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, *begins, mask, flip, room, out, o = arguments
        places = [place_in(context, builder, signature.args[0], data, begin, _BYTES) for begin in begins]
        a, b, c, d = (load_lanes(builder, place, room, _BYTES, f"v{AT_ONCE}i8") for place in places)
        pairs = [builder.bitcast(interleaved(builder, *two), halves) for two in ((a, b), (c, d))]
        quads = builder.bitcast(interleaved(builder, *pairs), _QUADS)
        quads = builder.and_(quads, splat_of(builder, mask, _QUADS))
        quads = builder.xor(quads, splat_of(builder, flip, _QUADS))
        place = place_in(context, builder, signature.args[8], out, o, _QUADS)
        store_lanes(builder, quads, place, room, f"v{AT_ONCE}i32")
        return context.get_dummy_value()

    halves = ir.VectorType(ir.IntType(16), AT_ONCE)

    def interleaved(builder: Any, first: Any, second: Any) -> Any:
        order = [lane + source * AT_ONCE for lane in range(AT_ONCE) for source in range(2)]
        return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order))

    n = types.int64
    return types.void(data, n, n, n, n, types.uint32, types.uint32, n, out, n), generate


@compiled
def interleave(data, begins, stride, samples, flip, count, out, places, step, origin, filled, width, slab, first, last):
    """Rows of four samples at a time as quads.

    Args:
        data: uint8, flat.
        begins: int64: where the rows of a sample begin.
        stride: Distance of samples.
        samples: Samples; 0 stands for those that are missing in the last four.
        flip: What bits to turn, uint32.
        count: Length of a row.
        out: uint32, flat: a quad each.
        places: int64: where the rows of four samples belong.
        step: Distance of fours in ``out``.
        origin: Where ``out`` begins.
        filled: Quads of ones that follow each row.
        width: Quads of a row that lie side by side, at most ``AT_ONCE``.
        slab: Distance of those and the next ones.
        first: First (four and) row.
        last: Behind the last one.
    """
    n, r = first // begins.size, first % begins.size
    for _ in range(first, last):
        present = min(samples - n * QUAD, QUAD)
        mask = _PRESENT[present]
        a, o = n * QUAD * stride + begins[r], n * step + places[r] - origin
        b = a + stride if present > 1 else a
        c = b + stride if present > 2 else a
        d = c + stride if present > 3 else a
        for k in range(0, count, width):
            _store_quads(data, a + k, b + k, c + k, d + k, mask, flip, min(count - k, width), out, o)
            o += slab
        o = n * step + places[r] - origin + count
        for k in range(filled):
            out[o + k] = _ONES
        r += 1
        if r == begins.size:
            n, r = n + 1, 0


@compiled
def _interleaved(
    data, begins, stride, samples, flip, count, out, places, step, origin, filled, width, slab, first, last, piece
):
    how = places, step, origin, filled, width, slab
    interleave(data, begins, stride, samples, flip, count, out, *how, first, last)
    return np.int32(0)


_interleave_in_team = team.in_team(_interleaved)


@compiled
def _interleave_all(arguments, ends, results, runtime):
    """``interleave``, for ``team.run``."""
    _interleave_in_team(arguments, ends, results, runtime)


@compiled
def _fill(begins, counts, values, step, out):
    """``out[begins[i] + n * step:][:counts[i]] = values[n]`` for every i and n, uint32."""
    for n in range(values.size):
        for i in range(begins.size):
            o = n * step + begins[i]
            for k in range(counts[i]):
                out[o + k] = values[n]


@compiled
def _columns_interleaved(data, begins, stride, columns, out, places, first, last, piece):
    """Panels ``first`` to ``last`` of ``(rows, columns)``, whose columns lie side by side; see ``interleave``."""
    for p in range(first, last):
        count = min(WIDTH, columns - p * WIDTH)
        there = places, 0, 0, 0, AT_ONCE, AT_ONCE
        interleave(data[p * WIDTH :], begins, stride, QUAD, NO_FLIP, count, out[p], *there, 0, begins.size)
    return np.int32(0)


_columns_in_team = team.in_team(_columns_interleaved)


@compiled
def _interleave_columns(arguments, ends, results, runtime):
    """``_columns_interleaved``, for ``team.run``."""
    _columns_in_team(arguments, ends, results, runtime)
