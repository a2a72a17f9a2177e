"""The three contractions of a training step of one layer, as one autograd function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_int8.backends import Backend, Counts, backend_for
from lightning_int8.backends.cpu.arrays import FLOAT_DTYPES
from lightning_int8.backends.cpu.expression import Expression, Term
from lightning_int8.backends.form import Form
from lightning_int8.clock import Clock
from lightning_int8.fusion import Deferred
from lightning_int8.geometry import ConvGeometry
from lightning_int8.layer_call import LayerCall, extent
from lightning_int8.layer_times import LayerTimes
from lightning_int8.operand import Operand, make_operands
from lightning_int8.planes import Planes, packed, unpacked
from lightning_int8.policies import BitWidthRule, DeviationFactor
from lightning_int8.spec import Recipe


class LayerState:
    """What a converted layer remembers, beside the module and not in it: no buffer, no parameter.

    Attributes:
        name: Name of the layer in the model that was converted.
        recipe: Its numerics.
        backend: Choice of backend, resolved at each call by the device of the input.
        fuse: Whether a convolution may return a deferred tensor, and the gradient of a bias be summed along the way.
        clock: Steps of the model, shared by its layers.
        operands: Operand of each slot; slots may share one.
        counts: Contractions executed.
        train_calls: Forward passes of training that had something to compute.
        call: The training call that asked for most so far, None before the first.
        kept_by_recipe: Why the recipe keeps the layer in float, empty if it does not.
        times: Of the layer in INT8 and in float, once ``layers="auto"`` has compared them.
        learning_rate: Rule of the layer's learning-rate factor, or None.
        factor: Factor of the layer's updates, in force at the next optimizer step.
    """

    def __init__(
        self, name: str, layer: nn.Module, recipe: Recipe, backend: str, clock: Clock, seed: int, fuse: bool
    ) -> None:
        self.name = name
        self.recipe = recipe
        self.backend = backend
        self.fuse = fuse
        self.clock = clock
        self.operands = make_operands(recipe, name, layer, clock, seed)
        self.counts = Counts()
        self.train_calls = 0
        self.call: LayerCall | None = None
        self.kept_by_recipe = ""
        self.times: LayerTimes | None = None
        self.learning_rate: DeviationFactor | None = None
        self.factor = 1.0
        self._factor_of: Tensor | None = None
        if recipe.learning_rate is not None:
            self.scale_learning_rate(recipe.learning_rate)
        if recipe.bit_width is not None:
            self.adapt_widths(recipe.bit_width)

    @property
    def kept_float(self) -> str:
        """Why the layer computes in float after all, empty if it does not."""
        return self.kept_by_recipe or ("" if self.times is None else self.times.reason)

    def note(
        self, x: Tensor, geometry: ConvGeometry | None, channels_last: bool, needs_input: bool, needs_weight: bool
    ) -> None:
        """Take note of a training call, see ``LayerCall``; the largest is what timings and the report are about."""
        if self.call is None or extent(x.numel(), needs_input, needs_weight) > self.call.extent:
            self.call = LayerCall.of(x, geometry, channels_last, needs_input, needs_weight)
            self.counts.routes.clear()

    def adapt_widths(self, rule: BitWidthRule) -> None:
        """Let ``rule`` decide the widths of the operands from now on."""
        for operand in self.distinct_operands():
            operand.adapt(rule)

    def scale_learning_rate(self, rule: DeviationFactor | None) -> None:
        """Let ``rule`` decide the learning-rate factor from now on; None takes plain steps."""
        self.learning_rate = rule
        self.operands["grad_weight.lhs"].tracks_distance = rule is not None
        self._factor_of = None
        self.update_factor()

    def update_factor(self) -> None:
        """Take the factor from the cosine distance that the gradient of the output showed last."""
        distance = self.operands["grad_weight.lhs"].distance
        if self.learning_rate is None or self.kept_float or distance is None:
            self.factor = 1.0
        elif distance is not self._factor_of:
            self._factor_of = distance  # read by the host once, not at every step
            if math.isfinite(value := float(distance)):
                self.factor = self.learning_rate.factor(value)

    def distinct_operands(self) -> list[Operand]:
        """The operands, each once."""
        return list(dict.fromkeys(self.operands.values()))


@torch.compiler.disable
def contract(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: LayerState,
    geometry: ConvGeometry | None,
    training: bool,
    channels_last: bool = True,
) -> Tensor:
    """x · w + bias with INT8 operands, and its two derivatives with INT8 operands.

    Args:
        x: float32, bfloat16 or float16, ``(rows, C)``, or ``(N, C, *in)`` with ``geometry``; it may be deferred.
        weight: ``(Co, C)``, or ``(Co, C / groups, *kernel)`` with ``geometry``.
        bias: ``(Co,)`` or None.
        state: The layer.
        geometry: The convolution, None for a matrix product.
        training: Whether the layer is in training mode.
        channels_last: Memory format of the result of a convolution.

    Returns:
        ``(rows, Co)`` or ``(N, Co, *out)`` in the autocast dtype where autocast is on, else in the dtype of ``x``; of a
        convolution a deferred tensor where the layer may fuse.
    """
    differentiable = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    # Gradients of a layer in eval mode (frozen batch norm is often trained so) make it part of training all the same.
    training = training or differentiable
    state.train_calls += training
    return _Contraction.apply(x, weight, bias, state, geometry, training, differentiable, channels_last)


class _Contraction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: LayerState,
        geometry: ConvGeometry | None,
        training: bool,
        differentiable: bool,
        channels_last: bool,
    ) -> Tensor:
        backend, operands = backend_for(x, state.backend), state.operands
        # A forward inside a backward is the recomputation of a checkpointed segment: same draw, nothing updated.
        fresh = training and torch._C._current_graph_task_id() == -1
        planes = Planes(backend, update=fresh)
        if fresh and state.clock.order is not None and state.name not in state.clock.order:
            state.clock.order.append(state.name)
        needs_x, needs_w = (differentiable and needed for needed in ctx.needs_input_grad[:2])
        if fresh:
            state.note(x, geometry, channels_last, needs_x, needs_w)
        keys = {o: o.draw(fresh, x.device) for o in state.distinct_operands()}
        dtype = _output_dtype(x)
        defers = geometry is not None and state.fuse and backend.fuses and dtype in FLOAT_DTYPES
        defers = defers and not torch.jit.is_tracing()
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)

        with torch.autocast(x.device.type, enabled=False):
            source, w = _canonical(x, geometry, backend), _canonical(weight, geometry, backend)
            qx = planes.of(operands["output.lhs"], source, keys)
            if needs_x:
                qw, saved_w = planes.of_both(operands["output.rhs"], operands["grad_input.rhs"], w, keys)
            else:
                qw, saved_w = planes.of(operands["output.rhs"], w, keys), None
            moments = None
            if defers and training and bias is None and geometry is not None and geometry.groups == 1:
                # A convolution without a bias is mostly one before a batch norm. Grouped ones have faster routes than
                # the one that sums moments.
                moments = torch.full((2, len(weight)), torch.nan, dtype=torch.float64)
            form = Form(dtype, None if bias is None else bias.float(), moments)
            y = backend.output(qx, qw, geometry, state.counts, form)
            saved_x = planes.of(operands["grad_weight.rhs"], source, keys) if needs_w else None

        # The gradient comes once, to the recomputed graph (reentrant checkpointing) or to the first one.
        ctx.state, ctx.geometry, ctx.keys, ctx.update = state, geometry, keys, training
        ctx.layout, tensors = packed(saved_w, saved_x)
        ctx.save_for_backward(*tensors)
        if geometry is None:
            return y
        if defers:
            if moments is not None and bool(moments[1, 0].isnan()):
                moments = None  # not by this backend or route, or of what is no number
            return Deferred(Expression((Term(y),), moments=moments), channels_last)
        # `.data`, since autograd must not take the output for a view.
        return y.movedim(-1, 1).data if channels_last else y.movedim(-1, 1).contiguous()

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        state: LayerState = ctx.state
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"layer {state.name!r}: second derivatives (create_graph=True, gradient penalties) do not exist for "
                f"INT8 contractions; keep the layer in float with skip=({state.name!r},)"
            )
        backend, operands = backend_for(grad_output, state.backend), state.operands
        planes = Planes(backend, update=ctx.update)
        saved_w, saved_x = unpacked(ctx.layout, ctx.saved_tensors)
        x_dtype, w_dtype, bias_dtype = ctx.dtypes
        grad_x = grad_w = grad_bias = None
        with torch.autocast(grad_output.device.type, enabled=False):
            g = _canonical(grad_output, ctx.geometry, backend)
            if ctx.needs_input_grad[2] and state.fuse and backend.fuses and g.dtype in FLOAT_DTYPES:
                g = g if isinstance(g, Expression) else Expression((Term(g.detach().contiguous()),))
                g.summed = True
            if saved_w is not None:
                qg = planes.of(operands["grad_input.lhs"], g, ctx.keys)
                grad_x = backend.grad_input(qg, saved_w, ctx.geometry, state.counts, Form(x_dtype))
            if saved_x is not None:
                qg = planes.of(operands["grad_weight.lhs"], g, ctx.keys)
                grad_w = backend.grad_weight(qg, saved_x, ctx.geometry, state.counts, Form(w_dtype))
            if ctx.needs_input_grad[2]:
                grad_bias = _channel_sums(g).to(bias_dtype)
        if ctx.geometry is not None:
            grad_x, grad_w = (t if t is None else t.movedim(-1, 1) for t in (grad_x, grad_w))
        return grad_x, grad_w, grad_bias, None, None, None, None, None


def _canonical(t: Tensor, geometry: ConvGeometry | None, backend: Backend) -> Tensor | Expression:
    """A tensor of a convolution with its channels last, of a matrix product as it is; deferred ones stay so."""
    if isinstance(t, Deferred):
        return t.source() if backend.fuses else t.plain().movedim(1, -1)
    return t if geometry is None else t.movedim(1, -1)


def _channel_sums(g: Tensor | Expression) -> Tensor:
    return g.channel_sums() if isinstance(g, Expression) else g.float().flatten(0, -2).sum(0)


def _output_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
