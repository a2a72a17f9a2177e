"""Kernels under ThreadSanitizer or AddressSanitizer, in a process that starts with the sanitizer's library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from emulator.compiler import gpp

LIBRARIES = {"thread": "libtsan.so", "address": "libasan.so"}
OPTIONS = {"TSAN_OPTIONS": "exitcode=0", "ASAN_OPTIONS": "detect_leaks=0 halt_on_error=0 exitcode=0"}
"""Reports do not end the process: one process looks at many kernels."""

TESTS = Path(__file__).parents[1]
_CASE = "sanitizers.case "


def case(name: str) -> None:
    """Inside the code of ``reports``: what follows belongs to ``name``."""
    print(_CASE + name, file=sys.stderr, flush=True)


def reports(sanitizer: str, code: str, timeout: float = 300) -> dict[str, str]:
    """Run Python code whose kernels use ``Machine(sanitizer=...)``.

    Args:
        sanitizer: "thread" or "address".
        code: A script that calls ``case`` before each of its cases.
        timeout: Seconds.

    Returns:
        The summary lines of the reports of each case, joined; "" for a case without one.

    Raises:
        RuntimeError: The script failed.
    """
    library = subprocess.run(
        [gpp(), f"-print-file-name={LIBRARIES[sanitizer]}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    path = os.pathsep.join([str(TESTS), *sys.path])
    env = os.environ | OPTIONS | {"LD_PRELOAD": library, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # ThreadSanitizer expects its shadow memory at fixed addresses: no address space randomisation.
    command = ["setarch", "-R", sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError(f"the script failed under the {sanitizer} sanitizer:\n{done.stderr[-4000:]}")
    found: dict[str, str] = {}
    name = ""
    for line in done.stderr.splitlines():
        if line.startswith(_CASE):
            name = line.removeprefix(_CASE)
            found[name] = ""
        elif line.startswith("SUMMARY"):
            found[name] += line + "\n"
    return found
