"""Batch norms of the papers' recipes: float modules of torch whose class is swapped, with the same keys and buffers.

None of them is an INT8 contraction: what they quantize or simplify stays in float tensors.
"""

from lightning_int8.norm.fixed_point_batch_norm import SWAPS as FIXED_POINT_SWAPS
from lightning_int8.norm.fixed_point_batch_norm import (
    FixedPointBatchNorm1d,
    FixedPointBatchNorm2d,
    FixedPointBatchNorm3d,
    FixedPointSyncBatchNorm,
)
from lightning_int8.norm.range_batch_norm import SWAPS as RANGE_SWAPS
from lightning_int8.norm.range_batch_norm import (
    RangeBatchNorm1d,
    RangeBatchNorm2d,
    RangeBatchNorm3d,
    RangeSyncBatchNorm,
)

__all__ = [
    "FIXED_POINT_SWAPS",
    "RANGE_SWAPS",
    "FixedPointBatchNorm1d",
    "FixedPointBatchNorm2d",
    "FixedPointBatchNorm3d",
    "FixedPointSyncBatchNorm",
    "RangeBatchNorm1d",
    "RangeBatchNorm2d",
    "RangeBatchNorm3d",
    "RangeSyncBatchNorm",
]
