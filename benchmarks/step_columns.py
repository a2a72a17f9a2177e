"""What ``train_step.py`` compares: networks by name, and one training step of a network in each precision."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_int8 import convert
from lightning_int8.clock import Clock
from lightning_int8.vision.models import MODELS

CLASSES = 1000
LEARNING_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Column:
    """One way to compute a step.

    Attributes:
        name: In results.
        autocast: Whether bfloat16 autocast is on; with a recipe, what lies between INT8 contractions is bfloat16.
        recipe: INT8 by this recipe; empty for another precision.
        layers: See ``lightning_int8.convert``.
        fuse: Likewise.
        compiled: Whether the network is compiled.
        torchao: Whether Linear layers are torchao's INT8 ones.
    """

    name: str
    autocast: bool = False
    recipe: str = ""
    layers: str = "int8"
    fuse: bool = True
    compiled: bool = False
    torchao: bool = False

    def prepare(self, model: nn.Module, refresh: int) -> nn.Module:
        """Convert ``model`` in place, and return what is to be called.

        Raises:
            ImportError: torchao is not installed.
            TypeError: The network has no layer for this column.
        """
        if self.torchao:
            _quantize_by_torchao(model)
        if self.recipe:
            convert(model, self.recipe, layers=self.layers, fuse=self.fuse, refresh=refresh)
        return torch.compile(model) if self.compiled else model  # type: ignore[return-value]


def all_columns(recipes: Sequence[str], compiled: bool) -> list[Column]:
    """Every column; the first recipe also with bfloat16 between layers, without fusion and with ``layers="auto"``."""
    floats = [Column(name="float32"), Column(name="bfloat16", autocast=True)]
    if compiled:
        floats += [Column(name=f"{c.name} compiled", autocast=c.autocast, compiled=True) for c in floats]
    int8 = [Column(name=f"int8 {recipe}", recipe=recipe) for recipe in recipes]
    if recipes:
        first = recipes[0]
        int8.append(Column(name=f"int8 {first} bfloat16", recipe=first, autocast=True))
        int8.append(Column(name=f"int8 {first} unfused", recipe=first, fuse=False))
        int8.append(Column(name=f"int8 {first} auto", recipe=first, layers="auto"))
    return [*floats, *int8, Column(name="torchao int8", autocast=True, torchao=True)]


class Training:
    """A copy of a network that takes training steps on one batch.

    Attributes:
        column: How it computes.
        model: The copy.
        steps: Steps taken.
    """

    def __init__(self, column: Column, model: nn.Module, batch: tuple[Tensor, Tensor], refresh: int) -> None:
        self.column = column
        self.model = copy.deepcopy(model)
        self.steps = 0
        self._clock = Clock(refresh)
        self._forward = column.prepare(self.model, refresh)
        self._batch = batch
        self._optimizer = torch.optim.SGD(self.model.parameters(), LEARNING_RATE, momentum=0.9, fused=True)

    @property
    def refreshes(self) -> bool:
        """Whether the next step is one that refreshes clip values in an INT8 column; the first one is."""
        return self._clock.last_due(None, self.steps) == self.steps

    def step(self) -> Tensor:
        """Take a step; the loss comes back."""
        images, labels = self._batch
        self._optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.column.autocast):
            loss = nn.functional.cross_entropy(self._forward(images), labels)
        loss.backward()
        self._optimizer.step()
        self.steps += 1
        return loss.detach()

    def forget_gradients(self) -> None:
        """Free them, as ``zero_grad`` does."""
        self._optimizer.zero_grad()

    def lasting_bytes(self) -> int:
        """Bytes of parameters, buffers and momentum, which every column keeps from step to step."""
        momentum = [t for state in self._optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *momentum]
        return sum(t.numel() * t.element_size() for t in tensors)


def network(name: str) -> nn.Module:
    """A network with random weights, channels last, in training mode; InceptionV3 without its auxiliary classifier.

    Args:
        name: Of torchvision; or of timm, also as "timm/NAME"; or "small/NAME" for one of this package's own.

    Raises:
        ValueError: There is no such network, or its package is not installed.
    """
    library, _, short = name.rpartition("/")
    torch.manual_seed(0)
    if library == "small" and short in MODELS:
        model: Any = MODELS[short](3, CLASSES)
    else:
        model = _from_torchvision(short) if library == "" else None
        model = _from_timm(short) if model is None and library in ("", "timm") else model
    if model is None:
        raise ValueError(f"model: {name!r}: neither torchvision nor timm, as far as they are installed, has it")
    return model.to(memory_format=torch.channels_last).train()


def batch_of(size: int, samples: int) -> tuple[Tensor, Tensor]:
    """Random images ``(samples, 3, size, size)``, channels last, and labels."""
    torch.manual_seed(0)
    images = torch.randn(samples, 3, size, size).to(memory_format=torch.channels_last)
    return images, torch.randint(0, CLASSES, (samples,))


def _from_torchvision(name: str) -> nn.Module | None:
    try:
        from torchvision import models
    except ImportError:
        return None
    if name not in models.list_models(module=models):
        return None
    # Their classifiers in the middle need larger images than 224 x 224; their own initialization takes minutes.
    plain = {"aux_logits": False, "init_weights": False} if name in ("inception_v3", "googlenet") else {}
    return models.get_model(name, weights=None, **plain)


def _from_timm(name: str) -> nn.Module | None:
    try:
        import timm
    except ImportError:
        return None
    return timm.create_model(name) if timm.is_model(name) else None


def _quantize_by_torchao(model: nn.Module) -> None:
    from torchao import quantize_
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig

    if not any(type(m) is nn.Linear for m in model.modules()):
        raise TypeError("torchao's INT8 training is for Linear layers, and the network has none")
    quantize_(model, Int8MixedPrecisionTrainingConfig(module_swap=True))
