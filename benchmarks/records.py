"""Result files of the benchmarks: what was measured, on what, with what; finished runs are never lost."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch

from lightning_int8.version import __version__

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return what a time depends on besides the settings: device, threads and versions."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "lightning_int8": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }


def open_record(path: Path, described: dict[str, Any]) -> dict[str, Any]:
    """Return the file's record if it was made as ``described``, a new one in a new file if there is none.

    Args:
        path: The JSON file; several processes may add their runs to it.
        described: What all runs of the file have in common, machine included.

    Raises:
        ValueError: The file was made otherwise.
    """
    with _locked(path):
        if not path.exists():
            _write(path, {**described, "runs": [], "summary": {}})
        record = json.loads(path.read_text())
    for key, value in described.items():
        if record.get(key) != value:
            raise ValueError(f"{path} has {key} {record.get(key)}, this run {value}: give another --output")
    return record


def add_run(
    path: Path, entry: dict[str, Any], summarise: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
) -> dict[str, Any]:
    """Add a finished run to the file and return its record."""
    with _locked(path):
        record = json.loads(path.read_text())
        record["runs"].append(entry)
        record["summary"] = summarise(record["runs"])
        _write(path, record)
    return record


def origin() -> dict[str, Any]:
    """Return when, from which commit and by which command a run was made."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": _command(),
    }


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    with open(lock, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    lock.unlink(missing_ok=True)


def _write(path: Path, record: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(unfinished, path)


def _command() -> str:
    """Return the command line, without the folder of the images: it lies elsewhere on another machine."""
    words = ["python", *sys.argv]
    if "--root" in words:
        words[words.index("--root") + 1] = "DIR"
    return shlex.join(words)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
