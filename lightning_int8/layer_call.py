"""What one call of a layer looked like: all that its time depends on, besides the layer and the machine."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lightning_int8.fusion import Deferred
from lightning_int8.geometry import ConvGeometry


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """One call in training, in primitives, so that ranks can send it to each other.

    Attributes:
        shape: Of the input: ``(rows, C)``, or ``(N, C, *in)`` with ``geometry``.
        dtype: Of the input.
        autocast: dtype that autocast computes in, None where it is off.
        geometry: The convolution, None for a matrix product.
        channels_last: Memory format of the input.
        deferred: Whether the input came as an expression, whose values lie with channels last in any case.
        output_channels_last: Memory format of the result.
        needs_input: Whether autograd asks for grad_input.
        needs_weight: Whether autograd asks for grad_weight.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    autocast: torch.dtype | None
    geometry: ConvGeometry | None
    channels_last: bool
    deferred: bool
    output_channels_last: bool
    needs_input: bool
    needs_weight: bool

    @classmethod
    def of(
        cls, x: Tensor, geometry: ConvGeometry | None, output_channels_last: bool, needs_input: bool, needs_weight: bool
    ) -> LayerCall:
        """The call with input ``x`` that is being made."""
        device, format_ = x.device.type, memory_format(x.dim())
        return cls(
            shape=tuple(x.shape),
            dtype=x.dtype,
            autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            geometry=geometry,
            channels_last=format_ != torch.contiguous_format and x.is_contiguous(memory_format=format_),
            deferred=isinstance(x, Deferred),
            output_channels_last=output_channels_last,
            needs_input=needs_input,
            needs_weight=needs_weight,
        )

    @property
    def extent(self) -> tuple[int, int]:
        """How much a call asks for, to be compared: contractions of the backward pass, elements of the input."""
        return extent(prod(self.shape), self.needs_input, self.needs_weight)


def extent(elements: int, needs_input: bool, needs_weight: bool) -> tuple[int, int]:
    """``LayerCall.extent`` of a call that is not written down."""
    return needs_input + needs_weight, elements


def memory_format(dim: int) -> torch.memory_format:
    """The format with channels last of a tensor with ``dim`` axes, the contiguous one where torch has none."""
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(dim, torch.contiguous_format)
