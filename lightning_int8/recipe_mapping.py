"""Recipes from nested mappings, as YAML files hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning_int8 import ranges
from lightning_int8.policies import BitWidthRule, DeviationFactor
from lightning_int8.ranges import RangeRule
from lightning_int8.spec import CONTRACTIONS, ContractionSpec, OperandSpec, Recipe

_NESTED: dict[str, type] = {
    **dict.fromkeys(CONTRACTIONS, ContractionSpec),
    "lhs": OperandSpec,
    "rhs": OperandSpec,
    "learning_rate": DeviationFactor,
    "bit_width": BitWidthRule,
}


OF_THE_MODEL = ("name", "keep_float", "optimizer", "overrides")
"""Fields that say something about the whole model: no layer overrides them."""


def recipe_from_mapping(data: Any, base: Recipe | None = None) -> Recipe:
    """Build a recipe from nested mappings.

    A range is written as its name, or as a mapping with ``name`` and the rule's own fields. ``overrides`` maps globs of
    layer names to the fields that are different there.

    Args:
        data: The fields.
        base: Where the fields that ``data`` does not name come from; None for the defaults.

    Raises:
        ValueError: An unknown or badly typed field; the message gives its dotted path and value.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"recipe: {data!r} is not a mapping of fields")
    fields = dict(data)
    overrides = fields.pop("overrides", {})
    if not isinstance(overrides, Mapping):
        raise ValueError(f"recipe.overrides: {overrides!r} is not a mapping of globs to fields")
    recipe = _build(Recipe, fields, "recipe", base)
    for glob, part in overrides.items():
        for field in OF_THE_MODEL:
            if isinstance(part, Mapping) and field in part:
                raise ValueError(f"recipe.overrides.{glob}: field {field!r} is the whole model's and has no override")
    plain = dataclasses.replace(recipe, overrides=())
    made = [(str(glob), _build(Recipe, part, f"recipe.overrides.{glob}", plain)) for glob, part in overrides.items()]
    return dataclasses.replace(recipe, overrides=(*recipe.overrides, *made))


def _build(cls: type, data: Any, path: str, base: Any) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}: {data!r} is not a mapping of fields")
    known = [f.name for f in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            raise ValueError(f"{path}: field {key!r} is not one of {', '.join(known)}")
        below = getattr(base, key, None)
        if key in _NESTED and value is not None:
            value = _build(_NESTED[key], value, f"{path}.{key}", below)
        elif key == "range":
            value = _range(value, f"{path}.range", below)
        values[key] = value
    if base is not None:
        return _at(path, lambda **changes: dataclasses.replace(base, **changes), values)
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in values and _required(f)]
    if missing:
        raise ValueError(f"{path}: field {missing[0]!r} is missing")
    return _at(path, cls, values)


def _range(value: Any, path: str, base: Any) -> RangeRule:
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping) and "name" not in value and base is not None:
        name = type(base).__module__.rpartition(".")[2]
        value = {"name": name, **dataclasses.asdict(base), **value}
    if not isinstance(value, Mapping) or "name" not in value:
        raise ValueError(f"{path}: {value!r} is neither the name of a range rule nor a mapping with 'name'")
    return _at(path, ranges.make, value)


def _at(path: str, build: Any, values: Mapping[str, Any]) -> Any:
    try:
        return build(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
