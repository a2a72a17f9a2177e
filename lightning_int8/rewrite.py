"""Conversion in place and back: exact types are swapped by ``__class__``, so names, parameters and hooks stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lightning_int8.clock import Clock
from lightning_int8.contraction import LayerState
from lightning_int8.eligibility import FLOAT_CLASSES, FLOAT_NORMS, NORM_SWAPS, all_names, decide
from lightning_int8.layers import SWAPS
from lightning_int8.report import ConversionReport, current
from lightning_int8.settings import Settings
from lightning_int8.spec import Recipe
from lightning_int8.steering import Steering

_FUSED_EVAL_FLAGS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
"""Attributes whose truth lets torch bypass the child layers in eval mode, so that train and eval would differ."""

_CONVERSION = "int8_conversion"
_FUSED_EVAL = "int8_fused_eval"


@dataclass
class Conversion:
    """What a converted model carries beside its layers.

    Attributes:
        settings: The arguments.
        clock: Shared by all layers.
        steering: What acts between steps.
        report: The decisions.
    """

    settings: Settings
    clock: Clock
    steering: Steering
    report: ConversionReport


def convert(
    model: nn.Module,
    recipe: str | Path | Recipe = "default",
    skip: str | Sequence[str] = (),
    layers: str = "int8",
    backend: str = "auto",
    fuse: bool = True,
    seed: int = 0,
    refresh: int = 100,
) -> ConversionReport:
    """Let Linear and Conv layers of ``model`` run their three contractions on INT8 operands, in place.

    Module objects, parameters, hooks and ``state_dict`` keys stay; a second call with the same arguments changes
    nothing. Either the whole model is converted or, on an error, nothing of it.

    Args:
        model: Any module; its own submodules are converted, and itself if its type is one that is.
        recipe: A name (``recipes.names()``), a ``Recipe``, or the path of a YAML recipe.
        skip: Names or globs of layers, or of modules that contain them, to keep in float.
        layers: "int8" converts every layer that can be; "auto" takes back, after the first training step, those that
            are faster in float on this machine.
        backend: "auto" chooses by the device of the input at each call; or the name of one.
        fuse: Whether batch norm, ReLU, addition and max pooling between convolutions are computed while their result is
            quantized, on the CPU; see ``docs/fusion.md``.
        seed: Seed of stochastic rounding.
        refresh: Optimizer steps between refreshes of clip values whose range rule names no interval.

    Returns:
        The decision for each layer, with the reason.

    Raises:
        TypeError: Nothing in the model can be converted, or a weight has a dtype that cannot be.
        ValueError: An argument is out of its range, a ``skip`` pattern matches nothing, or the model was converted
            before with other arguments.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> convert(model, skip="2").converted
        ['0']
    """
    settings = Settings.make(recipe, skip, layers=layers, backend=backend, fuse=fuse, seed=seed, refresh=refresh)
    return convert_with(model, settings)


def convert_with(model: nn.Module, settings: Settings) -> ConversionReport:
    """``convert`` with checked arguments."""
    earlier = conversion_of(model)
    if earlier is not None and earlier.settings != settings:
        raise ValueError(f"the model was converted before with {earlier.settings}; call restore(model) first")
    clock = Clock(settings.refresh) if earlier is None else earlier.clock
    rows = tuple(decide(model, settings, clock))
    report = ConversionReport(settings.recipe.name, rows)
    if not report.converted:
        found = {r.kind for r in rows} or {type(m).__name__ for m in model.modules()}
        raise TypeError(
            f"nothing to convert: the model has no {', '.join(t.__name__ for t in SWAPS)} layer that may run INT8; "
            f"found: {', '.join(sorted(found))}"
        )
    modules, names = dict(model.named_modules()), all_names(model)
    for row in rows:
        module = modules[row.name]
        if row.decision in NORM_SWAPS and row.decision != "float":
            module.__class__ = NORM_SWAPS[row.decision][FLOAT_NORMS.get(type(module), type(module))]
        elif row.decision == "int8" and type(module) in FLOAT_CLASSES:
            module.__dict__["int8_state"].name = row.name  # it may have moved since
        elif row.decision == "int8":
            # All of them, or one that came after an earlier conversion, such as a new head for fine-tuning.
            recipe = settings.recipe.for_layer(names[module])
            with torch.inference_mode(False), torch.device("cpu"):  # whatever the caller's context makes of new tensors
                state = LayerState(row.name, module, recipe, settings.backend, clock, settings.seed, settings.fuse)
            module.__class__ = SWAPS[type(module)]
            module.__dict__["int8_state"] = state
            clock.order = []
    if clock.order == []:
        for state in layer_states(model):
            state.kept_by_recipe = ""  # which layers run first and last is seen anew
    _disable_fused_eval(model)
    report = current(report, model)
    if earlier is None:
        earlier = Conversion(
            settings, clock, Steering(clock, settings.recipe.keep_float, settings.layers == "auto"), report
        )
        model.__dict__[_CONVERSION] = earlier
    earlier.report = report
    earlier.steering.layers = [(m, m.__dict__["int8_state"]) for m in model.modules() if type(m) in FLOAT_CLASSES]
    return report


def restore(model: nn.Module) -> None:
    """Undo ``convert``: the float classes come back, weights bit for bit. A model never converted stays as it is."""
    for module in model.modules():
        if type(module) in FLOAT_CLASSES:
            module.__class__ = FLOAT_CLASSES[type(module)]
            del module.__dict__["int8_state"]
        elif type(module) in FLOAT_NORMS:
            module.__class__ = FLOAT_NORMS[type(module)]
        if _FUSED_EVAL in module.__dict__:
            flag, value = module.__dict__.pop(_FUSED_EVAL)
            setattr(module, flag, value)
        module.__dict__.pop(_CONVERSION, None)


def conversion_of(model: nn.Module) -> Conversion | None:
    """The conversion that ``model`` was the root of, or None."""
    return model.__dict__.get(_CONVERSION)


def layer_states(model: nn.Module) -> list[LayerState]:
    """States of the converted layers, in the order of the model."""
    return [m.__dict__["int8_state"] for m in model.modules() if type(m) in FLOAT_CLASSES]


def _disable_fused_eval(model: nn.Module) -> None:
    for module in model.modules():
        flag = next((f for kind, f in _FUSED_EVAL_FLAGS.items() if isinstance(module, kind)), None)
        if flag and getattr(module, flag, False) and any(type(m) in FLOAT_CLASSES for m in module.modules()):
            module.__dict__[_FUSED_EVAL] = (flag, getattr(module, flag))
            setattr(module, flag, False)
