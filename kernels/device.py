"""What a launcher needs of the machine that runs kernels: a GPU through CuPy, or the emulated one of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Program:
    """A source compiled with certain options.

    Attributes:
        source: Name of a ``.cu`` file of this folder.
        options: ``-D`` definitions.
    """

    source: str
    options: tuple[str, ...] = ()


class Launch(Protocol):
    """A compiled kernel, ready to be launched on torch's current stream."""

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], *, shared_mem: int = 0) -> None:
        """Launch without waiting.

        Args:
            grid: Blocks along x, y, z.
            block: Threads along x, y, z.
            args: Typed scalars and structures of ``parameters``; pointers inside them are those of ``pointer``.
            shared_mem: Dynamic shared memory of a block, bytes.
        """


class Device(Protocol):
    """A machine that runs kernels.

    Attributes:
        arch: Architecture to compile for, "sm_80".
        multiprocessors: Number of multiprocessors.
    """

    arch: str
    multiprocessors: int

    def kernel(self, program: Program, entry: str) -> Launch:
        """The kernel ``entry`` of ``program``, compiled at first use."""


def pointer(tensor: Tensor | None) -> int:
    """Address of a tensor's first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
