"""Launches of the matrix products: ``gemm_wgmma.cu``, ``gemm_imma.cu``, ``gemm_dp4a.cu`` and ``gemm_finish.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_int8.kernels.device import Device, Program
from lightning_int8.kernels.parameters import GEMM, by_value
from lightning_int8.kernels.planes import matrix_fields, padded
from lightning_int8.kernels.result import Result, epilogue_fields
from lightning_int8.kernels.split import finish, plan_split
from lightning_int8.kernels.variants import Variant, choose, variants
from lightning_int8.numerics import Plane

LAYOUTS = {"output": "nt", "grad_input": "nn", "grad_weight": "tn"}
"""Contraction and how its operands lie, in the letters of BLAS: right "t" is (n, k), left "t" is (k, m)."""


def product_shape(contraction: str, a: Tensor, b: Tensor) -> tuple[int, int, int]:
    """Rows and columns of a product, and the length of its sums."""
    layout = LAYOUTS[contraction]
    m, k = a.shape if layout[0] == "n" else a.shape[::-1]
    return m, b.shape[0 if layout[1] == "t" else 1], k


def gemm(
    device: Device, contraction: str, a: Plane, b: Plane, result: Result | None = None, variant: Variant | None = None
) -> Tensor:
    """One plane times one plane, scaled.

    Args:
        device: Runs the kernels.
        contraction: "output": a (m, k), b (n, k); "grad_input": a (m, k), b (k, n); "grad_weight": a (k, m), b (k, n).
        a: int8 plane; scale and zero point ``()`` or, for grad_weight, ``(m,)``.
        b: int8 plane; scale and zero point ``()`` or ``(n,)``.
        result: What becomes of the sums.
        variant: Tile to use instead of the one that fits the shape.

    Returns:
        ``(m, n)`` in ``result.dtype``.
    """
    result = result or Result()
    layout = LAYOUTS[contraction]
    m, n, k = product_shape(contraction, a.data, b.data)
    out = torch.empty(m, n, dtype=result.dtype, device=a.data.device)
    if out.numel() == 0:
        return out
    variant = variant or choose(variants(device.arch), m, n, 1, device.multiprocessors)
    left, right = padded(a.data), padded(b.data)
    tiles = variant.tiles(m, n)
    split = plan_split(device, out.device, tiles, (m, n), k, variant.depth)
    left_sums = None if b.zero_point is None else left.sum(1 if layout[0] == "n" else 0, dtype=torch.int64)
    right_sums = None if a.zero_point is None else right.sum(1 if layout[1] == "t" else 0, dtype=torch.int64)
    fields = {
        "left": matrix_fields(left),
        "right": matrix_fields(right),
        "m": m,
        "n": n,
        "k": k,
        "split": split.fields(),
        "epilogue": epilogue_fields(a, b, left_sums, right_sums, k, out, result),
    }
    parameters = by_value(GEMM, fields)
    kernel = device.kernel(Program(f"gemm_{variant.family}.cu", variant.options), f"gemm_{layout}")
    kernel((tiles, split.slices), (variant.threads,), (parameters,), shared_mem=variant.shared_bytes)
    if split.slabs is not None:
        finish(device.kernel(Program("gemm_finish.cu"), "gemm_finish"), split, parameters)
    return out
