"""How the result of a contraction is wanted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """What becomes of the scaled sums, which are float32.

    Attributes:
        dtype: Of the result, to which it is rounded at the end.
        bias: float32 ``(Co,)`` to be added to an output; None for 0.
        moments: float64 ``(2, Co)`` of NaN, to be filled with mean and biased variance of each channel of an output, by
            a backend that can; else None.
    """

    dtype: torch.dtype = torch.float32
    bias: Tensor | None = None
    moments: Tensor | None = None

    def finish(self, scaled: Tensor) -> Tensor:
        """The result of scaled sums, which nobody else needs; moments are left alone."""
        return (scaled if self.bias is None else scaled.add_(self.bias)).to(self.dtype)


FLOAT32 = Form()
"""float32, and nothing else."""
