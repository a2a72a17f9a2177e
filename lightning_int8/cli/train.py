"""``lightning-int8 train``: a small network on real images, or the user's own module and data through LightningCLI."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from torch import distributed

from lightning_int8 import Recipe, recipes
from lightning_int8.backends import CHOICES as BACKENDS
from lightning_int8.report import table
from lightning_int8.settings import LAYERS
from lightning_int8.spec import CONTRACTIONS
from lightning_int8.version import __version__
from lightning_int8.vision.experiment import (
    DEFAULTS,
    PRECISIONS,
    Result,
    Settings,
    quieten_lightning,
    run,
    trainer_precision,
)
from lightning_int8.vision.models import MODELS
from lightning_int8.vision.readers import READERS, DataError
from lightning_int8.vision.required import mismatches

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")

DESCRIPTION = """\
Train a small network on real images and report accuracy, time and INT8 contractions. MNIST-5k needs no download.

With --config FILE.yaml everything after `train` goes to LightningCLI instead, to train your own LightningModule on
your own data: train [fit|validate|test|predict] --config FILE.yaml [OPTIONS OF LIGHTNINGCLI]. INT8 is switched on in
the file, under trainer.plugins, by class_path: lightning_int8.Int8Precision. Classes are looked up in the installed
packages, the current folder and the file's folder.
"""


class UserError(Exception):
    """What the command line asks for cannot be done; the message is all that the user sees."""


class ConfiguredTraining(LightningCLI):
    """LightningCLI that reports a configuration which cannot be built as an error of the user."""

    def instantiate_classes(self) -> None:
        """Build trainer, model and data."""
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            raise UserError(f"the configuration cannot be built: {error}") from error


def main(arguments: Sequence[str]) -> int:
    """Run the command on the words after ``train``; ``cli.main`` explains the exit code."""
    files = _config_files(arguments)
    try:
        return _hand_over(arguments, files) if files else _train(_parser().parse_args(arguments))
    except (UserError, DataError) as error:
        print(f"lightning-int8 train: error: {error}", file=sys.stderr)
        return 2
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()  # its threads must not outlive the interpreter


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-int8 train", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", metavar="FILE.yaml", help="hand over to LightningCLI; see above")
    add("--data", choices=READERS, default="mnist-5k", help="default: %(default)s")
    add("--root", help="where the files are: their folder, torchvision's root, or a zip for cifar10")
    add("--model", choices=MODELS, help="default: resnet8, for cifar10 resnet20")
    add("--precision", choices=PRECISIONS, default="int8", help="default: %(default)s")
    add("--recipe", default="default", help=f"{', '.join(recipes.names())}, or a YAML file; default: %(default)s")
    add("--backend", choices=BACKENDS, default="auto", help="of the INT8 contractions; default: %(default)s")
    add("--layers", choices=LAYERS, default="int8", help="auto: in float where INT8 is slower; default: %(default)s")
    add("--epochs", type=int, help="default: depends on the data set")
    add("--max-steps", type=int, help="stop after so many steps, whatever the epochs")
    add("--batch-size", type=int, help="images a step and device; default: depends on the data set")
    add("--lr", type=float, help="highest learning rate of the one-cycle schedule; default: 0.2")
    add("--seed", type=int, help="of the weights, the batches and the stochastic rounding; default: 0")
    add("--accelerator", choices=("auto", "cpu", "gpu"), help="default: auto")
    add("--devices", type=int, help="processes for distributed data parallel; default: 1")
    add("--threads", type=int, help="CPU threads a process; default: torch's choice")
    add("--compare", action="store_true", help="train in float first, from the same weights on the same batches")
    add("--checkpoint", type=Path, metavar="PATH", help="save the trained state (with --compare, not that of float)")
    add("--output", type=Path, metavar="FILE.json", help="write settings and results")
    return parser


def _train(options: argparse.Namespace) -> int:
    if options.compare and options.precision == "float":
        raise UserError("--compare sets --precision bf16 or int8 against float; it got --precision float")
    for path in (options.checkpoint, options.output):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UserError(f"{path} cannot be written: it is a folder, or its folder does not exist")
    given: dict[str, Any] = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    names = ("float", options.precision) if options.compare else (options.precision,)
    try:
        settings = dataclasses.replace(DEFAULTS[options.data], **given)
        recipe = recipes.get(options.recipe)
        precisions = {
            name: trainer_precision(name, options.recipe, options.backend, settings.seed, options.layers)
            for name in names
        }
    except ValueError as error:
        raise UserError(error) from error
    _set_threads(options.threads)
    quieten_lightning()
    images = READERS[options.data](options.root)

    results = {}
    for name, precision in precisions.items():
        checkpoint = options.checkpoint if name == options.precision else None
        try:
            results[name] = run(settings, images, precision, checkpoint)
        except MisconfigurationException as error:
            raise UserError(error) from error
    if not results[options.precision].is_global_zero:
        return 0
    print("\n" + summary(results))
    wrong = []
    if "int8" in results and options.backend == "reference":
        print("the reference backend makes no INT8 contractions: nothing to count")
    elif "int8" in results:
        wrong = check_counts(results["int8"], recipe)
    if options.output is not None:
        record = {
            "data": options.data,
            "settings": dataclasses.asdict(settings),
            "recipe": options.recipe,
            "backend": options.backend,
            "layers": options.layers,
            "threads": torch.get_num_threads(),
            "versions": {"lightning_int8": __version__, "torch": torch.__version__, "lightning": lightning.__version__},
            "results": {name: dataclasses.asdict(result) for name, result in results.items()},
            "count_mismatches": wrong,
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if wrong else 0


def summary(results: Mapping[str, Result]) -> str:
    """Return a table with one line for each run and, where float is one of them, the differences to it."""
    header = ("precision", "test accuracy", "time", "per step", "speed", *CONTRACTIONS)
    reference = results.get("float")
    body = [
        (
            name,
            f"{result.test_accuracy:.2f} %",
            f"{result.train_seconds:.1f} s",
            f"{result.step_milliseconds:.1f} ms",
            f"{reference.step_milliseconds / result.step_milliseconds:.2f}x" if reference else "-",
            *(f"{sum(count[c] for count in result.counted.values()):,}" for c in CONTRACTIONS),
        )
        for name, result in results.items()
    ]
    lines = [
        table(header, body),
        "time: whole training; per step: after the start-up; speed: per step, against float;",
        "output, grad_input, grad_weight: INT8 contractions executed in training and test",
    ]
    if reference is not None:
        lines += [
            f"{name} against float: {result.test_accuracy - reference.test_accuracy:+.2f} points"
            for name, result in results.items()
            if name != "float"
        ]
    return "\n".join(lines)


def check_counts(result: Result, recipe: Recipe) -> list[str]:
    """Print whether the INT8 counters are what autograd required; return a line for each one that is not."""
    wrong = mismatches(result.counted, result.required, recipe)
    left = sorted(set(result.required) - set(result.counted))
    if left:
        print(f"layers left in float: {', '.join(left)}")
    for name, reason in result.kept_float.items():
        print(f"layer {name}: float after the first step: {reason}")
    print(f"counts equal to the contractions autograd required: {'no' if wrong else 'yes'}")
    for line in wrong:
        print(f"  {line}")
    return wrong


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise UserError(f"--threads: {threads} must be at least 1")
    # Lightning sets the number of each process of several by itself unless the variable is there.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def _config_files(arguments: Sequence[str]) -> list[Path]:
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("-c", "--config", action="append", type=Path, default=[])
    return known.parse_known_args(arguments)[0].config


def _hand_over(arguments: Sequence[str], files: Sequence[Path]) -> int:
    for file in files:
        if not file.is_file():
            raise UserError(f"--config: {file} does not exist")
    # As `python script.py` finds what lies beside the script; a console program would look beside itself.
    sys.path[:0] = [*(str(file.absolute().parent) for file in files), str(Path.cwd())]
    # It warns whoever gives it words while the program has some, and here they are the same words.
    warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
    given = arguments[0] in LIGHTNING_COMMANDS
    words: list[Any] = list(arguments) if given else ["fit", *arguments]
    ConfiguredTraining(args=words, parser_kwargs={"prog": "lightning-int8 train"})
    return 0
