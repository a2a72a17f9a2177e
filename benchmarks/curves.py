"""Training curves of a network that INT8 gradients are hard on, with and without each part of a method.

Trains every variant once per seed from the same weights on the same batches and writes the loss, averaged over windows
of steps, and the test accuracy at the end. Started again with the same settings it goes on where it was cut off;
several processes, with other seeds or variants each, may write one file. ``--plot`` draws what the file holds.

    python benchmarks/curves.py --data cifar10 --model mobilenetv2 --max-steps 600 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from records import RESULTS, add_run, machine, open_record, origin

from lightning_int8 import Int8Precision, Recipe, recipes
from lightning_int8.ranges.absmax import Rule as AbsMax
from lightning_int8.vision import experiment
from lightning_int8.vision.models import MODELS
from lightning_int8.vision.readers import READERS, ImageSet


def variants() -> dict[str, Recipe | None]:
    """The recipes by name; None is float32."""
    unified = recipes.get("unified")
    unclipped = dataclasses.replace(unified.grad_weight.lhs, range=AbsMax())
    without_clip = dataclasses.replace(
        unified,
        grad_input=dataclasses.replace(unified.grad_input, lhs=unclipped),
        grad_weight=dataclasses.replace(unified.grad_weight, lhs=unclipped),
    )
    return {
        "float": None,
        "absmax": dataclasses.replace(without_clip, learning_rate=None),
        "unified": unified,
        "unified without clip": without_clip,
        "unified without factor": dataclasses.replace(unified, learning_rate=None),
        "distribution_adaptive": recipes.get("distribution_adaptive"),
    }


class Curve(Callback):
    """Mean loss of each window of steps, and the smallest learning-rate factor at its end."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.losses: list[float] = []
        self.records: list[dict[str, float | None]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Note the loss; close the window if it is full."""
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step % self.window == 0:
            mean = statistics.mean(self.losses[-self.window :])
            record: dict[str, float | None] = {"step": trainer.global_step}
            record["loss"] = round(mean, 4) if math.isfinite(mean) else None
            if isinstance(trainer.precision_plugin, Int8Precision):
                record["smallest factor"] = round(min(s.factor for s in trainer.precision_plugin.layers), 4)
            self.records.append(record)


def measure(settings: experiment.Settings, images: ImageSet, name: str, window: int) -> dict[str, Any]:
    """Train one variant once and return the entry of the results file."""
    recipe, curve = variants()[name], Curve(window)
    precision: dict[str, Any] = {"precision": "32-true"}
    if recipe is not None:
        precision = {"plugins": [Int8Precision(recipe, seed=settings.seed)]}
    result = experiment.run(settings, images, precision, progress=False, callbacks=[curve])
    return {
        "seed": settings.seed,
        "variant": name,
        "test_accuracy": result.test_accuracy,
        "train_seconds": round(result.train_seconds, 1),
        "curve": curve.records,
    } | origin()


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds of the test accuracy and of the last window's loss."""
    summary = {}
    for name in dict.fromkeys(run["variant"] for run in runs):
        own = [run for run in runs if run["variant"] == name]
        losses = [run["curve"][-1]["loss"] for run in own if run["curve"]]
        summary[name] = {
            "seeds": len(own),
            "test_accuracy": round(statistics.mean(run["test_accuracy"] for run in own), 3),
            "test_accuracies": [run["test_accuracy"] for run in own],
            "last_losses": losses,
        }
    return summary


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw the loss of every run, one colour a variant (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for index, name in enumerate(record["summary"]):
        for run in (run for run in record["runs"] if run["variant"] == name):
            steps = [point["step"] for point in run["curve"]]
            losses = [math.nan if point["loss"] is None else point["loss"] for point in run["curve"]]
            label = name if run["seed"] == min(r["seed"] for r in record["runs"]) else None
            axes.plot(steps, losses, color="black" if name == "float" else f"C{index}", linewidth=1, label=label)
    axes.set(xlabel="optimizer step", ylabel="training loss, mean of a window", title=record["settings"]["model"])
    axes.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=READERS, default="cifar10")
    parser.add_argument("--root", help="where the files of the data set are")
    parser.add_argument("--model", choices=MODELS, default="mobilenetv2")
    parser.add_argument("--max-steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--window", type=int, default=20, help="steps averaged to one point of a curve")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=variants(), default=list(variants()))
    parser.add_argument("--plot", action="store_true", help="draw the file beside it, as PNG, and train nothing")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/curves_DATA_MODEL.json")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    path = options.output or RESULTS / f"curves_{options.data}_{options.model}.json"
    chosen = {"model": options.model, "max_steps": options.max_steps, "batch_size": options.batch_size}
    settings = dataclasses.replace(experiment.DEFAULTS[options.data], **chosen, lr=options.lr, epochs=1000)
    common = {name: value for name, value in dataclasses.asdict(settings).items() if name != "seed"}
    record = open_record(path, {"data": options.data, "settings": common, "machine": machine()})
    if options.plot:
        plot(record, path.with_suffix(".png"))
        return 0
    experiment.quieten_lightning()
    images = READERS[options.data](options.root)
    done = {(run["seed"], run["variant"]) for run in record["runs"]}
    for seed in options.seeds:
        for name in options.variants:
            if (seed, name) not in done:
                entry = measure(dataclasses.replace(settings, seed=seed), images, name, options.window)
                record = add_run(path, entry, summarise)
                print(f"seed {seed}  {name:<24} {entry['test_accuracy']:.2f} %  {entry['train_seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
