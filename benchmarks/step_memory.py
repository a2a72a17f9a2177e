"""Peak memory of a training step, each column in a process of its own (Linux).

The resident memory of the resting process (network, momentum, libraries; freed memory given back) is taken off the
highest that it reaches during one step: gradients, whatever is kept for the backward pass, and temporaries remain.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step_columns import Training

from lightning_int8.backends.cpu import buffers

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FIRST_STEPS = 3
"""Steps before the measured ones. Step 3 refreshes nothing, step 4 does."""

_MARK = "peak memory: "


def in_its_own_process(script: str, words: Sequence[str]) -> dict[str, float]:
    """Run ``script`` with ``words``, which make it call ``measure_here``; what it printed comes back.

    Raises:
        RuntimeError: The process failed.
    """
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"peak memory: {(done.stderr.strip().splitlines() or ['no result'])[-1]}")
    return json.loads(lines[-1].removeprefix(_MARK))


def measure_here(training: Training) -> None:
    """Take steps and print the peaks, in MiB."""
    for _ in range(FIRST_STEPS):
        training.step()
    found: dict[str, Any] = {name: round(_peak(training), 2) for name in ("ordinary_step", "refresh_step")}
    found["lasting"] = round(training.lasting_bytes() / 2**20, 2)
    print(_MARK + json.dumps(found))


def _peak(training: Training) -> float:
    training.forget_gradients()
    gc.collect()
    buffers.clear()
    ctypes.CDLL(None).malloc_trim(0)
    resting = _kibibytes("VmRSS")
    CLEAR.write_text("5")  # the highest resident size begins anew
    training.step()
    return (_kibibytes("VmHWM") - resting) / 2**10


def _kibibytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])
