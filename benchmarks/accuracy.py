"""Test accuracy of INT8 recipes against float: the same seeds, the same first weights, the same batches.

Trains float and each recipe once per seed through the code of ``lightning-int8 train``, seed by seed, and writes the
JSON file after every run. Started again with the same settings on the same machine it goes on where it was cut off;
several processes, with other seeds or recipes each, may write one file.

    python benchmarks/accuracy.py --data fashion-mnist --epochs 3 --seeds 0 1 2 3 4 --recipes float default
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
from records import RESULTS, add_run, machine, open_record, origin

from lightning_int8 import recipes
from lightning_int8.spec import CONTRACTIONS
from lightning_int8.vision.experiment import DEFAULTS, Settings, quieten_lightning, run, trainer_precision
from lightning_int8.vision.models import MODELS
from lightning_int8.vision.readers import READERS, DataError, ImageSet
from lightning_int8.vision.required import mismatches

PLAIN_PRECISIONS = ("float", "bf16")
# Two-sided 95 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom; beyond, the last one is a safe bound.
T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
T_95 += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, or 2 for an error of the user."""
    options = _parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    given: dict[str, Any] = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        settings = dataclasses.replace(DEFAULTS[options.data], **given)
        for name in options.recipes:
            _precision(name, seed=0)
        path = options.output or RESULTS / f"accuracy_{options.data}_{settings.model}.json"
        common = {name: value for name, value in dataclasses.asdict(settings).items() if name != "seed"}
        record = open_record(path, {"data": options.data, "settings": common, "machine": machine()})
        images = READERS[options.data](options.root)
    except (ValueError, DataError) as error:
        print(f"accuracy.py: error: {error}", file=sys.stderr)
        return 2
    quieten_lightning()
    done = {(entry["seed"], entry["recipe"]) for entry in record["runs"]}
    for seed in options.seeds:
        for name in options.recipes:
            if (seed, name) in done:
                continue
            entry = measure(dataclasses.replace(settings, seed=seed), images, name)
            print(f"seed {seed}  {name:<24} {entry['test_accuracy']:.2f} %  {entry['train_seconds']:.1f} s", flush=True)
            record = add_run(path, entry, summarise)
    print(f"\n{describe(record)}\nwritten to {path}")
    return 0


def measure(settings: Settings, images: ImageSet, name: str) -> dict[str, Any]:
    """Train once and return the entry of the results file.

    Args:
        settings: Of the run, seed included.
        images: To train and test on.
        name: "float", "bf16", or name or YAML file of an INT8 recipe.
    """
    result = run(settings, images, _precision(name, settings.seed), progress=False)
    entry: dict[str, Any] = {
        "seed": settings.seed,
        "recipe": name,
        "test_accuracy": result.test_accuracy,
        "train_seconds": round(result.train_seconds, 2),
        "step_milliseconds": round(result.step_milliseconds, 3),
        "steps": result.steps,
    }
    if name not in PLAIN_PRECISIONS:
        entry["contractions"] = {c: sum(count[c] for count in result.counted.values()) for c in CONTRACTIONS}
        entry["left_in_float"] = sorted(set(result.required) - set(result.counted))
        entry["count_mismatches"] = mismatches(result.counted, result.required, recipes.get(name))
    return entry | origin()


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each recipe its mean accuracy and its mean paired difference to float with the 95 % t-interval.

    Differences are in percentage points, over the seeds that both have; the half width needs two of them.
    """
    accuracy: dict[str, dict[int, float]] = {}
    for entry in runs:
        accuracy.setdefault(entry["recipe"], {})[entry["seed"]] = entry["test_accuracy"]
    summary = {}
    for name, of_seed in accuracy.items():
        line: dict[str, Any] = {"seeds": len(of_seed), "mean": round(statistics.mean(of_seed.values()), 4)}
        pairs = sorted(of_seed.keys() & accuracy.get("float", {}).keys())
        if name != "float" and pairs:
            differences = [of_seed[seed] - accuracy["float"][seed] for seed in pairs]
            line["pairs"] = len(pairs)
            line["difference"] = round(statistics.mean(differences), 4)
            if len(pairs) > 1:
                line["half_width_95"] = round(half_width(differences), 4)
        summary[name] = line
    return summary


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95 % t-interval of the mean of at least two values."""
    quantile = T_95[min(len(values) - 1, len(T_95)) - 1]
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def describe(record: dict[str, Any]) -> str:
    """Return every seed's accuracy and the summary as text."""
    seeds = sorted({entry["seed"] for entry in record["runs"]})
    lines = ["test accuracy, %".ljust(25) + "".join(f"seed {seed}".rjust(9) for seed in seeds) + "     mean"]
    for name, line in record["summary"].items():
        of_seed = {entry["seed"]: entry["test_accuracy"] for entry in record["runs"] if entry["recipe"] == name}
        cells = "".join(f"{of_seed[seed]:.2f}".rjust(9) if seed in of_seed else "-".rjust(9) for seed in seeds)
        text = f"{name:<25}{cells}{line['mean']:9.2f}"
        if "difference" in line:
            spread = f" ± {line['half_width_95']:.2f} (95 %, {line['pairs']} seeds)" if "half_width_95" in line else ""
            text += f"  against float {line['difference']:+.2f}{spread} points"
        lines.append(text)
    return "\n".join(lines)


def _precision(name: str, seed: int) -> dict[str, Any]:
    return (
        trainer_precision(name, seed=seed) if name in PLAIN_PRECISIONS else trainer_precision("int8", name, seed=seed)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=READERS, default="fashion-mnist")
    parser.add_argument("--root", help="where the files of the data set are")
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--recipes", nargs="+", default=["float", "default"], help="float, bf16, and INT8 recipes by name or YAML file"
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/accuracy_DATA_MODEL.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
