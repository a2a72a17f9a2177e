"""Speed of each route through a contraction against float32 and bfloat16, layer by layer, on the CPU.

Every route is checked before it is timed: its result must be that of the ``reference`` backend, to the bit. All that is
compared for a layer runs in turn, round after round, in one process; medians and quartiles are written. The limit is
that of the vector unit: how much faster than the fastest float32 convolution of all layers INT8 can be, 4 times where
one instruction multiplies 64 pairs of bytes (VNNI) and 16 pairs of floats.

    python benchmarks/contractions.py --layers resnet8 --rounds 21
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accuracy import machine
from torch import Tensor

from lightning_int8 import backends
from lightning_int8.backends import int_matmul
from lightning_int8.backends.cpu.route import Scales
from lightning_int8.backends.onednn import OneDNN
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import Plane
from lightning_int8.spec import CONTRACTIONS

RESULTS = Path(__file__).parent / "results"
VECTOR_UNIT_GAIN = 4.0


class Layer(NamedTuple):
    """A square convolution: batch, channels, size of the input, kernel, stride, groups; padding keeps the size."""

    batch: int
    inputs: int
    outputs: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def geometry(self) -> ConvGeometry:
        """The convolution."""
        padding = (self.kernel // 2, self.kernel // 2)
        return ConvGeometry(
            input_size=(self.size,) * 2,
            kernel_size=(self.kernel,) * 2,
            stride=(self.stride,) * 2,
            padding=(padding, padding),
            dilation=(1, 1),
            groups=self.groups,
        )

    @property
    def operations(self) -> int:
        """Multiplications and additions that a contraction needs."""
        positions = self.batch * self.geometry.output_size[0] ** 2
        return 2 * positions * self.outputs * self.inputs // self.groups * self.kernel**2


LAYERS = {
    "resnet18": [  # images of 224 x 224, batch 16
        Layer(16, 3, 64, 224, 7, 2),
        Layer(16, 64, 64, 56, 3),
        Layer(16, 64, 128, 56, 3, 2),
        Layer(16, 64, 128, 56, 1, 2),
        Layer(16, 128, 128, 28, 3),
        Layer(16, 128, 256, 28, 3, 2),
        Layer(16, 256, 256, 14, 3),
        Layer(16, 256, 512, 14, 3, 2),
        Layer(16, 512, 512, 7, 3),
    ],
    "resnet8": [  # images of 28 x 28, batch 128
        Layer(128, 1, 16, 28, 3),
        Layer(128, 16, 16, 28, 3),
        Layer(128, 16, 32, 28, 3, 2),
        Layer(128, 16, 32, 28, 1, 2),
        Layer(128, 32, 32, 14, 3),
        Layer(128, 32, 64, 14, 3, 2),
        Layer(128, 64, 64, 7, 3),
    ],
    "mobilenetv2": [  # its depthwise layers, images of 28 x 28, batch 32
        Layer(32, 96, 96, 28, 3, 1, 96),
        Layer(32, 144, 144, 28, 3, 2, 144),
        Layer(32, 192, 192, 14, 3, 1, 192),
        Layer(32, 576, 576, 14, 3, 2, 576),
        Layer(32, 960, 960, 7, 3, 1, 960),
    ],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "contractions.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "load_before": os.getloadavg()[0]}
    record["layers"] = [
        measure(network, layer, contraction, options.rounds)
        for network in options.layers
        for layer in LAYERS[network]
        for contraction in CONTRACTIONS
    ]
    fastest_float = max(entry["gflops"]["float32"] for entry in record["layers"])
    record["vector_unit_limit_gflops"] = round(VECTOR_UNIT_GAIN * fastest_float, 1)
    record["load_after"] = os.getloadavg()[0]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = options.output.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(unfinished, options.output)
    print(f"limit of the vector unit: {record['vector_unit_limit_gflops']} GFLOP/s\nwritten to {options.output}")
    return 0


def measure(network: str, layer: Layer, contraction: str, rounds: int) -> dict[str, Any]:
    """Check and time all ways through one contraction of one layer."""
    torch.manual_seed(0)
    ways = int8_ways(layer, contraction) | {
        "float32": float_way(layer, contraction, torch.float32),
        "bfloat16": float_way(layer, contraction, torch.bfloat16),
    }
    times = interleaved(ways, rounds)
    milliseconds = {name: [round(t * 1e3, 4) for t in statistics.quantiles(of, n=4)] for name, of in times.items()}
    gflops = {name: round(layer.operations / statistics.median(of) / 1e9, 1) for name, of in times.items()}
    best = max((name for name in ways if name not in ("float32", "bfloat16")), key=gflops.__getitem__)
    print(
        f"{network} {contraction:<11} {tuple(layer)!s:<34} "
        + "  ".join(f"{name} {rate:.0f}" for name, rate in gflops.items())
        + f"  GFLOP/s; {best}: {gflops[best] / gflops['float32']:.2f} x float32",
        flush=True,
    )
    return {
        "network": network,
        "layer": layer._asdict(),
        "contraction": contraction,
        "gflops": gflops,
        "milliseconds_quartiles": milliseconds,
        "fastest": best,
    }


def int8_ways(layer: Layer, contraction: str) -> dict[str, Callable[[], Tensor]]:
    """Every route that computes this contraction: packing and epilogue included, quantization not."""
    geometry = layer.geometry
    x = plane(layer.batch, *geometry.input_size, layer.inputs)
    w = plane(layer.outputs, *geometry.kernel_size, layer.inputs // layer.groups)
    g = plane(layer.batch, *geometry.output_size, layer.outputs)
    a, b = {"output": (x, w), "grad_input": (g, w), "grad_weight": (g, x)}[contraction]
    scales = None if contraction == "grad_weight" else Scales(torch.tensor(0.37), torch.tensor(0.73))
    backend = OneDNN(int_matmul.exact_matmul())
    routes = [r for r in backend.routes if r.supports(contraction, a, b, geometry, scales is not None)]
    expected = backends.load("reference").accumulate(contraction, a, b, geometry)
    if scales is not None:
        expected = expected.to(torch.float32) * scales.left * scales.right

    def way(route: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            return route.run(contraction, a, b, geometry, scales)

        if not torch.equal(run().to(expected.dtype), expected):
            raise RuntimeError(f"route {route.name!r} is not exact for {contraction} of {layer}")
        return run

    return {route.name: way(route) for route in routes}


def float_way(layer: Layer, contraction: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Torch's own convolution, channels last."""
    geometry, groups = layer.geometry, layer.groups

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype=dtype, memory_format=torch.channels_last)

    x = random(layer.batch, layer.inputs, *geometry.input_size)
    w = random(layer.outputs, layer.inputs // groups, *geometry.kernel_size)
    g = random(layer.batch, layer.outputs, *geometry.output_size)
    windows = (geometry.stride, [lo for lo, _ in geometry.padding], geometry.dilation)
    if contraction == "output":
        return lambda: torch.ops.aten.convolution(x, w, None, *windows, False, [0, 0], groups)
    mask = [contraction == "grad_input", contraction == "grad_weight", False]
    index = 0 if mask[0] else 1
    arguments = (g, x, w, None, *windows, False, [0, 0], groups, mask)
    return lambda: torch.ops.aten.convolution_backward(*arguments)[index]


def plane(*shape: int) -> Plane:
    """Random int8 values of the whole range."""
    return Plane(torch.randint(-127, 128, shape, dtype=torch.int8), torch.ones(()))


def interleaved(ways: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, one run of each per round; two rounds to warm up are left out."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    sys.exit(main())
