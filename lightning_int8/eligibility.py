"""Which layers of a model run INT8, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_int8.clock import Clock
from lightning_int8.layers import SWAPS
from lightning_int8.norm import FIXED_POINT_SWAPS, RANGE_SWAPS
from lightning_int8.report import Row
from lightning_int8.settings import Settings
from lightning_int8.spec import matches

FLOAT_CLASSES: dict[type[nn.Module], type[nn.Module]] = {int8: float_ for float_, int8 in SWAPS.items()}
"""Converted types, and what they were."""

NORM_SWAPS = {"float": {}, "range": RANGE_SWAPS, "fixed_point": FIXED_POINT_SWAPS}
"""What the batch norms become, by ``Recipe.norm``."""

FLOAT_NORMS = {new: float_ for swaps in NORM_SWAPS.values() for float_, new in swaps.items()}
"""Converted batch norms, and what they were."""

UNSUPPORTED: dict[type[nn.Module], str] = {
    nn.modules.conv._ConvTransposeNd: "transposed convolutions are not supported yet",
    nn.RNNBase: "recurrent layers are not supported yet",
    nn.RNNCellBase: "recurrent layers are not supported yet",
    nn.MultiheadAttention: "attention is not supported yet",
    nn.Bilinear: "bilinear layers are not supported yet",
}
"""Layers that multiply matrices and stay in float, and the reason that the report gives."""


def decide(model: nn.Module, settings: Settings, clock: Clock) -> Iterator[Row]:
    """One row for each layer that multiplies matrices, and for each batch norm that the recipe replaces.

    Raises:
        ValueError: A glob of ``skip`` or of the recipe's ``overrides`` matches nothing, or a layer was converted
            before as part of another module.
        TypeError: A weight has a dtype that cannot be converted.
    """
    candidates = {name: module for name, module in model.named_modules() if _multiplies(module)}
    names = all_names(model)
    norms = [module for module in names if FLOAT_NORMS.get(type(module), type(module)) in FLOAT_NORMS.values()]
    for field, patterns in (("skip", settings.skip), ("overrides", [glob for glob, _ in settings.recipe.overrides])):
        for pattern in patterns:
            if not any(matches(names[module], pattern) for module in (*candidates.values(), *norms)):
                raise ValueError(f"{field}: {pattern!r} matches no layer; layers: {', '.join(candidates)}")
    for name, module in model.named_modules():
        skipped = next((f"skip={p!r}" for p in settings.skip if matches(names[module], p)), "")
        if name in candidates:
            kind, shape = FLOAT_CLASSES.get(type(module), type(module)).__name__, _weight_shape(module)
            reason = skipped or _obstacle(name, module, clock)
            decision = "float" if reason else "int8"
            yield Row(name=name, kind=kind, shape=shape, decision=decision, reason=reason or "converted")
            continue
        norm = settings.recipe.for_layer(names[module]).norm
        float_norm = FLOAT_NORMS.get(type(module), type(module))
        if float_norm in NORM_SWAPS[norm]:
            features = (module.num_features,)
            obstacle = skipped or ("its forward was replaced on the instance" if "forward" in module.__dict__ else "")
            decision, reason = ("float", obstacle) if obstacle else (norm, f"norm={norm!r}")
            yield Row(name=name, kind=float_norm.__name__, shape=features, decision=decision, reason=reason)


def all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The names of each module, several where it is shared."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _multiplies(module: nn.Module) -> bool:
    """Whether the module itself multiplies by a matrix that it owns, as far as its parameters show."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return False
    if isinstance(module, (*SWAPS, *UNSUPPORTED)):
        return True
    own = module._parameters.values()
    return not list(module.children()) and any(p is not None and p.dim() >= 2 for p in own if not _lazy(p))


def _obstacle(name: str, module: nn.Module, clock: Clock) -> str:
    """Why the layer must stay in float, or an empty string."""
    if type(module) in FLOAT_CLASSES:
        if module.__dict__["int8_state"].clock is clock:
            return ""
        raise ValueError(f"layer {name!r} was converted before, as part of another module; call restore on that first")
    for kind, reason in UNSUPPORTED.items():
        if isinstance(module, kind):
            return reason
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if type(module) not in SWAPS:
        parent = next((k.__name__ for k in SWAPS if isinstance(module, k)), None)
        return f"a subclass of {parent} may compute something else" if parent else "not a layer type that is converted"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a Parameter"
    if type(weight).__name__ == "DTensor":
        raise TypeError(f"layer {name!r}: weight: a sharded DTensor cannot be converted; INT8 training works under DDP")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"layer {name!r}: weight dtype: {weight.dtype} cannot be converted; cast the model, or keep the layer in "
            f"float with skip=({name!r},)"
        )
    return ""


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    parameters = [p for p in module._parameters.values() if p is not None and not _lazy(p)]
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and not _lazy(weight):
        return tuple(weight.shape)
    return tuple(max(parameters, key=lambda p: p.numel()).shape) if parameters else ()


def _lazy(parameter: Any) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedParameter)
