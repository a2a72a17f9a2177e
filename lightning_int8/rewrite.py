"""Conversion in place and back: exact types are swapped by ``__class__``, so names, parameters and hooks stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_int8 import backends, recipes
from lightning_int8.clock import Clock
from lightning_int8.contraction import LayerState
from lightning_int8.layers import SWAPS
from lightning_int8.report import ConversionReport, Row, with_routes
from lightning_int8.spec import Recipe

FLOAT_CLASSES = {int8: float_ for float_, int8 in SWAPS.items()}

UNSUPPORTED: dict[type[nn.Module], str] = {
    nn.modules.conv._ConvTransposeNd: "transposed convolutions are not supported yet",
    nn.RNNBase: "recurrent layers are not supported yet",
    nn.RNNCellBase: "recurrent layers are not supported yet",
    nn.MultiheadAttention: "attention is not supported yet",
    nn.Bilinear: "bilinear layers are not supported yet",
}
"""Layers that multiply matrices and stay in float, and the reason that the report gives."""

_FUSED_EVAL_FLAGS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
"""Attributes whose truth lets torch bypass the child layers in eval mode, so that train and eval would differ."""

_CONVERSION = "int8_conversion"
_FUSED_EVAL = "int8_fused_eval"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of one conversion, checked.

    Attributes:
        recipe: The numerics.
        skip: Names or globs of layers, or of modules that contain them, to keep in float.
        layers: "int8" converts every layer that can be.
        backend: One of ``backends.CHOICES``.
        fuse: Whether neighbouring passes may be fused where the result stays the same.
        seed: Seed of stochastic rounding.
        refresh: Optimizer steps between refreshes of clip values whose range rule names no interval.

    Raises:
        ValueError: A value out of its range; the message names field and value.
    """

    recipe: Recipe
    skip: tuple[str, ...] = ()
    layers: str = "int8"
    backend: str = "auto"
    fuse: bool = True
    seed: int = 0
    refresh: int = 100

    def __post_init__(self) -> None:
        backends.check_choice(self.backend)
        if self.layers == "auto":
            raise ValueError("layers: 'auto' is not part of this version; use 'int8', and skip= for float layers")
        if self.layers != "int8":
            raise ValueError(f"layers: {self.layers!r} is not one of 'int8', 'auto'")
        if not isinstance(self.refresh, int) or isinstance(self.refresh, bool) or self.refresh < 1:
            raise ValueError(f"refresh: {self.refresh!r} is not a positive number of optimizer steps")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed: {self.seed!r} is not an integer")
        if not isinstance(self.fuse, bool):
            raise ValueError(f"fuse: {self.fuse!r} is not True or False")
        if any(not isinstance(pattern, str) or not pattern for pattern in self.skip):
            raise ValueError(f"skip: {self.skip!r} is not a sequence of names or globs")

    @classmethod
    def make(cls, recipe: str | Path | Recipe, skip: str | Sequence[str], **fields: Any) -> Settings:
        """Resolve the recipe, and a single pattern given as ``skip``."""
        if not isinstance(skip, Iterable):
            raise ValueError(f"skip: {skip!r} is not a sequence of names or globs")
        return cls(recipe=recipes.get(recipe), skip=(skip,) if isinstance(skip, str) else tuple(skip), **fields)


@dataclass
class Conversion:
    """What a converted model carries beside its layers.

    Attributes:
        settings: The arguments.
        clock: Shared by all layers.
        report: The decisions.
    """

    settings: Settings
    clock: Clock
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
        layers: "int8" converts every layer that can be.
        backend: "auto" chooses by the device of the input at each call; or the name of one.
        fuse: Whether neighbouring passes may be fused where the result stays the same (this version fuses none).
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
    rows = tuple(_decide(model, settings, clock))
    report = ConversionReport(settings.recipe.name, rows)
    if not report.converted:
        found = {r.kind for r in rows} or {type(m).__name__ for m in model.modules()}
        raise TypeError(
            f"nothing to convert: the model has no {', '.join(t.__name__ for t in SWAPS)} layer that may run INT8; "
            f"found: {', '.join(sorted(found))}"
        )
    modules = dict(model.named_modules())
    for name in report.converted:
        module = modules[name]
        if type(module) in FLOAT_CLASSES:
            module.__dict__["int8_state"].name = name  # it may have moved since
            continue
        # All of them, or one that came after an earlier conversion, such as a new head for fine-tuning.
        with torch.inference_mode(False), torch.device("cpu"):  # whatever the caller's context makes of new tensors
            state = LayerState(name, module, settings.recipe, settings.backend, clock, settings.seed)
        module.__class__ = SWAPS[type(module)]
        module.__dict__["int8_state"] = state
    _disable_fused_eval(model)
    report = with_routes(report, model)
    if earlier is None:
        model.__dict__[_CONVERSION] = Conversion(settings, clock, report)
    else:
        earlier.report = report
    return report


def restore(model: nn.Module) -> None:
    """Undo ``convert``: the float classes come back, weights bit for bit. A model never converted stays as it is."""
    for module in model.modules():
        if type(module) in FLOAT_CLASSES:
            module.__class__ = FLOAT_CLASSES[type(module)]
            del module.__dict__["int8_state"]
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


def _decide(model: nn.Module, settings: Settings, clock: Clock) -> Iterator[Row]:
    candidates = {name: module for name, module in model.named_modules() if _multiplies(module)}
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for pattern in settings.skip:
        if not any(_matches(names[module], pattern) for module in candidates.values()):
            raise ValueError(f"skip: {pattern!r} matches no layer; layers: {', '.join(candidates)}")
    for name, module in candidates.items():
        skipped = next((f"skip={p!r}" for p in settings.skip if _matches(names[module], p)), "")
        kind, shape = FLOAT_CLASSES.get(type(module), type(module)).__name__, _weight_shape(module)
        reason = skipped or _obstacle(name, module, clock)
        decision = "float" if reason else "int8"
        yield Row(name=name, kind=kind, shape=shape, decision=decision, reason=reason or "converted")


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


def _matches(names: Sequence[str], pattern: str) -> bool:
    """Whether ``pattern`` is one of the names of the layer or of a module around it, or a glob of one."""
    paths = [name.split(".") for name in names]
    return any(fnmatchcase(".".join(path[: i + 1]), pattern) for path in paths for i in range(len(path)))


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    parameters = [p for p in module._parameters.values() if p is not None and not _lazy(p)]
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and not _lazy(weight):
        return tuple(weight.shape)
    return tuple(max(parameters, key=lambda p: p.numel()).shape) if parameters else ()


def _lazy(parameter: Any) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def _disable_fused_eval(model: nn.Module) -> None:
    for module in model.modules():
        flag = next((f for kind, f in _FUSED_EVAL_FLAGS.items() if isinstance(module, kind)), None)
        if flag and getattr(module, flag, False) and any(type(m) in FLOAT_CLASSES for m in module.modules()):
            module.__dict__[_FUSED_EVAL] = (flag, getattr(module, flag))
            setattr(module, flag, False)
