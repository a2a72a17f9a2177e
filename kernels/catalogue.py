"""Every program that an architecture may be asked to run."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_int8.kernels.device import Program
from lightning_int8.kernels.variants import variants


@dataclass(frozen=True)
class Item:
    """One program.

    Attributes:
        program: Source and definitions.
        label: What to call it in a table: the source and its tile.
        shared_bytes: Dynamic shared memory of a block.
    """

    program: Program
    label: str
    shared_bytes: int


TILED = ("gemm_{}.cu", "conv_{}.cu")
"""Sources that exist for each family and tile."""

PLAIN = (
    "gemm_finish.cu",
    "conv_finish.cu",
    "conv_direct.cu",
    "quantize.cu",
    "absmax.cu",
    "histogram.cu",
    "error_sums.cu",
)
"""Sources without a tile to choose."""


def catalogue(arch: str) -> list[Item]:
    """The programs of an architecture.

    Args:
        arch: Such as "sm_80".

    Raises:
        ValueError: The architecture has no INT8 product.
    """
    items = []
    for variant in variants(arch):
        tile = "{}x{}".format(*variant.block)
        for source in TILED:
            name = source.format(variant.family)
            items.append(Item(Program(name, variant.options), f"{name} {tile}", variant.shared_bytes))
    return items + [Item(Program(name), name, 0) for name in PLAIN]
