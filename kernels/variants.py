"""Variants of the matrix product: instruction family and tile sizes, and which of them a device gets."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How one block computes its tile.

    Attributes:
        family: "dp4a" (sm_61+), "imma" (mma.sync, sm_75+) or "wgmma" (sm_90a).
        block: Rows and columns of the result a block computes.
        warp: Rows and columns a warp computes (imma).
        stages: Tiles in flight (imma, wgmma).
        register_staging: Whether tiles reach shared memory through registers: below sm_80, which has no cp.async.
    """

    family: str
    block: tuple[int, int]
    warp: tuple[int, int] = (0, 0)
    stages: int = 2
    register_staging: bool = True

    @property
    def depth(self) -> int:
        """Summed index a tile covers."""
        return {"dp4a": 32, "imma": 64, "wgmma": 128}[self.family]

    @property
    def threads(self) -> int:
        """Threads of a block."""
        if self.family == "dp4a":
            return math.prod(self.block) // 64
        if self.family == "wgmma":  # a warpgroup that fills shared memory, and one for each 64 rows
            return 128 + 2 * self.block[0]
        return 32 * math.prod(self.block) // math.prod(self.warp)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        if self.family == "dp4a":
            return 2 * self.depth * (sum(self.block) + 8)
        barriers = 16 * self.stages if self.family == "wgmma" else 0
        return self.stages * self.depth * sum(self.block) + barriers

    def tiles(self, m: int, n: int) -> int:
        """Blocks that cover a result of ``m`` rows and ``n`` columns."""
        return -(-m // self.block[0]) * -(-n // self.block[1])

    @property
    def options(self) -> tuple[str, ...]:
        """Definitions that the sources read."""
        values = {"BLOCK_M": self.block[0], "BLOCK_N": self.block[1]}
        if self.family == "imma":
            values |= {"WARP_M": self.warp[0], "WARP_N": self.warp[1], "STAGES": self.stages}
            values["REGISTER_STAGING"] = int(self.register_staging)
        if self.family == "wgmma":
            values["STAGES"] = self.stages
        return tuple(f"-D{name}={value}" for name, value in values.items())


DP4A_LARGE = Variant(family="dp4a", block=(128, 128))
DP4A_SMALL = Variant(family="dp4a", block=(64, 64))
IMMA_SM75_LARGE = Variant(family="imma", block=(128, 128), warp=(64, 64))
IMMA_SM75_SMALL = Variant(family="imma", block=(64, 64), warp=(32, 32))
IMMA_LARGE = Variant(family="imma", block=(128, 128), warp=(64, 64), stages=4, register_staging=False)
IMMA_LARGE_3 = Variant(family="imma", block=(128, 128), warp=(64, 64), stages=3, register_staging=False)
IMMA_WIDE = Variant(family="imma", block=(128, 256), warp=(64, 64), stages=4, register_staging=False)
IMMA_SMALL = Variant(family="imma", block=(64, 64), warp=(32, 32), stages=4, register_staging=False)

WGMMA_WIDE = Variant(family="wgmma", block=(128, 256), stages=4)
WGMMA_LARGE = Variant(family="wgmma", block=(128, 128), stages=4)
WGMMA_SMALL = Variant(family="wgmma", block=(128, 64), stages=4)


def compute_capability(arch: str) -> int:
    """Number of an architecture: 90 for "sm_90a"."""
    return int(re.sub(r"\D", "", arch))


def variants(arch: str) -> tuple[Variant, ...]:
    """Variants that an architecture can run and may want, the largest tile first.

    Args:
        arch: "sm_61" and so on; "sm_90a" for warpgroup products.

    Raises:
        ValueError: The architecture has no INT8 product.
    """
    number = compute_capability(arch)
    if number < 61:
        raise ValueError(f"{arch} has no INT8 dot product; DP4A needs sm_61 or newer")
    if number < 75:
        return (DP4A_LARGE, DP4A_SMALL)
    if number < 80:
        return (IMMA_SM75_LARGE, IMMA_SM75_SMALL)
    if arch == "sm_90a":  # "a": code for 9.0 alone, which is what wgmma is
        return (WGMMA_WIDE, WGMMA_LARGE, WGMMA_SMALL)
    if number in (80, 90, 100, 103):  # 164 KiB of shared memory and more: room for four stages of the wide tile
        return (IMMA_WIDE, IMMA_LARGE, IMMA_SMALL)
    return (IMMA_LARGE_3, IMMA_SMALL)


def choose(candidates: tuple[Variant, ...], m: int, n: int, groups: int, multiprocessors: int) -> Variant:
    """The largest tile that still gives every multiprocessor a block and is not mostly outside the result.

    A model, not a measurement: larger tiles read less shared memory a product, idle multiprocessors do nothing.

    Args:
        candidates: Largest tile first.
        m: Rows of the result.
        n: Columns of the result.
        groups: Products of this shape in the launch.
        multiprocessors: Of the device.
    """
    for variant in candidates[:-1]:
        tiles = variant.tiles(m, n) * groups
        used = m * n * groups / (tiles * math.prod(variant.block))
        if tiles >= multiprocessors and used > 0.5:
            return variant
    return candidates[-1]
