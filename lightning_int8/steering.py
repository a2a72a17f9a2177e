"""What happens between the steps of a converted model: widths change, learning-rate factors apply, layers stay float.

Global optimizer hooks see every optimizer step, whoever calls it: a Trainer, Fabric, a gradient scaler or a plain loop.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_int8.clock import Clock
from lightning_int8.comparison import compare
from lightning_int8.contraction import LayerState
from lightning_int8.layer_times import LayerTimes
from lightning_int8.sync import first_rank, of_first_rank, several_ranks, union

_alive: weakref.WeakSet[Steering] = weakref.WeakSet()


class Steering:
    """Steers the layers of one conversion.

    Attributes:
        layers: The converted layers with their states.
        settles_itself: Whether every optimizer step settles; False while an engine steps, which lets ranks agree first.
        keep_float: "first" and "last", the layers to keep in float by the order in which they run.
        compares: Whether layers that are faster in float stay float.
    """

    def __init__(self, clock: Clock, keep_float: Sequence[str], compares: bool) -> None:
        self.layers: list[tuple[nn.Module, LayerState]] = []
        self.settles_itself = True
        self.keep_float = tuple(keep_float)
        self.compares = compares
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
            agreed: Whether every rank is here and knows the same distances. Without that factors stay as they are: of
                their own, they would drive the weights of the ranks apart. Nor are layers compared.
        """
        if self._settled_steps == self._clock.steps:
            return
        self._settled_steps = self._clock.steps
        if order := self._clock.order:  # empty as long as no layer had anything to compute
            self._clock.order = None
            states = {state.name: state for _, state in self.layers}
            for position, name in (("first", order[0]), ("last", order[-1])):
                if position in self.keep_float and name in states:
                    states[name].kept_by_recipe = f"keep_float: runs {position}"
        for _, state in self.layers:
            for operand in state.distinct_operands():
                operand.settle(self._clock.steps - 1)
        if self.compares and agreed:
            self._compare()
        for _, state in self.layers:
            if agreed or state.kept_float:
                state.update_factor()

    @torch.compiler.disable
    def _compare(self) -> None:
        """Time the layers that have trained and were not compared before; rank 0 does it for all.

        A layer that is faster in float stays so from now on.
        """
        undecided = {s.name: (m, s) for m, s in self._own_layers() if not s.kept_float and s.times is None}
        if not undecided:
            return
        if torch._C._current_graph_task_id() != -1:  # where a contraction takes itself for a recomputation
            self._warn("layers='auto' compares nothing where the optimizer steps inside the backward pass")
            return
        calls = {name: s.call for name, (_, s) in undecided.items() if s.call is not None}
        times: dict[str, LayerTimes] = {}
        if several_ranks():
            calls = union(calls)
        if calls and first_rank():
            times = {name: compare(*undecided[name], call) for name, call in calls.items()}
        if calls and several_ranks():
            times = of_first_rank(times)
        for name, found in times.items():
            undecided[name][1].times = found
        called = [s for _, s in self._own_layers() if s.call is not None or s.kept_float]
        if times and first_rank() and all(s.kept_float for s in called):
            warnings.warn(
                "layers='auto': every layer is faster in float on this machine; nothing runs INT8", stacklevel=2
            )

    def _own_layers(self) -> list[tuple[nn.Module, LayerState]]:
        """Without those that were restored or converted anew, though a plugin may still hold them."""
        return [(layer, state) for layer, state in self.layers if layer.__dict__.get("int8_state") is state]

    def settle_alone(self) -> None:
        """``settle`` after a step that nobody else follows, as in a plain loop."""
        alone, stepped = not several_ranks(), self._settled_steps < self._clock.steps
        waiting = ["learning-rate factors are not applied"] if any(s.learning_rate for _, s in self.layers) else []
        waiting += ["layers='auto' compares nothing"] if self.compares else []
        if stepped and not alone and waiting:
            self._warn(
                f"{' and '.join(waiting)}: several ranks must agree on them, which they do where the plugin "
                "Int8Precision (of Lightning or Fabric) calls the optimizer"
            )
        self.settle(agreed=alone)

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=2)

    def hold(self, optimizer: Optimizer) -> list[tuple[Tensor, Tensor, float]]:
        """Copies of the parameters that ``optimizer`` is about to update and whose factor is below 1, with the factor.

        A parameter that several layers own takes the smallest factor.
        """
        factors: dict[Tensor, float] = {}
        for layer, state in self._own_layers():
            if state.factor < 1.0:
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
