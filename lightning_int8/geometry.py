"""The shape of a convolution, in any number of spatial dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import gcd, prod


@dataclass(frozen=True, kw_only=True)
class ConvGeometry:
    """One convolution call; every tuple has one entry per spatial dimension.

    Attributes:
        input_size: Spatial size of the input.
        kernel_size: Taps.
        stride: Step of the window.
        padding: (before, after), in zeros.
        dilation: Distance of neighbouring taps.
        groups: Number of channel groups.
    """

    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Tables are looked up by geometry at every contraction.
        return hash(self.as_integers)

    @cached_property
    def as_integers(self) -> tuple[int, ...]:
        """Everything, for ``of_integers``: the fields one after the other."""
        padding = (n for pair in self.padding for n in pair)
        return (*self.input_size, *self.kernel_size, *self.stride, *self.dilation, *padding, self.groups)

    @staticmethod
    @lru_cache(maxsize=4096)
    def of_integers(integers: tuple[int, ...]) -> ConvGeometry:
        """The geometry of ``as_integers``."""
        dims = len(integers) // 6
        fields = [integers[k * dims : (k + 1) * dims] for k in range(4)]
        padding = integers[4 * dims : 6 * dims]
        return ConvGeometry(
            input_size=fields[0],
            kernel_size=fields[1],
            stride=fields[2],
            dilation=fields[3],
            padding=tuple(zip(padding[::2], padding[1::2], strict=True)),
            groups=integers[-1],
        )

    @cached_property
    def output_size(self) -> tuple[int, ...]:
        """Spatial size of the output; an entry below 1 where the window does not fit."""
        return tuple(
            (n + lo + hi - d * (k - 1) - 1) // s + 1
            for n, k, s, (lo, hi), d in zip(
                self.input_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )

    @cached_property
    def taps(self) -> int:
        """Number of kernel positions."""
        return prod(self.kernel_size)

    def residues(self) -> list[Residue]:
        """The stride-1 correlations that make up grad_input: one for each residue of the input position mod stride."""
        sizes = zip(self.input_size, self.output_size, self.kernel_size, strict=True)
        steps = zip(self.stride, self.padding, self.dilation, strict=True)
        per_dim = [
            [_residue(first, *size, *step) for first in range(min(step[0], size[0]))]
            for size, step in zip(sizes, steps, strict=True)
        ]
        return [Residue(dims) for dims in product(*per_dim)]


@dataclass(frozen=True)
class ResidueDim:
    """One spatial dimension of a residue of grad_input.

    Input positions ``first + stride · t`` for t < size sum gradient positions ``t + offset + tap_step · j`` times tap
    ``taps[j]``. Gradient positions outside the output count as 0.

    Attributes:
        first: First input position.
        stride: Distance of the input positions.
        size: Number of input positions.
        taps: Kernel positions that take part, in the order of rising gradient position; may be empty.
        offset: Gradient position of the first tap at t = 0.
        tap_step: Distance of the gradient positions of neighbouring taps.
        padding: (before, after) by which the gradient must be extended; negative where part of it is not used.
    """

    first: int
    stride: int
    size: int
    taps: tuple[int, ...]
    offset: int
    tap_step: int
    padding: tuple[int, int]


@dataclass(frozen=True)
class Residue:
    """The input positions of one residue class, and how they sum the gradient."""

    dims: tuple[ResidueDim, ...]


def _residue(
    first: int, n_in: int, n_out: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int
) -> ResidueDim:
    """Positions h = first + stride·t take output o with h + padding = o·stride + k·dilation."""
    taps = tuple(k for k in reversed(range(kernel)) if (first + padding[0] - k * dilation) % stride == 0)
    size = -(-(n_in - first) // stride)
    tap_step = dilation // gcd(stride, dilation)
    offset = (first + padding[0] - taps[0] * dilation) // stride if taps else 0
    last = offset + (size - 1) + tap_step * (len(taps) - 1)
    return ResidueDim(first, stride, size, taps, offset, tap_step, (-offset, last - (n_out - 1)))
