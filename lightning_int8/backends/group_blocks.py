"""Grouped convolutions as a few dense products: neighbouring groups share one, the products between them cancel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_int8.numerics import Plane, along

BLOCK_CHANNELS = 16
"""Groups are merged until a block has this many input or output channels; narrower products waste the vector units."""


@dataclass(frozen=True)
class Block:
    """Some neighbouring groups.

    Attributes:
        first: First group.
        groups: Number of groups.
        group_in: Input channels of one group.
        group_out: Output channels of one group.
    """

    first: int
    groups: int
    group_in: int
    group_out: int

    @property
    def in_count(self) -> int:
        """Input channels of the block."""
        return self.groups * self.group_in

    @property
    def out_count(self) -> int:
        """Output channels of the block."""
        return self.groups * self.group_out

    @property
    def inputs(self) -> slice:
        """The block's input channels."""
        return slice(self.first * self.group_in, self.first * self.group_in + self.in_count)

    @property
    def outputs(self) -> slice:
        """The block's output channels."""
        return slice(self.first * self.group_out, self.first * self.group_out + self.out_count)

    def weight(self, w: Plane) -> Tensor:
        """Block-diagonal weight ``(out_count, *kernel, in_count)`` of ``w`` ``(Co, *kernel, C / groups)``.

        Off the diagonal stands the zero point (a scalar or ``(Co,)``), so that those products vanish when it is taken
        off.
        """
        rows = w.data[self.outputs]
        if self.groups == 1:
            return rows
        dense = rows.new_zeros(*rows.shape[:-1], self.in_count)
        if w.zero_point is not None:
            dense += along(self.out(w.zero_point), None if w.zero_point.dim() == 0 else 0, dense.dim())
        for k in range(self.groups):
            out = slice(k * self.group_out, (k + 1) * self.group_out)
            dense[out, ..., k * self.group_in : (k + 1) * self.group_in] = rows[out]
        return dense

    def out(self, value: Tensor) -> Tensor:
        """The block's part of a scalar or of a vector over output channels."""
        return value if value.dim() == 0 else value[self.outputs]

    def columns(self, value: Tensor, taps: int) -> Tensor:
        """A scalar, or the block's part of a vector over input channels, repeated for each tap."""
        return value if value.dim() == 0 else value[self.inputs].repeat(taps)

    def diagonal(self, sums: Tensor) -> Tensor:
        """The products within groups, ``(out_count, taps · group_in)``, of ``(out_count, taps · in_count)``."""
        if self.groups == 1:
            return sums
        parts = sums.reshape(self.groups, self.group_out, -1, self.groups, self.group_in)
        return torch.stack([parts[k, :, :, k] for k in range(self.groups)]).reshape(self.out_count, -1)


def blocks(groups: int, channels: int, out_channels: int) -> list[Block]:
    """Split ``groups`` into blocks of at least ``BLOCK_CHANNELS`` channels where there are as many."""
    group_in, group_out = channels // groups, out_channels // groups
    merged = min(groups, max(1, BLOCK_CHANNELS // max(group_in, group_out)))
    return [Block(g, min(merged, groups - g), group_in, group_out) for g in range(0, groups, merged)]
