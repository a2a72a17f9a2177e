"""Expressions evaluated: their values, and the sums over rows that batch norm needs of them."""

from __future__ import annotations

from math import gcd, prod

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu import elementwise
from lightning_int8.backends.cpu.elementwise import Source, TermSource
from lightning_int8.backends.cpu.expression import MASK_BITS, Expression, Term
from lightning_int8.backends.cpu.threads import split
from lightning_int8.backends.cpu.tile import tile

_BLOCK = 4096  # elements: what surrounds a block takes as long as a thousand of them
_SMALLEST_PIECE = 1 << 15  # elements that are worth a thread
_NOTHING = np.empty(0, np.float32)
_NO_TAPS, _NO_WINDOWS, _NO_WORDS = np.empty(0, np.uint8), np.empty(0, np.int64), np.empty(0, np.uint16)
_NO_TERM = TermSource(_NOTHING, _NO_TAPS, _NO_WINDOWS, _NO_WORDS, _NOTHING, _NOTHING, _NOTHING)


def block_of(channels: int) -> int:
    """Elements of a block: whole rows of channels, and whole words of a mask."""
    unit = channels * MASK_BITS // gcd(channels, MASK_BITS)
    return -(-_BLOCK // unit) * unit


def source_of(expression: Expression, kept: Tensor | None, block: int | None = None) -> Source:
    """The expression for compiled passes; its mask is made room for.

    Args:
        expression: Anything; one whose mask is known already does not compute it again.
        kept: float32, flat, to be filled with the values; None where nobody wants them.
        block: Elements of a block, a multiple of the channels; None for ``block_of`` them.
    """
    terms = expression.checked().terms
    block = block or block_of(expression.shape[-1])
    words = _NO_WORDS
    if expression.rectified and expression.mask is not None and expression.mask.words is None:
        expression.mask.words = torch.empty(-(-prod(expression.shape) // MASK_BITS), dtype=torch.int16)
        words = expression.mask.words.numpy().view(np.uint16)
    second = _term(terms[1], block) if len(terms) > 1 else _NO_TERM
    values = _NOTHING if kept is None else kept.numpy()
    return Source(_term(terms[0], block), second, expression.rectified, words, values)


def _term(term: Term, block: int) -> TermSource:
    taps, windows, words = _NO_TAPS, _NO_WINDOWS, _NO_WORDS
    if term.unpooled is not None:
        taps = term.unpooled.taps.view(-1).numpy()
        windows = np.array(term.unpooled.windows.as_integers(), np.int64)
    if term.mask is not None:
        assert term.mask.words is not None, "nobody has computed the tensor that this is the gradient of"
        words = term.mask.words.numpy().view(np.uint16)
    centre, factor, offset = _NOTHING, _NOTHING, _NOTHING
    if term.affine is not None:
        centre, factor, offset = tile(term.affine, block)
    return TermSource(term.values.view(-1).numpy(), taps, windows, words, centre, factor, offset)


def evaluate(expression: Expression) -> Tensor:
    """The values, float32, canonical."""
    values = torch.empty(expression.shape)
    source, block, count = source_of(expression, values.view(-1)), block_of(expression.shape[-1]), values.numel()

    def work(start: int, stop: int) -> None:
        elementwise.compute_all(source, start * block, min(stop * block, count), block)

    split(work, -(-count // block), -(-_SMALLEST_PIECE // block))
    return values


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, float64 ``(C,)``, of canonical float32 values."""
    channels = values.shape[-1]
    block, flat = block_of(channels), values.view(-1).numpy()
    # Sums of squares lose digits where the mean is far from 0; the first row is near enough.
    pivot = values.view(-1, channels)[0].nan_to_num(0.0, 0.0, 0.0)
    pivots = tile(pivot, block)

    def work(start: int, stop: int) -> np.ndarray:
        return elementwise.square_sums(flat, start * block, min(stop * block, flat.size), block, pivots)

    sums = sum(split(work, -(-flat.size // block), -(-_SMALLEST_PIECE // block)))
    first, second = torch.from_numpy(sums).view(2, -1, channels).sum(1) * (channels / flat.size)
    return first + pivot.double(), (second - first * first).clamp(min=0.0)


def channel_sums(expression: Expression, other: Tensor | None, centre: Tensor | None) -> Tensor:
    """Σ e, and Σ e · (other - centre), over all but the channels.

    Args:
        expression: e.
        other: float32, canonical, contiguous; None for the first sum alone, the second is 0 then.
        centre: float32 ``(C,)``.

    Returns:
        float64 ``(2, C)``.
    """
    channels = expression.shape[-1]
    source, block = source_of(expression, None), block_of(channels)
    count = prod(expression.shape)
    others, centres = _NOTHING, _NOTHING
    if other is not None and centre is not None:
        others, centres = other.view(-1).numpy(), tile(centre, block)

    def work(start: int, stop: int) -> np.ndarray:
        return elementwise.product_sums(source, start * block, min(stop * block, count), block, others, centres)

    sums = sum(split(work, -(-count // block), -(-_SMALLEST_PIECE // block)))
    return torch.from_numpy(sums).view(2, -1, channels).sum(1)
