"""The NVIDIA driver, asked without torch and without CuPy: it answers where neither of them can start."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "libcuda.so.1"
KERNEL_MODULE = Path("/proc/driver/nvidia/version")

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_NAME_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU.

    Attributes:
        name: As the driver calls it.
        capability: Compute capability, such as (8, 6).
    """

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Driver:
    """What the driver says.

    Attributes:
        cuda: The newest CUDA that it runs, (major, minor); None where there is no driver.
        release: Version of the kernel module, such as "580.65.06"; empty where it cannot be read.
        gpus: In the driver's order, which is torch's; CUDA_VISIBLE_DEVICES applies.
        problem: Why there is no driver or no GPU; empty otherwise.
    """

    cuda: tuple[int, int] | None = None
    release: str = ""
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""


class _DriverError(Exception):
    """A call that the driver answered with an error."""


def driver(library: str = LIBRARY, kernel_module: Path = KERNEL_MODULE) -> Driver:
    """Ask the driver.

    Args:
        library: The driver's library, by name or path.
        kernel_module: Text file in which the kernel module says its version.
    """
    release = _release(kernel_module)
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Driver(release=release, problem=f"{library} cannot be loaded")
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    version = (number.value // 1000, number.value % 1000 // 10)
    try:
        gpus = _gpus(cuda)
    except _DriverError as error:
        return Driver(cuda=version, release=release, problem=str(error))
    return Driver(cuda=version, release=release, gpus=gpus, problem="" if gpus else "the driver sees no GPU")


def _gpus(cuda: ctypes.CDLL) -> tuple[Gpu, ...]:
    def call(name: str, *arguments: object) -> None:
        status = cuda[name](*arguments)
        if status:
            text = ctypes.c_char_p()
            cuda.cuGetErrorString(status, ctypes.byref(text))
            raise _DriverError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")

    call("cuInit", 0)
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    gpus = []
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(_NAME_BYTES)
        call("cuDeviceGet", ctypes.byref(device), index)
        call("cuDeviceGetName", name, _NAME_BYTES, device)
        major, minor = ctypes.c_int(), ctypes.c_int()
        call("cuDeviceGetAttribute", ctypes.byref(major), _CAPABILITY_MAJOR, device)
        call("cuDeviceGetAttribute", ctypes.byref(minor), _CAPABILITY_MINOR, device)
        gpus.append(Gpu(name=name.value.decode(), capability=(major.value, minor.value)))
    return tuple(gpus)


def _release(kernel_module: Path) -> str:
    if not kernel_module.exists():
        return ""
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", kernel_module.read_text())
    return found.group(1) if found else ""
