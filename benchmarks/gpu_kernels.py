"""Speed of the CUDA kernels: products, convolutions and quantization, against what torch has for the same work.

python benchmarks/gpu_kernels.py
python benchmarks/gpu_kernels.py --dry-run        # the smallest shapes on the emulated machine, nothing is timed
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contractions import Layer
from gpu_timing import Target, check_close, check_equal, tf32
from records import RESULTS, add_run, open_record, origin
from torch import Tensor

from lightning_int8 import backends
from lightning_int8.backends import Counts
from lightning_int8.numerics import Plane, Quantized
from lightning_int8.spec import CONTRACTIONS, OperandSpec

GEMMS = [(8192,) * 3, (4096,) * 3, (2048,) * 3, (1024,) * 3, (16384, 4096, 1024), (16384, 1024, 4096)]
"""Rows, outputs and inputs of Linear layers."""

RESNET50 = [
    Layer(256, 64, 64, 56, 1),
    Layer(256, 64, 64, 56, 3),
    Layer(256, 64, 256, 56, 1),
    Layer(256, 256, 64, 56, 1),
    Layer(256, 128, 128, 56, 3, 2),
    Layer(256, 128, 128, 28, 3),
    Layer(256, 128, 512, 28, 1),
    Layer(256, 512, 128, 28, 1),
    Layer(256, 256, 512, 56, 1, 2),
    Layer(256, 256, 256, 28, 3, 2),
    Layer(256, 256, 256, 14, 3),
    Layer(256, 256, 1024, 14, 1),
    Layer(256, 1024, 256, 14, 1),
    Layer(256, 512, 512, 14, 3, 2),
    Layer(256, 512, 512, 7, 3),
    Layer(256, 512, 2048, 7, 1),
    Layer(256, 2048, 512, 7, 1),
]
"""Its convolutions behind the stem, each kind once; images of 224 x 224."""

QUANTIZED = [(256 * 56 * 56, 64), (256 * 14 * 14, 1024), (16384, 4096)]
SMALLEST: dict[str, Any] = {"gemm": [(48, 40, 72)], "convolution": [Layer(2, 16, 16, 6, 3)], "quantize": [(40, 70)]}
FLOAT_LIMITS = {"bfloat16": 1e-2, "float32": 1e-5, "float32 TF32": 1e-3}
"""Largest relative error of a baseline; its operands are the same integers."""


class Way(NamedTuple):
    """One way to do the work: ``prepare`` makes operands on the device, ``run`` computes with them."""

    run: Callable[..., Tensor]
    limit: float | None
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    dtype: torch.dtype = torch.int8


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SMALLEST, default=list(SMALLEST))
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--dry-run", action="store_true", help="smallest shapes on the emulated machine, not timed")
    parser.add_argument("--output", type=Path, help="default: results/gpu_kernels.json; none in a dry run")
    options = parser.parse_args(argv)
    target = Target(options.dry_run)
    torch.manual_seed(0)
    output = options.output or (None if options.dry_run else RESULTS / "gpu_kernels.json")
    if output:
        open_record(output, target.described())
    shapes: dict[str, Any] = (
        SMALLEST if options.dry_run else {"gemm": GEMMS, "convolution": RESNET50, "quantize": QUANTIZED}
    )
    ceilings = target.ceilings(options.repeats)
    measures: dict[str, Any] = {"gemm": gemm, "convolution": convolution, "quantize": quantize}
    for kind in options.only:
        for shape in shapes[kind]:
            for entry in measures[kind](target, shape, options.repeats):
                entry |= {"kind": kind, "shape": list(shape), "ceilings": ceilings} | origin()
                if output:
                    add_run(output, entry, summarise)
                print(describe(entry), flush=True)
    print(f"written to {output}" if output else "nothing written")
    return 0


def gemm(target: Target, shape: tuple[int, int, int], repeats: int) -> Iterator[dict[str, Any]]:
    """The three contractions of a Linear layer."""
    rows, outputs, inputs = shape
    sizes = {"x": (rows, inputs), "w": (outputs, inputs), "g": (rows, outputs)}
    matrices: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        "output": lambda a, b: (a, b.t()),
        "grad_input": lambda a, b: (a, b),
        "grad_weight": lambda a, b: (a.t(), b),
    }
    for contraction, names in zip(CONTRACTIONS, ("xw", "gw", "gx"), strict=True):
        turn = matrices[contraction]

        def product(a: Tensor, b: Tensor, turn: Any = turn) -> Tensor:
            return torch.matmul(*turn(a, b))

        def library(a: Tensor, b: Tensor, turn: Any = turn) -> Tensor:
            return torch._int_mm(*turn(a, b))

        ways = own_ways(target, contraction, None) | {"torch._int_mm": Way(library, 0.0)} | float_ways(product)
        operands = [sizes[name] for name in names]
        yield measure(target, contraction, None, operands, ways, repeats, 2 * rows * outputs * inputs)


def convolution(target: Target, layer: Layer, repeats: int) -> Iterator[dict[str, Any]]:
    """The three contractions of a convolution."""
    geometry = layer.geometry
    x = (layer.batch, *geometry.input_size, layer.inputs)
    w = (layer.outputs, *geometry.kernel_size, layer.inputs // layer.groups)
    g = (layer.batch, *geometry.output_size, layer.outputs)
    windows = (geometry.stride, [lo for lo, _ in geometry.padding], geometry.dilation, False, [0, 0], layer.groups)
    for contraction, operands in zip(CONTRACTIONS, ([x, w], [g, w], [g, x]), strict=True):
        other = torch.empty(x if contraction == "grad_input" else w, device="meta")

        def product(a: Tensor, b: Tensor, contraction: str = contraction, other: Tensor = other) -> Tensor:
            # The layout of the operands is that of channels_last: only the order of the axes' names changes.
            a, b = a.movedim(-1, 1), b.movedim(-1, 1)
            if contraction == "output":
                return torch.ops.aten.convolution(a, b, None, *windows).movedim(1, -1)
            absent = torch.empty_like(other, device=a.device, dtype=a.dtype).movedim(-1, 1)
            image, weight = (absent, b) if contraction == "grad_input" else (b, absent)
            mask = [contraction == "grad_input", contraction == "grad_weight", False]
            made = torch.ops.aten.convolution_backward(a, image, weight, None, *windows, mask)
            return made[0 if mask[0] else 1].movedim(1, -1)

        ways = own_ways(target, contraction, geometry) | float_ways(product)
        yield measure(target, contraction, geometry, operands, ways, repeats, layer.operations)


def own_ways(target: Target, contraction: str, geometry: Any) -> dict[str, Way]:
    """The backend of this package: the kernels that it chooses, and each family forced."""

    def way(family: str | None) -> Way:
        compute = getattr(target.backend(family), contraction)
        scale = torch.ones((), device=target.place)

        def run(a: Tensor, b: Tensor) -> Tensor:
            return compute(*(Quantized((Plane(t, scale),)) for t in (a, b)), geometry, Counts())

        return Way(run, None)

    return {"cupy": way(None)} | {f"cupy {family}": way(family) for family in target.families()}


def float_ways(product: Callable[..., Tensor]) -> dict[str, Way]:
    """The same product in torch's floating-point formats."""
    return {
        "bfloat16": Way(product, FLOAT_LIMITS["bfloat16"], dtype=torch.bfloat16),
        "float32": Way(product, FLOAT_LIMITS["float32"], partial(tf32, False), torch.float32),
        "float32 TF32": Way(product, FLOAT_LIMITS["float32 TF32"], partial(tf32, True), torch.float32),
    }


def measure(
    target: Target,
    contraction: str,
    geometry: Any,
    operands: Sequence[tuple[int, ...]],
    ways: dict[str, Way],
    repeats: int,
    operations: int,
) -> dict[str, Any]:
    """Check and time all ways through one contraction."""

    def pair() -> list[Tensor]:
        return [torch.randint(-127, 128, size, dtype=torch.int8, device=target.place) for size in operands]

    a, b = pair()
    one = torch.ones((), device=target.place)
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN may transform, and then float64 is not exact
        truth = backends.load("reference").accumulate(contraction, Plane(a, one), Plane(b, one), geometry)
    times, failures = {}, {}
    for name, way in ways.items():
        try:
            times[name] = _time(target, name, way, pair, (a, b), truth, repeats)
        except (RuntimeError, NotImplementedError) as error:
            if name.startswith("cupy"):
                raise
            failures[name] = str(error).partition("\n")[0]  # a baseline that cannot do this shape
    entry = {"contraction": contraction, "milliseconds_quartiles": times, "without": failures}
    return entry | {"tops": {n: round(operations / q[1] / 1e9, 2) for n, q in times.items() if q}}


def _time(
    target: Target, name: str, way: Way, pair: Any, first: tuple[Tensor, Tensor], truth: Tensor, repeats: int
) -> list[float] | None:
    with way.context():
        made = way.run(*(t.to(way.dtype) for t in first))
        if way.limit:
            check_close(name, made, truth, way.limit)
        else:
            check_equal(name, made, truth if made.dtype == torch.int32 else truth.to(torch.float32))
        size = sum(t.numel() for t in first) * way.dtype.itemsize
        sets = [[t.to(way.dtype) for t in pair()] for _ in range(target.sets(size))]
        return target.milliseconds([partial(way.run, *s) for s in sets], repeats)


def quantize(target: Target, shape: tuple[int, int], repeats: int) -> Iterator[dict[str, Any]]:
    """Float to one plane, by each rounding; the bytes are those of each input read and each output written once."""
    backend, truth, clip_value = target.backend(), backends.load("reference"), torch.tensor(3.0, device=target.place)
    key = torch.tensor([1, 0, 1])
    for rounding in ("nearest", "stochastic"):
        spec = OperandSpec(rounding=rounding)
        times, rates = {}, {}
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, device=target.place).to(dtype)
            expected = truth.quantize(x, clip_value, spec, None, key).planes[0].data
            name = str(dtype).removeprefix("torch.")
            check_equal(f"quantize {name}", backend.quantize(x, clip_value, spec, None, key).planes[0].data, expected)
            sets = [torch.randn(shape, device=target.place).to(dtype) for _ in range(target.sets(x.nbytes))]
            calls = [partial(backend.quantize, x, clip_value, spec, None, key) for x in sets]
            times[name] = quartiles = target.milliseconds(calls, repeats)
            if quartiles:
                rates[name] = round((x.nbytes + x.numel()) / quartiles[1] / 1e6, 1)
        yield {"contraction": rounding, "milliseconds_quartiles": times, "gb_per_s": rates}


def work_of(kind: str, shape: Sequence[int]) -> float:
    """How large the work of a shape is: operations of a product, bytes of a quantized float32 tensor."""
    if kind == "convolution":
        return Layer(*shape).operations
    return (2 if kind == "gemm" else 5) * math.prod(shape)


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The newest figures of each shape, as shares of the measured ceilings."""
    summary = {}
    for run in runs:
        label = f"{run['kind']} {run['contraction']} {tuple(run['shape'])}"
        ceilings = run["ceilings"]
        shares = {}
        for name, rate in run.get("tops", {}).items():
            unit = "int8_tops" if name.startswith(("cupy", "torch._int_mm")) else "bfloat16_tops"
            shares[name] = round(rate / ceilings[unit], 4)
        for name, rate in run.get("gb_per_s", {}).items():
            shares[name] = round(rate / ceilings["copy_gb_per_s"], 4)
        summary[label] = {"share_of_measured_peak": shares}
    return summary


def describe(entry: dict[str, Any]) -> str:
    """One line for a person to read."""
    head = f"{entry['kind']:<12}{entry['contraction']:<12}{tuple(entry['shape'])!s:<34}"
    rates, unit = (entry["tops"], "TOPS") if "tops" in entry else (entry["gb_per_s"], "GB/s")
    if not rates:
        return f"{head} checked: {', '.join(entry['milliseconds_quartiles'])}"
    return f"{head} " + "  ".join(f"{name} {rate:.0f}" for name, rate in rates.items()) + f" {unit}"


if __name__ == "__main__":
    sys.exit(main())
