"""The LightningModule of the image command: cross entropy, accuracy, SGD with Nesterov momentum, one cycle."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torchmetrics.classification import MulticlassAccuracy

from lightning_int8.optim import FixedPointSGD
from lightning_int8.vision.models import MODELS

FIXED_POINT_LR = 0.9
"""Learning rate of FixedPointSGD, whose gradients have no magnitude: that of plain SGD does not carry over."""

FIXED_POINT_WEIGHT_DECAY = 1e-4

FINAL_FACTOR = 0.04
"""Last learning rate over the first, of FixedPointSGD."""


class ImageClassifier(LightningModule):
    """A network of ``models.MODELS``, trained on ``(images, labels)`` batches in channels-last layout.

    Args:
        model: A name in ``models.MODELS``.
        in_channels: Of the images.
        classes: Of the labels.
        lr: Highest learning rate of the cycle.
        weight_decay: Of every parameter.
        optimizer: "SGD", or "FixedPointSGD" with stem and head in plain SGD.

    Raises:
        ValueError: ``model`` or ``optimizer`` is not a known name.
    """

    def __init__(
        self,
        model: str = "resnet8",
        in_channels: int = 1,
        classes: int = 10,
        lr: float = 0.1,
        weight_decay: float = 5e-4,
        optimizer: str = "SGD",
    ) -> None:
        super().__init__()
        if model not in MODELS:
            raise ValueError(f"model: {model!r} is not one of {', '.join(MODELS)}")
        if optimizer not in ("SGD", "FixedPointSGD"):
            raise ValueError(f"optimizer: {optimizer!r} is not one of SGD, FixedPointSGD")
        self.save_hyperparameters()
        self.network = MODELS[model](in_channels, classes)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, classes)`` of images ``(B, in_channels, H, W)``."""
        return self.network(images.to(memory_format=torch.channels_last))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the mean cross entropy of the batch; log it and the accuracy."""
        images, labels = batch
        logits = self(images)
        loss = cross_entropy(logits, labels)
        self.train_accuracy(logits, labels)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_accuracy", self.train_accuracy, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Log the accuracy on the batch."""
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test_accuracy", self.test_accuracy, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and its schedule over the whole fit, one step of it a batch."""
        total_steps = int(self.trainer.estimated_stepping_batches)
        schedule: LRScheduler
        if self.hparams["optimizer"] == "FixedPointSGD":
            schedule = LambdaLR(self._fixed_point_sgd(), lambda step: _half_cosine(step / total_steps))
        else:
            optimizer = SGD(
                self.parameters(),
                lr=self.hparams["lr"],
                momentum=0.9,
                nesterov=True,
                weight_decay=self.hparams["weight_decay"],
            )
            schedule = OneCycleLR(optimizer, self.hparams["lr"], total_steps=total_steps)
        return {"optimizer": schedule.optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _fixed_point_sgd(self) -> FixedPointSGD:
        ends = [*self.network.stem.parameters(), *self.network.head.parameters()]
        middle = [p for p in self.parameters() if all(p is not end for end in ends)]
        decay = self.hparams["weight_decay"]
        groups = [
            {"params": middle, "weight_decay": FIXED_POINT_WEIGHT_DECAY},
            {"params": ends, "quantized": False, "momentum": 0.9, "weight_decay": decay, "lr": self.hparams["lr"] / 2},
        ]
        return FixedPointSGD(groups, lr=FIXED_POINT_LR)


def _half_cosine(progress: float) -> float:
    """From 1 to ``FINAL_FACTOR``; a fixed-point learning rate must not come to rest at 0."""
    return FINAL_FACTOR + (1.0 - FINAL_FACTOR) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
