"""What this machine has that decides how INT8 training runs here."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_int8.cli.nvidia_driver import Driver, driver
from lightning_int8.kernels.nvrtc import installed

CPU_INFO = Path("/proc/cpuinfo")
CPU_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
"""Instructions that INT8 products gain from, in the kernel's spelling."""

ISA_LIMIT = "ONEDNN_MAX_CPU_ISA"
"""Variable that keeps oneDNN from instructions that the CPU has."""


@dataclass(frozen=True, kw_only=True)
class Torch:
    """The installed torch.

    Attributes:
        version: Of torch.
        cuda: CUDA that it was built for, such as "13.0"; None without CUDA.
        gpus: GPUs that it can use.
        architectures: "sm_80" and so on, for which it has machine code.
    """

    version: str
    cuda: str | None = None
    gpus: int = 0
    architectures: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CuPy:
    """The installed CuPy.

    Attributes:
        distributions: Each that provides it, such as "cupy-cuda13x 14.2.0"; more than one overwrite each other.
        cuda: Major version of its CUDA runtime; None where it cannot be imported.
        error: Why it cannot be imported; empty otherwise.
    """

    distributions: tuple[str, ...] = ()
    cuda: int | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """One installed NVRTC.

    Attributes:
        version: (major, minor).
        path: Its library.
        architectures: Compute capabilities that it compiles for, as numbers such as 86.
    """

    version: tuple[int, int]
    path: str
    architectures: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """The processor.

    Attributes:
        name: Its model.
        features: Those of ``CPU_FEATURES`` that it has.
        limit: Value of ``ISA_LIMIT``; empty where it is not set.
    """

    name: str
    features: tuple[str, ...] = ()
    limit: str = ""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Everything; ``numba`` is its version, or empty where it cannot be imported."""

    torch: Torch
    driver: Driver
    cupy: CuPy
    compilers: tuple[Compiler, ...]
    cpu: Cpu
    numba: str


def look() -> Found:
    """Look at this machine."""
    return Found(
        torch=_torch(),
        driver=driver(),
        cupy=_cupy(),
        compilers=tuple(
            Compiler(version=n.version, path=str(n.path), architectures=n.architectures) for n in installed()
        ),
        cpu=_cpu(),
        numba=_numba(),
    )


def _torch() -> Torch:
    usable = torch.cuda.is_available()
    return Torch(
        version=torch.__version__,
        cuda=torch.version.cuda,
        gpus=torch.cuda.device_count() if usable else 0,
        architectures=tuple(torch.cuda.get_arch_list()) if usable else (),
    )


def _cupy() -> CuPy:
    names = sorted(set(importlib.metadata.packages_distributions().get("cupy", ())))
    distributions = tuple(f"{name} {importlib.metadata.version(name)}" for name in names)
    try:
        cupy = importlib.import_module("cupy")
        return CuPy(distributions=distributions, cuda=cupy.cuda.runtime.runtimeGetVersion() // 1000)
    except Exception as error:  # a broken installation fails in any way
        reason = "" if isinstance(error, ModuleNotFoundError) and error.name == "cupy" else str(error)
        return CuPy(distributions=distributions, error=reason or "not installed")


def _cpu() -> Cpu:
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    words = set(flags.group(1).split()) if flags else set()
    return Cpu(
        name=name.group(1) if name else platform.processor() or platform.machine(),
        features=tuple(f for f in CPU_FEATURES if f in words),
        limit=os.environ.get(ISA_LIMIT, ""),
    )


def _numba() -> str:
    try:
        return importlib.import_module("numba").__version__
    except Exception:  # numba refuses a NumPy that is too new by errors of several types
        return ""
