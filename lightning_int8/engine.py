"""What the Lightning and the Fabric plugin share: one conversion, the work after each step, the saved state."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_int8.clock import Clock
from lightning_int8.contraction import LayerState
from lightning_int8.operand import Operand
from lightning_int8.report import ConversionReport, execution_table, with_routes
from lightning_int8.rewrite import Conversion, Settings, conversion_of, convert_with, layer_states
from lightning_int8.spec import Recipe
from lightning_int8.sync import SYNC_CLIP, agree_on_clip_values

HIGH_PRECISION = ("32-true", "bf16-mixed", "16-mixed")
"""What the layers that stay in float, and everything between layers, compute in."""

STATE_VERSION = 1
"""Version of the saved state; raise it whenever ``Engine.state_dict`` changes its layout."""


class Engine:
    """Converts one model and steers it while it trains.

    Args:
        settings: Arguments of the conversion.
        sync_clip: How ranks agree on clip values after a refresh: "max", "mean", or "local" for not at all.

    Attributes:
        optimizers: Number of optimizers that may take turns.
    """

    def __init__(self, settings: Settings, sync_clip: str = "max") -> None:
        if sync_clip not in SYNC_CLIP:
            raise ValueError(f"sync_clip: {sync_clip!r} is not one of {', '.join(SYNC_CLIP)}")
        self.settings = settings
        self.sync_clip = sync_clip
        self.optimizers = 1
        self._conversion: Conversion | None = None
        self._states: list[LayerState] = []
        self._seen_steps = 0
        self._summarised_steps = 0
        self._loss_scale: float | None = None

    def convert(self, model: nn.Module) -> None:
        """Convert ``model``, once; later calls with the same model change nothing."""
        _refuse_sharded(model)
        convert_with(model, self.settings)
        conversion = conversion_of(model)
        self._states = layer_states(model)
        if conversion is not self._conversion:
            self._conversion = conversion
            self._seen_steps = self._summarised_steps = self.clock.steps

    @property
    def clock(self) -> Clock:
        """Optimizer steps of the model."""
        assert self._conversion is not None, "no model has been converted"
        return self._conversion.clock

    def report(self, model: nn.Module) -> ConversionReport:
        """The decisions, with routes on the device where the model now lies."""
        assert self._conversion is not None, "no model has been converted"
        return with_routes(self._conversion.report, model)

    def set_rank(self, rank: int) -> None:
        """Give this process its own rounding noise."""
        for state in self._states:
            for operand in state.distinct_operands():
                operand.key[1] = rank

    def after_step(self, loss_scale: float) -> None:
        """Work after an optimizer step: prove that INT8 ran, follow the loss scale, agree on clip values.

        Args:
            loss_scale: Factor of ``GradScaler`` in force from now on, 1 without one.

        Raises:
            RuntimeError: A converted layer trained without a contraction.
        """
        self.follow_loss_scale(loss_scale)
        if self.clock.steps == self._seen_steps:
            return  # the optimizer was not called: a skipped step under GradScaler
        # More than one, where an optimizer wraps another or steps behind the plugin's back.
        finished, self._seen_steps = range(self._seen_steps, self.clock.steps), self.clock.steps
        for state in self._states:
            if state.train_calls and not state.counts.of("output"):
                raise RuntimeError(
                    f"layer {state.name!r}: trained {state.train_calls} forward passes without one INT8 contraction; "
                    "something replaces what its forward calls"
                )
        if self.sync_clip != "local" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            operands = [o for s in self._states for o in s.distinct_operands() if o.tensor != "w"]
            # With several optimizers that take turns a layer may refresh as many steps after it was due.
            late = range(self.optimizers)
            if any(s - self.clock.last_due(o.spec.range.every, s) in late for o in operands for s in finished):
                agree_on_clip_values(operands, self.sync_clip)

    def follow_loss_scale(self, loss_scale: float) -> None:
        """Gradients grow and shrink with the loss scale, and so must their clip values between refreshes."""
        if self._loss_scale is not None and loss_scale != self._loss_scale:
            for state in self._states:
                for operand in state.distinct_operands():
                    if operand.tensor == "g" and operand.clip_value is not None:
                        operand.clip_value = operand.clip_value * (loss_scale / self._loss_scale)
        self._loss_scale = loss_scale

    def summary(self) -> str | None:
        """Table of executed contractions; None if the optimizer made no step since the last one."""
        if self._conversion is None or self.clock.steps == self._summarised_steps:
            return None
        self._summarised_steps = self.clock.steps
        return execution_table(self._states)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in tensors and primitives; empty before the conversion."""
        if self._conversion is None:
            return {}
        return {
            "version": STATE_VERSION,
            "recipe": self.settings.recipe.name,
            "numerics": repr(self.settings.recipe),
            "steps": self.clock.steps,
            "loss_scale": self._loss_scale,
            "layers": {s.name: {o.slot: o.state_dict() for o in s.distinct_operands()} for s in self._states},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``. Everything is checked before anything changes.

        Raises:
            ValueError: The state is of another version or recipe, is truncated, or belongs to other layers; the
                message names the field.
        """
        self.check_state_dict(state)
        self.clock.steps = self._seen_steps = state["steps"]
        self._loss_scale = state["loss_scale"]
        for (layer, slot), operand in self._slots().items():
            operand.load_state_dict(state["layers"][layer][slot])

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise the error of ``load_state_dict``, if any, and change nothing."""
        _check_state(state, self.settings.recipe, self._slots())

    def _slots(self) -> dict[tuple[str, str], Operand]:
        return {(s.name, o.slot): o for s in self._states for o in s.distinct_operands()}


def _check_state(state: Any, recipe: Recipe, own: dict[tuple[str, str], Operand]) -> None:
    if not isinstance(state, dict) or "version" not in state:
        raise ValueError("INT8 plugin state: field 'version' is missing: this is not the state of an INT8 plugin")
    if state["version"] != STATE_VERSION:
        raise ValueError(f"INT8 plugin state: version: {state['version']!r} where this version reads {STATE_VERSION}")
    for field in ("recipe", "numerics", "steps", "loss_scale", "layers"):
        if field not in state:
            raise ValueError(f"INT8 plugin state: field {field!r} is missing: the state is truncated")
    for field, value in (("recipe", recipe.name), ("numerics", repr(recipe))):
        if state[field] != value:
            raise ValueError(f"INT8 plugin state: {field}: {state[field]!r} was saved, {value!r} is in use")
    steps, loss_scale, layers = state["steps"], state["loss_scale"], state["layers"]
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"INT8 plugin state: steps: {steps!r} does not fit")
    if not isinstance(loss_scale, float | None):
        raise ValueError(f"INT8 plugin state: loss_scale: {loss_scale!r} does not fit")
    if not isinstance(layers, dict):
        raise ValueError(f"INT8 plugin state: layers: {layers!r} does not fit")
    for layer, slots in layers.items():
        if not isinstance(slots, dict) or not all(isinstance(entry, dict) for entry in slots.values()):
            raise ValueError(f"INT8 plugin state: layer {layer!r}: {slots!r} does not fit")
    saved = {(layer, slot) for layer, slots in layers.items() for slot in slots}
    for layer, slot in sorted(saved ^ own.keys()):
        where = "saved but not converted now" if (layer, slot) in saved else "converted now but not saved"
        raise ValueError(
            f"INT8 plugin state: layer {layer!r}, slot {slot!r}: {where}; resume with the recipe and skip= of the "
            "saved run, or load the weights alone"
        )
    for (layer, slot), operand in own.items():
        entry = layers[layer][slot]
        forms = {"key": (operand.key.shape, torch.int64), "clip_value": (operand.clip_shape, torch.float32)}
        for field, kind in (("clip_value", (torch.Tensor, type(None))), ("key", torch.Tensor), ("refreshed", int)):
            value = entry.get(field, "missing")
            fits = isinstance(value, kind) and (
                not isinstance(value, torch.Tensor) or (value.shape, value.dtype) == forms[field]
            )
            if not fits:
                raise ValueError(f"INT8 plugin state: layer {layer!r}, slot {slot!r}: {field}: {value!r} does not fit")


def _refuse_sharded(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(c.__name__ in ("FullyShardedDataParallel", "FSDPModule") for c in type(module).__mro__):
            raise TypeError(
                f"module {name!r}: {type(module).__name__} cannot be converted; INT8 training works under DDP"
            )
