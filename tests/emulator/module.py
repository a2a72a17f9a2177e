"""The call interface of ``cupy.RawModule`` and ``cupy.RawKernel``, on the emulated machine."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emulator.compiler import compile_kernel, entry_points

DEFAULT_SHARED_BYTES = 48 << 10
"""Dynamic shared memory that a kernel has without asking for more, on every GPU."""

MOST_THREADS = 1024
MOST_GRID = (2**31 - 1, 65535, 65535)
_ERROR_BYTES = 256


class KernelError(RuntimeError):
    """A launch that the emulated machine ended: deadlock, misaligned access, barrier that is never reached."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How the emulated machine behaves where the real one is free.

    Attributes:
        schedule: Order in which threads take turns: 0 forward, 1 reverse, others shuffled by this seed.
        copies: When asynchronous copies take effect: "early", "late" or "random".
        sanitizer: "", "thread" or "address"; the process must have been started with the sanitizer's library.
        shared_limit: Most dynamic shared memory of a block, bytes.
    """

    schedule: int = 0
    copies: str = "late"
    sanitizer: str = ""
    shared_limit: int = 227 << 10


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("schedule", ctypes.c_uint),
        ("copies", ctypes.c_uint),
    )


class Module:
    """A compiled source.

    Args:
        source: CUDA C++ text.
        headers: Text of each header by its name.
        options: Compiler options; the ``-D`` definitions are used.
        machine: The machine to run on.
        name: What reports call the source.
    """

    def __init__(
        self,
        source: str,
        headers: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        machine: Machine | None = None,
        name: str = "kernel.cu",
    ) -> None:
        self.machine = machine or Machine()
        self.names = entry_points(source)
        self._library = ctypes.CDLL(str(compile_kernel(source, headers or {}, options, self.machine.sanitizer, name)))

    def get_function(self, name: str) -> Kernel:
        """The kernel called ``name``."""
        if name not in self.names:
            raise AttributeError(f"no kernel {name!r}; there are {', '.join(self.names)}")
        return Kernel(name, self._library, self.machine)


class Kernel:
    """A kernel that can be launched.

    Attributes:
        max_dynamic_shared_size_bytes: As in CuPy: must be raised before a launch with more than 48 KiB.
    """

    def __init__(self, name: str, library: ctypes.CDLL, machine: Machine) -> None:
        self.name = name
        self.max_dynamic_shared_size_bytes = DEFAULT_SHARED_BYTES
        self._machine = machine
        self._launch = library[f"launch_{name}"]
        sizes = (ctypes.c_int * 64)()
        self._sizes = sizes[: library[f"sizes_{name}"](sizes)]

    def __call__(
        self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], *, shared_mem: int = 0, stream: Any = None
    ) -> None:
        """Run to the end.

        Args:
            grid: Blocks along x, y, z.
            block: Threads along x, y, z.
            args: By CuPy's rules, see ``_as_parameter``.
            shared_mem: Dynamic shared memory, bytes.
            stream: Accepted and without effect: everything runs at once.

        Raises:
            ValueError: The launch would be refused by a GPU.
            TypeError: An argument is not of the size that the kernel declares.
            KernelError: The machine ended the launch.
        """
        config = self._config(grid, block, shared_mem)
        parameters = [_as_parameter(a) for a in args]
        given = [ctypes.sizeof(p) for p in parameters]
        if given != self._sizes:
            raise TypeError(f"{self.name}: arguments of {given} bytes for parameters of {self._sizes} bytes")
        addresses = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(p) for p in parameters))
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        if self._launch(ctypes.byref(config), addresses, error, _ERROR_BYTES):
            raise KernelError(f"{self.name}: {error.value.decode()}")

    def _config(self, grid: Sequence[int], block: Sequence[int], shared_mem: int) -> _LaunchConfig:
        grid, block = ((*t, 1, 1)[:3] for t in (grid, block))
        if math.prod(block) > MOST_THREADS:
            raise ValueError(f"{self.name}: {math.prod(block)} threads in a block")
        if any(not 1 <= n <= most for n, most in zip(grid, MOST_GRID, strict=True)):
            raise ValueError(f"{self.name}: grid {grid} is not possible")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise ValueError(f"{self.name}: raise max_dynamic_shared_size_bytes to {shared_mem} first")
        if shared_mem > self._machine.shared_limit:
            raise ValueError(f"{self.name}: {shared_mem} bytes of shared memory, the machine has less")
        timing = ("early", "late", "random").index(self._machine.copies)
        return _LaunchConfig(grid, block, shared_mem, self._machine.schedule, timing)


def _as_parameter(value: Any) -> Any:
    """One kernel parameter by CuPy's rules.

    A Python int becomes 8 bytes (so does a pointer, the ``data_ptr()`` of a tensor), a Python float a double, a NumPy
    scalar keeps its type, and a NumPy array of one element, structured or not, is passed by value.
    """
    if isinstance(value, bool | np.bool_):
        return ctypes.c_bool(bool(value))
    if isinstance(value, int):
        return ctypes.c_longlong(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.size == 1):
        return (ctypes.c_char * value.nbytes).from_buffer_copy(value.tobytes())
    raise TypeError(f"a kernel does not take {type(value).__name__}; pass pointers as data_ptr()")
