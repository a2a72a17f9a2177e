"""Expressions evaluated: their values, and the sums over rows that batch norm needs of them."""

from __future__ import annotations

from math import gcd, prod

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu import elementwise
from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.elementwise import Source
from lightning_int8.backends.cpu.expression import MASK_BITS, Expression
from lightning_int8.backends.cpu.threads import split_blocks
from lightning_int8.backends.cpu.tile import tile

_BLOCK = 4096  # elements: with their factors they fit the second-level cache, and hide what surrounds a block
_NOTHING = np.empty(0, np.float32)
_NO_TAPS, _NO_WINDOWS, _NO_WORDS = np.empty(0, np.uint8), np.empty(0, np.int64), np.empty(0, np.uint16)


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
    first, *others = expression.checked().terms
    assert not any(t.is_gradient for t in others)
    block = block or block_of(expression.shape[-1])
    taps, windows, words, kept_words = _NO_TAPS, _NO_WINDOWS, _NO_WORDS, _NO_WORDS
    if first.unpooled is not None:
        taps = first.unpooled.taps.view(-1).numpy()
        windows = np.array(first.unpooled.windows.as_integers(), np.int64)
    if first.mask is not None:
        words = first.mask.known().numpy().view(np.uint16)
    mask = expression.mask if expression.rectified else None
    if mask is not None and mask.words is None:
        mask.words = empty(-(-prod(expression.shape) // MASK_BITS), dtype=torch.int16)
        mask.expression = None
        kept_words = mask.words.numpy().view(np.uint16)
    return (
        first.values.view(-1).numpy(),
        taps,
        windows,
        words,
        others[0].values.view(-1).numpy() if others else _NOTHING,
        *_factors(expression, block),
        expression.rectified,
        np.float32(expression.upper),
        kept_words,
        _NOTHING if kept is None else kept.numpy(),
    )


def _factors(expression: Expression, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors of both terms, and the offset, for each element of a block; nothing where there is nothing to do."""
    factors = [t.factor for t in expression.terms]
    if expression.offset is None and all(f is None for f in factors):
        return _NOTHING, _NOTHING, _NOTHING
    one, zero = torch.ones(expression.shape[-1]), torch.zeros(expression.shape[-1])
    first, second = (one if f is None else f for f in (*factors, None)[:2])
    offset = zero if expression.offset is None else expression.offset
    return tile(first, block), tile(second, block) if len(factors) > 1 else _NOTHING, tile(offset, block)


def evaluate(expression: Expression) -> Tensor:
    """The values, float32, canonical."""
    values = empty(*expression.shape)
    source, block, count = source_of(expression, values.view(-1)), block_of(expression.shape[-1]), values.numel()

    split_blocks(lambda first, last: elementwise.compute_all(source, first, last, block), count, block)
    return values


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, float64 ``(C,)``, of canonical float32 values."""
    channels = values.shape[-1]
    block, flat = block_of(channels), values.view(-1).numpy()
    # Sums of squares lose digits where the mean is far from 0; the first row is near enough.
    pivot = values.view(-1, channels)[0].nan_to_num(0.0, 0.0, 0.0)
    pivots = tile(pivot, block)

    def work(first: int, last: int) -> np.ndarray:
        return elementwise.square_sums(flat, first, last, block, pivots)

    sums = sum(split_blocks(work, flat.size, block))
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
    others, centres = _NOTHING, _NOTHING
    if other is not None and centre is not None:
        others, centres = other.view(-1).numpy(), tile(centre, block)

    def work(first: int, last: int) -> np.ndarray:
        return elementwise.product_sums(source, first, last, block, others, centres)

    sums = sum(split_blocks(work, prod(expression.shape), block))
    return torch.from_numpy(sums).view(2, -1, channels).sum(1)
