"""The console program ``lightning-int8``: one module of this folder per command."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from lightning_int8.version import __version__

COMMANDS = {
    "doctor": "show what is here, what will compute on each device and why, and what to install",
    "kernels": "compile every CUDA kernel, with no GPU, and show registers, spills and INT8 instructions",
    "train": "train a small network on real images, or your own module and data with --config",
}
"""Command and its line in the help. Module ``cli/COMMAND.py`` has ``main(arguments) -> int``, the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The words after the program's name; None takes them from ``sys.argv``.

    Returns:
        The exit code: 0, 1 where a check failed, 2 for an error of the user. A wrong option leaves through
        ``SystemExit(2)``, as argparse does it.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-int8",
        description="INT8 training for PyTorch Lightning.",
        epilog="commands:\n" + "\n".join(f"  {name:<10} {line}" for name, line in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below; COMMAND --help says more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of the command")
    parsed = parser.parse_args(argv)
    # Only the chosen command is imported: the program's own help must not wait for torch.
    return importlib.import_module(f"{__name__}.{parsed.command}").main(parsed.arguments)
