"""The state of a conversion as it is saved: its layout, and every check before any of it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from lightning_int8.clock import Clock
from lightning_int8.contraction import LayerState
from lightning_int8.layer_times import LayerTimes
from lightning_int8.operand import Operand
from lightning_int8.policies import WIDTHS, BitWidthRule, DeviationFactor
from lightning_int8.settings import Settings

STATE_VERSION = 3
"""Version of the saved state; raise it whenever the layout changes."""

_FIELDS = ("recipe", "numerics", "choice", "steps", "loss_scale", "ordered", "steering", "layers")


def state_of(
    settings: Settings, clock: Clock, loss_scale: float | None, states: Sequence[LayerState]
) -> dict[str, Any]:
    """Everything that a resumed run needs, in tensors and primitives."""
    return {
        "version": STATE_VERSION,
        "recipe": settings.recipe.name,
        "numerics": repr(settings.recipe),
        "choice": settings.layers,
        "steps": clock.steps,
        "loss_scale": loss_scale,
        "ordered": clock.order is None,
        "steering": {
            s.name: {
                "kept_by_recipe": s.kept_by_recipe,
                "times": None if s.times is None else asdict(s.times),
                "learning_rate": None if s.learning_rate is None else asdict(s.learning_rate),
            }
            for s in states
        },
        "layers": {s.name: {o.slot: o.state_dict() for o in s.distinct_operands()} for s in states},
    }


def load(state: dict[str, Any], clock: Clock, states: Sequence[LayerState]) -> None:
    """Inverse of ``state_of``, after ``check``.

    Rules come back too, of the recipe or of a callback that this run may lack: it goes on as it was steered.
    """
    clock.steps = state["steps"]
    clock.order = None if state["ordered"] else []
    for layer in states:
        steering = state["steering"][layer.name]
        layer.kept_by_recipe = steering["kept_by_recipe"]
        times, rule = steering["times"], steering["learning_rate"]
        layer.times = None if times is None else LayerTimes(**times)
        layer.scale_learning_rate(None if rule is None else DeviationFactor(**rule))
        for operand in layer.distinct_operands():
            operand.load_state_dict(state["layers"][layer.name][operand.slot])


def check(state: Any, settings: Settings, states: Sequence[LayerState]) -> None:
    """Refuse what ``load`` could not use.

    Raises:
        ValueError: The state is of another version or recipe, is truncated, or belongs to other layers; the message
            names the field.
    """
    if not isinstance(state, dict) or "version" not in state:
        raise ValueError("INT8 plugin state: field 'version' is missing: this is not the state of an INT8 plugin")
    if state["version"] != STATE_VERSION:
        raise ValueError(f"INT8 plugin state: version: {state['version']!r} where this version reads {STATE_VERSION}")
    for field in _FIELDS:
        if field not in state:
            raise ValueError(f"INT8 plugin state: field {field!r} is missing: the state is truncated")
    recipe = settings.recipe
    for field, value in (("recipe", recipe.name), ("numerics", repr(recipe)), ("choice", settings.layers)):
        if state[field] != value:
            there, here = _around_difference(str(state[field]), value)
            raise ValueError(f"INT8 plugin state: {field}: {there!r} was saved, {here!r} is in use")
    steps, loss_scale, layers, steering = (state[f] for f in ("steps", "loss_scale", "layers", "steering"))
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"INT8 plugin state: steps: {steps!r} does not fit")
    if not isinstance(loss_scale, float | None):
        raise ValueError(f"INT8 plugin state: loss_scale: {loss_scale!r} does not fit")
    if not isinstance(layers, dict):
        raise ValueError(f"INT8 plugin state: layers: {layers!r} does not fit")
    for layer, slots in layers.items():
        if not isinstance(slots, dict) or not all(isinstance(entry, dict) for entry in slots.values()):
            raise ValueError(f"INT8 plugin state: layer {layer!r}: {slots!r} does not fit")
    own = {(s.name, o.slot): o for s in states for o in s.distinct_operands()}
    saved = {(layer, slot) for layer, slots in layers.items() for slot in slots}
    for layer, slot in sorted(saved ^ own.keys()):
        where = "saved but not converted now" if (layer, slot) in saved else "converted now but not saved"
        raise ValueError(
            f"INT8 plugin state: layer {layer!r}, slot {slot!r}: {where}; resume with the recipe and skip= of the "
            "saved run, or load the weights alone"
        )
    for layer in layers:
        _check_steering(layer, steering.get(layer) if isinstance(steering, dict) else steering)
    for (layer, slot), operand in own.items():
        for field, fits, value in _operand_fields(layers[layer][slot], operand):
            if not fits:
                raise ValueError(f"INT8 plugin state: layer {layer!r}, slot {slot!r}: {field}: {value!r} does not fit")


def _around_difference(a: str, b: str, context: int = 60) -> tuple[str, str]:
    """The parts of two texts around the first character that differs: recipes are long."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    first = max(0, same - context)
    return a[first : same + context], b[first : same + context]


def _check_steering(layer: str, entry: Any) -> None:
    try:
        assert isinstance(entry["kept_by_recipe"], str)
        if entry["times"] is not None:
            LayerTimes(**entry["times"])
        if entry["learning_rate"] is not None:
            DeviationFactor(**entry["learning_rate"])
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"INT8 plugin state: steering: layer {layer!r}: {entry!r} does not fit") from error


def _operand_fields(entry: dict[str, Any], operand: Operand) -> list[tuple[str, bool, Any]]:
    """Field, whether its value fits, value."""
    clip_value, key, width = (entry.get(field, "missing") for field in ("clip_value", "key", "width"))
    distance, refreshed = entry.get("distance", "missing"), entry.get("refreshed", "missing")
    return [
        ("clip_value", clip_value is None or _is_tensor(clip_value, operand.clip_shape, torch.float32), clip_value),
        ("key", _is_tensor(key, operand.key.shape, torch.int64), key),
        ("refreshed", isinstance(refreshed, int), refreshed),
        ("distance", isinstance(distance, float | None), distance),
        ("width", width is None or _is_width(width), width),
    ]


def _is_tensor(value: Any, shape: torch.Size, dtype: torch.dtype) -> bool:
    return isinstance(value, torch.Tensor) and (value.shape, value.dtype) == (shape, dtype)


def _is_width(value: Any) -> bool:
    try:
        BitWidthRule(**value["rule"])
        average = value["average"]
        return (
            value["bits"] in WIDTHS
            and isinstance(value["next_step"], int)
            and len(average) == 3
            and all(isinstance(v, float) for v in average)
        )
    except (KeyError, TypeError, ValueError):
        return False
