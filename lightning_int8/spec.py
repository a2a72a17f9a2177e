"""What a recipe is: which integers each operand of the three contractions becomes, checked when it is built.

A training step of a layer is three contractions of two operands each (``x`` input, ``w`` weight, ``g`` gradient of the
output)::

    output      = x · w     sums over input channels (and taps)
    grad_input  = g · w     sums over output channels (and taps)
    grad_weight = g · x     sums over samples and positions

A scale can be taken out of an integer sum only if it does not change along the summed axis; ``Recipe`` refuses the rest
and names the operand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_int8 import ranges
from lightning_int8.numerics import BITS, INT8_MAX, LOWER_PLANE_MAX, plane_count
from lightning_int8.ranges import RangeRule
from lightning_int8.ranges.absmax import Rule as AbsMax

CONTRACTIONS = ("output", "grad_input", "grad_weight")
OPERANDS = {"output": ("x", "w"), "grad_input": ("g", "w"), "grad_weight": ("g", "x")}
"""The tensors that each contraction multiplies: left operand, right operand."""

CHANNEL_AXIS: dict[tuple[str, str], int] = {
    ("output", "rhs"): 0,
    ("grad_input", "rhs"): -1,
    ("grad_weight", "lhs"): -1,
    ("grad_weight", "rhs"): -1,
}
"""Axis, in canonical order, that ``per="channel"`` gives its own scales; the other operands sum over their channels."""

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class OperandSpec:
    """How one operand becomes integers.

    Attributes:
        bits: 8, 16 or 24: one, two or three INT8 planes.
        range: The rule that sets the clip value.
        per: "tensor" for one scale, "channel" for one per channel that the contraction does not sum over.
        rounding: "nearest" (ties to even) or "stochastic" (unbiased).
        affine: Whether the range has an integer zero point instead of being symmetric about 0.
    """

    bits: int = 8
    range: RangeRule = field(default_factory=AbsMax)
    per: str = "tensor"
    rounding: str = "nearest"
    affine: bool = False

    def __post_init__(self) -> None:
        _one_of("bits", self.bits, BITS)
        _one_of("per", self.per, ("tensor", "channel"))
        _one_of("rounding", self.rounding, ("nearest", "stochastic"))
        _one_of("affine", self.affine, (False, True))
        if isinstance(self.range, type) or not callable(getattr(self.range, "clip_value", None)):
            raise ValueError(f"range: {self.range!r} is not a range rule; rules: {', '.join(ranges.names())}")

    @property
    def largest_difference(self) -> int:
        """Largest |plane - zero point| of any plane."""
        digit = INT8_MAX if plane_count(self.bits) == 1 else LOWER_PLANE_MAX
        return digit + INT8_MAX if self.affine else digit

    def __str__(self) -> str:
        parts = [f"i{self.bits}", "sr" if self.rounding == "stochastic" else "", "z" if self.affine else ""]
        return "".join(parts) + ("/ch" if self.per == "channel" else "")


@dataclass(frozen=True, kw_only=True)
class ContractionSpec:
    """The two operands of one contraction, left and right as in ``OPERANDS``."""

    lhs: OperandSpec = field(default_factory=OperandSpec)
    rhs: OperandSpec = field(default_factory=OperandSpec)

    def __str__(self) -> str:
        return f"{self.lhs}·{self.rhs}"


def reduction_limit(a: OperandSpec, b: OperandSpec) -> int:
    """Number of products of one plane of ``a`` and one of ``b`` that an int32 sum holds for certain."""
    return INT32_MAX // (a.largest_difference * b.largest_difference)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The numerics of a converted layer: three contractions, nothing else.

    Attributes:
        name: How reports call it.
        output: x · w.
        grad_input: g · w.
        grad_weight: g · x.

    Raises:
        ValueError: A scale that cannot be taken out of the integer sum, or a field out of its range.
    """

    name: str
    output: ContractionSpec = field(default_factory=ContractionSpec)
    grad_input: ContractionSpec = field(default_factory=ContractionSpec)
    grad_weight: ContractionSpec = field(default_factory=ContractionSpec)

    def __post_init__(self) -> None:
        for contraction in CONTRACTIONS:
            spec = getattr(self, contraction)
            if not isinstance(spec, ContractionSpec):
                raise ValueError(f"recipe {self.name!r}: {contraction}: {spec!r} is not a ContractionSpec")
            for side, tensor in zip(("lhs", "rhs"), OPERANDS[contraction], strict=True):
                operand = getattr(spec, side)
                if not isinstance(operand, OperandSpec):
                    raise ValueError(f"recipe {self.name!r}: {contraction}.{side}: {operand!r} is not an OperandSpec")
                if operand.per == "channel" and (contraction, side) not in CHANNEL_AXIS:
                    raise ValueError(
                        f"recipe {self.name!r}: {contraction}.{side}.per: 'channel' is not possible: {contraction} "
                        f"sums over the channels of {tensor}, so their scales cannot be taken out of the integer sum"
                    )

    def __str__(self) -> str:
        return f"out {self.output} · gi {self.grad_input} · gw {self.grad_weight}"


def recipe_from_mapping(data: Mapping[str, Any]) -> Recipe:
    """Build a recipe from nested mappings, as read from YAML.

    A range is written as its name, or as a mapping with ``name`` and the rule's own fields.

    Raises:
        ValueError: An unknown or badly typed field; the message gives its dotted path and value.
    """
    return _build(Recipe, data, "recipe")


_NESTED: dict[str, type] = dict.fromkeys(CONTRACTIONS, ContractionSpec) | dict.fromkeys(("lhs", "rhs"), OperandSpec)


def _build(cls: type, data: Any, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}: {data!r} is not a mapping of fields")
    known = [f.name for f in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            raise ValueError(f"{path}: field {key!r} is not one of {', '.join(known)}")
        if key in _NESTED:
            value = _build(_NESTED[key], value, f"{path}.{key}")
        elif key == "range":
            value = _range(value, f"{path}.range")
        values[key] = value
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in values and _required(f)]
    if missing:
        raise ValueError(f"{path}: field {missing[0]!r} is missing")
    return _at(path, cls, values)


def _range(value: Any, path: str) -> RangeRule:
    if isinstance(value, str):
        value = {"name": value}
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


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value == a and type(value) is type(a) for a in allowed):
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(repr(a) for a in allowed)}")
