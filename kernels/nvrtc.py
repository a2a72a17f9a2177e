"""NVIDIA's run-time compiler through ctypes: CUDA C++ to machine code with no GPU, no driver and no header files."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PLACES = {13: "nvidia/cu13/lib/libnvrtc.so.13", 12: "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"}
"""Where the wheels ``nvidia-cuda-nvrtc`` and ``nvidia-cuda-nvrtc-cu12`` put the library, by CUDA's major version."""

_WHEELS = {13: "'nvidia-cuda-nvrtc==13.0.*'", 12: "nvidia-cuda-nvrtc-cu12"}


class CompileError(RuntimeError):
    """The compiler refused a source; the message is its log."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made.

    Attributes:
        image: Machine code (cubin), or PTX text.
        log: Messages, registers and spills of each kernel among them.
    """

    image: bytes
    log: str


class Nvrtc:
    """One loaded version of the library.

    Args:
        path: ``libnvrtc.so``.

    Attributes:
        path: The library.
        version: (major, minor).
        architectures: Numbers that it compiles for, such as 80.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # The library opens its built-ins by bare name, which fails from a virtual environment unless they are mapped.
        self._builtins = [ctypes.CDLL(str(p)) for p in sorted(path.parent.glob("libnvrtc-builtins.so.*"))]
        self._library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        numbers = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(numbers))
        self.architectures = tuple(numbers)

    def compile(
        self, source: str, name: str, headers: Mapping[str, str], arch: str, options: Sequence[str], ptx: bool = False
    ) -> Compiled:
        """Compile a source.

        Args:
            source: CUDA C++.
            name: What messages call it.
            headers: Text of each header by the name that an ``#include`` gives.
            arch: "sm_80" for machine code; "compute_80" with ``ptx``.
            options: Further options.
            ptx: Whether to stop at PTX.

        Raises:
            CompileError: The source or an option is wrong.
        """
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * max(1, len(headers)))(*(t.encode() for t in headers.values()))
        names = (ctypes.c_char_p * max(1, len(headers)))(*(n.encode() for n in headers))
        create = self._library.nvrtcCreateProgram
        self._check(create(ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names))
        try:
            arguments = [f"--gpu-architecture={arch}", *options]
            given = (ctypes.c_char_p * len(arguments))(*(a.encode() for a in arguments))
            failed = self._library.nvrtcCompileProgram(program, len(arguments), given)
            log = self._read(program, "ProgramLog").decode().rstrip("\0")
            if failed:
                raise CompileError(f"{name} for {arch}: {self._message(failed)}\n{log}")
            return Compiled(self._read(program, "PTX" if ptx else "CUBIN"), log)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(self._library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(self._library[f"nvrtcGet{what}"](program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"NVRTC: {self._message(status)}")

    def _message(self, status: int) -> str:
        return self._library.nvrtcGetErrorString(status).decode()


@functools.cache
def installed() -> tuple[Nvrtc, ...]:
    """Every version found on ``sys.path``, the newest first."""
    found = {}
    for major, place in _PLACES.items():
        path = next((p for p in (Path(folder) / place for folder in sys.path) if p.exists()), None)
        if path is not None:
            found[major] = Nvrtc(path)
    return tuple(found.values())


def compiler_of(major: int) -> Nvrtc:
    """The installed version of CUDA's major version ``major``.

    Raises:
        RuntimeError: It is not installed; the message says which wheel to install.
    """
    for nvrtc in installed():
        if nvrtc.version[0] == major:
            return nvrtc
    raise RuntimeError(f"no NVRTC {major} (found: {_found()}); pip install {_WHEELS.get(major, 'a newer version')}")


def compiler_for(arch: str) -> Nvrtc:
    """The newest installed version that compiles for ``arch``, such as "sm_80".

    Raises:
        RuntimeError: None does; the message says which wheel to install.
    """
    number = int("".join(c for c in arch if c.isdigit()))
    for nvrtc in installed():
        if number in nvrtc.architectures:
            return nvrtc
    wheel = _WHEELS[12 if number < 75 else 13]  # CUDA 13 left Pascal and Volta behind
    raise RuntimeError(f"no NVRTC that compiles for {arch} (found: {_found()}); pip install {wheel}")


def _found() -> str:
    return ", ".join("{}.{}".format(*n.version) for n in installed()) or "none"
