"""Ranks agree on clip values: one flat all-reduce after a refresh, in force from the next step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_int8.operand import Operand

SYNC_CLIP = ("max", "mean", "local")
"""What ranks do with each other's clip values."""


def agree_on_clip_values(operands: Sequence[Operand], mode: str) -> None:
    """Replace the clip values of ``operands`` by their maximum or mean over the ranks that have one.

    Every rank must pass the same operands. A layer that a rank has not called yet takes the others' values.

    Args:
        operands: The live slots, in the same order on every rank.
        mode: "max" or "mean".
    """
    # Communicate where the model is: keys stay on the host, clip values follow the tensors.
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    sizes = [o.clip_shape.numel() for o in operands]
    values = torch.cat([_flat(o, size, device) for o, size in zip(operands, sizes, strict=True)])
    known = torch.isfinite(values)
    if mode == "max":
        # Clip values are never negative, so -1 stands for "none here".
        merged = torch.where(known, values, -1.0)
        dist.all_reduce(merged, op=dist.ReduceOp.MAX)
        anywhere = merged >= 0
    else:
        sums = torch.stack((torch.where(known, values, 0.0), known.float()))
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        anywhere = sums[1] > 0
        merged = sums[0] / sums[1].clamp(min=1.0)
    for operand, value, some in zip(operands, merged.split(sizes), anywhere.split(sizes), strict=True):
        if bool(some.all()):
            operand.clip_value = value.reshape(operand.clip_shape).clone()


def _flat(operand: Operand, size: int, device: torch.device) -> Tensor:
    if operand.clip_value is None:
        return torch.full((size,), torch.nan, device=device)
    return operand.clip_value.to(device).reshape(-1)
