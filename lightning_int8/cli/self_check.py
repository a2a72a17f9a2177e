"""One small contraction of each kind on a device, against exact arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lightning_int8 import backends
from lightning_int8.backends import Backend
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import INT8_MAX, LOWER_PLANE_MAX, Plane
from lightning_int8.spec import CONTRACTIONS, OperandSpec

ROWS, INPUTS, OUTPUTS = 33, 100, 17
BATCH = 2
GEOMETRY = ConvGeometry(
    input_size=(9, 8),
    kernel_size=(3, 3),
    stride=(2, 1),
    padding=((1, 1), (1, 1)),
    dilation=(1, 1),
    groups=1,
)
SEED = 1


def self_check(backend: Backend, device: str) -> dict[str, bool]:
    """Compare ``backend`` with ``reference`` on random operands.

    Args:
        backend: Under test.
        device: Where its tensors live, such as "cuda:0".

    Returns:
        Name of each check and whether the result is right to the bit.
    """
    generator = torch.Generator().manual_seed(SEED)
    truth = backends.load("reference")
    results = {}
    for kind, geometry, operands in _operands(generator):
        for contraction, (a, b) in zip(CONTRACTIONS, _pairs(*operands), strict=True):
            expected = truth.accumulate(contraction, a, b, geometry)
            made = backend.accumulate(contraction, _moved(a, device), _moved(b, device), geometry)
            results[f"{kind} {contraction}"] = torch.equal(made.cpu().long(), expected.long())
    x, clip_value = torch.randn(ROWS, INPUTS, generator=generator), torch.tensor(2.0)
    for rounding in ("nearest", "stochastic"):
        key, spec = torch.tensor([SEED, 0, 1]), OperandSpec(rounding=rounding)
        digits = truth.quantize(x, clip_value, spec, None, key).planes[0].data
        made = backend.quantize(x.to(device), clip_value.to(device), spec, None, key).planes[0].data
        results[f"quantize {rounding}"] = torch.equal(made.cpu(), digits)
    return results


def _operands(generator: torch.Generator) -> Iterator[tuple[str, ConvGeometry | None, tuple[Plane, Plane, Plane]]]:
    """Planes of x, w and g: of a matrix product, and of a convolution."""
    shapes = ((ROWS, INPUTS), (OUTPUTS, INPUTS), (ROWS, OUTPUTS))
    yield "linear", None, _planes(shapes, generator)
    image = (
        (BATCH, *GEOMETRY.input_size, INPUTS),
        (OUTPUTS, *GEOMETRY.kernel_size, INPUTS),
        (BATCH, *GEOMETRY.output_size, OUTPUTS),
    )
    yield "convolution", GEOMETRY, _planes(image, generator)


def _planes(shapes: tuple[tuple[int, ...], ...], generator: torch.Generator) -> tuple[Plane, Plane, Plane]:
    def plane(shape: tuple[int, ...]) -> Plane:
        # Half of the digits are extreme: there, instructions that saturate betray themselves.
        data = torch.randint(-LOWER_PLANE_MAX, INT8_MAX + 1, shape, dtype=torch.int8, generator=generator)
        extreme = torch.rand(shape, generator=generator) < 0.5
        return Plane(torch.where(extreme, data.sign() * INT8_MAX, data).to(torch.int8), torch.ones(()))

    x, w, g = map(plane, shapes)
    return x, w, g


def _pairs(x: Plane, w: Plane, g: Plane) -> tuple[tuple[Plane, Plane], ...]:
    return (x, w), (g, w), (g, x)


def _moved(plane: Plane, device: str) -> Plane:
    return Plane(plane.data.to(device), plane.scale.to(device))
