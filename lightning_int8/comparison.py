"""Which is faster for one layer on this machine, INT8 or float: timed on the layer's own shapes, then remembered."""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_int8.backends import Backend, Counts, backend_for
from lightning_int8.backends.cpu.choice_file import ChoiceFile
from lightning_int8.contraction import LayerState, contract
from lightning_int8.fusion import Deferred
from lightning_int8.geometry import ConvGeometry
from lightning_int8.layer_call import LayerCall, memory_format
from lightning_int8.layer_times import LayerTimes
from lightning_int8.version import __version__

ROUNDS = (3, 30)
"""Fewest and most timed runs of each way, taken in turn; the shortest counts."""

ENOUGH_SECONDS = 0.05
"""Time that all runs of a layer may take before the fewest are enough: short runs need more of them."""

REMEMBERED = ChoiceFile(name="layers.json")
"""Times between processes."""

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}

Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def compare(layer: nn.Module, state: LayerState, call: LayerCall) -> LayerTimes:
    """Time a layer both ways, or remember what another layer or process found.

    INT8 is timed as the layer runs it: with its recipe, the widths in force and the quantization of what it reads, but
    without the refreshes of clip values that happen at an interval. Float is what ``skip=`` would leave. Random numbers
    stand in for input and gradient; nothing of the layer changes, no generator of the user's is drawn from.

    Args:
        layer: Converted; its weight and bias take part.
        state: Of the layer.
        call: Shapes, dtypes, and the contractions that autograd asks for.
    """
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    backend = backend_for(weight, state.backend)
    problem = _problem(weight, bias, state, call, backend)
    times = _parse(REMEMBERED.get(problem), backend)
    if times is None:
        seconds = shortest(*_both_ways(weight, bias, state, call), weight.device)
        text = "{:.4g} {:.4g}".format(*seconds)
        REMEMBERED.put(problem, text)
        times = _parse(text, backend)  # what every later process will read
        assert times is not None
    return times


@torch.compiler.disable
def shortest(int8: Callable[[], None], float_: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds of the shortest run of each; both have run before."""
    best = [float("inf"), float("inf")]
    fewest, most = ROUNDS
    begin = time.perf_counter()
    for done in range(most):
        if done >= fewest and time.perf_counter() - begin > ENOUGH_SECONDS:
            break
        for way, run in enumerate((int8, float_)):
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            best[way] = min(best[way], time.perf_counter() - start)
    return best[0], best[1]


def _both_ways(
    weight: Tensor, bias: Tensor | None, state: LayerState, call: LayerCall
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A run of the INT8 layer and one of the float layer, warmed up."""
    twin, geometry = _twin(state), call.geometry

    def int8(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return contract(x, weight, bias, twin, geometry, True, call.output_channels_last)

    def float_(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if geometry is None:
            return functional.linear(x, weight, bias)
        return _convolution(x, weight, bias, geometry)

    differentiable = call.needs_input or call.needs_weight
    leaves = _leaf(weight, call.needs_weight), _leaf(bias, differentiable and bias is not None and bias.requires_grad)
    int8_format, float_format = call.channels_last or call.deferred, call.channels_last
    runs = _run(int8, leaves, call, int8_format), _run(float_, leaves, call, float_format)
    for run in runs:
        run()
    twin.clock.steps += 1  # that was a refresh; from now on nothing is due but what is due at every step
    for run in runs:
        run()
    return runs


def _run(
    forward: Forward, parameters: tuple[Tensor, Tensor | None], call: LayerCall, channels_last: bool
) -> Callable[[], None]:
    """Forward and, as far as autograd asks for it, backward pass on random numbers."""
    device = parameters[0].device
    generator = torch.Generator(device).manual_seed(0)

    def random(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, last: bool) -> Tensor:
        format_ = memory_format(len(shape)) if last else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device=device, memory_format=format_).normal_(generator=generator)

    x = random(call.shape, call.dtype, channels_last).requires_grad_(call.needs_input)
    wanted = [t for t in (x, *parameters) if t is not None and t.requires_grad]
    gradient: list[Tensor] = []

    def run() -> None:
        with torch.enable_grad(), _autocast(device, call.autocast):
            y = forward(x, *parameters)
        if not gradient:
            last = isinstance(y, Deferred) or call.output_channels_last
            gradient.append(random(y.shape, y.dtype, last))
        if wanted:
            torch.autograd.grad(y, wanted, gradient[0])

    return run


def _leaf(parameter: Tensor | None, differentiable: bool) -> Any:
    """The same memory, without the hooks that DDP puts on a parameter."""
    return None if parameter is None else parameter.detach().requires_grad_(differentiable)


def _twin(state: LayerState) -> LayerState:
    """A state that computes as ``state`` does, with a clock of its own that stands at a refresh of every range."""
    twin = copy.deepcopy(state)
    twin.counts = Counts()
    twin.clock.order, twin.clock.monitor_every = None, None
    for operand in twin.distinct_operands():
        operand.spec, operand.width = replace(operand.spec, bits=operand.bits), None
    interval = lcm(*(o.spec.range.every or twin.clock.refresh for o in twin.distinct_operands()))
    twin.clock.steps += interval - twin.clock.steps % interval
    return twin


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """Torch's own; what it cannot pad by itself is padded before, as torch's layer does too."""
    even = [min(pair) for pair in geometry.padding]
    if any(low != high for low, high in geometry.padding):
        x = functional.pad(
            x, [p - n for pair, n in reversed(list(zip(geometry.padding, even, strict=True))) for p in pair]
        )
    convolution = _CONVOLUTIONS[len(geometry.kernel_size)]
    return convolution(x, weight, bias, geometry.stride, even, geometry.dilation, geometry.groups)


def _problem(weight: Tensor, bias: Tensor | None, state: LayerState, call: LayerCall, backend: Backend) -> str:
    """All that the times depend on but the CPU; also the version, since a later one may be faster."""
    numerics = zlib.crc32(repr([(o.slot, o.spec, o.bits) for o in state.distinct_operands()]).encode())
    device = "" if weight.device.type == "cpu" else f" on {torch.cuda.get_device_name(weight.device)}"
    layout = "channels last" if call.output_channels_last else "contiguous"
    return (
        f"{__version__} {backend.name}{device}, {torch.get_num_threads()} threads; "
        f"weight {tuple(weight.shape)} {weight.dtype} {layout}, bias {bias is not None}, {call}; "
        f"numerics {numerics:08x}, refresh {state.clock.refresh}, fuse {state.fuse and backend.fuses}"
    )


def _parse(text: str | None, backend: Backend) -> LayerTimes | None:
    """Times as they are remembered; None for anything else, which is then timed again."""
    try:
        int8, float_ = map(float, (text or "").split())
        return LayerTimes(int8_seconds=int8, float_seconds=float_, backend=backend.name, integer=backend.integer)
    except ValueError:
        return None


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
