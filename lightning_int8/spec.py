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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from lightning_int8 import ranges
from lightning_int8.numerics import BITS, FLAG_BITS, INT8_MAX, LOWER_PLANE_MAX, plane_count
from lightning_int8.policies import BitWidthRule, DeviationFactor
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
        bits: 8, 16 or 24: one, two or three INT8 planes; 9 is the flag format, a coarse and a fine plane.
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
        if self.affine and self.bits == FLAG_BITS:
            raise ValueError("affine: True is not possible with bits=9: the flag format is symmetric")

    @property
    def largest_difference(self) -> int:
        """Largest |plane - zero point| of any plane."""
        digit = INT8_MAX if plane_count(self.bits) == 1 or self.bits == FLAG_BITS else LOWER_PLANE_MAX
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


NORMS = ("float", "range", "fixed_point")
"""What batch norms become; see ``lightning_int8.norm``."""

KEEP_FLOAT = ("first", "last")
"""Layers that a recipe may keep in float, by the order in which they run."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The numerics of a converted model: three contractions for each layer, and what goes with them.

    Attributes:
        name: How reports call it.
        output: x · w.
        grad_input: g · w.
        grad_weight: g · x.
        norm: What BatchNorm layers compute: "float" leaves them alone, "range" (Banner et al. 2018), "fixed_point"
            (Yang et al. 2019).
        keep_float: "first" and "last" keep the layer that runs first, or last, in float. The order is that of the first
            training step, which therefore still runs them in INT8.
        learning_rate: Rule of the per-layer learning-rate factors, or None.
        bit_width: Rule that adapts the widths of the operands, or None.
        optimizer: Name of the optimizer class that the method is meant for; another one is warned about.
        overrides: Recipes for the layers whose name matches a glob; the last match wins. Of such a recipe the
            contractions, ``norm``, ``learning_rate`` and ``bit_width`` count.

    Raises:
        ValueError: A scale that cannot be taken out of the integer sum, or a field out of its range.
    """

    name: str
    output: ContractionSpec = field(default_factory=ContractionSpec)
    grad_input: ContractionSpec = field(default_factory=ContractionSpec)
    grad_weight: ContractionSpec = field(default_factory=ContractionSpec)
    norm: str = "float"
    keep_float: tuple[str, ...] = ()
    learning_rate: DeviationFactor | None = None
    bit_width: BitWidthRule | None = None
    optimizer: str = ""
    overrides: tuple[tuple[str, Recipe], ...] = ()

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
        self._check_model_fields()

    def _check_model_fields(self) -> None:
        try:
            for field_name in ("name", "optimizer"):
                if not isinstance(getattr(self, field_name), str):
                    raise ValueError(f"{field_name}: {getattr(self, field_name)!r} is not a string")
            _one_of("norm", self.norm, NORMS)
            if isinstance(self.keep_float, str) or not isinstance(self.keep_float, Iterable):
                raise ValueError(f"keep_float: {self.keep_float!r} is not a sequence of 'first' and 'last'")
            object.__setattr__(self, "keep_float", tuple(self.keep_float))  # YAML gives a list
            for position in self.keep_float:
                _one_of("keep_float", position, KEEP_FLOAT)
            for name, kind in (("learning_rate", DeviationFactor), ("bit_width", BitWidthRule)):
                if not isinstance(getattr(self, name), kind | None):
                    raise ValueError(f"{name}: {getattr(self, name)!r} is not a {kind.__name__}, nor None")
            overrides = self.overrides.items() if isinstance(self.overrides, Mapping) else self.overrides
            object.__setattr__(self, "overrides", tuple((pattern, recipe) for pattern, recipe in overrides))
            for pattern, recipe in self.overrides:
                if not isinstance(pattern, str) or not isinstance(recipe, Recipe) or recipe.overrides:
                    raise ValueError(f"overrides: {pattern!r}: {recipe!r} is not a Recipe without overrides of its own")
        except (TypeError, ValueError) as error:
            raise ValueError(f"recipe {self.name!r}: {error}") from error

    def for_layer(self, names: Sequence[str]) -> Recipe:
        """The recipe of the layer that goes by ``names`` (several, if the module is shared)."""
        found = self
        for pattern, recipe in self.overrides:
            if matches(names, pattern):
                found = recipe
        return found

    def __str__(self) -> str:
        return f"out {self.output} · gi {self.grad_input} · gw {self.grad_weight}"


def matches(names: Sequence[str], pattern: str) -> bool:
    """Whether ``pattern`` is one of the names of a layer or of a module around it, or a glob of one."""
    paths = [name.split(".") for name in names]
    return any(fnmatchcase(".".join(path[: i + 1]), pattern) for path in paths for i in range(len(path)))


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value == a and type(value) is type(a) for a in allowed):
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(repr(a) for a in allowed)}")
