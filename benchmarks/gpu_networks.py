"""Networks whose training steps are timed on a GPU: two wide ones, and any classifier of torchvision or timm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_int8.vision.models import MODELS

OWN = ("mlp4096", "vit_l", *MODELS)
DEFAULT = ("resnet50", "vgg16", "mlp4096", "vit_l")
DRY = ("resnet8", "mlp4096", "vit_l")
"""One convolutional network and the two others, small enough for the emulated machine."""

CLASSES = 1000


@dataclass(frozen=True)
class Workload:
    """A network and what it is trained on.

    Attributes:
        model: In float32, on the CPU.
        shape: Of a batch.
        classes: Of the labels.
    """

    model: nn.Module
    shape: tuple[int, ...]
    classes: int


class Block(nn.Module):
    """A pre-norm transformer layer whose four projections are Linear modules: all of them are converted."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x ``(N, tokens, width)``."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Transformer layers over embedded patches, and a classifier of their mean."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, patches: Tensor) -> Tensor:
        """Logits ``(N, CLASSES)``."""
        return self.head(self.blocks(patches).mean(1))


def workload(name: str, batch: int | None, dry_run: bool) -> Workload:
    """Build a network.

    Args:
        name: One of ``OWN``, else a name of torchvision, else of timm.
        batch: Images, or rows of the perceptron; None takes 256 images, 16,384 rows or 64 sequences.
        dry_run: Small enough for the emulated machine: a thin perceptron and encoder, small images.

    Raises:
        ValueError: Nobody knows the name.
    """
    if name == "mlp4096":
        width, depth, rows = (48, 2, 40) if dry_run else (4096, 6, 16384)
        layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
        return Workload(nn.Sequential(*layers, nn.Linear(width, CLASSES)), (batch or rows, width), CLASSES)
    if name == "vit_l":
        width, heads, depth, tokens = (32, 2, 1, 5) if dry_run else (1024, 16, 24, 197)
        return Workload(Encoder(width, heads, depth), (batch or (2 if dry_run else 64), tokens, width), CLASSES)
    if name in MODELS:
        size = 12 if dry_run else 32
        return Workload(MODELS[name](1, 10), (batch or (2 if dry_run else 256), 1, size, size), 10)
    model, size = _library(name)
    return Workload(model, (batch or (2 if dry_run else 256), 3, *((32, 32) if dry_run else size)), _classes(model))


def _library(name: str) -> tuple[nn.Module, tuple[int, int]]:
    missing = []
    try:
        import torchvision

        if name in torchvision.models.list_models():
            return torchvision.models.get_model(name), (224, 224)
    except ImportError:
        missing.append("torchvision")
    try:
        import timm

        if timm.is_model(name):
            model = timm.create_model(name)
            height, width = model.default_cfg["input_size"][1:]
            return model, (height, width)
    except ImportError:
        missing.append("timm")
    absent = f" ({' and '.join(missing)} cannot be imported)" if missing else ""
    raise ValueError(f"model: {name!r} is not one of {', '.join(OWN)}, nor a name of torchvision or timm{absent}")


def _classes(model: nn.Module) -> int:
    heads = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    return getattr(model, "num_classes", heads[-1] if heads else CLASSES)


def parameters_in_millions(model: nn.Module) -> float:
    """How large the network is."""
    return round(sum(math.prod(p.shape) for p in model.parameters()) / 1e6, 1)


def batch_of(work: Workload, place: torch.device) -> tuple[Tensor, Tensor]:
    """Random inputs, channels last where they are images, and random labels."""
    x = torch.randn(work.shape, device=place)
    if len(work.shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    return x, torch.randint(0, work.classes, work.shape[:1], device=place)
