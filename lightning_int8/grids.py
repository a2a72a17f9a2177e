"""Direct, shift and constant quantization: values rounded to grids of powers of two, carried in floats.

Source: Yang et al., "Training high-performance and large-scale deep neural networks with full 8-bit integers", Neural
Networks 2020, and the authors' code. Their "k bits" count the sign and k - 1 fraction bits: the grid is 2^(1 - k) and
integer bits come on top, so that a value of "8 bits" fits an int8 only if its magnitude stays below 1. What is computed
here stays a float tensor; nothing here is an INT8 contraction or feeds one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_int8.generator import RANDOM_BITS, random_bits

GRID_BITS = range(2, 25)
"""Widths whose grid float32 holds: up to 24, its significand."""


def grid_step(bits: int) -> float:
    """Distance of neighbouring values of ``bits`` bits, the paper's d(k) = 2^(1 - k).

    Raises:
        ValueError: ``bits`` is not an integer in [2, 24].
    """
    if not isinstance(bits, int) or bits not in GRID_BITS:
        raise ValueError(f"bits: {bits!r} is not an integer from {GRID_BITS[0]} to {GRID_BITS[-1]}")
    return 2.0 ** (1 - bits)


def direct_quantize(x: Tensor, bits: int) -> Tensor:
    """Q(x, k): round to the grid of ``bits`` bits, ties to even, without clipping.

    Args:
        x: Any shape, float32 or float64 (narrower floats do not hold every grid).
        bits: 2 to 24.

    Returns:
        Multiples of ``grid_step(bits)``, shape and dtype of ``x``; elements that are not finite stay what they are.
    """
    step = grid_step(bits)
    return (x / step).round_().mul_(step)


def power_of_two_range(x: Tensor) -> Tensor:
    """R(x) = 2^round(log2 max|x|), exact, ``()`` in the dtype of ``x``: 0 for zeros, NaN where ``x`` is not finite."""
    if x.numel() == 0:
        return x.new_zeros(())
    largest = torch.maximum(-x.amin(), x.amax())
    # frexp gives mantissa · 2^exponent with the mantissa in [0.5, 1): log2 rounds up from a mantissa of sqrt(0.5) on.
    mantissa, _ = torch.frexp(largest)
    power = (largest / (2 * mantissa)) * torch.where(mantissa.double() >= math.sqrt(0.5), 2.0, 1.0)
    return torch.where(largest == 0, largest, power)


def shift_quantize(x: Tensor, bits: int) -> Tensor:
    """SQ(x, k) = R(x)·clip(Q(x / R(x), k), -1 + d(k), 1 - d(k)): integers of ``bits`` bits times a power of two.

    Magnitudes beyond R(x)·(1 - d(k)) saturate: R(x) is the nearest power of two, not the next.

    Args:
        x: Any shape, float32 or float64.
        bits: 2 to 24.

    Returns:
        Shape and dtype of ``x``; all NaN if an element is not finite.
    """
    scale = power_of_two_range(x)
    bound = 1 - grid_step(bits)
    return direct_quantize(_over(x, scale), bits).clamp_(-bound, bound).mul_(scale)


def constant_quantize(x: Tensor, significance: int, bits: int, key: Tensor) -> Tensor:
    """CQ(x): the direction of ``x`` in few significant bits; its magnitude is dropped.

    clip(Sr(s·x / R(x)), -s + 1, s - 1)·d(k), where Sr rounds the magnitude stochastically (unbiased).

    Args:
        x: Any shape, float32 or float64.
        significance: s, the paper's dr: integer steps of R(x).
        bits: k, the width of the result, which is therefore at most (s - 1)·d(k) in magnitude.
        key: int64 ``(seed, rank, call)`` of the generator; elements count in row-major order.

    Returns:
        Multiples of ``grid_step(bits)``, shape and dtype of ``x``; all NaN if an element is not finite.
    """
    y = _over(x, power_of_two_range(x)).mul_(significance)
    magnitude = y.abs()
    whole = magnitude.floor()
    draw = random_bits(key, x.numel(), x.device).reshape(x.shape)
    whole += draw < (magnitude - whole) * float(1 << RANDOM_BITS)
    return whole.clamp_(max=significance - 1).copysign_(y).mul_(grid_step(bits))


def _over(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale``, and 0 where the scale is 0: exact, since the scale is a power of two."""
    return x / torch.where(scale == 0, torch.ones_like(scale), scale)
