"""What the tests of the CUDA kernels share: a compiler to ask for, operands, and the result that is right."""

import shutil

import pytest
import torch

from lightning_int8 import backends
from lightning_int8.backends.base import output_scales
from lightning_int8.kernels import variants
from lightning_int8.numerics import Plane, Quantized

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed: kernels cannot be compiled for the emulated machine"
)

SMALL = {
    "imma": ("sm_80", variants.IMMA_SMALL),
    "imma-sm75": ("sm_75", variants.IMMA_SM75_SMALL),
    "wgmma": ("sm_90a", variants.WGMMA_SMALL),
    "dp4a": ("sm_61", variants.DP4A_SMALL),
}
"""The smallest tile of each family and an architecture that runs it: the emulated machine computes whole tiles."""

SCHEDULES = [(0, "early"), (1, "late"), (2, "random"), (3, "early"), (4, "late")]
"""Orders in which threads take turns, and when asynchronous copies take effect."""


def random_plane(shape, channels=None, affine=False, extreme=0):
    """A plane of random digits, or of ±127 everywhere; ``channels`` scales and zero points, or one for None."""
    data = torch.randint(-128, 128, shape, dtype=torch.int8)
    if extreme:
        data = torch.full(shape, 127 * extreme, dtype=torch.int8)
    size = () if channels is None else (channels,)
    zero = torch.randint(-127, 128, size, dtype=torch.int32) if affine else None
    return Plane(data, torch.rand(size) + 0.1, zero)


def expected_sums(contraction, a, b, geometry=None):
    return backends.load("reference").accumulate(contraction, a, b, geometry)


def scaled(sums, contraction, a, b, geometry=None):
    """The contract's float32 result of one plane times one plane."""
    axes = [None if p.scale.dim() == 0 else -1 for p in (a, b)]
    axes[1] = 0 if axes[1] is not None and contraction == "output" else axes[1]
    a, b = (Quantized((p,), axis) for p, axis in zip((a, b), axes, strict=True))
    left, right = output_scales(contraction, a, b, 0, 0, geometry, sums.dim())
    return sums.to(torch.float32).mul_(left).mul_(right)
