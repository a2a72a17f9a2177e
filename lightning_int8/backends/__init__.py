"""Backends: one device path per file, chosen by looking at the tensor."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from functools import cache

import torch
from torch import Tensor

from lightning_int8.backends.base import Backend, Counts
from lightning_int8.kernels.gain import OLDEST, why_no_gain

__all__ = ["CHOICES", "Backend", "Counts", "backend_for", "check_choice"]

CHOICES = ("auto", "reference", "onednn", "cupy")


def check_choice(choice: str) -> None:
    """Raise ValueError unless ``choice`` names a backend of this version, or "auto"."""
    if choice not in CHOICES:
        raise ValueError(f"backend: {choice!r} is not one of {', '.join(CHOICES)}")
    if choice != "auto" and choice not in (m.name for m in pkgutil.iter_modules(__path__)):
        raise ValueError(f"backend: {choice!r} is not part of this version; use 'auto'")


@cache
def load(name: str) -> Backend:
    """The one instance of backend ``name``; imports what it needs the first time."""
    return importlib.import_module(f"{__name__}.{name}").make()


def backend_for(tensor: Tensor, choice: str) -> Backend:
    """The backend that computes on the device of ``tensor``.

    Args:
        tensor: Decides by its device, at call time: a model is converted before it is moved.
        choice: One of ``CHOICES``.

    Raises:
        RuntimeError: No backend of this version computes there.
    """
    if choice == "cupy" and tensor.device.type == "cuda":
        return _gpu(tensor.device.index)
    if choice != "auto":
        return load(choice)
    if tensor.device.type == "cpu":
        return _cpu()
    raise RuntimeError(
        f"no INT8 backend of this version is proven on device {str(tensor.device)!r}; "
        "train on the CPU, pass backend='reference' for slow, exact arithmetic on any device, or, on an NVIDIA GPU, "
        "backend='cupy' to try kernels that have run on an emulated machine only"
    )


@cache
def _gpu(index: int) -> Backend:
    capability = torch.cuda.get_device_capability(index)
    reason = why_no_gain(capability)
    if capability < OLDEST:
        warnings.warn(
            f"cuda:{index}: {reason}: computing with the 'reference' backend instead, which is exact and slow; its "
            "contractions are not counted as INT8",
            stacklevel=2,
        )
        return load("reference")
    if reason:
        warnings.warn(
            f"cuda:{index}: INT8 gains no time here: {reason}; the contractions run in INT8 all the same, since "
            "backend='cupy' asks for it",
            stacklevel=2,
        )
    return load("cupy")


@cache
def _cpu() -> Backend:
    backend = load("onednn")
    if not backend.exact:
        warnings.warn(
            "the INT8 matrix product of this CPU is not exact (self-check failed): computing with the 'reference' "
            "backend instead, which is exact and slow; its contractions are not counted as INT8",
            stacklevel=2,
        )
        return load("reference")
    return backend
