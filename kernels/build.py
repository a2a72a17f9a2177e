"""Sources of this folder to machine code, kept on disk."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

from lightning_int8.kernels.device import Program
from lightning_int8.kernels.nvrtc import Nvrtc

SOURCES = Path(__file__).parent
OPTIONS = ("--std=c++17", "--fmad=false")
"""No fused multiply-add: results are those of ``reference``, which has none."""

CACHE_VARIABLE = "LIGHTNING_INT8_CACHE"
"""Environment variable with the folder that machine code is kept in."""


def read_source(name: str) -> str:
    """Text of a ``.cu`` or ``.cuh`` file."""
    return (SOURCES / name).read_text()


@functools.cache
def headers() -> dict[str, str]:
    """Text of every header by its name."""
    return {p.name: p.read_text() for p in sorted(SOURCES.glob("*.cuh"))}


def cache_folder() -> Path:
    """Where machine code is kept: ``$LIGHTNING_INT8_CACHE``, or a folder of the user's cache."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_int8"


def cubin(program: Program, arch: str, compiler: Nvrtc) -> bytes:
    """Machine code of a program, compiled unless it was before.

    Ranks that start together may compile the same program side by side: each writes a file of its own and renames it,
    so none ever reads half of one.

    Args:
        program: Source and definitions.
        arch: Architecture such as "sm_80".
        compiler: Its version is part of the key.
    """
    source = read_source(program.source)
    options = (*OPTIONS, *program.options)
    parts = [source, arch, str(compiler.version), *options, *(f"{n}\n{t}" for n, t in headers().items())]
    path = cache_folder() / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.cubin"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        pass
    start = time.perf_counter()
    image = compiler.compile(source, program.source, headers(), arch, options).image
    seconds = time.perf_counter() - start
    print(f"lightning_int8: compiled {program.source} for {arch} in {seconds:.1f} s", file=sys.stderr)
    _write(path, image)
    return image


def _write(path: Path, image: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(image)
        os.replace(file.name, path)
    except OSError as error:  # a home that cannot be written to costs a compilation each time, no more
        print(f"lightning_int8: machine code is not kept in {path.parent}: {error}", file=sys.stderr)
