"""Optimizer steps of a converted model: what decides when clip values are refreshed."""

from __future__ import annotations

import weakref
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

_clocks: weakref.WeakSet[Clock] = weakref.WeakSet()


class Clock:
    """Counts optimizer steps, whoever calls the optimizer; forward passes and micro-batches do not count.

    Any optimizer of the process may be this model's, so a step counts for every model that ran a training forward since
    the last one: another model that trains in between does not count.

    Attributes:
        steps: Optimizer steps since conversion.
        running: Whether a training forward ran since the last step.
        refresh: Interval, in optimizer steps, of the range rules that name none.
        epoch_steps: Optimizer steps of an epoch, where the trainer tells.
        monitor_every: Interval at which operands leave their quantization error; None never.
        order: Names of the layers in the order in which they first ran, until someone has used it; then None.
    """

    def __init__(self, refresh: int) -> None:
        self.steps = 0
        self.running = False
        self.refresh = refresh
        self.epoch_steps: int | None = None
        self.monitor_every: int | None = None
        self.order: list[str] | None = []
        _clocks.add(self)

    @property
    def monitored(self) -> bool:
        """Whether operands leave their quantization error at this step."""
        return self.monitor_every is not None and self.steps % self.monitor_every == 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copies and unpickled models keep their own time.
        self.__dict__.update(state)
        _clocks.add(self)

    def last_due(self, every: int | None, step: int) -> int:
        """The last step up to ``step`` that refreshes a rule: each ``every`` steps (None: ``refresh``).

        Ranges move fastest at the start, so steps 1, 2, 4, 8, ... before the first interval refresh too. The answer
        depends on the step alone, so that all ranks agree on it.
        """
        every = every or self.refresh
        if step >= every:
            return step - step % every
        return 1 << (step.bit_length() - 1) if step else 0


def _tick(*_: Any) -> None:
    for clock in _clocks:
        clock.steps += clock.running
        clock.running = False


register_optimizer_step_post_hook(_tick)
