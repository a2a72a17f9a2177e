"""Time of the passes that turn floats into INT8 planes on the CPU, beside a contraction that reads as many of them.

Passes quantize what lies between two convolutions of a residual network, as it lies in memory or computed on the way:
an activation behind batch norm and ReLU, a gradient before both. Each is checked before it is timed: its planes must be
those of ``numerics.quantize`` of the values. All ways run in turn, round after round; medians of wall time are written.

    python benchmarks/quantization.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from math import nan
from pathlib import Path
from typing import Any

import torch
from contractions import Layer, int8_ways, interleaved
from records import RESULTS, add_run, machine, open_record, origin
from torch import Tensor

from lightning_int8 import backends, numerics
from lightning_int8.backends.cpu.expression import Expression, Mask, Term
from lightning_int8.spec import OperandSpec

CHANNELS = 64
CLIP_VALUE = torch.tensor(3.0)
KEY = torch.tensor([1, 2, 3])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=56, help="height and width")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", type=Path, default=RESULTS / "quantization.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = (options.batch_size, options.size, options.size, CHANNELS)
    ways: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        ways |= {f"{name}, {str(dtype).removeprefix('torch.')}": way for name, way in passes(shape, dtype).items()}
    layer = Layer(options.batch_size, CHANNELS, CHANNELS, options.size, 3)
    routes = int8_ways(layer, "output")
    ways |= {f"contraction, {name}": routes[name] for name in ("implicit", "direct") if name in routes}
    times = interleaved(ways, options.rounds)
    milliseconds = {name: round(1e3 * statistics.median(own), 3) for name, own in times.items()}
    open_record(options.output, {"machine": machine()})
    entry = {"elements": torch.Size(shape).numel(), "rounds": options.rounds, "milliseconds": milliseconds} | origin()
    add_run(options.output, entry, lambda runs: runs[-1]["milliseconds"])
    for name, value in milliseconds.items():
        print(f"{name:<56}{value:8.3f} ms")
    print(f"written to {options.output}")
    return 0


def passes(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """What quantizes tensors of this shape and dtype, each way checked."""
    x, y = (torch.randn(shape).to(dtype) for _ in range(2))
    factor, offset = torch.rand(CHANNELS) + 0.5, torch.randn(CHANNELS)
    mask = Mask()
    Expression((Term(y, factor),), offset).rectify(mask, nan).values()
    expressions: dict[str, tuple[str, Callable[[], Expression]]] = {
        "to nearest": ("nearest", lambda: Expression((Term(x),))),
        "stochastic": ("stochastic", lambda: Expression((Term(x),))),
        "batch norm and ReLU, to nearest": (
            "nearest",
            lambda: Expression((Term(y, factor),), offset).rectify(Mask(), nan),
        ),
        "their gradient, stochastic": (
            "stochastic",
            lambda: Expression((Term(x, factor, mask), Term(y, offset)), offset),
        ),
    }
    return {name: _checked(*how) for name, how in expressions.items()}


def _checked(rounding: str, make: Callable[[], Expression]) -> Callable[[], Any]:
    spec, backend = OperandSpec(rounding=rounding), backends.load("onednn")

    def run() -> Any:
        made = make()
        source: Tensor | Expression = made.terms[0].values if made.is_plain else made
        return backend.quantize(source, CLIP_VALUE, spec, None, KEY)

    twin = make()
    wide = Expression(
        tuple(Term(t.values.float(), t.factor, t.mask) for t in twin.terms), twin.offset, twin.rectified, twin.upper
    )
    stochastic = rounding == "stochastic"
    expected = numerics.quantize(wide.values(), CLIP_VALUE, stochastic=stochastic, key=KEY if stochastic else None)
    if not torch.equal(run().planes[0].data, expected.planes[0].data):
        raise RuntimeError(f"the planes of {twin.terms} are not those of the definition")
    return run


if __name__ == "__main__":
    sys.exit(main())
