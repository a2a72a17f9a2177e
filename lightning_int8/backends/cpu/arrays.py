"""Tensors as the arrays that compiled passes take."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16)
"""What passes read and write."""


def as_array(x: Tensor) -> np.ndarray:
    """All of a contiguous tensor, flat; bfloat16, which NumPy has no type for, as its bits in uint16."""
    flat = x.detach().view(-1)
    return flat.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else flat.numpy()


def tile(values: Tensor, length: int) -> np.ndarray:
    """The last axis, values of channels, repeated until it is ``length`` long: one for each element of a block.

    Args:
        values: ``(*, C)``.
        length: A multiple of C.
    """
    channels = values.shape[-1]
    # `Tensor.repeat` takes twice as long.
    return np.tile(values.numpy(), length // channels)
