"""Range rules: one per file, found by the file's name.

A rule is a frozen dataclass named ``Rule`` with a field ``every`` (optimizer steps between refreshes; None takes the
interval of the conversion) and one method, ``clip_value``. It remembers nothing: what it needs from the past arrives as
``previous`` and lives in the operand's state.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Protocol

from torch import Tensor

from lightning_int8.magnitudes import STATISTICS, Statistics


class RangeRule(Protocol):
    """How wide the range of an operand is."""

    @property
    def every(self) -> int | None:
        """Optimizer steps between refreshes; None takes the interval of the conversion."""
        ...

    def clip_value(
        self, x: Tensor, axis: int | None, previous: Tensor | None, bits: int, statistics: Statistics = STATISTICS
    ) -> Tensor:
        """Clip value of ``x``.

        Args:
            x: The tensor to be quantized, any float dtype, canonical order. For an affine operand the rule is called
                twice, with the negative and with the positive part.
            axis: 0 or -1 for one clip value per index of that axis, None for one per tensor.
            previous: What the last refresh returned, or None at the first.
            bits: Width of the operand; rules that put the scale on a grid need it.
            statistics: What measures ``x`` on its device, in as few passes as that takes.

        Returns:
            float32 ``()`` or ``(C,)``, not negative, on the device of ``x``; without waiting for the host, unless the
            rule says that it does.
        """
        ...


def names() -> list[str]:
    """Names of the range rules, one per file of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def make(name: str, **fields: Any) -> RangeRule:
    """Build the rule of file ``name``.

    Raises:
        ValueError: No such file, or a field that the rule does not have; the message lists what there is.
    """
    if name not in names():
        raise ValueError(f"range: {name!r} is not one of {', '.join(names())}")
    rule = importlib.import_module(f"{__name__}.{name}").Rule
    known = list(rule.__dataclass_fields__)
    for field in fields:
        if field not in known:
            raise ValueError(f"range {name!r}: field {field!r} is not one of {', '.join(known)}")
    return rule(**fields)


def check_fraction(field: str, value: float) -> None:
    """Raise ValueError unless ``value`` lies in [0, 1)."""
    if not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ValueError(f"{field}: {value!r} is not in [0, 1)")


def check_every(every: int | None) -> None:
    """Raise ValueError unless ``every`` is None or a positive number of optimizer steps."""
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise ValueError(f"every: {every!r} is not a positive number of optimizer steps, nor None")
