"""Batch norm as one term of an expression: one walk for the statistics, none for the result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_int8.backends.cpu.expression import Expression, Term, passes
from lightning_int8.fusion.deferred import Deferred, fuses, plain_term


@fuses(functional.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """``torch.nn.functional.batch_norm``."""
    vectors = [t for t in (weight, bias, running_mean, running_var) if t is not None]
    channels, count = input.shape[1], input.numel() // max(1, input.shape[1])
    if (
        not isinstance(input, Deferred)
        or any(type(t) not in (Tensor, torch.nn.Parameter) or t.dtype != torch.float32 for t in vectors)
        or any(t.shape != (channels,) or t.device.type != "cpu" for t in vectors)
        or (training and count < 2)
        or (running_mean is None) != (running_var is None)
        or (running_mean is None and not training)
    ):
        return NotImplemented
    return _BatchNorm.apply(input, weight, bias, running_mean, running_var, training, momentum, eps)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Deferred,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Deferred:
        values = x.source().values()
        if training:
            mean, var = passes().moments(values)
            if running_mean is not None and running_var is not None:
                count = values.numel() // values.shape[-1]
                running_mean.lerp_(mean.float(), momentum)
                running_var.lerp_((var * (count / (count - 1))).float(), momentum)
        else:
            assert running_mean is not None
            assert running_var is not None
            mean, var = running_mean.double(), running_var.double()
        inverse = (var + eps).rsqrt()
        ctx.save_for_backward(values, weight)
        ctx.mean, ctx.inverse, ctx.training, ctx.channels_last = mean, inverse, training, x.channels_last
        ctx.set_materialize_grads(False)
        factor = _factor(inverse, weight)
        offset = -mean * factor if bias is None else bias.double() - mean * factor
        return Deferred(Expression((Term(values, factor.float()),), offset.float()), x.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 8
        values, weight = ctx.saved_tensors
        mean, inverse, count = ctx.mean, ctx.inverse, values.numel() // len(ctx.mean)
        g = plain_term(grad)
        total, along = passes().channel_sums(Expression((g,)), values, mean.float())
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = (along * inverse).float()
        if ctx.needs_input_grad[2]:
            grad_bias = total.float()
        if ctx.needs_input_grad[0]:
            factor = _factor(inverse, weight)
            terms, offset = [replace(g, factor=factor.float())], None
            if ctx.training:
                # The statistics depend on x too: that takes its mean and its correlation with x out of the gradient.
                slope = -factor * inverse * inverse * along / count
                terms.append(Term(values, slope.float()))
                offset = (-factor * total / count - slope * mean).float()
            grad_x = Deferred(Expression(tuple(terms), offset), ctx.channels_last)
        return (grad_x, grad_weight, grad_bias, None, None, None, None, None)


def _factor(inverse: Tensor, weight: Tensor | None) -> Tensor:
    return inverse if weight is None else inverse * weight.double()
