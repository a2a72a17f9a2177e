"""Kernel sources to shared libraries, by g++."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

HEADERS = Path(__file__).parent / "cuda"
CACHE = Path(tempfile.gettempdir()) / f"lightning-int8-emulator-{os.getuid()}"
SANITIZERS = {
    "": ["-O2"],
    "thread": ["-O1", "-g1", "-fsanitize=thread", "-DEMULATOR_THREAD_SANITIZER"],
    "address": ["-O1", "-g1", "-fsanitize=address", "-fsanitize-recover=address", "-DEMULATOR_ADDRESS_SANITIZER"],
}
"""Flags for the kernel; of these the scheduler gets the definition alone."""

COMMON = ["-std=c++17", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-fwrapv", "-ffp-contract=off", "-Wl,-Bsymbolic"]
_ENTRY = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(')


def entry_points(source: str) -> list[str]:
    """Names of the kernels that a source defines."""
    return _ENTRY.findall(source)


def gpp() -> str:
    """The compiler.

    Raises:
        FileNotFoundError: It is not installed.
    """
    found = shutil.which("g++")
    if found is None:
        raise FileNotFoundError("g++ is not installed")
    return found


def compile_kernel(
    source: str, headers: Mapping[str, str], options: Sequence[str], sanitizer: str, name: str = "kernel.cu"
) -> Path:
    """Compile a kernel source with the headers that it includes; a library made before is taken again.

    Args:
        source: CUDA C++ text.
        headers: Text of each header by the name that an ``#include`` gives.
        options: ``-D`` definitions.
        sanitizer: A key of ``SANITIZERS``.
        name: What compiler messages and sanitizer reports call the source.

    Returns:
        Path of the shared library.
    """
    text = f'#line 1 "{name}"\n{source}\n' + "".join(f"EMULATOR_ENTRY({e})\n" for e in entry_points(source))
    flags = [*COMMON, *SANITIZERS[sanitizer], *(o for o in options if o.startswith("-D"))]
    runtime = _runtime(sanitizer)
    key = _digest(text, *(f"{n}\n{t}" for n, t in headers.items()), *flags, runtime.name, *_texts())
    library = CACHE / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            for header, body in headers.items():
                (Path(folder) / header).write_text(body)
            kernel = Path(folder) / "kernel.cpp"
            kernel.write_text(text)
            include = [f"-I{HEADERS}", f"-I{folder}", "-include", str(HEADERS / "kernel.h")]
            _compile(library, [*flags, *include, str(kernel), str(runtime)])
    return library


@functools.cache
def _runtime(sanitizer: str) -> Path:
    definition = [f for f in SANITIZERS[sanitizer] if f.startswith("-D")]
    library = CACHE / f"runtime-{_digest(sanitizer, *_texts())}.o"
    if not library.exists():
        # A loop must not become a call of memcpy: the sanitizer would see it, in code that it is to leave alone.
        flags = ["-std=c++17", "-O2", "-fPIC", "-U_FORTIFY_SOURCE", "-fno-tree-loop-distribute-patterns", "-c"]
        _compile(library, [*flags, *definition, str(HEADERS / "runtime.cpp")])
    return library


@functools.cache
def _texts() -> tuple[str, ...]:
    return tuple(p.read_text() for p in sorted(HEADERS.iterdir()))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _compile(target: Path, arguments: list[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: another process may compile or load the same file at this moment.
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=target.suffix, delete=False) as file:
        done = subprocess.run([gpp(), *arguments, "-o", file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        os.unlink(file.name)
        raise RuntimeError(f"g++ failed:\n{done.stderr[-4000:]}")
    os.replace(file.name, target)
