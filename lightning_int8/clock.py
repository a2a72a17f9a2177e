"""Optimizer steps of a converted model: what decides when clip values are refreshed."""

from __future__ import annotations

import weakref
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

_clocks: weakref.WeakSet[Clock] = weakref.WeakSet()


class Clock:
    """Counts optimizer steps, whoever calls the optimizer; forward passes and micro-batches do not count.

    Attributes:
        steps: Optimizer steps since conversion.
        refresh: Interval, in optimizer steps, of the range rules that name none.
    """

    def __init__(self, refresh: int) -> None:
        self.steps = 0
        self.refresh = refresh
        _clocks.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copies and unpickled models keep their own time.
        self.__dict__.update(state)
        _clocks.add(self)

    def due(self, every: int | None, step: int | None = None) -> bool:
        """Whether ``step`` (the current one by default) refreshes a rule: each ``every`` steps.

        Ranges move fastest at the start, so steps 1, 2, 4, 8, ... before the first interval refresh too. The answer
        depends on the step alone, so that all ranks agree on it.
        """
        every = every or self.refresh
        step = self.steps if step is None else step
        return step % every == 0 or (step < every and step & (step - 1) == 0)


def _tick(*_: Any) -> None:
    for clock in _clocks:
        clock.steps += 1


register_optimizer_step_post_hook(_tick)
