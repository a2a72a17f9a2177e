"""One live operand slot of a layer: its clip value, its random key, and the step from float to planes."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_int8.backends import Backend
from lightning_int8.backends.base import Request
from lightning_int8.backends.cpu.expression import Expression, values_of
from lightning_int8.bit_width import AdaptiveWidth
from lightning_int8.clock import Clock
from lightning_int8.magnitudes import Statistics
from lightning_int8.measures import QuantizationError
from lightning_int8.numerics import affine_map
from lightning_int8.policies import WIDTHS, BitWidthRule
from lightning_int8.spec import CHANNEL_AXIS, CONTRACTIONS, OPERANDS, OperandSpec, Recipe


class Operand:
    """Turns one tensor of a layer into planes, step after step.

    Attributes:
        slot: Contraction and side that it was made for, such as "output.lhs".
        tensor: "x", "w" or "g".
        spec: Its numerics; the width in force may be larger, see ``bits``.
        axis: Canonical axis with its own clip values, None for one per tensor.
        clip_shape: Shape of the clip value.
        clip_value: float32 in force, see ``numerics.affine_map``; None before the first refresh.
        key: int64 ``(seed, rank, call)``, where the tensor is; ``call`` advances with every fresh draw.
        width: Where the width adapts, what decides it.
        tracks_distance: Whether refreshes measure the cosine distance.
        distance: Cosine distance at the last refresh, ``()``; None before.
        error: Measured at the last call of a monitored step, for whoever logs it; None before.
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
        self.width: AdaptiveWidth | None = None
        self.tracks_distance = False
        self.distance: Tensor | None = None
        self.error: QuantizationError | None = None
        self._clock = clock
        self._refreshed = -1
        self._before_refresh: Tensor | None = None

    @property
    def bits(self) -> int:
        """The width in force."""
        return self.spec.bits if self.width is None else self.width.bits

    def adapt(self, rule: BitWidthRule) -> None:
        """Let ``rule`` decide the width from now on, if it is about this tensor; the flag format has one width."""
        if self.tensor not in rule.operands or self.spec.bits not in WIDTHS:
            self.width = None
        elif self.width is None:
            self.width = AdaptiveWidth(rule, self.spec.bits)
        else:
            self.width.rule = rule

    def draw(self, fresh: bool, device: torch.device) -> Tensor:
        """The key of one call, on ``device``; advanced there and in place, so that each replay of a graph advances it.

        Args:
            fresh: False repeats the last draw, as the recomputation of a checkpointed segment must.
            device: Where the tensors of the layer are.
        """
        if self.key.device != device:
            with torch.inference_mode(False):  # a validation may come first, and its tensors cannot be advanced
                self.key = self.key.to(device)
        if fresh:
            self.key[2:].add_(1)
        return self.key.clone()

    def request(
        self, x: Tensor | Expression, key: Tensor, backend: Backend, update: bool, statistics: Statistics
    ) -> Request:
        """What planes of ``x`` to ask a backend for.

        Args:
            x: Canonical order; an expression only for a backend that fuses.
            key: What ``draw`` gave for this call.
            backend: Computes the planes.
            update: Whether this call is part of training, hence may refresh the clip value.
            statistics: What measures ``x``, if it is to be measured.
        """
        clip_value = self._current_clip_value(x, backend, update, statistics)
        spec = self.spec if self.bits == self.spec.bits else replace(self.spec, bits=self.bits)
        if update and self._clock.monitored:
            values = values_of(x)
            self.error = backend.quantization_error(values, [clip_value], [self.bits], spec.affine, self.axis)
        return Request(clip_value, spec, self.axis, key)

    def _current_clip_value(
        self, x: Tensor | Expression, backend: Backend, update: bool, statistics: Statistics
    ) -> Tensor:
        if self.clip_value is not None and self.clip_value.device != x.device:
            self.clip_value = self.clip_value.to(x.device)
        if not self._due(update):
            assert self.clip_value is not None
            return self.clip_value
        x = values_of(x)
        again = self._refreshed == self._clock.steps
        previous = self._before_refresh if again else self.clip_value
        previous = None if previous is None else previous.to(x.device)
        adjusts = update and self.width is not None and self.width.is_due(self._clock.steps)
        widths = WIDTHS if adjusts else (self.bits,)
        candidates = [self._measure(x, previous, bits, statistics) for bits in widths]
        measured = candidates[widths.index(self.bits)]
        if again and self.tensor != "w" and update:
            # Another micro-batch, or a layer used twice: one range for all that the step brings.
            assert self.clip_value is not None
            measured = torch.maximum(measured, self.clip_value)
        if not update:
            return measured
        # A range that is not finite shows in this call's output and is forgotten, and so is one of zeros, which would
        # clip all that follows: the next call measures again.
        if self._measures_each_call and previous is not None and not adjusts and not self.tracks_distance:
            self._remember(torch.where(_is_usable(measured), measured, previous), previous)
        elif bool(_is_usable(measured)):  # the host waits here, at a refresh and nowhere else
            self._remember(measured, previous)
            if adjusts or self.tracks_distance:
                self._note_error(x, candidates, widths, backend, again)
        return measured

    def _remember(self, clip_value: Tensor, previous: Tensor | None) -> None:
        self._before_refresh, self.clip_value = previous, clip_value
        self._refreshed = self._clock.steps

    def _note_error(
        self, x: Tensor, candidates: list[Tensor], widths: tuple[int, ...], backend: Backend, again: bool
    ) -> None:
        error = backend.quantization_error(x, candidates, widths, self.spec.affine, self.axis)
        if self.width is not None and widths == WIDTHS:
            self.width.measured(torch.stack(candidates), error.magnitude_shift)
        if self.tracks_distance:
            distance = error.cosine_distance[widths.index(self.bits)]
            self.distance = distance if self.distance is None or not again else torch.maximum(distance, self.distance)

    def _due(self, update: bool) -> bool:
        if self.clip_value is None:
            return True
        if self._measures_each_call or (self.tensor == "w" and not update):
            # Weights change under our feet: averaged, loaded, swapped. But not between a checkpointed forward and its
            # recomputation, which runs inside the backward pass and must find the same range.
            return torch._C._current_graph_task_id() == -1
        steps = self._clock.steps
        if not update or self._refreshed == steps:
            return update
        if self.width is not None and self.width.is_due(steps):
            return True
        return self._keeps_interval and self._refreshed < self._clock.last_due(self.spec.range.every, steps)

    @property
    def _measures_each_call(self) -> bool:
        return self.tensor == "w" and self.spec.range.every == 1

    @property
    def _keeps_interval(self) -> bool:
        """Whether ranges are refreshed at an interval: the rule's own, or the conversion's unless the width adapts."""
        return self.width is None or self.spec.range.every is not None

    def refreshes_within(self, step: int, late: range) -> bool:
        """Whether ``step`` may have refreshed the clip value, at most so ``late``; the same on every rank."""
        if self.width is not None and self.width.is_due(step):
            return True
        at_interval = self._keeps_interval and self.tensor != "w"  # weights are the same on all ranks
        return at_interval and step - self._clock.last_due(self.spec.range.every, step) in late

    def _measure(self, x: Tensor, previous: Tensor | None, bits: int, statistics: Statistics) -> Tensor:
        rule = self.spec.range
        if not self.spec.affine:
            return rule.clip_value(x, self.axis, previous, bits, statistics)
        parts = (x.clamp(max=0), x.clamp(min=0))
        sides = (None, None) if previous is None else previous.unbind(0)
        pairs = zip(parts, sides, strict=True)
        return torch.stack([rule.clip_value(p, self.axis, side, bits, statistics) for p, side in pairs])

    def settle(self, step: int) -> None:
        """Put the width in force that the measurement of step ``step`` asks for, if there was one."""
        width = self.width
        if width is None or width.candidates is None:
            return
        scales = [affine_map(c, b, self.spec.affine).scale for c, b in zip(width.candidates, WIDTHS, strict=True)]
        log2_steps = torch.stack([scale.log2().mean() for scale in scales]).tolist()
        self.clip_value = width.settle(step, log2_steps, self._clock.epoch_steps)

    def rescale(self, ratio: float) -> None:
        """Follow a tensor that is ``ratio`` times as large from now on, as gradients when the loss scale changes."""
        if self.clip_value is not None:
            self.clip_value = self.clip_value * ratio
        if self._before_refresh is not None:
            # A step that the scaler skips is taken again, and averages with what was before it.
            self._before_refresh = self._before_refresh * ratio
        if self.width is not None:
            self.width.rescale(ratio)

    def shared(self, ranges: bool) -> list[tuple[torch.Size, Tensor | None]]:
        """Shape and value of what ranks agree on; values are never negative, None is unknown.

        Args:
            ranges: Whether clip value and width belong to it, or the distance alone.
        """
        parts: list[tuple[torch.Size, Tensor | None]] = []
        if self.tracks_distance:
            parts.append((torch.Size(), self.distance))
        if ranges:
            parts.append((self.clip_shape, self.clip_value))
        if ranges and self.width is not None:
            count = len(WIDTHS)
            parts += [(torch.Size((count, *self.clip_shape)), self.width.candidates)]
            parts += [(torch.Size((count,)), self.width.errors)]
        return parts

    def agree(self, values: list[Tensor | None], ranges: bool) -> None:
        """Take over what the ranks agreed on, see ``shared``; None leaves a value as it is."""
        rest = iter(values)
        if self.tracks_distance:
            self.distance = _or(next(rest), self.distance)
        if ranges:
            self.clip_value = _or(next(rest), self.clip_value)
        if ranges and self.width is not None:
            self.width.candidates = _or(next(rest), self.width.candidates)
            self.width.errors = _or(next(rest), self.width.errors)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in tensors and primitives; call it between steps."""
        return {
            "clip_value": None if self.clip_value is None else self.clip_value.detach().cpu().clone(),
            "key": self.key.cpu().clone(),
            "refreshed": self._refreshed,
            "distance": None if self.distance is None else float(self.distance),
            "width": None if self.width is None else self.width.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; the rank of the key stays this process's own."""
        clip_value, distance = state["clip_value"], state["distance"]
        self.clip_value = None if clip_value is None else clip_value.clone()
        self.key[::2] = state["key"][::2].to(self.key.device)  # in place: a captured graph has its address
        self._refreshed = state["refreshed"]
        self.distance = None if distance is None else torch.tensor(distance, dtype=torch.float64)
        self.width = None if state["width"] is None else AdaptiveWidth.from_state_dict(state["width"], self.spec.bits)


def _is_usable(clip_value: Tensor) -> Tensor:
    """Whether all of it is finite and not all of it zero, bool ``()`` on its device; it is never negative."""
    largest = clip_value.amax()  # NaN if one is
    return (largest > 0) & (largest < torch.inf)


def _or(value: Tensor | None, otherwise: Tensor | None) -> Tensor | None:
    return otherwise if value is None else value


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
