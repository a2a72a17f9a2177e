"""How long a layer takes in INT8 and in float, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

MARGIN = 1.05
"""A layer stays INT8 unless it takes more than this many times as long as in float.

A tie stays INT8: the comparison charges it with a walk through memory that fusion saves, a float layer interrupts the
fusion of its neighbours, and timings repeat to a few per cent only.
"""


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Forward and backward pass of one layer, both ways.

    Attributes:
        int8_seconds: With the three contractions and the quantization of what they read.
        float_seconds: By torch's own linear or convolution, and its derivatives.
        backend: Name of the backend that computed ``int8_seconds``.
        integer: Whether its products are INT8 products.

    Raises:
        ValueError: A time is not positive and finite.
    """

    int8_seconds: float
    float_seconds: float
    backend: str
    integer: bool

    def __post_init__(self) -> None:
        for name in ("int8_seconds", "float_seconds"):
            value = getattr(self, name)
            if not isinstance(value, float) or not 0 < value < math.inf:
                raise ValueError(f"{name}: {value!r} is not a positive time")

    @property
    def float_wins(self) -> bool:
        """Whether the layer is to stay in float."""
        return self.int8_seconds > MARGIN * self.float_seconds

    @property
    def reason(self) -> str:
        """Why the layer stays in float, empty if it does not."""
        if not self.float_wins:
            return ""
        who = "INT8" if self.integer else f"backend {self.backend!r}"
        return f"{who} would take {self.int8_seconds / self.float_seconds:.2f} times as long ({self._both})"

    @property
    def gain(self) -> str:
        """What computing as the layer does saves."""
        return f"{self.float_seconds / self.int8_seconds:.2f} times as fast as float ({self._both})"

    @property
    def _both(self) -> str:
        return f"{_milliseconds(self.int8_seconds)} against {_milliseconds(self.float_seconds)} ms"


def _milliseconds(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.1f}" if milliseconds >= 1 else f"{milliseconds:.2g}"
