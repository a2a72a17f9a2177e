"""Kernels under ThreadSanitizer or AddressSanitizer, in a process that starts with the sanitizer's library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from emulator.compiler import gpp

LIBRARIES = {"thread": "libtsan.so", "address": "libasan.so"}
OPTIONS = {"TSAN_OPTIONS": "exitcode=66 report_signal_unsafe=0", "ASAN_OPTIONS": "detect_leaks=0"}
TESTS = Path(__file__).parents[1]


def run(sanitizer: str, code: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run Python code whose kernels use ``Machine(sanitizer=...)``.

    Args:
        sanitizer: "thread" or "address".
        code: A script.
        timeout: Seconds.

    Returns:
        The finished process; reports are in its ``stderr``, and then its exit code is not 0.
    """
    library = subprocess.run(
        [gpp(), f"-print-file-name={LIBRARIES[sanitizer]}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    path = os.pathsep.join([str(TESTS), *sys.path])
    env = os.environ | OPTIONS | {"LD_PRELOAD": library, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # ThreadSanitizer expects its shadow memory at fixed addresses: no address space randomisation.
    command = ["setarch", "-R", sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
