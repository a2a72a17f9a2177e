"""Every convolution by ``implicit_gemm``, on CPUs that have the instruction its kernel is made of.

The three contractions are operators of their own, so that whoever watches operations sees INT8 products here as well.
"""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.columns import window_tables
from lightning_int8.backends.cpu.correlation import (
    Correlation,
    grid_offsets,
    output_correlation,
    residue_correlation,
    transposed_weight,
)
from lightning_int8.backends.cpu.gemm import CENTRED_LIMIT, RAW_LIMIT
from lightning_int8.backends.cpu.passes import compiled_pass
from lightning_int8.backends.cpu.route import Route, Scales
from lightning_int8.backends.cpu.threads import split
from lightning_int8.backends.group_blocks import Block, blocks
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import INT8_MAX, LOWER_PLANE_MAX, Plane

IMPLICIT = compiled_pass("implicit_gemm")
"""The compiled products, or None where numba cannot be imported."""

PANELS = compiled_pass("panels")
"""The compiled packing of their operands, or None likewise."""

BORDER = compiled_pass("border")
"""The compiled padding, or None likewise."""

CENTRE = compiled_pass("centre")
"""The compiled sums of rows, or None likewise."""

_SUMS_BYTES = 1 << 19  # sums that one call adds to, which stay in the second-level cache
_BLOCK_BYTES = 1 << 19  # positions that it multiplies before the next ones, likewise
_MERGED = 256  # positions of a sample that make one piece instead of one for each row
_SMALLEST_PIECE = 1 << 20  # products that are worth a thread


class Implicit(Route):
    """All three contractions, in any number of dimensions."""

    name = "implicit"

    def supports(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scaled: bool) -> bool:
        """See ``Route.supports``."""
        if not is_exact():
            return False
        # A zero point of the operand whose windows are read: data, or the input of grad_weight.
        shifted, plain = (b, a) if contraction == "grad_weight" else (a, b)
        if plain.zero_point is not None or (shifted.zero_point is not None and shifted.zero_point.dim() > 0):
            return False
        length = b.data.shape[-1] if contraction == "output" else b.data.shape[0] // geometry.groups
        sums = prod(geometry.output_size) if contraction == "grad_weight" else geometry.taps * length
        return sums <= _longest(shifted.zero_point)

    def run(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scales: Scales | None = None) -> Tensor:
        """See ``Route.run``."""
        operator = getattr(torch.ops.lightning_int8, f"implicit_conv_{contraction}")
        zero = (b if contraction == "grad_weight" else a).zero_point
        left, right = (None, None) if scales is None else scales
        return operator(a.data, b.data, *_numbers(geometry), zero, left, right)


def _longest(zero: Tensor | None) -> int:
    """Longest sum of products that int32 holds for certain."""
    return RAW_LIMIT if zero is None else CENTRED_LIMIT


def _numbers(geometry: ConvGeometry) -> tuple[Any, ...]:
    g = geometry
    padding = [n for pair in g.padding for n in pair]
    return list(g.input_size), list(g.kernel_size), list(g.stride), padding, list(g.dilation), g.groups


def _geometry(
    input_size: list[int], kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> ConvGeometry:
    return ConvGeometry(
        input_size=tuple(input_size),
        kernel_size=tuple(kernel_size),
        stride=tuple(stride),
        padding=tuple(zip(padding[::2], padding[1::2], strict=True)),
        dilation=tuple(dilation),
        groups=groups,
    )


@torch.library.custom_op("lightning_int8::implicit_conv_output", mutates_args=(), device_types="cpu")
def implicit_conv_output(
    x: Tensor,
    w: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    zero: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
) -> Tensor:
    """Output of int8 x ``(N, *in, C)`` and w ``(Co, *kernel, C / groups)``.

    Args:
        x: See above.
        w: See above.
        input_size: See ``ConvGeometry``; padding is (before, after) axis by axis.
        kernel_size: Likewise.
        stride: Likewise.
        padding: Likewise.
        dilation: Likewise.
        groups: Likewise.
        zero: Zero point of x, or None.
        left: See ``Scales``; None for the sums.
        right: Likewise.

    Returns:
        ``(N, *out, Co)``, float32 with scales, else int32.
    """
    correlation = output_correlation(_geometry(input_size, kernel_size, stride, padding, dilation, groups))
    scales = _scales(left, right)
    result = empty(len(x), *correlation.size, len(w), dtype=_dtype(scales))
    _correlate(x, zero, w, correlation, scales, _grid(correlation.size, result.stride()[1:-1]), result)
    return result


@torch.library.custom_op("lightning_int8::implicit_conv_grad_input", mutates_args=(), device_types="cpu")
def implicit_conv_grad_input(
    g: Tensor,
    w: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    zero: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
) -> Tensor:
    """grad_input ``(N, *in, C)`` of int8 g ``(N, *out, Co)`` and w; for the rest see ``implicit_conv_output``."""
    geometry = _geometry(input_size, kernel_size, stride, padding, dilation, groups)
    scales = _scales(left, right)
    result = empty(len(g), *input_size, w.shape[-1] * groups, dtype=_dtype(scales))
    residues = geometry.residues()
    reached = [r for r in residues if all(d.taps for d in r.dims)]
    if len(reached) < len(residues):
        result.zero_()  # input positions that no tap reaches
    strides = result.stride()[1:-1]
    for residue in reached:
        steps = tuple(d.stride * s for d, s in zip(residue.dims, strides, strict=True))
        begin = sum(d.first * s for d, s in zip(residue.dims, strides, strict=True))
        targets = _grid(tuple(d.size for d in residue.dims), steps) + begin
        weight = transposed_weight(Plane(w, torch.ones(())), residue, groups).data
        _correlate(g, zero, weight, residue_correlation(residue, groups), scales, targets, result)
    return result


@torch.library.custom_op("lightning_int8::implicit_conv_grad_weight", mutates_args=(), device_types="cpu")
def implicit_conv_grad_weight(
    g: Tensor,
    x: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    zero: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
) -> Tensor:
    """grad_weight ``(Co, *kernel, C / groups)`` of int8 g and x; without scales int64 where int32 may not do.

    For the rest see ``implicit_conv_output``.
    """
    correlation = output_correlation(_geometry(input_size, kernel_size, stride, padding, dilation, groups))
    scales = _scales(left, right)
    samples = max(1, _longest(zero) // max(1, correlation.positions))
    if len(g) <= samples:
        result = _grad_weight(g, x, zero, correlation, scales)
    else:
        parts = zip(g.split(samples), x.split(samples), strict=True)
        result = torch.stack([_grad_weight(*part, zero, correlation, None).long() for part in parts]).sum(0)
        if scales is not None:
            result = result.to(torch.float32).mul_(scales.left.reshape(-1, 1)).mul_(scales.right)
    return result.view(g.shape[-1], *kernel_size, -1)


def _scales(left: Tensor | None, right: Tensor | None) -> Scales | None:
    return None if left is None or right is None else Scales(left, right)


def _dtype(scales: Scales | None) -> torch.dtype:
    return torch.int32 if scales is None else torch.float32


@lru_cache(maxsize=1024)
def _grid(sizes: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    return grid_offsets(sizes, strides).numpy()


# --- Output and grad_input -------------------------------------------------------------------------------------------


def _correlate(
    data: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    correlation: Correlation,
    scales: Scales | None,
    targets: np.ndarray,
    result: Tensor,
) -> None:
    """Write the windowed sums of one correlation to ``targets`` of each sample of ``result``."""
    batch, channels = data.shape[0], data.shape[-1]
    fill = 0 if zero is None else int(zero)
    of_one_piece = all(n == 1 for n in correlation.taps) and channels % IMPLICIT.QUAD == 0
    is_signed = of_one_piece and all(p == (0, 0) for p in correlation.padding)
    source = data if is_signed else BORDER.pad(data, correlation.padding, fill, True, IMPLICIT.QUAD)
    flat = source.as_strided((source.numel() + (0 if is_signed else IMPLICIT.QUAD),), (1,)).view(torch.uint8).numpy()
    samples, out = (source.stride(0), result.stride(0)), result.view(-1).numpy()
    for block in blocks(correlation.groups, channels, len(weight)):
        inputs, own = block.inputs, block.weight(Plane(weight, torch.ones(())))
        origins, runs, run = window_tables(correlation, tuple(source.shape[1:]), inputs.start, inputs.stop)
        if is_signed:
            origins, runs = origins + runs, runs - runs
        panels = PANELS.of_weight(own, len(runs), run)
        quads = -(-run // IMPLICIT.QUAD)
        pieces = _pieces(runs, np.arange(len(runs)) * quads * IMPLICIT.QUAD * IMPLICIT.WIDTH)
        starts = _column_sums(panels, len(runs), quads, len(own)) * -(int(IMPLICIT.UNSIGNED) + fill)
        factors = _factors(scales, block, len(starts))
        first = targets + block.outputs.start
        rest = (pieces, quads, panels, starts, factors, len(own))

        def work(start: int, stop: int, windows: Any = (origins, first), rest: Any = rest) -> None:
            IMPLICIT.correlate(flat, is_signed, samples, *windows, *rest, start, stop, out)

        split(work, batch * len(origins), -(-_SMALLEST_PIECE // own.numel()))


def _pieces(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.stack((left, right), axis=-1).reshape(-1)


def _column_sums(panels: np.ndarray, count: int, quads: int, columns: int) -> np.ndarray:
    """Sums over ``count`` pieces of the columns of panels, int32, whole vectors: a product with a row of ones."""
    whole = -(-columns // IMPLICIT.LANES) * IMPLICIT.LANES
    length = quads * IMPLICIT.QUAD
    pieces = _pieces(np.zeros(count, np.int64), np.arange(count) * length * IMPLICIT.WIDTH)
    origin, nothing, unused = np.zeros(1, np.int64), np.zeros(whole, np.int32), np.zeros(0, np.float32)
    sums = np.empty(whole, np.int32)
    operands = np.ones(length, np.uint8), False, (0, 0), origin, origin, pieces, quads, panels, nothing
    IMPLICIT.correlate(*operands, (np.float32(1), unused), whole, 0, 1, sums)
    return sums


def _factors(scales: Scales | None, block: Block, columns: int) -> tuple[np.float32, np.ndarray]:
    """Scales as ``correlate`` reads them."""
    right = np.zeros(columns, np.float32)
    if scales is None:
        return np.float32(1), right
    right[: block.out_count] = block.out(scales.right).numpy()
    return np.float32(scales.left.item()), right


# --- grad_weight -----------------------------------------------------------------------------------------------------


def _grad_weight(g: Tensor, x: Tensor, zero: Tensor | None, correlation: Correlation, scales: Scales | None) -> Tensor:
    """``(Co, taps · C / groups)``."""
    channels, out_channels = x.shape[-1], g.shape[-1]
    padded, sizes = PANELS.of_samples(x, correlation.padding, 0 if zero is None else int(zero))
    results = []
    for block in blocks(correlation.groups, channels, out_channels):
        panels = _panel_table(correlation, (*sizes, channels), block.inputs.start, block.inputs.stop)
        result = empty(block.out_count, int(panels[:, 1].sum()), dtype=_dtype(scales))
        taken_off = np.zeros(block.out_count, np.int32)
        if zero is not None:
            taken_off = (CENTRE.row_sums(g.flatten(0, -2)[:, block.outputs].t()) * zero).to(torch.int32).numpy()
        factors: Any = (np.float32(1), np.float32(1))
        if scales is not None:
            left = block.out(scales.left)
            factors = (np.float32(left.item()) if left.dim() == 0 else left.contiguous().numpy(), np.float32(scales.right.item()))
        positions = _positions(correlation, (*sizes, channels), -(-len(g) // IMPLICIT.QUAD))
        _sum_over_positions(g, padded, block, positions, panels, factors, taken_off, result.view(-1).numpy())
        results.append(block.diagonal(result))
    return results[0] if len(results) == 1 else torch.cat(results)


def _sum_over_positions(
    g: Tensor,
    padded: np.ndarray,
    block: Block,
    positions: tuple[np.ndarray, np.ndarray, int, int],
    panels: np.ndarray,
    factors: Any,
    taken_off: np.ndarray,
    out: np.ndarray,
) -> None:
    """Write ``(channels of g, columns of the panels)``, flat."""
    quad, width, threads = IMPLICIT.QUAD, IMPLICIT.WIDTH, torch.get_num_threads()
    # As many parts of the channels as it takes to give every thread panels of its own.
    channels = -(-block.out_count // min(-(-threads // len(panels)), block.out_count))
    parts = -(-block.out_count // channels)
    left, height = PANELS.of_gradient(g, block.outputs.start, block.out_count, channels)
    left_step = parts * height * quad
    left_places, right_offsets, quads, right_step = positions
    pieces = _pieces(left_places * left_step, right_offsets)
    at_once = max(1, _BLOCK_BYTES // (quads * (height * quad + right_step)))
    group = max(1, min(-(-len(panels) * parts // threads), _SUMS_BYTES // (height * width * out.itemsize)))
    groups = -(-len(panels) // group)

    def work(first: int, last: int) -> None:
        sums = np.empty(group * height * width, np.int32)
        for unit in range(first, last):
            part, own_panels = unit // groups, panels[unit % groups * group :][:group]
            channel = part * channels
            own_channels = (min(channels, block.out_count - channel), channel, height)
            operands = (left, part * height * quad, left_step), (padded, right_step)
            rest = (own_panels, own_channels, factors, taken_off, sums, out)
            IMPLICIT.grad_weight(*operands, pieces, quads, at_once, *rest)

    split(work, groups * parts, -(-_SMALLEST_PIECE // (g.numel() * width * group)))


@lru_cache(maxsize=1024)
def _panel_table(correlation: Correlation, shape: tuple[int, ...], first: int, stop: int) -> np.ndarray:
    """Where each panel begins in quads of samples ``shape``, its columns, and where they belong; see ``grad_weight``."""
    _, runs, run = window_tables(correlation, shape, first, stop)
    columns = np.arange(0, run, IMPLICIT.WIDTH)
    begins = (runs[:, None] + columns).reshape(-1) * IMPLICIT.QUAD
    places = (np.arange(len(runs))[:, None] * run + columns).reshape(-1)
    return np.stack((begins, np.tile(np.minimum(run - columns, IMPLICIT.WIDTH), len(runs)), places), axis=1)


@lru_cache(maxsize=1024)
def _positions(correlation: Correlation, shape: tuple[int, ...], fours: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Positions as pieces of equal distance.

    Returns:
        The number of the first position of each piece; where its window begins, in quads of samples ``shape``; the
        positions of a piece, and the distance of their windows.
    """
    *outer, last = correlation.size or (1,)
    strides = [prod(shape[axis + 1 :]) * IMPLICIT.QUAD for axis in range(len(shape) - 1)]
    *outer_steps, last_step = [s * n for s, n in zip(strides, correlation.step or (1,), strict=True)]
    windows = grid_offsets(outer, outer_steps).numpy()
    if correlation.is_pointwise and correlation.positions <= _MERGED:
        # The windows of a sample lie side by side: one piece.
        windows, last = windows[:1], correlation.positions
    places = np.arange(fours * len(windows)) * last
    samples = np.arange(fours)[:, None] * (prod(shape) * IMPLICIT.QUAD)
    return places, (samples + windows).reshape(-1), last, last_step


# --- Fakes, self-check -----------------------------------------------------------------------------------------------


@implicit_conv_output.register_fake
def _(x: Tensor, w: Tensor, *numbers: Any) -> Tensor:
    *of_geometry, _, left, right = numbers
    return x.new_empty(len(x), *_geometry(*of_geometry).output_size, len(w), dtype=_dtype(_scales(left, right)))


@implicit_conv_grad_input.register_fake
def _(g: Tensor, w: Tensor, input_size: list[int], *numbers: Any) -> Tensor:
    *_, groups, _, left, right = numbers
    return g.new_empty(len(g), *input_size, w.shape[-1] * groups, dtype=_dtype(_scales(left, right)))


@implicit_conv_grad_weight.register_fake
def _(g: Tensor, x: Tensor, input_size: list[int], kernel_size: list[int], *numbers: Any) -> Tensor:
    *_, groups, _, left, right = numbers
    return g.new_empty(g.shape[-1], *kernel_size, x.shape[-1] // groups, dtype=_dtype(_scales(left, right)))


@cache
def is_exact() -> bool:
    """Whether the kernel runs here and agrees with exact arithmetic where a saturating instruction betrays itself."""
    if IMPLICIT is None or not IMPLICIT.is_available():
        return False
    return all(_agrees(*case) for case in product((1, 70), (1, 17, 66), (None, -INT8_MAX, INT8_MAX), (1, -1)))


def _agrees(channels: int, out_channels: int, zero: int | None, sign: int) -> bool:
    geometry = ConvGeometry(
        input_size=(5, 6), kernel_size=(3, 3), stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), groups=1
    )
    data = torch.full((2, 5, 6, channels), sign * INT8_MAX, dtype=torch.int8)
    data[:, ::2, ::3] = -LOWER_PLANE_MAX
    weight = torch.full((out_channels, 3, 3, channels), INT8_MAX, dtype=torch.int8)
    weight[1::2] = -LOWER_PLANE_MAX
    one, offset = torch.ones(()), None if zero is None else torch.tensor(zero, dtype=torch.int32)
    sums = Implicit().run("output", Plane(data, one, offset), Plane(weight, one), geometry)
    centred = (data.double() - (zero or 0)).movedim(-1, 1)
    expected = torch.nn.functional.conv2d(centred, weight.movedim(-1, 1).double(), padding=1).movedim(1, -1)
    return torch.equal(sums.double(), expected)
