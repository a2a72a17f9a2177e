"""Plots of what the GPU benchmarks measured, one PNG beside each result file (needs matplotlib).

Of ``gpu_kernels.py``: each way's share of the measured peak against the size of the work, one panel for each
contraction. Of ``gpu_train_step.py``: the time of a step in each precision as a multiple of that of INT8.

    python benchmarks/gpu_plots.py
    python benchmarks/gpu_plots.py results/gpu_kernels.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_kernels import work_of
from records import RESULTS

FILES = ("gpu_kernels.json", "gpu_train_step.json")
Point = tuple[float, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help=f"default: those of {', '.join(FILES)} that there are")
    options = parser.parse_args(argv)
    files = options.files or [RESULTS / name for name in FILES if (RESULTS / name).exists()]
    for file in files:
        record = json.loads(file.read_text())
        if record.get("dry_run") or not record["summary"]:
            parser.error(f"{file} has no times: it is of a dry run, or empty")
        draw = _draw_steps if "network" in record["runs"][0] else _draw_kernels
        draw(record, file.with_suffix(".png"))
        print(f"written to {file.with_suffix('.png')}")
    return 0


def shares(record: dict[str, Any]) -> dict[str, dict[str, list[Point]]]:
    """By kind and contraction, then by way: (work, share of the measured peak), by size; the newest of each shape."""
    panels: dict[str, dict[str, dict[str, Point]]] = {}
    for run in record["runs"]:
        panel = panels.setdefault(f"{run['kind']} {run['contraction']}", {})
        label = f"{run['kind']} {run['contraction']} {tuple(run['shape'])}"
        for way, share in record["summary"][label]["share_of_measured_peak"].items():
            panel.setdefault(way, {})[label] = (work_of(run["kind"], run["shape"]), share)
    return {name: {way: sorted(points.values()) for way, points in ways.items()} for name, ways in panels.items()}


def ratios(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By network, then by precision: time of a step over that of INT8."""
    names = {
        network: {k.removesuffix(" / int8"): v for k, v in of.items()} for network, of in record["summary"].items()
    }
    return {network: {"int8": 1.0, **of} for network, of in names.items()}


def _draw_kernels(record: dict[str, Any], path: Path) -> None:
    pyplot = _pyplot()
    panels = shares(record)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.5 * rows), squeeze=False)
    for place, (name, ways) in zip(axes.flat, panels.items(), strict=False):
        for way, points in ways.items():
            place.plot(*zip(*points, strict=True), marker="o", label=way)
        unit = "bytes" if name.startswith("quantize") else "operations"
        place.set(title=name, xscale="log", xlabel=unit, ylabel="share of measured peak", ylim=(0, None))
        place.legend(fontsize="x-small")
    for place in list(axes.flat)[len(panels) :]:
        place.remove()
    _save(figure, record, path)


def _draw_steps(record: dict[str, Any], path: Path) -> None:
    pyplot = _pyplot()
    networks = ratios(record)
    precisions = list(dict.fromkeys(p for of in networks.values() for p in of))
    figure, axes = pyplot.subplots(figsize=(2 + 2.5 * len(networks), 4))
    width = 0.8 / len(precisions)
    for i, precision in enumerate(precisions):
        known = [(n + i * width, of[precision]) for n, of in enumerate(networks.values()) if precision in of]
        axes.bar(*zip(*known, strict=True), width, label=precision)
    middle = 0.4 - width / 2
    axes.set_xticks([n + middle for n in range(len(networks))], list(networks))
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(ylabel="time of a step, INT8 = 1 (more is slower)")
    axes.legend(fontsize="small")
    _save(figure, record, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, record: dict[str, Any], path: Path) -> None:
    figure.suptitle(record["machine"]["device"])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
