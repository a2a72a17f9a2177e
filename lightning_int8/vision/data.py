"""A LightningDataModule over images in memory: the same seed gives the same batches, whatever the precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_int8.vision.readers import READERS, ImageSet

SHIFT = 4
TEST_BATCH_SIZE = 500


class ImageData(LightningDataModule):
    """Batches of normalised images and their labels.

    Args:
        data: A name in ``readers.READERS``.
        root: Where the files are; see the reader of that data set.
        batch_size: Training images a step and device.
        seed: Of the shuffling and of the augmentation. Neither draws from torch's global generator, so a network that
            uses more random numbers still sees the same batches.
        image_set: Images already read, in place of ``data`` and ``root``.

    Raises:
        ValueError: ``data`` is not a known name.
        DataError: The files are missing or damaged.
    """

    def __init__(
        self,
        data: str = "mnist-5k",
        root: str | None = None,
        batch_size: int = 64,
        seed: int = 0,
        image_set: ImageSet | None = None,
    ) -> None:
        super().__init__()
        if image_set is None:
            if data not in READERS:
                raise ValueError(f"data: {data!r} is not one of {', '.join(READERS)}")
            image_set = READERS[data](root)
        self.images = image_set
        self.batch_size = batch_size
        self.seed = seed
        self.mean, self.std = channel_statistics(image_set.train_images)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches; flipped and shifted where the data set allows it. The last, smaller batch is kept."""
        rank = self.trainer.global_rank if self.trainer else 0
        noise = torch.Generator().manual_seed(self.seed + rank) if self.images.mirrored else None
        return DataLoader(
            ImageBatches(self.images.train_images, self.images.train_labels, self.mean, self.std, noise),
            batch_size=self.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed),
            collate_fn=_as_it_is,
        )

    def test_dataloader(self) -> DataLoader:
        """Batches of the test images in the files' order."""
        return DataLoader(
            ImageBatches(self.images.test_images, self.images.test_labels, self.mean, self.std),
            batch_size=TEST_BATCH_SIZE,
            collate_fn=_as_it_is,
        )


class ImageBatches(Dataset):
    """Images that are fetched, augmented and normalised a batch at a time.

    Args:
        images: uint8 ``(N, C, H, W)``.
        labels: int64 ``(N,)``.
        mean: float32 ``(C,)``, subtracted; unit: grey levels, 0 to 255.
        std: float32 ``(C,)``, divided by.
        noise: Generator of the augmentation; None does not augment.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, noise: Generator | None = None
    ) -> None:
        self.images, self.labels, self.noise = images, labels, noise
        self.mean, self.std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return float32 images ``(B, C, H, W)`` of mean 0 and deviation 1, and int64 labels ``(B,)``."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        if self.noise is not None:
            images = flip_and_shift(images, self.noise)
        return images.float().sub_(self.mean).div_(self.std), self.labels[chosen]


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, float32 ``(C,)``, of each channel of uint8 images ``(N, C, H, W)``."""
    levels = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(channel.reshape(-1), minlength=256) for channel in images.unbind(1)]).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ levels
    variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    return mean.float(), variance.sqrt().clamp(min=1.0).float()


def flip_and_shift(images: Tensor, noise: Generator) -> Tensor:
    """Mirror each image with probability one half and move it by up to ``SHIFT`` pixels, filling with zeros.

    Args:
        images: uint8 ``(B, C, H, W)``.
        noise: Where the random numbers come from.
    """
    batch, _, height, width = images.shape
    flip = torch.rand(batch, generator=noise) < 0.5
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, batch, 1), generator=noise)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (SHIFT, SHIFT, SHIFT, SHIFT))
    # Adjacent index tensors would keep the channel in place; split by the slice it comes last.
    return padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _as_it_is(batch: Any) -> Any:
    return batch
