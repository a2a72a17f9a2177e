"""Launches of the convolutions: ``conv_wgmma.cu``, ``_imma``, ``_dp4a``, ``_direct`` and ``conv_finish.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_int8.geometry import ConvGeometry
from lightning_int8.kernels.conv_fields import (
    Product,
    fill_of,
    grad_input_product,
    grad_weight_product,
    output_product,
)
from lightning_int8.kernels.device import Device, Program, pointer
from lightning_int8.kernels.parameters import CONV, DIRECT, by_value
from lightning_int8.kernels.planes import padded
from lightning_int8.kernels.result import Result, epilogue_fields
from lightning_int8.kernels.split import WHOLE, finish, plan_split
from lightning_int8.kernels.variants import Variant, choose, variants
from lightning_int8.numerics import INT8_MAX, LOWER_PLANE_MAX, Plane
from lightning_int8.spec import INT32_MAX

DIRECT_LIMIT = INT32_MAX // (LOWER_PLANE_MAX + INT8_MAX) ** 2
"""Longest sum that int32 holds where zero points are taken off each factor."""

DIRECT_THREADS = 256
DIRECT_ACROSS = 32
"""Output channels side by side in a block of ``conv_direct.cu``'s grad_weight."""


def convolution(
    device: Device,
    contraction: str,
    a: Plane,
    b: Plane,
    geometry: ConvGeometry,
    result: Result | None = None,
    variant: Variant | None = None,
) -> Tensor:
    """One plane times one plane, scaled.

    Args:
        device: Runs the kernels.
        contraction: "output", "grad_input" or "grad_weight".
        a: Left operand: x ``(N, *in, C)`` for output, else g ``(N, *out, Co)``.
        b: Right operand: w ``(Co, *kernel, C / groups)``, or x for grad_weight.
        geometry: The convolution.
        result: What becomes of the sums.
        variant: Tile to use instead of the one that fits the shape.

    Returns:
        ``(N, *out, Co)``, ``(N, *in, C)`` or ``(Co, *kernel, C / groups)`` in ``result.dtype``.
    """
    a, b = (Plane(padded(p.data), p.scale, p.zero_point) for p in (a, b))
    groups, result = geometry.groups, result or Result()
    out = torch.empty(result_shape(contraction, a.data, b.data, geometry), dtype=result.dtype, device=a.data.device)
    if out.numel() == 0:
        return out
    for product in _products(contraction, a, b, geometry):
        if groups == 1 or product.aligned:
            _launch_tiles(device, product, a, b, groups, out, result, variant)
        else:
            _launch_direct(device, product, a, b, groups, out, result)
    return out


def result_shape(contraction: str, a: Tensor, b: Tensor, geometry: ConvGeometry) -> tuple[int, ...]:
    """Shape of what ``convolution`` returns."""
    if contraction == "output":
        return (a.shape[0], *geometry.output_size, b.shape[0])
    if contraction == "grad_input":
        return (a.shape[0], *geometry.input_size, b.shape[-1] * geometry.groups)
    return (a.shape[-1], *geometry.kernel_size, b.shape[-1] // geometry.groups)


def _products(contraction: str, a: Plane, b: Plane, geometry: ConvGeometry) -> list[Product]:
    if contraction == "output":
        return [output_product(a, b, geometry)]
    if contraction == "grad_weight":
        return [grad_weight_product(a, b, geometry)]
    return [grad_input_product(a, b, geometry, residue) for residue in geometry.residues()]


def _launch_tiles(
    device: Device,
    product: Product,
    a: Plane,
    b: Plane,
    groups: int,
    out: Tensor,
    result: Result,
    variant: Variant | None,
) -> None:
    m, n = product.m, product.n
    variant = variant or choose(variants(device.arch), m, n, groups, device.multiprocessors)
    tiles = variant.tiles(m, n)
    split = plan_split(device, out.device, tiles * groups, (groups * m, n), product.k, variant.depth)
    left_sums = product.left_sums() if b.zero_point is not None else None
    right_sums = product.right_sums() if a.zero_point is not None else None
    fill = fill_of(product.image)
    fields = product.fields | {
        "image": product.fields["image"] | {"fill": pointer(fill)},
        "split": split.fields(),
        "epilogue": epilogue_fields(a, b, left_sums, right_sums, product.products, out, result),
    }
    parameters = by_value(CONV, fields)
    kernel = device.kernel(Program(f"conv_{variant.family}.cu", variant.options), product.entry)
    kernel((tiles, split.slices, groups), (variant.threads,), (parameters,), shared_mem=variant.shared_bytes)
    if split.slabs is not None:
        finish(device.kernel(Program("conv_finish.cu"), f"{product.entry}_finish"), split, parameters)


def _launch_direct(
    device: Device, product: Product, a: Plane, b: Plane, groups: int, out: Tensor, result: Result
) -> None:
    # Zero points are taken off each factor, so the epilogue sees a symmetric product.
    left, right = (Plane(p.data, p.scale) for p in (a, b))
    conv = product.fields | {"epilogue": epilogue_fields(left, right, None, None, product.products, out, result)}
    zeros = {"left_zero": pointer(a.zero_point), "right_zero": pointer(b.zero_point)}
    kernel = device.kernel(Program("conv_direct.cu"), product.entry)
    if product.entry != "conv_grad_weight":
        conv["split"] = WHOLE.fields()
        blocks = -(-product.m * out.shape[-1] // DIRECT_THREADS)
        kernel((blocks,), (DIRECT_THREADS,), (by_value(DIRECT, {"conv": conv, **zeros}),))
        return
    blocks = -(-out.shape[0] // DIRECT_ACROSS) * out[0].numel()
    down = DIRECT_THREADS // DIRECT_ACROSS
    shape = (groups * product.m, product.n)
    split = plan_split(device, out.device, blocks, shape, product.k, down, limit=DIRECT_LIMIT, whole_sums=False)
    conv["split"] = split.fields()
    kernel((blocks, split.slices), (DIRECT_ACROSS, down), (by_value(DIRECT, {"conv": conv, **zeros}),))
    finish(device.kernel(Program("conv_finish.cu"), f"{product.entry}_finish"), split, by_value(CONV, conv))
