"""SGD whose gradients, momentum, learning rate and weights lie on fixed grids (WAGEUBN)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_int8.grids import constant_quantize, direct_quantize, grid_step

MASTER_DTYPES = (torch.float32, torch.float64)
"""Dtypes whose significand holds a 24-bit weight."""

_WIDTHS = ("gradient_bits", "momentum_bits", "accumulator_bits", "lr_bits", "update_bits")


class FixedPointSGD(torch.optim.Optimizer):
    """SGD with momentum in fixed point: gradient, momentum buffer, learning rate and weight each on a grid of its own.

    With Q(x, k) rounding to multiples of 2^(1 - k), and CQ keeping the direction of a gradient in a few significant
    bits while it drops the magnitude (``lightning_int8.grids``)::

        g   = CQ(grad + weight_decay·w)      two or more dimensions;  Q(grad, gradient_bits) for biases and norms
        acc = Q(momentum·acc + g, accumulator_bits)
        w   = Q(w - clip(Q(lr, lr_bits))·acc, update_bits)

    Grids are carried in float tensors: this is no INT8 contraction. CQ makes the update independent of the loss scale
    and of the size of the gradient, so learning rates of plain SGD do not carry over. Its stochastic rounding draws
    from (seed, index of the parameter, step of the parameter): a run resumed from ``state_dict`` continues bit for bit.

    Every argument but ``params`` may differ per parameter group, and may be changed between steps, as learning rate
    schedulers do; a group with ``quantized=False`` takes a plain float step of SGD with momentum, for the layers that
    the recipe leaves in float.

    Source: Yang et al., "Training high-performance and large-scale deep neural networks with full 8-bit integers",
    Neural Networks 2020, and the authors' code, from which the defaults are; the paper's momentum is 0.75.

    Departures: the authors' script leaves the order of update and rounding open; here it is as written above. Weights
    are not initialised anew: they come to their grid with the first step.

    Args:
        params: Parameters, or dictionaries that describe groups of them. Quantized ones are float32 or float64.
        lr: Learning rate; in a quantized group at least half a step of its grid, 2^-lr_bits, and below 1 once rounded.
        momentum: Coefficient of the momentum buffer; in a quantized group a multiple of 2^(1 - momentum_bits).
        weight_decay: L2 penalty; a quantized group applies it to parameters of two or more dimensions only.
        significance: The paper's dr: integer steps that CQ divides the power of two nearest to max|grad| into. Lowering
            it makes the update smaller, like the learning rate: |g| < significance · 2^(1 - gradient_bits). With the
            default widths 2, the authors' last value, stops the weights: a single step is lost in the accumulator.
        gradient_bits: Width of a gradient.
        momentum_bits: Width of the momentum coefficient.
        accumulator_bits: Width of the momentum buffer.
        lr_bits: Width of the learning rate.
        update_bits: Width of a weight after its update.
        quantized: Whether the group is updated in fixed point.
        seed: Seed of stochastic rounding.

    Raises:
        ValueError: A hyper-parameter out of its range, at construction or when a step finds it; among them a learning
            rate that rounds to 0.
        TypeError: In ``step``: a sparse or complex gradient, or a quantized parameter of another dtype.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0.25,
        weight_decay: float = 0.0,
        significance: int = 128,
        gradient_bits: int = 15,
        momentum_bits: int = 3,
        accumulator_bits: int = 13,
        lr_bits: int = 10,
        update_bits: int = 24,
        quantized: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "significance": significance,
            "gradient_bits": gradient_bits,
            "momentum_bits": momentum_bits,
            "accumulator_bits": accumulator_bits,
            "lr_bits": lr_bits,
            "update_bits": update_bits,
            "quantized": quantized,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what it does not say is taken from the arguments of the optimizer."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; nothing is updated if anything is refused.

        Args:
            closure: Evaluates the model anew and returns the loss.

        Returns:
            The loss that ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check(group)
        for index, group, parameter, grad in list(self._work()):
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["step"] = 0
            if group["quantized"]:
                key = torch.tensor((group["seed"], index, state["step"]), dtype=torch.int64)
                _fixed_point_update(parameter, grad, state["momentum_buffer"], group, key)
            else:
                _float_update(parameter, grad, state["momentum_buffer"], group)
            state["step"] += 1
        return loss

    def _work(self) -> Iterator[tuple[int, dict[str, Any], Tensor, Tensor]]:
        """Index in ``state_dict``, group, parameter and gradient of what has one, checked."""
        index = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for place, parameter in enumerate(group["params"]):
                grad = parameter.grad
                if grad is not None and parameter.numel() > 0:
                    name = names[place] if names else f"{index} of shape {tuple(parameter.shape)}"
                    _check_tensors(name, parameter, grad, group["quantized"])
                    yield index, group, parameter, grad
                index += 1


def quantized_lr(lr: float, bits: int) -> float:
    """Clip(Q(lr, bits)): the learning rate that a quantized group applies, at most 1 - 2^(1 - bits).

    Raises:
        ValueError: ``lr`` is not a finite number, is negative, or rounds to 0.
    """
    step = grid_step(bits)
    rate = min(round(lr / step) * step, 1 - step) if math.isfinite(lr) and lr >= 0 else 0.0
    if rate == 0:
        raise ValueError(
            f"lr: {lr!r} rounds to no learning rate on a grid of {step} (lr_bits={bits}); it must be above {step / 2}"
        )
    return rate


def _fixed_point_update(w: Tensor, grad: Tensor, acc: Tensor, group: dict[str, Any], key: Tensor) -> None:
    """One step in place; ``w``, ``grad`` and ``acc`` float32 or float64 of one shape."""
    if w.dim() >= 2:
        # Multiplied, then added: a fused multiply-add would round otherwise on other processors.
        decayed = grad + w * group["weight_decay"] if group["weight_decay"] else grad
        g = constant_quantize(decayed, group["significance"], group["gradient_bits"], key)
    else:
        g = direct_quantize(grad, group["gradient_bits"])
    acc.copy_(direct_quantize(g.add_(acc * group["momentum"]), group["accumulator_bits"]))
    rate = quantized_lr(float(group["lr"]), group["lr_bits"])
    w.copy_(direct_quantize(w - acc * rate, group["update_bits"]))


def _float_update(w: Tensor, grad: Tensor, buffer: Tensor, group: dict[str, Any]) -> None:
    """One step of ``torch.optim.SGD`` with momentum, in place."""
    if group["weight_decay"]:
        grad = grad.add(w, alpha=group["weight_decay"])
    buffer.mul_(group["momentum"]).add_(grad)
    w.add_(buffer, alpha=-float(group["lr"]))


def _check(group: dict[str, Any]) -> None:
    """Raise ``ValueError`` that names the hyper-parameter out of its range."""
    lr = float(group["lr"])
    for name, value in (("lr", lr), ("momentum", group["momentum"]), ("weight_decay", group["weight_decay"])):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: {value!r} is not a finite number from 0 on")
    seed = group["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: {seed!r} is not a 64-bit integer")
    if not isinstance(group["quantized"], bool):
        raise ValueError(f"quantized: {group['quantized']!r} is not True or False")
    if group["quantized"]:
        _check_grids(group, lr)


def _check_grids(group: dict[str, Any], lr: float) -> None:
    for name in _WIDTHS:
        try:
            grid_step(group[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    quantized_lr(lr, group["lr_bits"])
    step = grid_step(group["momentum_bits"])
    if group["momentum"] >= 1 or group["momentum"] % step:
        raise ValueError(f"momentum: {group['momentum']!r} is not a multiple of {step} below 1 (momentum_bits)")
    significance = group["significance"]
    if not isinstance(significance, int) or isinstance(significance, bool) or significance < 2:
        raise ValueError(f"significance: {significance!r} is not an integer from 2 on")


def _check_tensors(name: str, parameter: Tensor, grad: Tensor, quantized: bool) -> None:
    """Raise ``TypeError`` that names the parameter whose gradient cannot be applied."""
    if grad.layout != torch.strided:
        raise TypeError(f"parameter {name}: gradient: {grad.layout} is not supported; use sparse=False")
    if grad.is_complex():
        raise TypeError(f"parameter {name}: gradient: {grad.dtype} is not supported; gradients must be real")
    if quantized and parameter.dtype not in MASTER_DTYPES:
        raise TypeError(
            f"parameter {name}: {parameter.dtype} does not hold a weight on the grid of the update; keep master "
            f"weights in float32, or put the parameter into a group with quantized=False"
        )
