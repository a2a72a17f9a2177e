"""Batch norm as one term of an expression: at most one walk for the statistics, none for the result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_int8.backends.cpu.expression import Expression, Term, normalization, passes
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
        source = x.source()
        values, moments = source.values(), source.moments
        if training:
            mean, var = passes().moments(values) if moments is None else moments
            if running_mean is not None and running_var is not None:
                count = values.numel() // values.shape[-1]
                running_mean.lerp_(mean.float(), momentum)
                running_var.lerp_((var * (count / (count - 1))).float(), momentum)
        else:
            assert running_mean is not None
            assert running_var is not None
            mean, var = running_mean.double(), running_var.double()
        ctx.mean = mean.numpy()
        ctx.inverse, factor, offset = normalization().affine(ctx.mean, var.numpy(), eps, weight, bias)
        ctx.save_for_backward(values, weight)
        ctx.training, ctx.channels_last = training, x.channels_last
        ctx.set_materialize_grads(False)
        term = Term(values, torch.from_numpy(factor))
        return Deferred(Expression((term,), torch.from_numpy(offset)), x.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 8
        values, weight = ctx.saved_tensors
        g = plain_term(grad)
        mean = torch.from_numpy(ctx.mean)
        sums = passes().channel_sums(Expression((g,)), values, mean.float())
        found = normalization().gradients(
            sums.numpy(), ctx.mean, ctx.inverse, weight, values.numel() // values.shape[-1]
        )
        grad_weight, grad_bias, factor, slope, offset = (torch.from_numpy(v) for v in found)
        grad_x = None
        if ctx.needs_input_grad[0]:
            terms: tuple[Term, ...] = (replace(g, factor=factor),)
            if ctx.training:
                terms = (*terms, Term(values, slope))
            grad_x = Deferred(Expression(terms, offset if ctx.training else None), ctx.channels_last)
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        return (
            grad_x,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            *(None,) * 5,
        )
