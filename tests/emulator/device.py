"""The emulated machine as a `lightning_int8.kernels.device.Device`: launchers run on it as they run on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import lightning_int8.kernels
from emulator.module import Kernel, Machine, Module
from lightning_int8.kernels.device import Program

SOURCES = Path(lightning_int8.kernels.__file__).parent


class EmulatedDevice:
    """Runs the package's kernels on CPU tensors.

    Args:
        arch: Architecture that launchers choose variants for; the sources are compiled by g++ whatever it is.
        machine: Schedule and timing.
        multiprocessors: How many launchers should believe in.
        edits: ``{file: (old, new)}``: one replacement in a source or header, to plant a bug.
    """

    def __init__(
        self,
        arch: str = "sm_80",
        machine: Machine | None = None,
        multiprocessors: int = 1,
        edits: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.arch = arch
        self.multiprocessors = multiprocessors
        self.launches: list[str] = []
        self._machine = machine or Machine()
        self._edits = dict(edits or {})
        self._modules: dict[Program, Module] = {}

    def kernel(self, program: Program, entry: str) -> Kernel:
        """See ``Device.kernel``."""
        if program not in self._modules:
            headers = {name: self._text(name) for name in _headers()}
            source = self._text(program.source)
            self._modules[program] = Module(source, headers, program.options, self._machine, program.source)
        self.launches.append(entry)
        kernel = self._modules[program].get_function(entry)
        kernel.max_dynamic_shared_size_bytes = self._machine.shared_limit
        return kernel

    def _text(self, name: str) -> str:
        text = (SOURCES / name).read_text()
        if name in self._edits:
            old, new = self._edits[name]
            assert text.count(old) == 1, f"{name} has {text.count(old)} times: {old}"
            text = text.replace(old, new)
        return text


@functools.cache
def _headers() -> list[str]:
    return sorted(p.name for p in SOURCES.glob("*.cuh"))
