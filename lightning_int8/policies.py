"""What a recipe may decide between steps: per-layer learning-rate factors and bit-widths. Rules without state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTHS = (8, 16, 24)
"""Widths among which a bit-width rule chooses."""


@dataclass(frozen=True, kw_only=True)
class DeviationFactor:
    """Deviation-counteractive learning-rate scaling (Zhu et al. 2019).

    A layer whose gradient turns by the cosine distance d when it is quantized learns at the rate
    ``max(exp(-alpha · d), beta)`` times the plain one.

    Attributes:
        alpha: How fast the factor falls; 0 turns the scaling off.
        beta: Smallest factor, in [0, 1].
    """

    alpha: float = 20.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        _check("alpha", self.alpha, 0.0, math.inf)
        _check("beta", self.beta, 0.0, 1.0)

    def factor(self, distance: float) -> float:
        """The factor for cosine distance ``distance``."""
        return max(math.exp(-self.alpha * distance), self.beta)


@dataclass(frozen=True, kw_only=True)
class BitWidthRule:
    """Quantization error measurement and parameter adjustment (Zhang et al. 2020).

    At an adjustment the width grows by 8 bits while ``Diff = log2(|mean|x| - mean|quantized x|| / mean|x| + 1)``
    exceeds the threshold; then the next adjustment is scheduled: the sooner, the larger the error and the drift of the
    resolution. A range rule without an interval of its own (``every``) measures at adjustments only.

    Attributes:
        threshold: Largest tolerated Diff.
        mode: 1: a width never shrinks. 2: each adjustment begins again at the recipe's width, 8 bits.
        max_bits: Largest width, 8, 16 or 24.
        alpha: Weight of the present log2 resolution in its moving average R.
        beta: Numerator of the interval.
        gamma: Steps taken off the interval.
        delta: Weight of Diff² against the drift |ΔR|.
        epoch_steps: Optimizer steps of an epoch: the longest interval. None takes the Trainer's number, or
            ``DEFAULT_EPOCH_STEPS`` where nothing tells it.
        operands: Which tensors adapt: any of "x", "w", "g".
    """

    threshold: float = 0.03
    mode: int = 1
    max_bits: int = 24
    alpha: float = 0.04
    beta: float = 0.1
    gamma: float = 2.0
    delta: float = 100.0
    epoch_steps: int | None = None
    operands: Sequence[str] = ("x", "w", "g")

    def __post_init__(self) -> None:
        for field in ("threshold", "beta", "gamma", "delta"):
            _check(field, getattr(self, field), 0.0, math.inf)
        _check("alpha", self.alpha, 0.0, 1.0)
        if self.mode not in (1, 2):
            raise ValueError(f"mode: {self.mode!r} is not 1 or 2")
        if self.max_bits not in WIDTHS:
            raise ValueError(f"max_bits: {self.max_bits!r} is not one of {', '.join(map(str, WIDTHS))}")
        steps = self.epoch_steps
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise ValueError(f"epoch_steps: {self.epoch_steps!r} is not a positive number of optimizer steps, nor None")
        if isinstance(self.operands, str) or not isinstance(self.operands, Iterable):
            raise ValueError(f"operands: {self.operands!r} is not a sequence of 'x', 'w', 'g'")
        object.__setattr__(self, "operands", tuple(self.operands))  # YAML gives a list
        if not self.operands or not set(self.operands) <= {"x", "w", "g"}:
            raise ValueError(f"operands: {self.operands!r} is not a selection of 'x', 'w', 'g'")

    def width(self, errors: Sequence[float], bits: int, least: int) -> int:
        """The width to use.

        Args:
            errors: Diff at each of ``WIDTHS``.
            bits: The width in use.
            least: The width that the recipe gives.
        """
        index = WIDTHS.index(bits if self.mode == 1 else least)
        while errors[index] > self.threshold and WIDTHS[index] < self.max_bits:
            index += 1
        return WIDTHS[index]

    def interval(self, error: float, drift: float, step: int, epoch_steps: int) -> int:
        """Optimizer steps until the next adjustment.

        Args:
            error: Diff at the width chosen.
            drift: |ΔR|, change of the moving average of the log2 resolution.
            step: Optimizer steps so far.
            epoch_steps: Optimizer steps of an epoch.
        """
        if step < epoch_steps / 100:
            return 1
        if step >= epoch_steps:
            return epoch_steps
        change = max(self.delta * error * error, drift)
        wanted = self.beta / change - self.gamma if change > 0 else math.inf
        return epoch_steps if wanted >= epoch_steps else max(1, round(wanted))


DEFAULT_EPOCH_STEPS = 1000
"""Length of an epoch, in optimizer steps, where neither the rule nor a Trainer says it."""


def _check(field: str, value: float, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        raise ValueError(f"{field}: {value!r} is not a finite number from {low:g} to {high:g}")
