"""Values of channels written out for every element of a block, as compiled passes read them."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def tile(values: Tensor, length: int) -> np.ndarray:
    """The last axis repeated until it is ``length`` long.

    Args:
        values: ``(*, C)``.
        length: A multiple of C.
    """
    channels = values.shape[-1]
    # `Tensor.repeat` takes twice as long.
    return np.tile(values.numpy(), length // channels)
