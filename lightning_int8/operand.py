"""One live operand slot of a layer: its clip value, its random key, and the step from float to planes."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from lightning_int8.backends import Backend
from lightning_int8.clock import Clock
from lightning_int8.numerics import Quantized
from lightning_int8.spec import CHANNEL_AXIS, CONTRACTIONS, OPERANDS, OperandSpec, Recipe


class Operand:
    """Turns one tensor of a layer into planes, step after step.

    Attributes:
        slot: Contraction and side that it was made for, such as "output.lhs".
        tensor: "x", "w" or "g".
        spec: Its numerics.
        axis: Canonical axis with its own clip values, None for one per tensor.
        clip_shape: Shape of the clip value.
        clip_value: float32 in force, see ``numerics.affine_map``; None before the first refresh.
        key: int64 ``(seed, rank, call)``; ``call`` advances with every fresh draw.
    """

    def __init__(
        self, slot: str, tensor: str, spec: OperandSpec, axis: int | None, channels: int, clock: Clock, seed: int
    ) -> None:
        self.slot = slot
        self.tensor = tensor
        self.spec = spec
        self.axis = axis
        self.clip_shape = torch.Size(((2,) if spec.affine else ()) + (() if axis is None else (channels,)))
        self.clip_value: Tensor | None = None
        self.key = torch.tensor([seed, 0, 0], dtype=torch.int64)
        self._clock = clock
        self._refreshed = -1
        self._before_refresh: Tensor | None = None

    def draw(self, fresh: bool) -> Tensor:
        """The key of one call.

        Args:
            fresh: False repeats the last draw, as the recomputation of a checkpointed segment must.
        """
        if fresh:
            self.key[2] += 1
        return self.key.clone()

    def quantize(self, x: Tensor, key: Tensor, backend: Backend, update: bool) -> Quantized:
        """Planes of ``x``.

        Args:
            x: Canonical order.
            key: What ``draw`` gave for this call.
            backend: Computes the planes.
            update: Whether this call is part of training, hence may refresh the clip value.
        """
        return backend.quantize(x, self._current_clip_value(x, update), self.spec, self.axis, key)

    def _current_clip_value(self, x: Tensor, update: bool) -> Tensor:
        if self.clip_value is not None and self.clip_value.device != x.device:
            self.clip_value = self.clip_value.to(x.device)
        if not self._due(update):
            assert self.clip_value is not None
            return self.clip_value
        again = self._refreshed == self._clock.steps
        previous = self._before_refresh if again else self.clip_value
        measured = self._measure(x, previous)
        if again and self.tensor != "w" and update:
            # Another micro-batch, or a layer used twice: one range for all that the step brings.
            assert self.clip_value is not None
            measured = torch.maximum(measured, self.clip_value)
        # The host waits here, at a refresh and nowhere else. A range that is not finite shows in this call's output
        # and is forgotten, and so is one of zeros, which would clip all that follows: the next call measures again.
        if update and bool(torch.isfinite(measured).all() & (measured > 0).any()):
            self._before_refresh, self.clip_value = previous, measured
            self._refreshed = self._clock.steps
        return measured

    def _due(self, update: bool) -> bool:
        if self.clip_value is None:
            return True
        if self.tensor == "w" and (self.spec.range.every == 1 or not update):
            # Weights change under our feet: averaged, loaded, swapped. But not between a checkpointed forward and its
            # recomputation, which runs inside the backward pass and must find the same range.
            return torch._C._current_graph_task_id() == -1
        steps = self._clock.steps
        missed = self._refreshed < self._clock.last_due(self.spec.range.every, steps)
        return update and (missed or self._refreshed == steps)

    def _measure(self, x: Tensor, previous: Tensor | None) -> Tensor:
        rule = self.spec.range
        previous = None if previous is None else previous.to(x.device)
        if not self.spec.affine:
            return rule.clip_value(x, self.axis, previous)
        parts = ((-x).clamp(min=0), x.clamp(min=0))
        sides = (None, None) if previous is None else previous.unbind(0)
        return torch.stack([rule.clip_value(p, self.axis, s) for p, s in zip(parts, sides, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        """Clip value, key and the step of the last refresh: tensors and primitives only."""
        clip_value = None if self.clip_value is None else self.clip_value.detach().cpu().clone()
        return {"clip_value": clip_value, "key": self.key.clone(), "refreshed": self._refreshed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; the rank of the key stays this process's own."""
        clip_value = state["clip_value"]
        self.clip_value = None if clip_value is None else clip_value.clone()
        self.key = torch.stack((state["key"][0], self.key[1], state["key"][2]))
        self._refreshed = state["refreshed"]


def make_operands(recipe: Recipe, name: str, layer: nn.Module, clock: Clock, seed: int) -> dict[str, Operand]:
    """The operand of each slot ("output.lhs", ...) of layer ``name``.

    Slots that ask the same of the same tensor share one operand, so that it is quantized once.

    Args:
        recipe: Numerics of the layer.
        name: Enters the seed of each slot.
        layer: The module: its weight and groups tell the number of channels.
        clock: Steps of the model.
        seed: Seed of the conversion.
    """
    out, per_group = layer.get_parameter("weight").shape[:2]
    channels = {("w", 0): out, ("w", -1): per_group, ("g", -1): out, ("x", -1): per_group * getattr(layer, "groups", 1)}
    operands: dict[str, Operand] = {}
    made: dict[tuple[str, OperandSpec, int | None], Operand] = {}
    for contraction in CONTRACTIONS:
        for side, tensor in zip(("lhs", "rhs"), OPERANDS[contraction], strict=True):
            spec: OperandSpec = getattr(getattr(recipe, contraction), side)
            axis = CHANNEL_AXIS[contraction, side] if spec.per == "channel" else None
            slot = f"{contraction}.{side}"
            if (tensor, spec, axis) not in made:
                # Each slot draws its own stream: the layer's name and the slot enter the seed.
                own_seed = ((seed & 0x7FFFFFFF) << 32) | zlib.crc32(f"{name}/{slot}".encode())
                count = 1 if axis is None else channels[tensor, axis]
                made[tensor, spec, axis] = Operand(slot, tensor, spec, axis, count, clock, own_seed)
            operands[slot] = made[tensor, spec, axis]
    return operands
