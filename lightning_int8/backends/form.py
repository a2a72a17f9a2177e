"""How the result of a contraction is wanted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """What becomes of the scaled sums.

    Attributes:
        dtype: Of the result.
        moments: float64 ``(2, Co)`` of NaN, to be filled with mean and biased variance of each channel of an output, as
            it is before it is rounded, by a backend that can; else None.
    """

    dtype: torch.dtype = torch.float32
    moments: Tensor | None = None


FLOAT32 = Form()
"""float32, and nothing else."""
