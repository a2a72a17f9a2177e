"""Time and peak memory of a whole training step on the CPU: INT8 against float32, bfloat16 and torchao's INT8.

A step is zero_grad, forward, loss, backward, and SGD with momentum and ``fused=True``, the same in every column. All
columns take their steps in turn, round after round, in one process; medians and minima of process time (all threads
together) and of wall time are kept. INT8 is checked before it is timed: its first loss must be near that of float32,
and its contractions as many as autograd asks for. Steps that refresh clip values (0, 1, 2, 4, 8, ... and each multiple
of ``--refresh``) are timed apart; rules with an interval of their own keep it. Peak memory is that of step 3, which
refreshes nothing, with what lasts from step to step. Networks are those of torchvision and timm, and "small/resnet8"
needs neither.

    python benchmarks/train_step.py --model resnet18 --threads 1 2
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from records import RESULTS, add_run, machine, open_record, origin
from step_breakdown import breakdown
from step_columns import Column, Training, all_columns, batch_of, network
from step_memory import in_its_own_process, measure_here

from lightning_int8 import gemm_counts, recipes
from lightning_int8.rewrite import layer_states
from lightning_int8.vision.required import Contractions, contractions_of_one_step, mismatches

LOSS_LIMIT = 0.1
"""Largest relative difference of the loss of the first step to that of float32."""

BREAKDOWN_STEPS = 3

CANNOT_RUN = (ImportError, TypeError, RuntimeError, AttributeError)
"""What a column may fail with; it is then left out, with the reason."""

Times = dict[str, list[tuple[float, float]]]
"""By column: process and wall seconds of each step."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, or 2 for an error of the user."""
    options = _parser().parse_args(argv)
    try:
        columns = _chosen(all_columns(options.recipes, options.compile), options.columns)
        if options.memory_of:
            torch.set_num_threads(options.threads[0])
            (column,) = _chosen(columns, [options.memory_of])
            batch = batch_of(options.size, options.batch_size)
            measure_here(Training(column, network(options.model[0]), batch, options.refresh))
            return 0
        machine_ = {name: value for name, value in machine().items() if name != "threads"}
        open_record(options.output, {"machine": machine_, "refresh": options.refresh})
        for name in options.model:
            record = _run(name, columns, options)
    except ValueError as error:
        print(f"train_step.py: error: {error}", file=sys.stderr)
        return 2
    print(f"written to {options.output}")
    try:
        print(f"drawn to {plot(record['summary'], options.output.with_suffix('.png'))}")
    except ImportError:
        print("not drawn: matplotlib is not installed")
    return 0


def _run(name: str, columns: Sequence[Column], options: argparse.Namespace) -> dict[str, Any]:
    """All that is measured of one network; the record with it comes back."""
    memory: dict[str, Any] = {}
    for column in columns if options.memory else ():
        words = ["--model", name, "--memory-of", column.name, "--recipes", *options.recipes]
        words += ["--compile"] if column.compiled else []
        for option in ("batch_size", "size", "refresh"):
            words += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
        try:
            memory[column.name] = in_its_own_process(__file__, [*words, "--threads", str(options.threads[0])])
        except RuntimeError as error:
            memory[column.name] = {"without": str(error)}
    for threads in options.threads:
        torch.set_num_threads(threads)
        entry = measure(name, columns, options) | {"memory_mib": memory} | origin()
        record = add_run(options.output, entry, summarise)
        print(describe(entry, record["summary"][_title(entry)]), flush=True)
    return record


def measure(name: str, columns: Sequence[Column], options: argparse.Namespace) -> dict[str, Any]:
    """Check and time the columns of one network."""
    load, model, batch = os.getloadavg()[0], network(name), batch_of(options.size, options.batch_size)
    try:
        required = contractions_of_one_step(model, batch[0][:2])
    except RuntimeError as error:
        raise ValueError(f"{name} cannot be trained on images of {options.size} x {options.size}: {error}") from error
    truth = _first_loss(Training(Column(name="float32"), model, batch, options.refresh))
    trainings: dict[str, Training] = {}
    first, without = {}, {}
    for column in columns:
        try:
            start = time.perf_counter()
            training = Training(column, model, batch, options.refresh)
            check(training, _first_loss(training), truth, required)
            first[column.name] = round(time.perf_counter() - start, 3)
            trainings[column.name] = training
        except CANNOT_RUN as error:
            without[column.name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    ordinary, refreshing = timed(trainings, options.rounds)
    int8 = {column: training for column, training in trainings.items() if training.column.recipe}
    return {
        "model": name,
        "batch_size": options.batch_size,
        "size": options.size,
        "threads": torch.get_num_threads(),
        "refresh": options.refresh,
        "load_before": round(load, 2),
        "first_step_seconds": first,
        "milliseconds": {column: entry_of(times) for column, times in ordinary.items()},
        "milliseconds_refreshing": {column: entry_of(times) for column, times in refreshing.items() if column in int8},
        "milliseconds_by_operation": {column: breakdown(t, BREAKDOWN_STEPS) for column, t in int8.items()},
        "float_layers": {
            column: {s.name: s.kept_float for s in layer_states(t.model) if s.kept_float} for column, t in int8.items()
        },
        "without": without,
    }


def check(training: Training, loss: float, truth: float, required: Contractions) -> None:
    """Refuse a column whose first step was wrong.

    Raises:
        RuntimeError: The loss is far from that of float32, or contractions are missing.
    """
    if not abs(loss - truth) <= LOSS_LIMIT * abs(truth):
        raise RuntimeError(f"the first loss is {loss:.4f}, that of float32 {truth:.4f}: it is not timed")
    if training.column.recipe:
        wrong = mismatches(gemm_counts(training.model), required, recipes.get(training.column.recipe))
        if wrong:
            raise RuntimeError(f"{'; '.join(wrong)}: it is not timed")


def timed(trainings: dict[str, Training], rounds: int) -> tuple[Times, Times]:
    """Steps in turn, until ``rounds`` of them refreshed nothing; then those that refreshed."""
    ordinary: Times = {name: [] for name in trainings}
    refreshing: Times = {name: [] for name in trainings}
    names = list(trainings)
    while min(map(len, ordinary.values())) < rounds:
        for name in names:
            training = trainings[name]
            times = refreshing if training.refreshes else ordinary
            process, wall = time.process_time(), time.perf_counter()
            training.step()
            times[name].append((time.process_time() - process, time.perf_counter() - wall))
        names = names[1:] + names[:1]  # nobody always runs after the same one
    return ordinary, refreshing


def entry_of(times: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Number, medians and minima of steps, in milliseconds."""
    entry: dict[str, Any] = {"steps": len(times)}
    for kind, seconds in zip(("process", "wall"), zip(*times, strict=True), strict=False):
        milliseconds = [1e3 * s for s in seconds]
        entry[kind] = {"median": round(statistics.median(milliseconds), 3), "minimum": round(min(milliseconds), 3)}
    return entry


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many times as fast as float32 and bfloat16 each column is, for the newest run of each network."""
    summary = {}
    for run in runs:
        steps, ratios = run["milliseconds"], {}
        for base in ("float32", "bfloat16"):
            for column in steps if base in steps else ():
                ratios[f"{base} / {column}"] = {
                    f"{clock} {figure}": round(steps[base][clock][figure] / steps[column][clock][figure], 3)
                    for clock in ("process", "wall")
                    for figure in ("median", "minimum")
                }
        summary[_title(run)] = {"ratios": ratios, "refreshing": _shares(run), "memory": _memory_ratios(run)}
    return summary


def _shares(run: dict[str, Any]) -> dict[str, float]:
    """How much of a long training refreshes add, with one of them in every ``--refresh`` steps."""
    shares = {}
    for column, times in run["milliseconds_refreshing"].items():
        ordinary = run["milliseconds"][column]["process"]["median"]
        if times["steps"]:
            shares[column] = round((times["process"]["median"] - ordinary) / (run["refresh"] * ordinary), 4)
    return shares


def _memory_ratios(run: dict[str, Any]) -> dict[str, float]:
    """Peak of an ordinary step, with what lasts from step to step, over that of float32."""
    peaks = {c: m["ordinary_step"] + m["lasting"] for c, m in run["memory_mib"].items() if "lasting" in m}
    return {c: round(peak / peaks["float32"], 3) for c, peak in peaks.items() if "float32" in peaks}


def describe(entry: dict[str, Any], summary: dict[str, Any]) -> str:
    """A table for a person to read."""
    lines = [f"\n{_title(entry)}", f"{'':<28}{'process ms':>12}{'least':>10}{'wall ms':>10}  times float32"]
    for column, steps in entry["milliseconds"].items():
        ratio = summary["ratios"].get(f"float32 / {column}", {}).get("process median")
        share, memory = summary["refreshing"].get(column), summary["memory"].get(column)
        cells = f"{steps['process']['median']:12.1f}{steps['process']['minimum']:10.1f}{steps['wall']['median']:10.1f}"
        line = f"{column:<28}{cells}  {'' if ratio is None else f'{ratio:.2f}'}"
        line += "" if share is None else f", refreshes {share:+.1%}"
        lines.append(line + ("" if memory is None else f", memory {memory:.2f}"))
        if parts := entry["milliseconds_by_operation"].get(column):
            total = parts["total"]
            lines.append("    " + ", ".join(f"{n} {v / total:.0%}" for n, v in parts.items() if n != "total"))
        if kept := entry["float_layers"].get(column):
            lines.append(f"    {len(kept)} layers in float")
    lines += [f"without {column}: {why}" for column, why in entry["without"].items()]
    memory = {c: m["without"] for c, m in entry["memory_mib"].items() if "without" in m and c not in entry["without"]}
    lines += [f"{column}: {why}" for column, why in memory.items()]
    return "\n".join(lines)


def plot(summary: dict[str, Any], path: Path) -> Path:
    """Draw how many times as fast as float32 each column is (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(len(summary), 1, figsize=(8, 3 * len(summary)), squeeze=False)
    for axes, (title, entry) in zip(grid[:, 0], summary.items(), strict=True):
        bars = {k.partition(" / ")[2]: v for k, v in entry["ratios"].items() if k.startswith("float32 / ")}
        axes.barh(list(bars), [v["process median"] for v in bars.values()])
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="times as fast as float32, process time, median")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path


def _first_loss(training: Training) -> float:
    torch.manual_seed(1)  # of dropout
    return float(training.step())


def _title(entry: dict[str, Any]) -> str:
    threads = "1 thread" if entry["threads"] == 1 else f"{entry['threads']} threads"
    return f"{entry['model']}, {entry['size']} x {entry['size']}, batch {entry['batch_size']}, {threads}"


def _chosen(columns: Sequence[Column], names: Sequence[str] | None) -> list[Column]:
    known = [column.name for column in columns]
    if unknown := sorted(set(names or ()) - set(known)):
        raise ValueError(f"columns: {', '.join(unknown)}: not among {', '.join(known)}")
    return [column for column in columns if not names or column.name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", default=["resnet18"], help="of torchvision or timm (also timm/NAME), or small/resnet8")
    add("--batch-size", type=int, default=16)
    add("--size", type=int, default=224, help="height and width of the images")
    add("--threads", type=int, nargs="+", default=[1, 2])
    add("--rounds", type=int, default=15, help="timed steps of each column that refresh nothing")
    add("--refresh", type=int, default=100, help="steps between refreshes of clip values")
    add("--recipes", nargs="+", default=recipes.names(), help="the first one also unfused and with layers='auto'")
    add("--compile", action="store_true", help="float32 and bfloat16 by torch.compile, too")
    add("--columns", nargs="+", metavar="NAME", help='only these, as "int8 default"')
    add("--no-memory", dest="memory", action="store_false", help="leave out the processes that measure peak memory")
    add("--memory-of", metavar="NAME", help=argparse.SUPPRESS)
    add("--output", type=Path, default=RESULTS / "train_step.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
