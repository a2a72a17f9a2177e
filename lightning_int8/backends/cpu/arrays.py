"""Tensors as the arrays that compiled passes take."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16)
"""What passes read and write."""


def as_array(x: Tensor) -> np.ndarray:
    """All of a contiguous tensor, flat; bfloat16, which NumPy has no type for, as its bits in uint16."""
    assert x.is_contiguous()
    x = x.detach()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy().reshape(-1)
