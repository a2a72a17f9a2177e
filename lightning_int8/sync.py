"""Ranks agree on clip values, distances and errors: one flat all-reduce after a refresh, in force at the next step.

Clip values and widths may differ between ranks (mode "local"). Distances may not, nor the order of the layers: learning
rates follow from them, and with rates of their own the weights of the ranks would drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_int8.operand import Operand

T = TypeVar("T")

SYNC_CLIP = ("max", "mean", "local")
"""What ranks do with each other's clip values."""


def agree(operands: Sequence[Operand], mode: str) -> None:
    """Replace what ``operands`` share by the maximum or mean over the ranks that have it.

    Every rank must pass the same operands. A layer that a rank has not called yet takes the others' values.

    Args:
        operands: The live slots, in the same order on every rank.
        mode: "max" or "mean"; "local" is the maximum of the distances, and nothing else.
    """
    ranges = mode != "local"
    # NCCL moves memory of GPUs alone. Random keys are not shared: each rank draws its own noise.
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    parts = [part for operand in operands for part in operand.shared(ranges)]
    sizes = [shape.numel() for shape, _ in parts]
    values = torch.cat([_flat(value, size, device) for (_, value), size in zip(parts, sizes, strict=True)])
    known = torch.isfinite(values)
    if mode in ("max", "local"):
        # Nothing shared is ever negative, so -1 stands for "none here".
        merged = torch.where(known, values, -1.0)
        dist.all_reduce(merged, op=dist.ReduceOp.MAX)
        anywhere = merged >= 0
    else:
        sums = torch.stack((torch.where(known, values, 0.0), known.float()))
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        anywhere = sums[1] > 0
        merged = sums[0] / sums[1].clamp(min=1.0)
    agreed = iter(
        value.reshape(shape).clone() if bool(some.all()) else None
        for (shape, _), value, some in zip(parts, merged.split(sizes), anywhere.split(sizes), strict=True)
    )
    for operand in operands:
        operand.agree([next(agreed) for _ in operand.shared(ranges)], ranges)


def several_ranks() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    return not several_ranks() or dist.get_rank() == 0


def union(known: dict[str, T]) -> dict[str, T]:
    """What any rank knows, on every rank in the same order; of two that know the same key, the lower one's value."""
    of_ranks: list[dict[str, T]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, known)
    merged: dict[str, T] = {}
    for theirs in of_ranks:
        merged = theirs | merged
    return merged


def of_first_rank(value: T) -> T:
    """The ``value`` of rank 0, on every rank; anything that can be pickled."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _flat(value: Tensor | None, size: int, device: torch.device) -> Tensor:
    if value is None:
        return torch.full((size,), torch.nan, device=device)
    return value.to(device, torch.float32).reshape(-1)
