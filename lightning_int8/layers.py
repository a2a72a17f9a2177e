"""Converted layers: they bring their tensors into canonical order and describe their geometry, nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_int8.contraction import LayerState, contract
from lightning_int8.geometry import ConvGeometry

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Input dtypes of a converted layer."""


class _Int8Layer(nn.Module):
    """What converted layers share: their state, and the checks of their input."""

    int8_state: LayerState

    def _contracts(self, x: Tensor, channel_axis: int, channels: int) -> bool:
        """Check the input; tell the clock that the model is running, be it on an empty batch.

        Returns:
            Whether there is something to compute in INT8; else the float forward gives the shape and the graph.
        """
        self.int8_state.clock.running |= self.training or torch.is_grad_enabled()
        name = self.int8_state.name
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"layer {name!r}: input dtype: {x.dtype} is not one of "
                f"{', '.join(str(d) for d in FLOAT_DTYPES)}; cast the input, or keep the layer in float with "
                f"skip=({name!r},)"
            )
        found = x.shape[channel_axis] if x.dim() else 0
        if found != channels:
            raise ValueError(
                f"layer {name!r}: input shape: {tuple(x.shape)} has {found} channels where the layer takes {channels}"
            )
        return x.numel() > 0 and not self.int8_state.kept_float

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8: {self.int8_state.recipe}"


class Int8Linear(_Int8Layer, nn.Linear):
    """``torch.nn.Linear`` whose three matrix products have INT8 operands."""

    def forward(self, x: Tensor) -> Tensor:
        """``(*, in_features)`` to ``(*, out_features)``."""
        if not self._contracts(x, -1, self.in_features) or self.out_features == 0:
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)
        y = contract(rows, self.weight, self.bias, self.int8_state, None, self.training)
        return y.reshape(*x.shape[:-1], self.out_features)


class _Int8Conv(_Int8Layer):
    """``torch.nn.ConvNd`` whose three contractions have INT8 operands."""

    weight: Tensor
    bias: Tensor | None
    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Any
    _reversed_padding_repeated_twice: list[int]

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, *spatial)`` or unbatched ``(C, *spatial)``; the memory format follows the input or the weight."""
        # Without this each look at a deferred tensor's shape would be a call of its ``__torch_function__``.
        with torch._C.DisableTorchFunctionSubclass():
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        spatial = len(self.kernel_size)
        if x.dim() not in (spatial + 1, spatial + 2):
            raise ValueError(
                f"layer {self.int8_state.name!r}: input shape: {tuple(x.shape)} has {x.dim()} axes where the layer "
                f"takes {spatial + 1} (unbatched) or {spatial + 2}"
            )
        if not self._contracts(x, -1 - spatial, self.in_channels):
            return super().forward(x)
        if x.dim() == spatial + 1:
            return self._batched(x.contiguous().unsqueeze(0)).squeeze(0)
        return self._batched(x)

    def _batched(self, x: Tensor) -> Tensor:
        if self.padding_mode != "zeros":
            # The backward pass of padding asks for the shape of its input alone: keep no float copy of it.
            with torch.autograd.graph.saved_tensors_hooks(_shape_only, _shape_only):
                x = nn.functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        channels_last = _is_channels_last(x) or _is_channels_last(self.weight)
        windows = (*self.kernel_size, *self.stride, *self.dilation, *self._zero_padding(), self.groups)
        geometry = ConvGeometry.of_integers((*x.shape[2:], *windows))
        if min(geometry.output_size) < 1:
            raise ValueError(
                f"layer {self.int8_state.name!r}: input shape: the padded size {tuple(x.shape[2:])} is smaller than "
                f"the kernel {self.kernel_size} at dilation {self.dilation}"
            )
        return contract(x, self.weight, self.bias, self.int8_state, geometry, self.training, channels_last)

    def _zero_padding(self) -> list[int]:
        """(before, after) in zeros, axis by axis."""
        if self.padding_mode != "zeros":
            return [0] * (2 * len(self.kernel_size))
        if isinstance(self.padding, str):
            # Torch keeps (before, after) of "same" and "valid", last axis first.
            flat = self._reversed_padding_repeated_twice
            return [n for i in reversed(range(0, len(flat), 2)) for n in flat[i : i + 2]]
        return [p for p in self.padding for _ in range(2)]


class Int8Conv1d(_Int8Conv, nn.Conv1d):
    """``torch.nn.Conv1d`` whose three contractions have INT8 operands."""


class Int8Conv2d(_Int8Conv, nn.Conv2d):
    """``torch.nn.Conv2d`` whose three contractions have INT8 operands."""


class Int8Conv3d(_Int8Conv, nn.Conv3d):
    """``torch.nn.Conv3d`` whose three contractions have INT8 operands."""


SWAPS: dict[type[nn.Module], type[Any]] = {
    nn.Linear: Int8Linear,
    nn.Conv1d: Int8Conv1d,
    nn.Conv2d: Int8Conv2d,
    nn.Conv3d: Int8Conv3d,
}
"""Exact types that are converted, and what they become."""


def _is_channels_last(t: Tensor) -> bool:
    """Whether channels are innermost in memory; strides tell, even where sizes of 1 leave a choice."""
    return t.dim() > 3 and t.stride(1) == 1 and t.stride(-1) >= t.shape[1] and t.shape[1:].numel() > 1


def _shape_only(t: Tensor) -> Tensor:
    """A tensor of the same shape in the memory of one element."""
    return t.new_empty(()).expand(t.shape)
