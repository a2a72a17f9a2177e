"""``lightning-int8 kernels``: compile every CUDA kernel, with no GPU, and show what the compiler made of it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from lightning_int8.kernels.catalogue import Item, catalogue
from lightning_int8.kernels.machine_code import KernelReport, report
from lightning_int8.kernels.nvrtc import compiler_for

DEFAULT_ARCHITECTURES = "75,80,86,89,90a,100,120"
MOST_PROCESSES = 8
"""Each holds a compiler, half a gigabyte."""


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: The words after ``kernels``.

    Returns:
        0; 1 where a kernel spills registers; 2 where a compiler is missing or an architecture cannot be had.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-int8 kernels",
        description="Compile every CUDA kernel, with no GPU, and show registers, spills and INT8 instructions.",
    )
    parser.add_argument(
        "--arch",
        default=DEFAULT_ARCHITECTURES,
        metavar="N,N,...",
        help="compute capabilities without the dot, such as 61,75,90a (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    try:
        rows = list(compile_matrix([f"sm_{a.strip()}" for a in options.arch.split(",")]))
    except (RuntimeError, ValueError) as error:
        print(f"lightning-int8 kernels: {error}", file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    return int(any(row["spill_bytes"] for row in rows))


def compile_matrix(architectures: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row for each kernel of each program of each architecture.

    Args:
        architectures: Such as "sm_80".

    Yields:
        Architecture, program, entry point, registers of a thread, bytes spilled, dynamic shared memory of a block in
        bytes, and the count of each INT8 instruction.

    Raises:
        RuntimeError: No compiler for an architecture is installed.
        ValueError: An architecture has no INT8 product.
    """
    items = [(arch, item) for arch in architectures for item in catalogue(arch)]
    for arch in architectures:
        compiler_for(arch)
    # Processes: NVRTC compiles one program at a time, whatever the thread (13.0: two threads took as long as one).
    processes = min(MOST_PROCESSES, os.cpu_count() or 1, len(items))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        reports = pool.map(_report, items)
        for (arch, item), made in zip(items, reports, strict=True):
            for kernel in made:
                yield {
                    "arch": arch,
                    "program": item.label,
                    "entry": kernel.entry,
                    "registers": kernel.registers,
                    "spill_bytes": kernel.spill_bytes,
                    "shared_bytes": item.shared_bytes,
                    "int8_instructions": kernel.int8_instructions,
                    "counted_in": kernel.counted_in,
                }


def _report(job: tuple[str, Item]) -> list[KernelReport]:
    arch, item = job
    return report(item.program, arch, compiler_for(arch))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a person to read."""
    lines = [("arch", "program", "entry", "registers", "spills", "shared", "INT8 instructions")]
    for row in rows:
        counts = ", ".join(f"{n} {name}" for name, n in sorted(row["int8_instructions"].items()))
        source = f" ({row['counted_in']})" if counts and row["counted_in"] != "machine code" else ""
        numbers = (str(row[n]) for n in ("registers", "spill_bytes", "shared_bytes"))
        lines.append((row["arch"], row["program"], row["entry"], *numbers, counts + source))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
