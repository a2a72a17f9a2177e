"""What the compiler made of a kernel: registers, spills, and how many instructions of the INT8 units."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lightning_int8.kernels.build import OPTIONS, headers, read_source
from lightning_int8.kernels.device import Program
from lightning_int8.kernels.nvrtc import Nvrtc

_DISASSEMBLER = "nvidia/cu13/bin/nvdisasm"
"""Where the wheel ``nvidia-cuda-nvdisasm`` puts it."""

_LOG = re.compile(
    r"Compiling entry function '(?P<entry>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)
_SECTION = re.compile(r"^\s*\.text\.(\w+):", re.M)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_INT8_MACHINE = re.compile(r"^(IMMA|IGMMA|IDP)\.")
_PTX_ENTRY = re.compile(r"\.entry (\w+)\(")
_INT8_PTX = re.compile(r"\b(?:mma\.sync\S*\.s32\.s8\.s8\.s32|wgmma\S*\.s32\.s8\.s8|dp4a\.s32\.s32)")


@dataclass(frozen=True)
class KernelReport:
    """One kernel of a program.

    Attributes:
        entry: Its name.
        registers: Of a thread.
        spill_bytes: Stored to and loaded from local memory because registers ran out; and the stack frame.
        int8_instructions: Count of each instruction of the INT8 units.
        counted_in: "machine code", or "PTX" where no disassembler reads the architecture.
    """

    entry: str
    registers: int
    spill_bytes: int
    int8_instructions: dict[str, int]
    counted_in: str


def report(program: Program, arch: str, compiler: Nvrtc) -> list[KernelReport]:
    """Compile a program and look at each of its kernels.

    Args:
        program: Source and definitions.
        arch: Architecture such as "sm_80".
        compiler: Version that knows the architecture.
    """
    source, options = read_source(program.source), (*OPTIONS, *program.options)
    made = compiler.compile(source, program.source, headers(), arch, (*options, "--ptxas-options=-v"))
    text = disassemble(made.image)
    if text is None:
        ptx = compiler.compile(source, program.source, headers(), arch.replace("sm_", "compute_"), options, ptx=True)
        counts, counted_in = count_ptx(ptx.image.decode()), "PTX"
    else:
        counts, counted_in = count_machine_code(text), "machine code"
    found = [m.groupdict() for m in _LOG.finditer(made.log)]
    return [
        KernelReport(
            f["entry"],
            int(f["registers"]),
            int(f["stack"]) + int(f["stores"]) + int(f["loads"]),
            dict(counts.get(f["entry"], {})),
            counted_in,
        )
        for f in sorted(found, key=lambda f: f["entry"])
    ]


def disassembler() -> str | None:
    """Path of ``nvdisasm``, None where it is not installed."""
    places = [str(Path(folder) / _DISASSEMBLER) for folder in sys.path]
    return next((p for p in places if Path(p).exists()), None) or shutil.which("nvdisasm")


def disassemble(image: bytes) -> str | None:
    """Assembly of a cubin; None where there is no disassembler, or it does not read the architecture."""
    program = disassembler()
    if program is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        done = subprocess.run([program, "-c", file.name], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def count_machine_code(text: str) -> dict[str, Counter[str]]:
    """INT8 instructions of each kernel in a disassembly."""
    pieces = _SECTION.split(text)
    counts: dict[str, Counter[str]] = {}
    for entry, body in zip(pieces[1::2], pieces[2::2], strict=True):
        counts[entry] = Counter(op for op in _INSTRUCTION.findall(body) if _INT8_MACHINE.match(op))
    return counts


def count_ptx(text: str) -> dict[str, Counter[str]]:
    """INT8 instructions of each kernel in PTX; loops are unrolled there already."""
    pieces = _PTX_ENTRY.split(text)
    return {entry: Counter(_INT8_PTX.findall(body)) for entry, body in zip(pieces[1::2], pieces[2::2], strict=True)}
