"""Expressions evaluated: their values, and the sums over rows that batch norm needs of them."""

from __future__ import annotations

from math import gcd, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_int8.backends.cpu import elementwise, team
from lightning_int8.backends.cpu.arrays import as_array
from lightning_int8.backends.cpu.buffers import empty
from lightning_int8.backends.cpu.elementwise import Source
from lightning_int8.backends.cpu.expression import MASK_BITS, Expression, Term
from lightning_int8.backends.cpu.threads import block_ends
from lightning_int8.backends.cpu.vectors import LANES

_BLOCK = 1024  # elements: what belongs to each place of a block, factors and sums, fits the first-level cache
_NOTHING, _NO_HALVES = np.empty(0, np.float32), np.empty(0, np.uint16)
_NO_TAPS, _NO_WINDOWS, _NO_WORDS = np.empty(0, np.uint8), np.empty(0, np.int64), np.empty(0, np.uint16)


def block_of(channels: int) -> int:
    """Elements of a block: whole rows of channels, and whole vectors."""
    unit = channels * LANES // gcd(channels, LANES)
    return -(-_BLOCK // unit) * unit


def source_of(expression: Expression, kept: Tensor | None) -> Source:
    """The expression for compiled passes; its mask is made room for.

    Args:
        expression: Anything; one whose mask is known already does not compute it again.
        kept: In the dtype of the expression, to be filled with the values; None where nobody wants them.
    """
    first, *others = expression.checked().terms
    assert not any(t.is_gradient for t in others)
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
    nothing = _none_of(expression)
    return (
        as_array(first.values),
        taps,
        windows,
        words,
        as_array(others[0].values) if others else nothing,
        *_factors(expression),
        expression.rectified,
        np.float32(expression.upper),
        kept_words,
        nothing if kept is None else as_array(kept),
    )


def _none_of(expression: Expression) -> np.ndarray:
    """No elements, in the form that the expression's have in memory: compiled passes know arrays by their type."""
    return _NO_HALVES if expression.dtype == torch.bfloat16 else _NOTHING


def _factors(expression: Expression) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors of both terms, and the offset, for each channel; nothing where there is nothing to do."""
    factors = [t.factor for t in expression.terms]
    if expression.offset is None and all(f is None for f in factors):
        return _NOTHING, _NOTHING, _NOTHING
    channels = expression.shape[-1]
    first, second = (np.ones(channels, np.float32) if f is None else as_array(f) for f in (*factors, None)[:2])
    offset = np.zeros(channels, np.float32) if expression.offset is None else as_array(expression.offset)
    return first, second if len(factors) > 1 else _NOTHING, offset


def evaluate(expression: Expression) -> Tensor:
    """The values in the dtype of the expression, canonical."""
    values = empty(*expression.shape, dtype=expression.dtype)
    block = block_of(expression.shape[-1])
    team.run(elementwise.compute_all, (source_of(expression, values), block), block_ends(values.numel(), block))
    return values


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, float64 ``(C,)``, of canonical values."""
    channels = values.shape[-1]
    # Sums of squares lose digits where the mean is far from 0; the first row is near enough.
    pivot = values.view(-1, channels)[0].float().nan_to_num(0.0, 0.0, 0.0)
    sums = channel_sums(Expression((Term(values),), offset=-pivot), values, pivot)
    first, second = sums * (channels / values.numel())
    return first + pivot.double(), (second - first * first).clamp(min=0.0)


def channel_sums(expression: Expression, other: Tensor | None, centre: Tensor | None) -> Tensor:
    """Σ e, and Σ e · (other - centre), over all but the channels.

    Args:
        expression: e.
        other: In the dtype of e, canonical, contiguous; None for the first sum alone, the second is 0 then.
        centre: float32 ``(C,)``.

    Returns:
        float64 ``(2, C)``.
    """
    channels = expression.shape[-1]
    source, block = source_of(expression, None), block_of(channels)
    others, centres = nothing_to_multiply(expression)
    if other is not None and centre is not None:
        others, centres = as_array(other), as_array(centre)

    ends = block_ends(prod(expression.shape), block)
    return sums_and_tops(source, ends, block, channels, (others, centres), None)[0]


def sums_and_tops(
    source: Source,
    ends: list[int],
    block: int,
    channels: int,
    multiplied: tuple[np.ndarray, np.ndarray],
    rounding: tuple[Any, ...] | None,
) -> tuple[Tensor, np.ndarray]:
    """float64 ``(2, C)`` sums over pieces, and their largest magnitudes; see ``elementwise.product_sums``."""
    sums = np.empty((len(ends) - 1, 2, block))
    tops = team.run(elementwise.product_sums, (source, block, *multiplied, rounding, sums), ends)
    return torch.from_numpy(sums.sum(0)).view(2, -1, channels).sum(1), tops


def nothing_to_multiply(expression: Expression) -> tuple[np.ndarray, np.ndarray]:
    """What ``elementwise.product_sums`` multiplies with, values and their centre, for sums alone."""
    return _none_of(expression), _NOTHING
