"""What timing found, remembered between processes in small JSON files of the user's cache directory."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

_FORMAT = 1
_MOST_ENTRIES = 4096


class ChoiceFile:
    """What was found by problem, such as the name of the fastest route, for this CPU and this torch.

    The file holds nothing that results depend on: whatever is wrong with it, it is read as empty, and where it cannot
    be written nothing is remembered. Processes may read and write it at the same time; each write replaces it whole, so
    what is lost at worst is an entry that the next process times again.

    Args:
        path: Where the file is; None for ``lightning_int8/`` under ``$XDG_CACHE_HOME`` or ``~/.cache``.
        name: Of the file in that folder.
    """

    def __init__(self, path: Path | None = None, name: str = "routes.json") -> None:
        self._given_path = path
        self._name = name
        self._entries: dict[str, str] | None = None

    @property
    def path(self) -> Path:
        """Where the file is."""
        if self._given_path is not None:
            return self._given_path
        folder = os.environ.get("XDG_CACHE_HOME")
        return (Path(folder) if folder else Path.home() / ".cache") / "lightning_int8" / self._name

    def get(self, problem: str) -> str | None:
        """What is remembered of ``problem``; the file is read once per process."""
        if self._entries is None:
            self._entries = self._read().get(machine(), {})
        return self._entries.get(problem)

    def put(self, problem: str, found: str) -> None:
        """Remember ``found`` for ``problem``."""
        machines = self._read()
        entries = {**machines.get(machine(), {}), problem: found}
        if len(entries) > _MOST_ENTRIES:
            entries = {problem: found}
        self._entries = machines[machine()] = entries
        with suppress(OSError):  # a read-only or full disk costs the next process its timings, nothing else
            self._write({"format": _FORMAT, "machines": machines})

    def _read(self) -> dict[str, dict[str, str]]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                return {}
            return {str(m): {str(k): str(v) for k, v in e.items()} for m, e in content["machines"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write(self, content: dict[str, object]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=0, sort_keys=True)
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise


@cache
def machine() -> str:
    """What timings depend on besides the problem: the CPU, the instructions that oneDNN may use, torch."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "all instructions"
    return f"{_cpu_model()} | {limit} | torch {torch.__version__}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
