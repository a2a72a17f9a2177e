"""What happens between the steps of a converted model: widths change, learning-rate factors apply, layers stay float.

Global optimizer hooks see every optimizer step, whoever calls it: a Trainer, Fabric, a gradient scaler or a plain loop.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_int8.clock import Clock
from lightning_int8.contraction import LayerState

_alive: weakref.WeakSet[Steering] = weakref.WeakSet()


class Steering:
    """Steers the layers of one conversion.

    Attributes:
        layers: The converted layers with their states.
        settles_itself: Whether every optimizer step settles; False while an engine steps, which lets ranks agree first.
        keep_float: "first" and "last", the layers to keep in float by the order in which they run.
    """

    def __init__(self, clock: Clock, keep_float: Sequence[str]) -> None:
        self.layers: list[tuple[nn.Module, LayerState]] = []
        self.settles_itself = True
        self.keep_float = tuple(keep_float)
        self._clock = clock
        self._warned = False
        self._settled_steps = clock.steps
        self._held: list[tuple[Tensor, Tensor, float]] = []
        _alive.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _alive.add(self)

    def resumed(self) -> None:
        """Begin again after the steps and the layers' states were loaded."""
        self._settled_steps = self._clock.steps
        for _, state in self.layers:
            state.update_factor()

    def settle(self, agreed: bool) -> None:
        """Put in force what the finished steps measured: widths, learning-rate factors, which layers stay float.

        Args:
            agreed: Whether the same distances are known to every rank. Without that factors stay as they are: of their
                own, they would drive the weights of the ranks apart.
        """
        if self._settled_steps == self._clock.steps:
            return
        self._settled_steps = self._clock.steps
        if order := self._clock.order:  # empty as long as no layer had anything to compute
            self._clock.order = None
            states = {state.name: state for _, state in self.layers}
            for position, name in (("first", order[0]), ("last", order[-1])):
                if position in self.keep_float and name in states:
                    states[name].kept_float = f"keep_float: runs {position}"
        for _, state in self.layers:
            for operand in state.distinct_operands():
                operand.settle(self._clock.steps - 1)
            if agreed or state.kept_float:
                state.update_factor()

    def settle_alone(self) -> None:
        """``settle`` after a step that nobody else follows, as in a plain loop."""
        alone, stepped = not several_ranks(), self._settled_steps < self._clock.steps
        if stepped and not alone and not self._warned and any(state.learning_rate for _, state in self.layers):
            self._warned = True
            warnings.warn(
                "learning-rate factors are not applied: several ranks must agree on them, which they do where the "
                "plugin Int8Precision (of Lightning or Fabric) calls the optimizer",
                stacklevel=2,
            )
        self.settle(agreed=alone)

    def hold(self, optimizer: Optimizer) -> list[tuple[Tensor, Tensor, float]]:
        """Copies of the parameters that ``optimizer`` is about to update and whose factor is below 1, with the factor.

        A parameter that several layers own takes the smallest factor.
        """
        factors: dict[Tensor, float] = {}
        for layer, state in self.layers:
            # Restored or converted anew, a layer is no longer this conversion's, though a plugin may still hold it.
            if state.factor < 1.0 and layer.__dict__.get("int8_state") is state:
                for parameter in layer._parameters.values():
                    if parameter is not None and parameter.requires_grad:
                        factors[parameter] = min(state.factor, factors.get(parameter, 1.0))
        if factors:
            updated = {p for group in optimizer.param_groups for p in group["params"]}
            factors = {p: factor for p, factor in factors.items() if p in updated}
        self._held = [(p, p.detach().clone(), factor) for p, factor in factors.items()]
        return self._held

    @torch.no_grad()
    def scale_update(self) -> None:
        """p = old + factor · (p - old) for every parameter held."""
        for parameter, old, factor in self._held:
            parameter.sub_(old).mul_(factor).add_(old)
        self._held = []


def several_ranks() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    held = [steering.hold(optimizer) for steering in _alive]
    if not any(held):
        return None
    # Called again, a closure would be evaluated at a point that the factor is about to move.
    arguments = [_only_once(a, optimizer) if callable(a) else a for a in args[1:]]
    named = {key: _only_once(a, optimizer) if callable(a) else a for key, a in kwargs.items()}
    return (args[0], *arguments), named


def _after_step(*_: Any) -> None:
    for steering in _alive:
        steering.scale_update()
        if steering.settles_itself:
            steering.settle_alone()


def _only_once(closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
    called = False

    def once() -> Any:
        nonlocal called
        if called:
            raise TypeError(
                f"optimizer: {type(optimizer).__name__} evaluates its closure more than once a step, which per-layer "
                "learning-rate factors do not allow; use another optimizer, or a recipe without learning_rate"
            )
        called = True
        return closure()

    return once


# After the clock's own hook: what settles belongs to the step that it has just counted.
register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
