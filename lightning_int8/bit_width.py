"""The width of one operand where a recipe adapts it: measured at some steps, changed between steps."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lightning_int8.policies import DEFAULT_EPOCH_STEPS, WIDTHS, BitWidthRule


class AdaptiveWidth:
    """Width, schedule and moving average of one operand (Zhang et al. 2020, quantization parameter adjustment).

    A measuring step leaves the candidates of all widths; ``settle`` chooses among them after the step, so that ranks
    can agree on the numbers in between, and the choice holds from the next step on.

    Attributes:
        rule: How widths and intervals follow from errors.
        least: The width that the recipe gives.
        bits: The width in force.
        next_step: Optimizer step of the next adjustment.
        candidates: Clip value at each of ``WIDTHS``, float32 ``(3, *clip_shape)``; None once settled.
        errors: Diff at each of ``WIDTHS``, float64 ``(3,)``; None once settled.
    """

    def __init__(self, rule: BitWidthRule, least: int) -> None:
        self.rule = rule
        self.least = least
        self.bits = least
        self.next_step = 0
        self.candidates: Tensor | None = None
        self.errors: Tensor | None = None
        # R, the moving average of the log2 resolution, begins at 0. Until it has come to the resolution it drifts, so
        # that adjustments are frequent while everything is new.
        self._average = 0.0
        self._averaged_step = -1
        self._resolution = 0.0  # s: log2 resolution since the last adjustment

    def is_due(self, step: int) -> bool:
        """Whether ``step`` adjusts."""
        return step >= self.next_step

    def measured(self, candidates: Tensor, errors: Tensor) -> None:
        """Note a measurement; several in one step (micro-batches, shared layers) count by their largest values."""
        if self.candidates is not None and self.errors is not None:
            candidates = torch.maximum(candidates, self.candidates.to(candidates.device))
            errors = torch.maximum(errors, self.errors)
        self.candidates, self.errors = candidates, errors

    def settle(self, step: int, log2_steps: list[float], epoch_steps: int | None) -> Tensor:
        """Choose the width from the last measurement and schedule the next.

        Args:
            step: The optimizer step that measured.
            log2_steps: Log2 resolution of each candidate.
            epoch_steps: Optimizer steps of an epoch, None if unknown.

        Returns:
            The clip value at the chosen width.
        """
        assert self.candidates is not None, "nothing was measured"
        assert self.errors is not None
        rule, errors = self.rule, self.errors.tolist()
        bits = rule.width(errors, self.bits, self.least)
        index = WIDTHS.index(bits)
        resolution = log2_steps[index]
        # The resolution moves by as many octaves as the width gains bits, and that is no drift.
        average = self._average_at(step) - (bits - self.bits)
        drift = abs(rule.alpha * (resolution - average))
        epoch_steps = rule.epoch_steps or epoch_steps or DEFAULT_EPOCH_STEPS
        self.next_step = step + rule.interval(errors[index], drift, step, epoch_steps)
        self._average = rule.alpha * resolution + (1.0 - rule.alpha) * average
        self._averaged_step, self._resolution, self.bits = step, resolution, bits
        clip_value, self.candidates, self.errors = self.candidates[index], None, None
        return clip_value

    def _average_at(self, step: int) -> float:
        """R just before ``step``: at every step in between it moved towards the unchanged resolution."""
        stays = (1.0 - self.rule.alpha) ** max(0, step - 1 - self._averaged_step)
        return self._resolution + stays * (self._average - self._resolution)

    def rescale(self, ratio: float) -> None:
        """Follow a tensor that is from now on ``ratio`` times as large: its resolution did not drift."""
        if self.candidates is not None:
            self.candidates = self.candidates * ratio
        if self._averaged_step >= 0:
            self._resolution += math.log2(ratio)
            self._average += math.log2(ratio)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in primitives; call it between steps, when all is settled."""
        average = [self._average, float(self._averaged_step), self._resolution]
        rule = asdict(self.rule)
        return {"rule": rule, "bits": self.bits, "next_step": self.next_step, "average": average}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], least: int) -> AdaptiveWidth:
        """Inverse of ``state_dict``; ``least`` is the width that the recipe gives."""
        width = cls(BitWidthRule(**state["rule"]), least)
        width.bits, width.next_step = state["bits"], state["next_step"]
        width._average, averaged, width._resolution = state["average"]
        width._averaged_step = int(averaged)
        return width
