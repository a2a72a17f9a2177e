"""One training run on images: settings in, test accuracy, time and contraction counts out."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_int8 import Int8Precision, Recipe, gemm_counts
from lightning_int8.vision.classifier import ImageClassifier
from lightning_int8.vision.data import ImageData
from lightning_int8.vision.models import MODELS
from lightning_int8.vision.readers import ImageSet
from lightning_int8.vision.required import Contractions, contractions_of_a_run, contractions_of_one_step

PRECISIONS = ("float", "bf16", "int8")
WARM_UP_STEPS = 10
PROBE_IMAGES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run depends on besides its images and its precision.

    Attributes:
        model: A name in ``models.MODELS``.
        epochs: Passes over the training images.
        batch_size: Images a step and device.
        lr: Highest learning rate of the cycle.
        seed: Of the weights, the shuffling and the augmentation.
        accelerator: "auto", "cpu" or "gpu".
        devices: Processes; more than one means distributed data parallel (gloo on the CPU).
        max_steps: Stop after so many steps; -1 trains all epochs.

    Raises:
        ValueError: A number is out of its range.
    """

    model: str = "resnet8"
    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.1
    seed: int = 0
    accelerator: str = "auto"
    devices: int = 1
    max_steps: int = -1

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"model: {self.model!r} is not one of {', '.join(MODELS)}")
        for name in ("epochs", "batch_size", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps: {self.max_steps} must be at least 1, or -1 for no limit")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: {self.lr} must be positive and finite")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one run gave.

    Attributes:
        test_accuracy: Percent.
        train_seconds: The whole fit, with everything that happens once at its start.
        step_milliseconds: Mean over the steps after the first ``WARM_UP_STEPS`` (all steps of a shorter run).
        steps: Training steps of this process.
        counted: INT8 contractions executed, per converted layer; empty for a float run.
        required: Contractions that autograd needed, per layer, whether converted or not.
        is_global_zero: Whether this process is the one to report.
        kept_float: Converted layers that went on in float after the first step, with the reason.
    """

    test_accuracy: float
    train_seconds: float
    step_milliseconds: float
    steps: int
    counted: Contractions
    required: Contractions
    is_global_zero: bool = True
    kept_float: Mapping[str, str] = dataclasses.field(default_factory=dict)


DEFAULTS = {
    "mnist-5k": Settings(model="resnet8", epochs=8, batch_size=64, lr=0.2),
    "fashion-mnist": Settings(model="resnet8", epochs=3, batch_size=128, lr=0.2),
    "cifar10": Settings(model="resnet20", epochs=4, batch_size=128, lr=0.2),
}
"""Settings of a data set where nothing else is asked for."""


class StepClock(Callback):
    """Counts the steps of a fit and of a test, and times the fit."""

    def __init__(self) -> None:
        self.training_steps = self.evaluation_steps = 0
        self.start = self.warm = self.end = 0.0
        self.warm_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.start = self.warm = _now(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; note the time when the warm-up is over."""
        self.training_steps += 1
        if self.training_steps == WARM_UP_STEPS:
            self.warm, self.warm_steps = _now(pl_module), WARM_UP_STEPS

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.end = _now(pl_module)
        if self.training_steps == self.warm_steps:
            self.warm, self.warm_steps = self.start, 0

    def on_test_batch_end(self, *_: Any) -> None:
        """Count."""
        self.evaluation_steps += 1

    @property
    def step_milliseconds(self) -> float:
        """Mean time of a step after the warm-up, data loading included."""
        return 1e3 * (self.end - self.warm) / max(1, self.training_steps - self.warm_steps)


def run(
    settings: Settings,
    images: ImageSet,
    precision: Mapping[str, Any],
    checkpoint: Path | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Train one network and test it. Equal settings give equal weights to start from and equal batches.

    The optimizer is the one that the recipe is meant for, SGD where it names none.

    Args:
        settings: Of the run.
        images: To train and test on.
        precision: What ``trainer_precision`` returned; a plugin in it belongs to this one run.
        checkpoint: Where to save the trained state, if anywhere.
        progress: Whether to show Lightning's progress bar.
        callbacks: More of them for the Trainer.

    Raises:
        ValueError: An unknown model.
        lightning.fabric.utilities.exceptions.MisconfigurationException: The accelerator or the devices are not there.
    """
    clock = StepClock()
    trainer = Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy="ddp" if settings.devices > 1 else "auto",
        max_epochs=settings.epochs,
        max_steps=settings.max_steps,
        callbacks=[clock, *callbacks],
        enable_progress_bar=progress,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **precision,
    )
    seed_everything(settings.seed, verbose=False)
    plugin = precision["plugins"][0] if "plugins" in precision else None
    recipe = Recipe(name="float") if plugin is None else plugin.recipe
    classifier = ImageClassifier(
        settings.model, images.train_images.shape[1], images.classes, settings.lr, optimizer=recipe.optimizer or "SGD"
    )
    one_step = contractions_of_one_step(classifier, images.train_images[:PROBE_IMAGES].float())
    data = ImageData(image_set=images, batch_size=settings.batch_size, seed=settings.seed)

    trainer.fit(classifier, datamodule=data)
    if checkpoint is not None:
        trainer.save_checkpoint(checkpoint)
    layers = [] if plugin is None else plugin.layers
    # What a recipe keeps in float follows from the order of the layers; what timing does, only the plugin knows.
    timed = [layer.name for layer in layers if layer.times and layer.times.float_wins]
    accuracy = 100 * trainer.test(classifier, datamodule=data, verbose=False)[0]["test_accuracy"]
    return Result(
        test_accuracy=round(accuracy, 4),
        train_seconds=clock.end - clock.start,
        step_milliseconds=clock.step_milliseconds,
        steps=clock.training_steps,
        counted=gemm_counts(classifier),
        required=contractions_of_a_run(
            one_step, clock.training_steps, clock.evaluation_steps, recipe.keep_float, timed
        ),
        is_global_zero=trainer.is_global_zero,
        kept_float={layer.name: layer.kept_float for layer in layers if layer.kept_float},
    )


def trainer_precision(
    precision: str,
    recipe: str = "default",
    backend: Literal["auto", "reference", "onednn", "cupy"] = "auto",
    seed: int = 0,
    layers: Literal["int8", "auto"] = "int8",
) -> dict[str, Any]:
    """Return the Trainer's arguments that switch a precision on.

    Args:
        precision: A name in ``PRECISIONS``.
        recipe: Name or YAML file of the INT8 recipe; the other precisions ignore what follows here.
        backend: Of the INT8 contractions.
        seed: Of the stochastic rounding.
        layers: "auto" keeps in float what INT8 makes slower.

    Raises:
        ValueError: An unknown precision, recipe, backend or choice of layers.
    """
    if precision == "float":
        return {"precision": "32-true"}
    if precision == "bf16":
        return {"precision": "bf16-mixed"}
    if precision != "int8":
        raise ValueError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
    return {"plugins": [Int8Precision(recipe=recipe, layers=layers, backend=backend, seed=seed)]}


def quieten_lightning() -> None:
    """Silence Lightning's remarks on devices and loggers, and its advice on loader processes: memory needs none."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
    # Where both packages are imported, they share the logger of the one that came last.
    for package in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(package).setLevel(logging.WARNING)


def _now(module: LightningModule) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()
